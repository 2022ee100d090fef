"""How fast a run is, how hard it works its devices, and how long it has had them over all its resumes."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from niso import hardware
from niso.event_writer import AppendFile, drop_after
from niso.run_files import HOURS, HOURS_FILE

RESTARTS = "time/restarts"


class StepTimer:
    """Speed and waiting time between log points; the first step, which may tune the program, is in none of them.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._begun = clock()  # of the window
        self._steps: int | None = None  # of the window; None before the first step has ended
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._begun += self._clock() - start

    def tick(self) -> None:
        """Call after every step."""
        if self._steps is None:
            self._restart()
        else:
            self._steps += 1

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


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """What one step computes (products and convolutions, on all devices, Program.model_operations), and the published peak of these
    devices together in FLOP/s: None for CPUs and others that hardware.py does not have."""

    operations: float
    peak: float | None

    @staticmethod
    def of(operations: float, devices: int, kind: str, dtype: str) -> "Utilisation":
        """On that many devices of a kind, for networks in a dtype."""
        chip = hardware.find(kind)
        return Utilisation(operations, chip.peak(dtype) * devices if chip else None)

    def scalars(self, steps_per_second: float) -> dict[str, float]:
        """The model FLOP utilisation as a share of the peak in [0, 1]; FLOP/s where there is no peak to compare with."""
        rate = self.operations * steps_per_second
        return {"time/flops_per_second": rate} if self.peak is None else {"time/mfu": rate / self.peak}


def memory_peak() -> dict[str, float]:
    """The most memory that one of this host's devices has held so far, GB of 1e9 bytes; nothing where the backend does not say."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return {"time/device_memory_peak_gb": max(peaks) / 1e9} if peaks else {}


class DeviceHours:
    """Hours since the start times devices, and how often the run was started again, over all resumes: `workdir`/hours.jsonl,
    apart from what a rerun reproduces.

    A resumed run goes on from what was written up to the step it resumes from: neither waiting for a machine nor steps that were
    lost count, but the start that lost them does. One whose first part did not know its hours writes none.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int, clock: Callable[[], float]):
        path = Path(workdir) / HOURS_FILE
        earlier = path.read_text(errors="replace") if path.exists() else ""
        self._restarts = max((int(n) for n in re.findall(rf'"{RESTARTS}": (\d+)', earlier)), default=0) + bool(earlier)
        drop_after(path, resume_step if resume_step > 0 else -1)
        kept = path.read_text().splitlines() if path.exists() else []
        nothing = 0.0 if resume_step == 0 else None  # an earlier part, by a niso that did not count
        self._before = json.loads(kept[-1])[HOURS] if kept else nothing
        self._clock, self._begun = clock, clock()
        self.file = AppendFile(path)
        self.write(resume_step)  # a start counts from here on, however soon it ends

    def write(self, step: int) -> dict[str, float]:
        """Appends the hours after `step` updates and the restarts, and returns them under their names."""
        if self._before is None:
            return {}
        hours = self._before + jax.device_count() * (self._clock() - self._begun) / 3600.0
        found = {HOURS: hours, RESTARTS: self._restarts}
        self.file.write(json.dumps({"step": step} | found).encode() + b"\n")
        return found
