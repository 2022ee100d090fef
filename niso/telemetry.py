"""What a run says about itself: event files, metrics.jsonl, hours.jsonl, the terminal line, profiles.

With niso.event_writer the only importer of clu and tensorboard. Everything but the hours is written by one background thread
per file; an orderly `close()` loses nothing, and a failed write is a UserError at the next call.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from niso import cost, folders
from niso.event_writer import ROLL_BYTES, EventWriter, JsonlWriter
from niso.mirror import Mirror
from niso.profiler import Profiler
from niso.run_files import HOURS_FILE, METRICS_FILE
from niso.speed import DeviceHours, StepTimer, Utilisation, memory_peak

# isort: split
# After niso.event_writer, which stands in for what clu wants of TensorFlow.
from clu import metric_writers

if TYPE_CHECKING:
    from niso.step import Program


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
    """All a run reports; a context manager. On hosts that are not `primary` it does nothing but profiles that are asked for there.

    Args:
        workdir: created if missing; where it is in a bucket, files are written here and copied (niso.mirror).
        steps: of the whole run. batch: examples per step, over all hosts and replicas.
        resume_step: the step the run continues from; what was written about later steps is dropped.
        profile_steps: (a, b) traces the updates a+1 to b for TensorBoard's profiler (niso.profiler); (0, 0) traces nothing.
        clock: seconds; for tests.

    Attributes:
        workdir: The run's folder, as it is told to people.
        folder: The same, or on this machine what becomes it: where its files are written.

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
        self._active, self._steps, self._batch, self._clock = primary, steps, batch, clock
        self._timer, self._closed = StepTimer(clock), False
        self._resume_step = self._last_step = resume_step
        self._writers: tuple[EventWriter | JsonlWriter | DeviceHours, ...] = ()
        self._work: Utilisation | None = None
        self.workdir = folders.named(workdir, "workdir")
        self._mirror = Mirror(self.workdir, (METRICS_FILE, HOURS_FILE) if primary else ())
        self.folder = self._mirror.folder
        window = profile_steps if primary else (0, 0)
        self._profiler = Profiler(self.folder, window, self.workdir, self._profiled)
        if not primary:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self._mirror.close)
            stack.callback(self._profiler.close)
            self._open(resume_step)
            stack.pop_all()

    def _open(self, resume_step: int) -> None:
        """The files of the first process."""
        # Readers drop what is later than the resumed step; a run from scratch, all of an earlier attempt.
        limit = ROLL_BYTES if folders.remote(self.workdir) else None
        events = EventWriter(self.folder, resume_step + 1 if resume_step > 0 else 0, limit)
        lines = JsonlWriter(self.folder, resume_step)
        self._hours = DeviceHours(self.folder, resume_step, self._clock)
        self._writers = (events, lines, self._hours)
        self._events = metric_writers.AsyncWriter(events)
        self._lines = metric_writers.AsyncWriter(lines)
        self._mirror.push()  # a start counts, however soon it ends

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

    def compile(self, program: "Program") -> Callable[..., Any]:
        """The train step compiled, once and ahead of time: takes and returns what `program.train` does. Says how long that took.

        Raises:
            UserError: it needs more memory than the devices have.
        """
        start = self._clock()
        traced = program.train.trace(program.state_shapes, program.batch_shapes)
        step = cost.compiled(traced)
        if self._active:
            seconds = self._clock() - start
            self.say(f"compiled in {seconds:.1f} s")
            self._events.write_scalars(self._resume_step, {"time/compile_seconds": seconds})
            device, dtype = program.mesh.devices.flat[0], getattr(program.task, "dtype", "float32")
            self._work = Utilisation.of(program.model_operations(traced), program.mesh.size, device.device_kind, dtype)
        self._profiler.tick(self._resume_step)
        return step

    def tick(self, step: int) -> None:
        """Call once after every step: begins and ends profiles."""
        self._last_step = step
        self._timer.tick()
        self._profiler.tick(step)

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
            times |= self._work.scalars(steps_per_second) if self._work else {}
        times |= memory_peak()
        if times:
            self._events.write_scalars(step, times)
        self.say(line)
        self._check()
        self._mirror.push_now_and_then()

    def say(self, line: str) -> None:
        """Prints one line to the terminal."""
        if self._active:
            print(line, flush=True)

    def _profiled(self, line: str) -> None:
        """What the profiler says, in whichever process: there may be a new profile."""
        print(line, flush=True)
        self._mirror.push_soon()

    def flush(self) -> None:
        """Waits until everything reported so far is in the files, and those in the bucket; call it before a checkpoint, whose
        hours it writes."""
        if self._active:
            self._hours.write(self._last_step)
            self._events.flush()
            self._lines.flush()
            self._check()
            self._mirror.push()

    def close(self) -> None:
        """Ends a profile that is under way and waits until everything is on disk; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._mirror.close)
            stack.callback(self._mirror.push)
            if self._active:
                self._active = False
                stack.callback(self._lines.close)
                stack.callback(self._events.close)
            self._profiler.close()

    def _check(self) -> None:
        for writer in self._writers:
            writer.file.check()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An exception that is already on its way says more than the failure to close after it.
        with contextlib.suppress(*(() if kind is None else (Exception,))):
            self.close()
