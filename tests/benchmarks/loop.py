"""What the loop itself costs: milliseconds per step of a task that does nothing, with log points at no step and at every one.

  python -m tests.benchmarks.loop --steps 3000 --json loop.json

Everything of a real run takes part: batches of one number from an iterator, placing, dispatch, the check for preemption, metrics,
event file, metrics.jsonl, hours.jsonl and the terminal line (kept in memory here). A row's figures are medians over windows of a
hundred steps. On a busy machine others only ever add to the elapsed time, so the fastest window stands beside it, and the time that
the loop's own thread was on a core (`thread_ms`), which others hardly change. --profile lists the functions that take longest.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import io
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from configs.pose_encode import get_config
from niso import sharding, train
from niso.checkpoint import Checkpoints
from niso.config import Experiment
from niso.journal import Journal
from niso.metrics import Mean, Metrics
from niso.step import Program
from niso.tasks.base import Batch, Rules, Task
from niso.telemetry import Telemetry
from tests.benchmarks import timing

WINDOW = 100
COLUMNS = {"log every": 9, "elapsed_ms": 10, "fastest_ms": 10, "thread_ms": 9, "windows": 7}


class Number(nnx.Module):
    """A model of one parameter."""

    def __init__(self) -> None:
        self.number = nnx.Param(jnp.ones(()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(Task):
    """A step whose arithmetic takes no time worth naming; four metrics, as many as pose_encode has."""

    def init_model(self, rngs: nnx.Rngs) -> Number:
        return Number()

    def rules(self) -> Rules:
        return ((".*", ()),)

    def loss(self, model: Number, batch: Batch) -> tuple[Array, Metrics]:
        value_B = model.number[...] * batch["weight_B"]
        return jnp.sum(value_B), {name: Mean.of(value_B, batch["weight_B"]) for name in ("loss", "one", "two", "three")}


class Clocked:
    """A dataset whose batches are always the same, and that looks at the clock whenever the loop has made WINDOW steps."""

    replaced = None

    def __init__(self, batch: int):
        self.batch = {"weight_B": np.ones(batch, np.float32)}
        self.times: list[tuple[float, float]] = []  # elapsed, of this thread

    @contextlib.contextmanager
    def train_batches(self, *, start: int, steps: int, **_: Any) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        """As Examples.train_batches."""
        yield self._count(steps - start)

    def _count(self, steps: int) -> Iterator[dict[str, np.ndarray]]:
        for step in range(steps):
            if step % WINDOW == 0:
                self.times.append((time.perf_counter(), time.thread_time()))
            yield self.batch

    @contextlib.contextmanager
    def test_batches(self, **_: Any) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        """As Examples.test_batches."""
        yield iter([self.batch])

    def figure_batch(self, count: int, train: bool = False) -> dict[str, np.ndarray]:
        """As Examples.figure_batch."""
        return self.batch

    def windows_ms(self) -> np.ndarray:
        """Milliseconds per step, elapsed and of the loop's own thread, of every window but the first, in which files are opened."""
        return 1e3 * np.diff(self.times[1:], axis=0) / WINDOW


def experiment(steps: int, every: int) -> Experiment:
    """The experiment of nothing: the published optimiser, one number a device, log points every so many steps."""
    config = get_config("quick")
    config.update(experiment="nothing", steps=steps, batch=8)
    config.log.update(every=every, evaluate_every=steps, figures_every=0)
    e = Experiment.from_config(config)
    return dataclasses.replace(e, task=Nothing(trainable=".*", warm_start=()))


def measure(steps: int, every: int) -> np.ndarray:
    """Milliseconds per step of the windows of a run in a folder of its own."""
    e = experiment(steps, every)
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, keep=1)
        stack.callback(checkpoints.close)
        dataset: Any = Clocked(e.batch)
        program = Program(e, sharding.make_mesh(e.mesh), {"weight_B": ((e.batch,), np.dtype(np.float32))})
        telemetry = stack.enter_context(Telemetry(workdir, steps=steps, batch=e.batch))
        train.loop(program, dataset, checkpoints, Journal(program, dataset, telemetry, workdir), program.init({}))
    return dataset.windows_ms()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=timing.positive, default=3000, help="steps of a run, a multiple of 100, default 3000")
    parser.add_argument("--profile", action="store_true", help="list the functions that take longest when every step is logged")
    parser.add_argument("--json", type=timing.json_file, help="file that gets the rows as JSON")
    arguments = parser.parse_args(given)
    if arguments.steps < 3 * WINDOW or arguments.steps % WINDOW:
        parser.error(f"argument --steps: {arguments.steps} is not a multiple of {WINDOW}, {3 * WINDOW} or more")
    timing.print_surroundings()
    timing.print_line(list(COLUMNS), list(COLUMNS.values()))
    rows = []
    for every in (arguments.steps, 1):
        taken = measure(arguments.steps, every)
        elapsed, thread = np.median(taken, axis=0).tolist()
        fastest = float(taken[:, 0].min())
        rows.append({"log_every": every, "elapsed_ms": elapsed, "fastest_ms": fastest, "thread_ms": thread, "windows": len(taken)})
        shown = [str(every), elapsed, fastest, thread, len(taken)]
        timing.print_line(shown, list(COLUMNS.values()))
    if arguments.profile:
        profile = cProfile.Profile(time.thread_time)
        profile.runcall(measure, arguments.steps, 1)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    timing.write(arguments.json, given, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
