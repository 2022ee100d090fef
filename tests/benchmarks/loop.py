"""What the loop itself costs: milliseconds per step of a task that does nothing.

  python -m tests.benchmarks.loop --steps 3000 --json loop.json
  python -m tests.benchmarks.loop --steps 3000 --window 10 --device_ms 50

Three rows: `bare`, the compiled step alone, its batch placed, no more than two of them in flight, for a few windows; then of
one run, window by window in turns, steps with no log point, which add all else of a real run: the check for preemption,
telemetry, what stops a run that is no longer finite; and with one at every step: metrics, event file, metrics.jsonl,
hours.jsonl and the terminal line (kept in memory here). A row's figures are medians over windows of so many steps. On a busy
machine others only ever add to the elapsed time, so the fastest window stands beside it, and the time that the loop's own
thread was on a core (`thread_ms`), which others hardly change. Below them: what log points add to the elapsed time, the median
over pairs of windows, one with and the one before without, and the standard error of that by resampling the pairs. With
--device_ms every step keeps one core busy that long, in the place of an accelerator: what the host does meanwhile on another
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

LEAST = 5  # windows
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


class InTurns(int):
    """A number of steps between log points, for the loop: one at every step in every second window, and none in the others.

    A log point is written while the next step is made; so those are due that are written in such a window.
    """

    def __rmod__(self, step: int) -> int:
        return 1 - step // self % 2


class Clocked:
    """A dataset whose batches are always the same, and that looks at the clock whenever the loop has made `window` steps."""

    replaced = None

    def __init__(self, batch: int, window: int):
        self.window, self.batch = window, {"weight_B": np.ones(batch, np.float32)}
        self.times: list[tuple[float, float]] = []  # elapsed, of this thread

    @contextlib.contextmanager
    def train_batches(self, *, start: int, steps: int, **_: Any) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        """As Examples.train_batches."""
        yield self._count(steps - start)

    def _count(self, steps: int) -> Iterator[dict[str, np.ndarray]]:
        for step in range(steps):
            if step % self.window == 0:
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
        """Milliseconds per step, elapsed and of the loop's own thread, of all windows but two, in which files are opened."""
        return 1e3 * np.diff(self.times[2:], axis=0) / self.window


def experiment(steps: int, window: int, rounds: int) -> Experiment:
    """The experiment of nothing: the published optimiser, log points in every second window, one checkpoint at the end."""
    config = get_config("quick")
    config.update(experiment="nothing", steps=steps, batch=8)
    config.checkpoint.every = steps
    config.log.update(evaluate_every=steps, figures_every=0)
    e = Experiment.from_config(config)
    log = dataclasses.replace(e.log, every=InTurns(window))
    return dataclasses.replace(e, log=log, task=Nothing(trainable=".*", warm_start=(), rounds=rounds))


def measure(e: Experiment, window: int, bare: bool) -> np.ndarray:
    """Milliseconds per step of the windows of a run in a folder of its own, or of the step alone."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, keep=1)
        stack.callback(checkpoints.close)
        clocked = Clocked(e.batch, window)
        dataset: Any = clocked
        program = Program(e, sharding.make_mesh(e.mesh), {"weight_B": ((e.batch,), np.dtype(np.float32))})
        telemetry = stack.enter_context(Telemetry(workdir, steps=e.steps, batch=e.batch))
        if bare:
            _bare(program, telemetry, clocked, e.steps)
        else:
            train.loop(program, dataset, checkpoints, Journal(program, dataset, telemetry), program.init({}))
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
    parser.add_argument("--steps", type=timing.positive, default=3000, help="steps of a run, default 3000")
    parser.add_argument("--window", type=timing.positive, default=100, help="steps of a window, default 100")
    parser.add_argument("--device_ms", type=float, default=0.0, help="milliseconds that a step takes on its device, default 0")
    parser.add_argument("--profile", action="store_true", help="list the functions that take longest when every step is logged")
    parser.add_argument("--json", type=timing.json_file, help="file that gets the rows as JSON")
    arguments = parser.parse_args(given)
    steps, window = arguments.steps, arguments.window
    if steps < (LEAST + 3) * window:
        parser.error(f"argument --steps: {steps} is less than {LEAST + 3} windows of {window}")
    timing.print_surroundings()
    timing.print_line(list(COLUMNS), list(COLUMNS.values()))
    e = experiment(steps, window, rounds_of(arguments.device_ms) if arguments.device_ms else 0)
    bare_Wx2 = measure(dataclasses.replace(e, steps=(LEAST + 3) * window), window, bare=True)
    both_Wx2 = measure(e, window, bare=False)
    taken = {"bare": bare_Wx2, "no log point": both_Wx2[::2], "log every step": both_Wx2[1::2]}
    rows = []
    for name, windows_Wx2 in taken.items():
        elapsed, thread = np.median(windows_Wx2, axis=0).tolist()
        row = {"loop": name, "elapsed_ms": elapsed, "fastest_ms": float(windows_Wx2[:, 0].min()), "thread_ms": thread}
        rows.append(row | {"windows": len(windows_Wx2)})
        timing.print_line(list(rows[-1].values()), list(COLUMNS.values()))
    without_Px2, with_Px2 = both_Wx2[::2][: len(both_Wx2) // 2], both_Wx2[1::2]
    added_P = with_Px2[:, 0] - without_Px2[:, 0]
    error = np.std(np.median(np.random.default_rng(0).choice(added_P, (2_000, len(added_P))), axis=1))
    rows.append({"loop": "log points add", "elapsed_ms": float(np.median(added_P)), "standard_error_ms": float(error)})
    print(f"log points add {np.median(added_P):.3f} +- {error:.3f} ms to a step")
    if arguments.profile:
        profile = cProfile.Profile(time.thread_time)
        profile.runcall(measure, e, window, bare=False)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    timing.write(arguments.json, given, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
