"""Runs of niso in processes of their own, for tests that kill, divide and resume them.

`python -m tests.runs HOOK ... -- ARGUMENT ...` is `python -m niso.main ARGUMENT ...` with something happening on the way:

  kill=N         the process kills itself (SIGKILL) right after update N was sent off and earlier checkpoints are written
  kill_commit=N  ... in the moment in which the checkpoint of step N would get its final name
  term=N         it sends itself SIGTERM after update N, as a machine does that is taken away; `end`: when all is done and saved
  full=N:SIZE    after update N, earlier checkpoints being written, no file can grow beyond SIZE bytes, as on a disk that is full
  rows=FILE      FILE gets, for every batch, {row of the global batch: checksum} of the rows this process read
  counts=FILE    FILE gets, for every read of metrics, [name, number of examples counted] of one of them
"""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from typing import Any, NoReturn

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
    command = [sys.executable, "-m", "tests.runs", *hooks, "--", f"--config=configs/{config}.py:quick", f"--workdir={workdir}"]
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
    workdir: pathlib.Path, hooks: tuple[Sequence[str], Sequence[str]] = ((), ()), devices: int = 2, **options: Any
) -> list[subprocess.Popen]:
    """The same run as two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--processes=2", f"--coordinator=127.0.0.1:{port}")
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
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
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


def _install(name: str, value: str, checkpoints: pathlib.Path) -> None:
    from niso import metrics, sharding
    from niso.checkpoint import Checkpoints
    from niso.telemetry import Telemetry

    def die() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
        raise AssertionError

    if (name, value) == ("term", "end"):
        close = Checkpoints.close

        def then(self: Checkpoints, failed: bool = False) -> None:
            close(self, failed)
            os.kill(os.getpid(), signal.SIGTERM)

        Checkpoints.close = then  # type: ignore[method-assign]
    elif name in ("kill", "term", "full"):
        tick, (at, _, size) = Telemetry.tick, value.partition(":")
        left = set(checkpoints.iterdir()) if checkpoints.exists() else set()  # half-written, by a process that was ended

        def after(self: Telemetry, step: int) -> None:
            tick(self, step)
            if step != int(at):
                return
            while name != "term" and any(not path.name.isdigit() for path in {*checkpoints.iterdir()} - left):
                time.sleep(0.01)
            if name == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
            else:
                die() if name == "kill" else os.kill(os.getpid(), signal.SIGTERM)

        Telemetry.tick = after  # type: ignore[method-assign]
    elif name == "kill_commit":
        for function in ("rename", "replace"):
            move = getattr(os, function)
            setattr(os, function, lambda a, b, move=move, **o: die() if pathlib.Path(b).name == value else move(a, b, **o))
    elif name == "rows":
        place = sharding.place_batch

        def record(shardings: Any, batch: dict[str, np.ndarray], size: int) -> Any:
            mesh = shardings["weight_B"].mesh
            sums = [zlib.crc32(b"".join(batch[key][i].tobytes() for key in sorted(batch))) for i in range(len(batch["weight_B"]))]
            with open(value, "a") as file:
                file.write(json.dumps(dict(zip(sharding.host_rows(mesh, size), sums, strict=True))) + "\n")
            return place(shardings, batch, size)

        sharding.place_batch = record  # type: ignore[assignment]
    elif name == "counts":
        read = metrics.values

        def count(measured: metrics.Metrics) -> dict[str, float]:
            found = "equivariance_error" if "equivariance_error" in measured else "loss"
            with open(value, "a") as file:
                file.write(json.dumps([found, float(measured[found].count)]) + "\n")
            return read(measured)

        metrics.values = count  # type: ignore[assignment]
    else:
        raise ValueError(name)


def _keep_all_programs() -> None:
    """Compiled programs of every process are kept where process 0's are: jax keeps those alone, for fear of slow file systems,
    while every process has names of its own for them."""
    from jax._src import compiler

    keep, state = compiler._cache_write, compiler.distributed.global_state

    def keep_as_first(*arguments: Any, **options: Any) -> None:
        me, state.process_id = state.process_id, 0
        try:
            keep(*arguments, **options)
        finally:
            state.process_id = me

    compiler._cache_write = keep_as_first


if __name__ == "__main__":
    split = sys.argv.index("--")
    from niso.main import main

    _keep_all_programs()

    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    for hook in sys.argv[1:split]:
        kind, _, what = hook.partition("=")
        _install(kind, what, pathlib.Path(given["--workdir"]) / "checkpoints")
    sys.argv[1:] = sys.argv[split + 1 :]
    sys.exit(main())
