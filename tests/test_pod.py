"""The train step compiled ahead of time for a TPU pod that is not there: what crosses chips. A CPU compile would pass falsely."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
COLLECTIVES = r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("


def compile_for_pod(data: int, space: int) -> str:
    """The compiled step's text for pose_encode (two residual levels, rank 16) on v5e:4x4."""
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh

    from niso.sharding import AXES
    from niso.step import Program
    from tests import tiny

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = Mesh(mesh_utils.create_device_mesh((data, space), chips, allow_split_physical_axes=True), AXES)
    e = tiny.experiment(batch=2 * data * space, data__size=32, task__rank=16, task__latent_channels=16)
    program = Program(e, mesh, tiny.shapes(e))
    return program.train.lower(program.state_shapes, program.batch_shapes).compile().as_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install -e ".[tpu]"')
@pytest.mark.timeout(600)
def test_only_gradients_and_metrics_cross_chips_on_a_data_mesh() -> None:
    """On data 16 x space 1 nothing is gathered around encodings, projections and solves."""
    command = [sys.executable, "-m", "tests.test_pod", "16", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(COLLECTIVES, done.stdout)) == {"all-reduce"}


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (the CPU is this process's own platform)

    print(compile_for_pod(int(sys.argv[1]), int(sys.argv[2])))
