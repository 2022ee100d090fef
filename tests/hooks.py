"""`python -m tests.hooks HOOK ... -- ARGUMENT ...` is `python -m niso.main ARGUMENT ...` with something happening on the way:

kill=N         the process kills itself (SIGKILL) right after update N was sent off and earlier checkpoints are written
kill_commit=N  ... in the moment in which the checkpoint of step N would get its final name
term=N         it sends itself SIGTERM after update N, as a machine does that is taken away; `end`: when all is done and saved
full=N:SIZE    after update N, earlier checkpoints being written, no file can grow beyond SIZE bytes, as on a disk that is full
rows=FILE      FILE gets, for every batch, {row of the global batch: checksum} of the rows this process read
counts=FILE    FILE gets, for every read of metrics, [name, number of examples counted] of one of them
nan=N          the weights of the examples of step N are not numbers
limit=SECONDS  after which it is said that something takes long
restored=FILE  FILE gets the state that was restored, as numpy.savez writes it
"""

import json
import os
import pathlib
import resource
import signal
import sys
import time
import zlib
from typing import Any, NoReturn

import numpy as np

from tests import runs


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    raise AssertionError


def install(name: str, value: str, checkpoints: pathlib.Path) -> None:
    """Lets it happen to this process."""
    if (name, value) == ("term", "end"):
        _told_at_the_end()
    elif name in ("kill", "term", "full"):
        _at_a_step(name, value, checkpoints)
    else:
        {"kill_commit": _die_in_commit, "rows": _tell_rows, "counts": _tell_counts, "nan": _spoil_batch, "limit": _set_limit,
         "restored": _tell_restored}[name](value)  # fmt: skip


def _told_at_the_end() -> None:
    from niso.checkpoint import Checkpoints

    close = Checkpoints.close

    def then(self: Checkpoints, failed: bool = False) -> None:
        close(self, failed)
        os.kill(os.getpid(), signal.SIGTERM)

    Checkpoints.close = then  # type: ignore[method-assign]


def _at_a_step(name: str, value: str, checkpoints: pathlib.Path) -> None:
    from niso.telemetry import Telemetry

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


def _die_in_commit(step: str) -> None:
    for function in ("rename", "replace"):
        move = getattr(os, function)
        setattr(os, function, lambda a, b, move=move, **o: die() if pathlib.Path(b).name == step else move(a, b, **o))
    # In a bucket a checkpoint has its name from the beginning, and is whole once it has this object.
    from etils.epath import abstract_path

    write = abstract_path.Path.write_text
    abstract_path.Path.write_text = lambda path, text, **o: (
        die() if path.parts[-2:] == (step, "commit_success.txt") else write(path, text, **o)
    )


def _tell_rows(file: str) -> None:
    from niso import sharding

    place = sharding.place_batch

    def record(shardings: Any, batch: dict[str, np.ndarray], size: int) -> Any:
        mesh = shardings["weight_B"].mesh
        sums = [zlib.crc32(b"".join(batch[key][i].tobytes() for key in sorted(batch))) for i in range(len(batch["weight_B"]))]
        with open(file, "a") as lines:
            lines.write(json.dumps(dict(zip(sharding.host_rows(mesh, size), sums, strict=True))) + "\n")
        return place(shardings, batch, size)

    sharding.place_batch = record  # type: ignore[assignment]


def _tell_counts(file: str) -> None:
    from niso import metrics

    read = metrics.values

    def count(measured: metrics.Metrics) -> dict[str, float]:
        found = "equivariance_error" if "equivariance_error" in measured else "loss"
        with open(file, "a") as lines:
            lines.write(json.dumps([found, float(measured[found].count)]) + "\n")
        return read(measured)

    metrics.values = count  # type: ignore[assignment]


def _spoil_batch(step: str) -> None:
    from niso.data.batches import Batches

    take = Batches.__next__

    def spoilt(self: Batches) -> dict[str, np.ndarray]:
        name = f"{self._name} {self._next}"
        batch = take(self)
        return batch | {"weight_B": np.full_like(batch["weight_B"], np.nan)} if name == f"step {step}" else batch

    Batches.__next__ = spoilt  # type: ignore[method-assign]


def _set_limit(seconds: str) -> None:
    from niso.data import watchdog

    watchdog.LIMIT = float(seconds)


def _tell_restored(file: str) -> None:
    from niso.checkpoint import Checkpoints

    restore = Checkpoints.restore

    def tell(self: Checkpoints, program: Any) -> Any:
        state = restore(self, program)
        np.savez(file, **runs.named(state))
        return state

    Checkpoints.restore = tell  # type: ignore[method-assign]


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
    from niso import folders
    from niso.main import program

    _keep_all_programs()

    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    for hook in sys.argv[1:split]:
        kind, _, what = hook.partition("=")
        install(kind, what, folders.named(given["--workdir"]) / "checkpoints")
    sys.argv[1:] = sys.argv[split + 1 :]
    program()
