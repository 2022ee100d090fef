"""Traces of some updates for TensorBoard's profiler: of a window that the config names, and on demand."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax

ON_DEMAND = 5  # updates in a trace after SIGUSR1
FOLDER = Path("plugins") / "profile"  # below the logdir, where TensorBoard looks


class Profiler:
    """Traces the updates a+1 to b of a window (a, b), and the next ON_DEMAND after each `kill -USR1` of this process.

    One trace at a time: what is asked for during another one follows it.

    Any process of a run may be asked, each of the machines of a pod then has a file of its own in TensorBoard.

    Args:
      folder: where the run's files are written.
      workdir: what people call that.
      say: prints a line.
    """

    def __init__(self, folder: Path, window: tuple[int, int], workdir: Path, say: Callable[[str], None]):
        self._folder, self._window, self._workdir, self._say = folder, window, workdir, say
        self._asked = False
        self._begun: int | None = None
        self._end = self._step = 0
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():  # no other may
            self._previous = signal.signal(signal.SIGUSR1, self._ask)

    def tick(self, step: int) -> None:
        """Call before the first update and after every one; `step` of them are done."""
        self._step = step
        if self._begun is not None and step >= self._end:
            self._stop()
        first, last = self._window
        if self._begun is None and (self._asked or (step == first and last > first)):
            self._end = last if step == first < last else step + ON_DEMAND
            self._asked = False
            self._start()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._begun is not None:
            self._stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
            self._previous = None

    def _start(self) -> None:
        try:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._begun = self._step
        except RuntimeError as error:  # another one is under way in this process
            self._say(f"no profile of step {self._step + 1}: {str(error).splitlines()[0]}")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        traces = (self._folder / FOLDER).glob("*")
        newest = max(traces, key=lambda trace: trace.stat().st_mtime_ns, default=self._folder / FOLDER)
        where = self._workdir / newest.relative_to(self._folder)
        assert self._begun is not None
        begun, self._begun = self._begun, None
        self._say(f"profile of steps {begun + 1} to {self._step} in {where}: tensorboard --logdir {self._workdir}")

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
