"""Eight virtual CPU devices for every test: set before a backend starts."""

import niso  # noqa: F401, I001  (first: it sets OPENBLAS_NUM_THREADS)
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import pytest
from jax.sharding import Mesh

from niso.sharding import MeshShape, make_mesh
from tests import bucket
from tests.runs import PROGRAMS

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Hundreds of small programs are compiled once and run a few times; the README's first command and the slow tests optimise.
jax.config.update("jax_disable_most_optimizations", True)
# Traced programs are many objects that live long: to look through them as often as Python does takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a session, and the runs that they start, keep what they have compiled for each other."""
    if PROGRAMS not in os.environ:  # the first process; the others get its environment
        os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="niso-programs-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(PROGRAMS), ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


LONGEST = (
    "test_readme.py", "test_homography_mnist.py", "test_replicas.py", "test_step.py", "test_autoencode.py", "test_resume.py",
    "test_processes.py", "test_pose.py", "test_launch.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first: begun last, one of them would keep one process busy while the other has nothing left."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def bucket_url() -> Iterator[str]:
    """gs://BUCKET, empty at first, of an emulator on this machine, which this process and its children take for the real thing.

    One for the session: clients keep the address that they began with.
    """
    with bucket.running() as variables:
        os.environ.update(variables)
        yield f"gs://{bucket.NAME}"
        for name in variables:
            del os.environ[name]


def mesh_of(data: int, space: int = 1) -> Mesh:
    """A mesh over the first data x space of the eight devices."""
    return make_mesh(MeshShape(data, space, False), jax.devices()[: data * space])
