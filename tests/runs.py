"""Runs of niso in processes of their own, for tests that kill, divide and resume them; what happens on the way: tests/hooks.py."""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

PROGRAMS = "NISO_TEST_PROGRAMS"  # variable with the folder of the programs that a session of pytest has compiled
REPOSITORY = pathlib.Path(__file__).parents[1]
BATCH, STEPS, TEST_PAIRS = 16, 16, 18
# Checkpoints at 5, 10, 15, 16; lines at 4, 8, 12, 16: no window of metrics but the last ends where a checkpoint is.
TINY = {
    "data.twin": "", "data.size": 8, "data.max_skip": 2, "data.test_skips": (0, 2), "data.prefetch": 2,
    "task.widths": (4,), "task.latent_channels": 8, "task.rank": 8,
    "batch": BATCH, "steps": STEPS, "optimizer.warmup": 4, "optimizer.weight_decay": 0.01,
    "log.every": 4, "log.evaluate_every": 8, "log.figures_every": 16, "log.figure_examples": 2,
    "checkpoint.every": 5, "checkpoint.keep": 9,
}  # fmt: skip
# An operator alone: cheap steps, of which many are between checkpoints that are worth being killed at.
OPERATOR = {
    "data.twin": "tiny", "data.size": 8, "data.stack": 10, "data.test_examples": 8, "task.rank": 8, "batch": 4, "steps": 120,
    "optimizer.warmup": 20, "log.every": 4, "log.evaluate_every": 50, "log.figures_every": 120, "log.figure_examples": 1,
    "checkpoint.every": 5, "checkpoint.keep": 3,
}  # fmt: skip
ON_EIGHT = {"optimizer.accumulate": 2, "mesh.zero": True, "log.profile_steps": (6, 8)}


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    out: str
    err: str


@functools.cache
def folder() -> pathlib.Path:
    """A folder of this session for what several tests share; it goes when pytest ends."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="niso-runs-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tiny_records() -> str:
    from tests import toy_records

    return toy_records.write_records(
        folder() / "records", {"train": (9, 7, 8, 6), "test": (6, 5, 4)}, size=8, picture=toy_records.noisy
    )


def careless() -> dict[str, str]:
    """Environment of a process that compiles without optimising, and once per session what several processes need."""
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(PROGRAMS) or str(folder() / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip


def start(
    workdir: pathlib.Path, *arguments: str, hooks: Sequence[str] = (), devices: int = 1, optimize: bool = False,
    config: str = "pose_encode", **changes: Any,
) -> subprocess.Popen:  # fmt: skip
    """Starts the tiny run of a config in `workdir`; `changes` are config keys with __ for the dot.

    Programs are compiled once per session and kept (`optimize`: neither kept nor compiled carelessly).
    """
    tiny = OPERATOR if config == "toric_laplacian" else TINY | {"data.records": tiny_records()}
    overrides = tiny | {k.replace("__", "."): v for k, v in changes.items()}
    command = [sys.executable, "-m", "tests.hooks", *hooks, "--", f"--config=configs/{config}.py:quick", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()] + list(arguments)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if not optimize:
        environment |= careless()
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, timeout: float = 120) -> Ended:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def run(workdir: pathlib.Path, *arguments: str, **options: Any) -> Ended:
    return end(start(workdir, *arguments, **options))


def start_pair(
    workdir: pathlib.Path, hooks: tuple[Sequence[str], Sequence[str]] = ((), ()), devices: int = 2,
    arguments: Sequence[str] = (), **options: Any,
) -> list[subprocess.Popen]:  # fmt: skip
    """The same run as two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (*arguments, "--processes=2", f"--coordinator=127.0.0.1:{port}")
    return [start(workdir, *flags, f"--process_id={i}", hooks=hooks[i], devices=devices, **options) for i in range(2)]


def run_pair(workdir: pathlib.Path, *arguments: Any, **options: Any) -> list[Ended]:
    return [end(process) for process in start_pair(workdir, *arguments, **options)]


@functools.cache
def unbroken(devices: int = 1) -> pathlib.Path:
    """The workdir of a run that nothing happened to, on 1 device (plain) or 8 (accumulating, optimiser state divided)."""
    workdir = folder() / f"unbroken-{devices}"
    hooks = [f"rows={workdir}-rows", f"counts={workdir}-counts"]
    ended = run(workdir, hooks=hooks, devices=devices, **(ON_EIGHT if devices > 1 else {}))
    assert ended.code == 0, ended.err
    return workdir


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path, whatever devices it came from."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return named(restored)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree, by path."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(where, simple=True, separator="."): np.asarray(leaf) for where, leaf in leaves}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal names, types and bits."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def program(data: int, space: int = 1, **changes: Any) -> Any:
    """The tiny run's Program in this process, on some of its eight devices."""
    from niso.step import Program
    from tests import tiny
    from tests.conftest import mesh_of

    experiment = tiny.experiment(**{key.replace(".", "__"): value for key, value in TINY.items()} | changes)
    return Program(experiment, mesh_of(data, space), tiny.shapes(experiment))


def flip(path: pathlib.Path, every: int = 0) -> None:
    """One bit of the byte in the middle, or of every so many."""
    content = bytearray(path.read_bytes())
    for at in range(every // 2, len(content), every) if every else [len(content) // 2]:
        content[at] ^= 16
    path.write_bytes(content)


def largest(checkpoint: pathlib.Path) -> pathlib.Path:
    """The file with most of the numbers."""
    return max(checkpoint.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


def spoil(checkpoint: pathlib.Path) -> None:
    """Some bits of the parameters and of everything else: of all files that hold numbers."""
    for path in checkpoint.glob("state/**/d/*"):
        flip(path, every=64)


def snapshot(workdir: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of everything below a folder."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [workdir, *workdir.rglob("*")]}
