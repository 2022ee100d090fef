"""What the loop itself costs: milliseconds per step of a task that does nothing.

  python -m tests.benchmarks.loop --steps 3000 --json loop.json
  python -m tests.benchmarks.loop --steps 1000 --turns 5 --device_ms 50

Three rows: `bare`, the compiled step alone, its batch placed, no more than two of them in flight; the loop with no log point, which
adds all else of a real run: batches of one number from an iterator, the check for preemption, telemetry; and with a log point at
every step: metrics, event file, metrics.jsonl, hours.jsonl and the terminal line (kept in memory here). The rows take turns. A
row's figures are medians over windows of a hundred steps. On a busy machine others only ever add to the elapsed time, so the
fastest window stands beside it, and the time that the loop's own thread was on a core (`thread_ms`), which others hardly change.
With --device_ms every step keeps one core busy that long, in the place of an accelerator: what the host does meanwhile on another
core costs nothing. --profile lists the functions that take longest.
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

import jax
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
COLUMNS = {"loop": 14, "elapsed_ms": 10, "fastest_ms": 10, "thread_ms": 9, "windows": 7}


class Number(nnx.Module):
    """A model of one parameter."""

    def __init__(self) -> None:
        self.number = nnx.Param(jnp.ones(()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(Task):
    """A step of no use, in so many `rounds` of `_busy`; four metrics, as many as pose_encode has."""

    rounds: int

    def init_model(self, rngs: nnx.Rngs) -> Number:
        return Number()

    def rules(self) -> Rules:
        return ((".*", ()),)

    def loss(self, model: Number, batch: Batch) -> tuple[Array, Metrics]:
        weight_B = batch["weight_B"] + 1e-9 * jnp.mean(_busy(jnp.zeros(4096), self.rounds))
        value_B = model.number[...] * weight_B
        return jnp.sum(value_B), {name: Mean.of(value_B, batch["weight_B"]) for name in ("loss", "one", "two", "three")}


def _busy(x_N: Array, rounds: int) -> Array:
    return jax.lax.fori_loop(0, rounds, lambda _, x_N: jnp.cos(x_N), x_N)


def rounds_of(milliseconds: float) -> int:
    """How many rounds of `_busy` take so long on one core."""
    probe = 2_000
    busy = jax.jit(_busy, static_argnums=1)
    return round(milliseconds / timing.median_ms({"busy": lambda: busy(jnp.zeros(4096), probe)}, 9)["busy"] * probe)


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


def experiment(steps: int, every: int, rounds: int) -> Experiment:
    """The experiment of nothing: the published optimiser, log points every so many steps, one checkpoint at the end."""
    config = get_config("quick")
    config.update(experiment="nothing", steps=steps, batch=8)
    config.checkpoint.every = steps
    config.log.update(every=every, evaluate_every=steps, figures_every=0)
    e = Experiment.from_config(config)
    return dataclasses.replace(e, task=Nothing(trainable=".*", warm_start=(), rounds=rounds))


def measure(steps: int, every: int | None, rounds: int) -> np.ndarray:
    """Milliseconds per step of the windows of a run in a folder of its own; of the step alone where `every` is None."""
    e = experiment(steps, every or steps, rounds)
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, keep=1)
        stack.callback(checkpoints.close)
        clocked = Clocked(e.batch)
        dataset: Any = clocked
        program = Program(e, sharding.make_mesh(e.mesh), {"weight_B": ((e.batch,), np.dtype(np.float32))})
        telemetry = stack.enter_context(Telemetry(workdir, steps=steps, batch=e.batch))
        if every is None:
            _bare(program, telemetry, clocked, steps)
        else:
            train.loop(program, dataset, checkpoints, Journal(program, dataset, telemetry, workdir), program.init({}))
    return clocked.windows_ms()


def _bare(program: Program, telemetry: Telemetry, clocked: Clocked, steps: int) -> None:
    step, state = telemetry.compile(program), program.init({})
    previous = None
    with clocked.train_batches(start=0, steps=steps) as batches:
        for batch in batches:
            state, window = step(state, program.place(batch))
            jax.block_until_ready(previous)
            previous = window


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=timing.positive, default=3000, help="steps of a run, a multiple of 100, default 3000")
    parser.add_argument("--turns", type=timing.positive, default=1, help="runs of each row, default 1")
    parser.add_argument("--device_ms", type=float, default=0.0, help="milliseconds that a step takes on its device, default 0")
    parser.add_argument("--profile", action="store_true", help="list the functions that take longest when every step is logged")
    parser.add_argument("--json", type=timing.json_file, help="file that gets the rows as JSON")
    arguments = parser.parse_args(given)
    if arguments.steps < 3 * WINDOW or arguments.steps % WINDOW:
        parser.error(f"argument --steps: {arguments.steps} is not a multiple of {WINDOW}, {3 * WINDOW} or more")
    timing.print_surroundings()
    timing.print_line(list(COLUMNS), list(COLUMNS.values()))
    rounds = rounds_of(arguments.device_ms) if arguments.device_ms else 0
    loops = {"bare": None, "no log point": arguments.steps, "log every step": 1}
    taken: dict[str, list[np.ndarray]] = {name: [] for name in loops}
    for _ in range(arguments.turns):
        for name, every in loops.items():
            taken[name].append(measure(arguments.steps, every, rounds))
    rows = []
    for name, runs in taken.items():
        windows_Wx2 = np.concatenate(runs)
        elapsed, thread = np.median(windows_Wx2, axis=0).tolist()
        row = {"loop": name, "elapsed_ms": elapsed, "fastest_ms": float(windows_Wx2[:, 0].min()), "thread_ms": thread}
        rows.append(row | {"windows": len(windows_Wx2)})
        timing.print_line(list(rows[-1].values()), list(COLUMNS.values()))
    if arguments.profile:
        profile = cProfile.Profile(time.thread_time)
        profile.runcall(measure, arguments.steps, 1, rounds)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    timing.write(arguments.json, given, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
