"""The train step compiled ahead of time for a TPU pod that is not there: what crosses chips. A CPU compile would pass falsely."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_sharding import COLLECTIVES

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def compile_for_pod(what: str, data: int, space: int) -> str:
    """The compiled text on v5e:4x4 of the `step` of pose_encode (two residual levels, rank 16), of the `solve` or the `basis`."""
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh

    from niso.sharding import AXES
    from niso.step import Program
    from tests import test_sharding, tiny

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = Mesh(mesh_utils.create_device_mesh((data, space), chips, allow_split_physical_axes=True), AXES)
    if what == "solve":
        return test_sharding.solve_for(mesh, "auto").compile().as_text()
    if what == "basis":
        return test_sharding.basis_for(mesh).compile().as_text()
    e = tiny.experiment(batch=2 * data * space, data__size=32, task__rank=16, task__latent_channels=16)
    program = Program(e, mesh, tiny.shapes(e))
    return program.train.lower(program.state_shapes, program.batch_shapes).compile().as_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "what,data,space,crossing",
    [
        ("step", 16, 1, {"all-reduce"}),  # gradients and metrics: nothing is gathered around encodings, projections and solves
        ("solve", 16, 1, set()),
        ("solve", 4, 4, set()),
        ("basis", 1, 16, {"all-reduce"}),  # K x K Gram matrices
    ],
)
def test_what_crosses_chips(what: str, data: int, space: int, crossing: set[str]) -> None:
    """`auto` is the solve by matrix products there: its batch and its gradient stay where they are."""
    command = [sys.executable, "-m", "tests.test_pod", what, str(data), str(space)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(COLLECTIVES, done.stdout)) == crossing
    assert not re.search(r"(?i)custom_call_target=\"(Qr|Eigh|Svd|LuDecomposition)", done.stdout)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (the CPU is this process's own platform)

    print(compile_for_pod(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
