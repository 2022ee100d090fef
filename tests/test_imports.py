"""Who may import whom (ARCHITECTURE.md), read off the syntax trees: downwards only, and every large library through one door.

A new file needs a line here only if it is a new kind of thing (a new top-level file of niso/) or opens a new door.
"""

import ast
import graphlib
import pathlib
import sys
from collections.abc import Iterable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
Sources = dict[str, str]  # module -> text

# Module or package -> what it may import from this repository, besides itself. The longest name that fits counts.
BELOW = {"niso", "niso.errors", "niso.geometry", "niso.metrics", "niso.rng", "niso.tree", "niso.figures", "niso.data"} | {
    "niso.checksums", "niso.operator_figures", "niso.poses", "niso.run_files", "niso.trajectories", "niso.trajectory_figure",
    "niso.trajectory_files", "niso.cost", "niso.folders", "niso.hardware", "niso.mirror", "niso.scaling",
}  # fmt: skip
THREE = {
    "niso.checkpoint", "niso.checkpoint_files", "niso.config", "niso.evaluate", "niso.event_writer", "niso.journal",
    "niso.optimizer", "niso.sharding", "niso.step", "niso.telemetry", "niso.inference", "niso.sequences", "niso.replicas",
    "niso.soundness", "niso.warm_start", "niso.dry_run", "niso.speed", "niso.profiler",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "niso": set(),
    "niso.errors": set(),
    "niso.folders": {"niso.errors"},
    "niso.mirror": {"niso.errors", "niso.folders", "niso.run_files"},
    "niso.hardware": {"niso.errors"},
    "niso.cost": {"niso.errors"},
    "niso.scaling": {"niso.cost", "niso.errors", "niso.hardware"},
    "niso.canvas": {"niso.errors"},
    "niso.figures": {"niso.canvas", "niso.errors"},
    "niso.operator_figures": {"niso.canvas", "niso.errors", "niso.figures"},
    "niso.poses": {"niso.errors", "niso.geometry"},
    "niso.trajectories": {"niso.errors", "niso.folders", "niso.geometry", "niso.poses"},
    "niso.trajectory_figure": {"niso.canvas", "niso.errors", "niso.geometry", "niso.poses"},
    "niso.trajectory_files": {"niso.errors"},
    "niso.checksums": set(),
    "niso.published": {"niso.errors"},
    "niso.run_files": {"niso.errors", "niso.folders"},
    "niso.rows": {"niso.errors", "niso.folders", "niso.published", "niso.run_files"},
    "niso.report": {"niso.errors", "niso.folders", "niso.published", "niso.rows", "niso.run_files"},
    "niso.geometry": {"niso.errors", "niso.rng"},
    "niso.metrics": {"niso.errors"},
    "niso.rng": {"niso.errors"},
    "niso.tree": {"niso.errors"},
    "niso.data": {"niso.errors", "niso.folders"},
    "niso.data.split": {"niso.data", "niso.errors", "niso.geometry.camera"},  # camera: numpy alone
    "niso.data.frames": {"niso.data", "niso.errors", "niso.geometry.camera"},
    "niso.models": {"niso.errors", "niso.geometry"},
    "niso.tasks": {
        "niso.errors",
        "niso.geometry",
        "niso.metrics",
        "niso.rng",
        "niso.figures",
        "niso.operator_figures",
        "niso.models",
    }
    | {"niso.data.transforms"},
    **{module: BELOW | THREE | {"niso.tasks.base"} for module in THREE},
    "niso.inference": BELOW | THREE | {"niso.tasks.base", "niso.tasks.latent"},  # what tasks with isometries share, none of them
    "niso.predict": BELOW | {"niso.inference"},
    "niso.train": BELOW | THREE | {"niso.tasks.base"},
    "niso.cluster": {"niso.errors"},
    "niso.peers": {"niso.errors"},
    "niso.distributed": {"niso.cluster", "niso.errors", "niso.peers"},
    "niso.main": {"niso.config", "niso.distributed", "niso.dry_run", "niso.errors", "niso.peers", "niso.train"},
    "configs": {"niso.config", "niso.errors"},
    "launch": {"niso.errors", "niso.folders"},  # programs of their own: niso.main is started, not imported
    # What a record is, and the things that it is made with.
    "data_prep": {"niso.data.records", "niso.data.transforms", "niso.errors", "niso.folders", "niso.geometry.camera"},
    # Makes the very images that the task makes on the device, so by the same function.
    "data_prep.homnist": {"data_prep", "niso.data.records", "niso.errors", "niso.folders", "niso.geometry.homography"},
}

# Libraries of a whole layer.
LIBRARIES: dict[str, set[str]] = {
    "niso": set(),
    "niso.errors": set(),
    "niso.folders": {"aiohttp", "etils", "fsspec", "gcsfs", "google"},
    "niso.mirror": set(),
    "niso.hardware": set(),
    "niso.cost": {"jax", "numpy"},
    "niso.scaling": set(),
    "niso.canvas": {"numpy", "PIL"},
    "niso.figures": {"numpy", "PIL"},
    "niso.operator_figures": {"numpy"},
    "niso.poses": {"numpy"},
    "niso.trajectories": {"numpy"},
    "niso.trajectory_figure": {"numpy", "PIL"},
    "niso.trajectory_files": {"numpy"},
    "niso.checksums": {"jax", "numpy"},
    "niso.published": set(),
    "niso.run_files": set(),
    "niso.rows": {"numpy"},
    "niso.report": set(),
    "niso.cluster": set(),
    "niso.peers": set(),
    "niso.distributed": {"jax"},
    "niso.predict": {"numpy"},
    "niso.geometry": {"jax", "numpy"},
    "niso.metrics": {"jax"},
    "niso.rng": {"jax"},
    "niso.tree": {"jax", "flax"},
    "niso.data": {"numpy", "PIL", "grain", "array_record", "google"},
    "niso.data.frames": {"numpy", "PIL", "imageio_ffmpeg"},
    "niso.models": {"jax", "flax"},
    "niso.tasks": {"jax", "flax", "numpy"},
    "configs": {"ml_collections"},
    "launch": set(),
    "data_prep": {"numpy", "PIL"},
    "data_prep.samples": {"numpy", "sklearn"},
    "data_prep.homnist_mat": {"numpy", "scipy"},
    "data_prep.surface": {"numpy", "scipy"},
    "data_prep.conformal": {"numpy", "scipy"},
    "data_prep.sphere_raster": {"numpy", "scipy"},
    "data_prep.mesh_files": {"numpy", "trimesh"},
}
# Libraries with one door each.
DOORS: dict[str, set[str]] = {
    "absl": {"niso.config", "niso.main"},
    "array_record": {"niso.data.records"},
    "clu": {"niso.telemetry", "niso.event_writer"},  # the second stands in for the part of clu that needs TensorFlow
    "etils": {"niso.folders"},
    "gcsfs": {"niso.folders"},  # an optional extra, with aiohttp
    "google": {"niso.data.example", "niso.folders"},  # protobuf; what gcsfs raises
    "grain": {"niso.data.stream"},
    "imageio_ffmpeg": {"niso.data.frames"},  # an optional extra
    "ml_collections": {"niso.config", "configs"},
    "optax": {"niso.optimizer", "niso.step"},
    "orbax": {"niso.checkpoint", "niso.checkpoint_files"},
    # MATLAB's files; sparse matrices of meshes. It comes with jax.
    "scipy": {"data_prep.homnist_mat", "data_prep.surface", "data_prep.conformal", "data_prep.sphere_raster"},
    "sklearn": {"data_prep.samples"},  # an optional extra
    "tensorboard": {"niso.event_writer"},
    "trimesh": {"data_prep.mesh_files"},  # an optional extra
    # A task by its name; the twin's generator; niso.load only when it is asked for.
    "importlib.import_module": {"niso.tasks.base", "niso.data.synthetic", "niso"},
}
NEVER = {"tensorflow", "torch", "matplotlib", "tests", "jaxlib"}


def read() -> Sources:
    files = [path for folder in ("niso", "data_prep", "configs", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    return {".".join(p[:-1] if p[-1] == "__init__" else p): f.read_text() for p, f in zip(parts, files, strict=True)}


def imports(module: str, sources: Sources, runtime: bool = False) -> Iterator[str]:
    """Every module that is imported anywhere in `module`; with `runtime`, not those that only type checkers import."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (_meant(f"{'.' * node.level}{node.module or ''}", alias.name, sources) for alias in node.names)
        elif isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in ("importlib.import_module", "__import__"):
            yield "importlib.import_module"
        elif not (runtime and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(sources[module]))


def _meant(package: str, name: str, sources: Sources) -> str:
    """`from package import name` means the module package.name where there is one, else package."""
    if f"{package}.{name}" in sources or f"{package}.{name}" == "importlib.import_module":
        return f"{package}.{name}"
    return package


def rule(module: str, table: dict[str, set[str]]) -> set[str] | None:
    """The entry of the module, or of the nearest package around it that has one (a file directly in niso/ needs its own)."""
    while module not in table:
        module, dot, _ = module.rpartition(".")
        if not dot or module == "niso":
            return None
    return table[module]


def within(module: str, names: set[str]) -> bool:
    return any(module == name or (name != "niso" and module.startswith(f"{name}.")) for name in names)


def violations(sources: Sources, modules: Iterable[str]) -> list[str]:
    found = []
    for module in modules:
        allowed, libraries = rule(module, MAY_IMPORT), rule(module, LIBRARIES)
        if allowed is None:
            found.append(f"{module} has no place in MAY_IMPORT")
            continue
        home = {module if module in MAY_IMPORT else next(name for name in MAY_IMPORT if within(module, {name}))}
        for target in imports(module, sources):
            top = target.partition(".")[0]
            if target.startswith("."):
                found.append(f"{module} imports {target} relatively")
            elif top in ("niso", "data_prep", "configs", "launch"):
                if not within(target, allowed | home):
                    found.append(f"{module} imports {target}")
            else:
                door = within(module, DOORS.get(target, DOORS.get(top, {module})))
                known = libraries is None or top in libraries | set(sys.stdlib_module_names)
                if top in NEVER or not door or not known:
                    found.append(f"{module} imports {target}")
    return found


def test_the_rules_hold() -> None:
    sources = read()
    assert violations(sources, sources) == []


def test_nothing_imports_itself_on_a_detour() -> None:
    sources = read()
    graph = {module: set(imports(module, sources, runtime=True)) & set(sources) - {module} for module in sources}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")
    assert order.index("niso.errors") < order.index("niso.config") < order.index("niso.train") < order.index("niso.main")


def test_every_door_is_used() -> None:
    """An exception that nobody needs any more is taken out of the table."""
    sources = read()
    assert {rule_ for rule_ in MAY_IMPORT if rule_ not in sources} == set()
    for library, doors in DOORS.items():
        for door in doors:
            users = [m for m in sources if within(m, {door}) and any(within(t, {library}) for t in imports(m, sources))]
            assert users, f"{door} does not import {library} any more"
    for target in ("niso.data.records", "niso.errors", "niso.geometry.camera"):
        assert any(target in imports(module, sources) for module in sources if within(module, {"data_prep"})), target


@pytest.mark.parametrize(
    "module,line",
    [
        ("niso.errors", "import numpy"),
        ("niso.errors", "from niso import tree"),
        ("niso.geometry.polar", "from niso.models import operator"),
        ("niso.geometry.polar", "import flax"),
        ("niso.figures", "import jax"),
        ("niso.canvas", "import matplotlib.pyplot as plt"),
        ("niso.metrics", "from niso import sharding"),
        ("niso.data.pipeline", "import jax.numpy as jnp"),
        ("niso.data.transforms", "import grain.python as grain"),
        ("niso.data.records", "from niso.geometry import camera"),
        ("niso.data.split", "from niso.geometry import polar"),
        ("niso.data.pipeline", "from data_prep import co3d"),
        ("niso.data.records", "import importlib; importlib.import_module('data_prep.co3d')"),
        ("niso.data.records", "from importlib import import_module"),
        ("niso.models.operator", "import optax"),
        ("niso.models.operator", "from niso import metrics"),
        ("niso.models.operator", "from niso.tasks import base"),
        ("niso.tasks.autoencode", "from niso.data import pipeline"),
        ("niso.tasks.autoencode", "from niso.config import Experiment"),
        ("niso.tasks.base", "def f():\n    from niso import step"),
        ("niso.step", "from niso.tasks.autoencode import Autoencode"),
        ("niso.step", "from niso.tasks import autoencode"),
        ("niso.step", "from niso import train"),
        ("niso.step", "from niso.models import operator"),
        ("niso.step", "from absl import flags"),
        ("niso.train", "from ml_collections import ConfigDict"),
        ("niso.train", "import orbax.checkpoint as ocp"),
        ("niso.train", "from clu import metric_writers"),
        ("niso.train", "from niso import main"),
        ("niso.telemetry", "from tensorboard.compat.proto import event_pb2"),
        ("niso.checkpoint", "import tensorflow as tf"),
        ("niso.checkpoint", "import torch"),
        ("niso.evaluate", "from . import metrics"),
        ("niso.main", "from niso import step"),
        ("configs.pose_encode", "from niso.tasks import autoencode"),
        ("configs.pose_encode", "import jax"),
        ("data_prep.co3d", "from niso.data import pipeline"),
        ("data_prep.co3d", "from niso import train"),
        ("data_prep.co3d", "import jax"),
        ("data_prep.images", "import scipy.io"),
        ("data_prep.homnist", "from niso.tasks import views"),
        ("data_prep.images", "from niso.geometry import homography"),
        ("data_prep.images", "from sklearn.datasets import load_sample_images"),
        ("niso.data.stills", "import grain.python as grain"),
        ("data_prep.co3d", "from configs import pose_encode"),
        ("niso.distributed", "from niso import config"),
        ("niso.cluster", "import jax"),
        ("launch.sweep", "from niso import train"),
        ("launch.sweep", "import numpy"),
        ("niso.utilities", "import os"),
    ],
)
def test_a_planted_violation_is_found(module: str, line: str) -> None:
    sources = read()
    planted = sources | {module: f"{sources.get(module, '')}\n{line}\n"}
    assert len(violations(planted, [module])) == 1


@pytest.mark.parametrize(
    "module,line",
    [
        ("niso.tasks.pose", "from niso.tasks.autoencode import Autoencode\nfrom niso.geometry import camera"),
        ("niso.models.heads", "from niso.models.autoencoder import Encoder\nimport jax\nfrom flax import nnx"),
        ("niso.data.meshes", "from niso.data import records\nimport numpy\nimport json"),
        ("niso.geometry.se3", "from niso.geometry.camera import look_at\nimport jax.numpy as jnp"),
        ("data_prep.shrec", "from data_prep import pool\nfrom niso.data.records import Field"),
        ("configs.pose_pred", "from niso.config import base\nfrom ml_collections import ConfigDict"),
    ],
)
def test_what_newcomers_write_is_allowed(module: str, line: str) -> None:
    assert violations(read() | {module: line}, [module]) == []
