"""Configs: every key is read once and none is hidden; every config under configs/ builds, and its quick variant trains."""

import dataclasses
import importlib
import json
import pathlib
import pickle
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs.pose_encode import get_config
from niso import main, sharding, tasks
from niso.config import SECTIONS, Experiment, difference, flat
from niso.errors import UserError
from niso.step import Program
from niso.tasks import base as task_base
from tests import tiny
from tests.conftest import mesh_of
from tests.test_bad_input import forget_flags

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# What takes seconds; of pose_encode and pose_pred tests/test_readme.py makes two steps or more.
QUICKEST = ("toric_laplacian",)
TASKS = sorted(path.stem for path in pathlib.Path(tasks.__path__[0]).glob("*.py") if path.stem not in task_base.SHARED)


def module(name: str) -> ModuleType:
    return importlib.import_module(f"configs.{name}")


def build(resolved: dict[str, Any]) -> Experiment:
    return Experiment.from_config(ConfigDict(resolved))


def without(nested: dict[str, Any], key: str) -> dict[str, Any]:
    head, _, tail = key.partition(".")
    if not tail:
        return {k: v for k, v in nested.items() if k != head}
    return nested | {head: without(nested[head], tail)}


def extended(nested: dict[str, Any], section: str) -> dict[str, Any]:
    return nested | ({section: nested[section] | {"surplus": 1}} if section else {"surplus": 1})


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_read_and_none_is_hidden(name: str) -> None:
    resolved = module(name).get_config("quick").to_dict()
    for key in flat(resolved):
        missing = "task.name=''" if key == "task.name" else f"{key} is missing from the config"
        with pytest.raises(UserError) as caught:
            build(without(resolved, key))
        assert missing in str(caught.value)
    sections = ["", *(key for key, value in resolved.items() if isinstance(value, dict))]
    assert set(sections) == {"", "task", *SECTIONS}
    for section in sections:
        with pytest.raises(UserError, match=r"surplus: nothing reads this key"):
            build(extended(resolved, section))


def test_dataclasses_have_no_defaults_that_a_config_could_miss() -> None:
    kinds = [Experiment, *SECTIONS.values(), *(task_base.load(name) for name in TASKS)]
    absent = dataclasses.MISSING
    hidden = {f.name for kind in kinds for f in dataclasses.fields(kind) if not f.default is f.default_factory is absent}
    assert hidden == {"resolved", "procrustes"}  # set by from_config and by the trainer, never by a user


def leaves(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value) if field.compare]
    if isinstance(value, list | tuple):
        yield from (leaf for item in value for leaf in leaves(item))
    else:
        yield value


@pytest.mark.parametrize("name", NAMES)
def test_experiments_are_frozen_all_the_way_down(name: str) -> None:
    config = module(name).get_config()
    experiment = Experiment.from_config(config)
    for part in (experiment, experiment.task, *(getattr(experiment, section) for section in SECTIONS)):
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)
    assert {type(leaf) for leaf in leaves(experiment)} <= {str, int, float, bool}
    assert {type(value) for value in flat(experiment.resolved).values()} <= {str, int, float, bool, list}
    twin = Experiment.from_config(module(name).get_config())
    assert experiment == twin and hash(experiment) == hash(twin)
    assert pickle.loads(pickle.dumps(experiment)) == experiment
    config.seed += 1  # the ConfigDict is not the experiment's any more
    assert experiment == twin and experiment.resolved == twin.resolved


@pytest.mark.parametrize("name", NAMES)
def test_resolved_configs_survive_json(name: str) -> None:
    for variant in module(name).VARIANTS:
        experiment = Experiment.from_config(module(name).get_config(variant))
        read = json.loads(json.dumps(experiment.resolved))
        assert difference(experiment.resolved, read) == []
        assert build(read) == experiment


def test_difference() -> None:
    old = get_config("quick").to_dict()
    old["task"] |= {"rank": 32, "widths": (16, 32)}
    assert difference(old, old) == []
    new = json.loads(json.dumps(old))
    new["task"]["rank"], new["task"]["widths"], new["log"]["surplus"] = 8, [16, 64], "new"
    del new["mesh"]["zero"]
    assert difference(old, new) == [
        "log.surplus: absent -> new", "mesh.zero: False -> absent", "task.rank: 32 -> 8", "task.widths: [16, 32] -> [16, 64]",
    ]  # fmt: skip


def test_types_are_exact_but_for_ints_as_floats_and_lists_as_tuples() -> None:
    resolved = get_config("quick").to_dict()
    resolved["task"] |= {"size": 48, "rank": 32}

    def task(**changes: Any) -> Any:
        return build(resolved | {"task": resolved["task"] | changes}).task

    assert type(task(alpha=1).alpha) is float
    assert task(widths=[8, 16]).widths == (8, 16)
    assert task(size=[48, 96]).size == (48, 96)  # int | tuple[int, int]
    assert task(warm_start=[["a", "b"]]).warm_start == (("a", "b"),)
    for changes in (
        {"rank": True}, {"rank": 8.0}, {"rank": "8"}, {"alpha": True}, {"alpha": "0.5"}, {"alpha": float("inf")}, {"remat": 0},
        {"widths": 8}, {"widths": ("8",)}, {"warm_start": (("a",),)}, {"group": None}, {"group": ("O",)},
        {"size": 48.0}, {"size": (48,)}, {"size": ("48", "96")}, {"size": True},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"task.{next(iter(changes))}.*: expected "):
            task(**changes)


@pytest.mark.parametrize("name", NAMES)
def test_floats_are_written_as_floats(name: str) -> None:
    """A key takes its type from the config: an int for a float would refuse --config.task.alpha=0.5."""
    for variant in module(name).VARIANTS:
        experiment = Experiment.from_config(module(name).get_config(variant))
        for key, value in flat(experiment.resolved).items():
            if key != "task.name" and not isinstance(value, list):
                read = experiment
                for part in key.split("."):
                    read = getattr(read, part)
                assert type(read) is type(value), key


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_override_keys_that_exist(name: str) -> None:
    overrides = list(module(name).sweep())
    assert overrides and len({json.dumps(one, sort_keys=True) for one in overrides}) == len(overrides)
    plain = module(name).get_config()
    for one in overrides:
        config = module(name).get_config()
        assert set(one) <= set(flat(config.to_dict())), one
        config.update_from_flattened_dict(one)
        changed = {line.partition(":")[0] for line in difference(plain.to_dict(), Experiment.from_config(config).resolved)}
        assert changed == {key for key, value in one.items() if value != flat(plain.to_dict())[key]}


@pytest.mark.parametrize("name", NAMES)
def test_paper_is_a_program(name: str) -> None:
    """Shapes only: no data, no memory, no compilation."""
    experiment = Experiment.from_config(module(name).get_config())
    assert (experiment.experiment, experiment.variant) == (name, "paper")
    program = Program(experiment, mesh_of(1), tiny.shapes(experiment))
    assert jax.tree.structure(program.state_shapes) == jax.tree.structure(program.state_sharding)
    state, _ = jax.eval_shape(program.train, program.state_shapes, program.batch_shapes)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(program.state_shapes)
    ]
    assert jax.eval_shape(program.evaluate, program.state_shapes, program.batch_shapes, 0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where this session's twins are made, once."""
    return tmp_path_factory.mktemp("niso-cache")


def call(*arguments: str) -> int:
    forget_flags()
    return main.main(["niso", *arguments])


def contents(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [name if name in QUICKEST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_quick_makes_two_steps(
    name: str, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NISO_CACHE", str(cache))
    monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh_of(1))  # a laptop, as the configs promise
    workdir = tmp_path / "run"
    command = [
        f"--config={ROOT}/configs/{name}.py:quick", f"--workdir={workdir}", "--config.steps=2", "--config.optimizer.warmup=1",
        "--config.log.every=1",
    ]  # fmt: skip
    quick = importlib.import_module(f"configs.{name}").get_config("quick")
    fewer = {"test_every": 40, "test_examples": 4, "test_copies": 1}  # what there is first
    command.append(next(f"--config.data.{key}={value}" for key, value in fewer.items() if key in quick.data))
    if quick.task.warm_start:
        command.append("--config.task.warm_start=()")  # of runs that are not there
    assert call(*command) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert set(logged) == {1, 2} and logged[1] != logged[2]
    assert {line["step"] for line in lines if "eval/loss" in line} == {0, 2}
    assert (workdir / "checkpoints" / "2").is_dir() and list(workdir.glob("figures/*/*.png"))
    written = json.loads((workdir / "config.json").read_text())
    assert difference(written, build(written).resolved) == [] and written["steps"] == 2

    # The finished run is safe from later mistakes in the same folder.
    before = contents(workdir)
    capfd.readouterr()
    assert call(*command, "--config.seed=1") == 2
    assert call(*command, "--config.seed=x") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 2 and "(seed: 0 -> 1)" in err
    assert contents(workdir) == before
