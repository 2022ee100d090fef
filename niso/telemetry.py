"""What a run says about itself: event files, metrics.jsonl, hours.jsonl, the terminal line, the profiler window.

With niso.event_writer the only importer of clu and tensorboard. Everything but the hours is written by one background thread
per file; an orderly `close()` loses nothing, and a failed write is a UserError at the next call.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from niso.errors import UserError
from niso.event_writer import AppendFile, EventWriter, JsonlWriter, drop_after
from niso.run_files import HOURS, HOURS_FILE

# isort: split
# After niso.event_writer, which stands in for what clu wants of TensorFlow.
from clu import metric_writers, periodic_actions


class StepTimer:
    """Speed and waiting time between log points; the first step, which compiles, is kept apart.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._begun = clock()  # of the first step, later of the window
        self._steps: int | None = None  # of the window; None before the first step has ended
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            self._waited += end - start
            if self._steps is None:  # the first step begins when its data is there
                self._begun = end

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._begun += self._clock() - start

    def tick(self) -> float | None:
        """Call after every step. Returns the seconds of the first one, once."""
        if self._steps is not None:
            self._steps += 1
            return None
        first = self._clock() - self._begun
        self._restart()
        return first

    def window(self) -> tuple[float, float] | None:
        """Returns (steps per second, share of the time spent waiting in [0, 1]) since the last call; starts anew.

        None if no step (after the first one) has been made.
        """
        if not self._steps:
            return None
        elapsed = max(self._clock() - self._begun, 1e-9)
        result = self._steps / elapsed, min(self._waited / elapsed, 1.0)
        self._restart()
        return result

    def _restart(self) -> None:
        self._begun, self._steps, self._waited = self._clock(), 0, 0.0


class DeviceHours:
    """Hours since the start times devices, over all resumes: `workdir`/hours.jsonl, apart from what a rerun reproduces.

    A resumed run goes on from what was written up to the step it resumes from: neither waiting for a machine nor steps that were
    lost count. One whose first part did not know its hours writes none.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int, clock: Callable[[], float]):
        path = Path(workdir) / HOURS_FILE
        drop_after(path, resume_step if resume_step > 0 else -1)
        kept = path.read_text().splitlines() if path.exists() else []
        nothing = 0.0 if resume_step == 0 else None  # an earlier part, by a niso that did not count
        self._before = json.loads(kept[-1])[HOURS] if kept else nothing
        self._clock, self._begun = clock, clock()
        self.file = AppendFile(path)

    def write(self, step: int) -> dict[str, float]:
        """Appends the hours after `step` updates, and returns them under their name."""
        if self._before is None:
            return {}
        hours = {HOURS: self._before + jax.device_count() * (self._clock() - self._begun) / 3600.0}
        self.file.write(json.dumps({"step": step} | hours).encode() + b"\n")
        return hours


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Returns "loss 0.4123  reconstruction 0.3010": four to six digits each, whatever the size."""
    return "  ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def format_seconds(seconds: float) -> str:
    """Returns "42 s", "1 min 59 s", "2 h 05 min" or "3 d 04 h"."""
    whole = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part:02d} {part_name}"
    return f"{whole} s"


def _number(value: float) -> str:
    size = abs(value)
    if math.isfinite(value) and size != 0 and not 1e-3 <= size < 1e3:
        return f"{value:.3e}"
    return f"{value:.{4 if size < 10 else 3 if size < 100 else 2}f}"


def _rate(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


class Telemetry:
    """All a run reports; a context manager. On hosts that are not `primary` it does nothing at all.

    Args:
        workdir: created if missing; a path on a mounted file system.
        steps: of the whole run. batch: examples per step, over all hosts and replicas.
        resume_step: the step the run continues from; what was written about later steps is dropped.
        profile_steps: (a, b) traces the updates a+1 to b for TensorBoard's profiler; (0, 0) traces nothing.
        clock: seconds; for tests.

    Raises:
        UserError: from the constructor and any method, if the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        steps: int,
        batch: int,
        resume_step: int = 0,
        primary: bool = True,
        profile_steps: tuple[int, int] = (0, 0),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._active, self._steps, self._batch = primary, steps, batch
        self._timer = StepTimer(clock)
        self._resume_step = self._last_step = resume_step
        self._files: list[AppendFile] = []
        self._profile: Callable[[int], Any] | None = None
        self._profile_end = profile_steps[1]
        if not primary:
            return
        if "://" in os.fspath(workdir):
            raise UserError(f"workdir {os.fspath(workdir)} is a URL: mount the bucket and give the mounted path.")
        # Readers drop what is later than the resumed step; a run from scratch, all of an earlier attempt.
        events = EventWriter(workdir, purge_step=resume_step + 1 if resume_step > 0 else 0)
        lines = JsonlWriter(workdir, resume_step)
        self._hours = DeviceHours(workdir, resume_step, clock)
        self._files = [events.file, lines.file, self._hours.file]
        self._events = metric_writers.AsyncWriter(events)
        self._lines = metric_writers.AsyncWriter(lines)
        first, last = profile_steps
        if last > first:
            self._profile = periodic_actions.Profile(
                logdir=os.fspath(workdir),
                first_profile=first,
                num_profile_steps=last - first,
                profile_duration_ms=None,
                every_secs=None,
            )

    def config(self, text: str, hparams: Mapping[str, int | float | str | bool]) -> None:
        """Writes the resolved config as a text, and the flat `hparams` for TensorBoard's table of runs."""
        if self._active:
            self._events.write_texts(self._resume_step, {"config": "\n".join(f"    {x}" for x in text.splitlines())})
            self._events.write_hparams(dict(hparams))
            self._check()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {name: value} to the event file and as one line of metrics.jsonl."""
        if self._active:
            values = {name: float(value) for name, value in values.items()}
            self._events.write_scalars(step, values)
            self._lines.write_scalars(step, values)
            self._check()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes {tag: uint8 HxWx3}."""
        if self._active:
            self._events.write_images(step, {tag: np.array(image) for tag, image in images.items()})
            self._check()

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the histograms of {tag: array of any shape}."""
        if self._active:
            self._events.write_histograms(step, {tag: np.array(array) for tag, array in arrays.items()})
            self._check()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Times its body as time spent waiting for data."""
        return self._timer.waiting()

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Leaves the time of its body, such as an evaluation, out of the training speed."""
        return self._timer.aside()

    def tick(self, step: int) -> None:
        """Call once after every step: times the first one (compilation) and opens and closes the profiler window."""
        self._last_step = step
        compiled = self._timer.tick()
        if compiled is not None:
            self.say(f"compiled in {compiled:.1f} s")
        if self._profile is not None:
            self._profile(step)

    def progress(self, step: int, metrics: Mapping[str, float], counts: Mapping[str, int] = MappingProxyType({})) -> None:
        """Prints the line of a log point, and writes its speeds and the device hours under time/, and `counts`.

        They go to the event file, and not to metrics.jsonl, which holds what a rerun reproduces.
        """
        if not self._active:
            return
        line = f"step {step:>{len(str(self._steps))}}/{self._steps} {f'({100 * step // self._steps} %)':<7}"
        line = f"{line} {format_metrics(metrics)}".rstrip()
        line += "".join(f"  {name} {count}" for name, count in counts.items() if count)
        times = self._hours.write(self._last_step) | dict(counts)
        rate = self._timer.window()
        if rate is not None:
            steps_per_second, share = rate
            examples_per_second = steps_per_second * self._batch
            line += f" | {_rate(steps_per_second)} steps/s  {_rate(examples_per_second)} examples/s"
            line += f"  waiting for data {100 * share:.0f} %"
            if step < self._steps:
                line += f"  {format_seconds((self._steps - step) / steps_per_second)} left"
            times |= {"time/steps_per_second": steps_per_second, "time/examples_per_second": examples_per_second}
            times["time/data_wait_share"] = share
        if times:
            self._events.write_scalars(step, times)
        self.say(line)
        self._check()

    def say(self, line: str) -> None:
        """Prints one line to the terminal."""
        if self._active:
            print(line, flush=True)

    def flush(self) -> None:
        """Waits until everything reported so far is in the files; call it before a checkpoint, whose hours it writes."""
        if self._active:
            self._hours.write(self._last_step)
            self._events.flush()
            self._lines.flush()
            self._check()

    def close(self) -> None:
        """Ends an open profiler window and waits until everything is on disk; calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        if self._profile is not None:
            self._profile(self._profile_end)
        with contextlib.ExitStack() as stack:
            stack.callback(self._lines.close)
            stack.callback(self._events.close)

    def _check(self) -> None:
        for file in self._files:
            file.check()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An exception that is already on its way says more than the failure to close after it.
        with contextlib.suppress(*(() if kind is None else (Exception,))):
            self.close()
