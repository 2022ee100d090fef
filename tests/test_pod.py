"""The train step compiled ahead of time for a TPU pod that is not there: what crosses chips. A CPU compile would pass falsely."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Metrics and the norm of the gradient are scalars: a few bytes each.
SCALARS = 200


def compile_for_pod(what: str, data: int, space: int) -> dict:
    """Of the `step` of pose_encode (two residual levels, rank 16) on v5e:4x4, of the `solve`, of `few solves`, of a `special solve`
    or of the `basis`: its exchanges, those of its calls that are LAPACK's, and the bytes of its parameters."""
    from niso import cost, dry_run, sharding, tree
    from niso.sharding import MeshShape
    from niso.step import Program
    from tests import test_sharding, tiny

    mesh = sharding.make_mesh(MeshShape(data, space, False), dry_run.pod("v5e:4x4"))
    parameters = basis = 0
    if what in ("solve", "few solves", "special solve"):
        count = data if what == "few solves" else None
        lowered = test_sharding.solve_for(mesh, "auto", count, special=what == "special solve")
    elif what == "basis":
        lowered = test_sharding.basis_for(mesh)
    else:
        e = tiny.experiment(batch=2 * data * space, data__size=32, task__rank=16, task__latent_channels=16)
        program = Program(e, mesh, tiny.shapes(e))
        parameters = 4 * tree.count(program.parameter_shapes)
        basis = 4 * program.parameter_shapes["operator/basis"].size
        lowered = program.train.lower(program.state_shapes, program.batch_shapes)
    text = lowered.compile().as_text()
    found = [(c.kind, c.axes, c.bytes) for c in cost.collectives(text, mesh)]
    calls = re.findall(r"(?i)custom_call_target=\"(?:Qr|Eigh|Svd|LuDecomposition)", text)
    return {"collectives": found, "calls": calls, "parameters": parameters, "basis": basis}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "what,data,space,crossing",
    [
        ("step", 16, 1, {("all-reduce", "data")}),  # nothing is gathered around encodings, projections and solves
        ("solve", 16, 1, set()),
        ("special solve", 16, 1, set()),  # onto SO(k): with Cholesky factors, and the signs of LU's
        ("solve", 4, 4, {("all-gather", "space")}),  # its own matrices, put together again
        ("few solves", 4, 4, {("all-gather", "space")}),  # one to each part of data, though there are four devices in it
        ("basis", 1, 16, {("all-reduce", "space")}),  # K x K Gram matrices
    ],
)
def test_what_crosses_chips(what: str, data: int, space: int, crossing: set[tuple[str, str]]) -> None:
    """`auto` is the solve by matrix products there: its batch and its gradient stay with their examples. What the step sums over
    `data` is one gradient for each parameter (for the eigenfunctions perhaps two, of projecting and of decoding), and scalars."""
    command = [sys.executable, "-m", "tests.test_pod", what, str(data), str(space)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(kind, axes) for kind, axes, _ in found["collectives"]} == crossing
    assert not found["calls"] or what == "special solve"
    if what == "step":
        total = sum(size for _, _, size in found["collectives"])
        assert found["parameters"] <= total < found["parameters"] + found["basis"] + SCALARS


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')
@pytest.mark.timeout(600)
def test_a_dry_run_for_a_pod() -> None:
    """Its report as a user gets it, and the refusal of what does not exist and of what a chip cannot hold."""
    small = [
        "--config=configs/pose_encode.py:quick", "--dry_run", "--config.data.size=16", "--config.task.widths=(4,8)",
        "--config.task.latent_channels=8", "--config.task.rank=8", "--config.batch=16",
    ]  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "niso.main", *small, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    done = run("--topology=v5e:4x4", "--config.mesh.space=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "v5e:4x4: 16 device(s) (TPU v5 lite), mesh data 8 x space 2" in done.stdout and " of 16.00 GB" in done.stdout
    assert re.search(r"^all-reduce +data", done.stdout, re.M) and re.search(r"^4,096 ", done.stdout, re.M)
    refused = run("--topology=v5e:nine")
    assert refused.returncode == 2 and re.fullmatch(r"niso: --topology v5e:nine: .*as in v5e:16x16\n", refused.stderr)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (the CPU is this process's own platform)

    print(json.dumps(compile_for_pod(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
