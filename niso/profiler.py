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

    Args:
      say: prints a line.
    """

    def __init__(self, workdir: str | os.PathLike[str], window: tuple[int, int], say: Callable[[str], None]):
        self._workdir, self._window, self._say = os.fspath(workdir), window, say
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
            jax.profiler.start_trace(self._workdir)
            self._begun = self._step
        except RuntimeError as error:  # another one is under way in this process
            self._say(f"no profile of step {self._step + 1}: {str(error).splitlines()[0]}")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        folders = (Path(self._workdir) / FOLDER).glob("*")
        newest = max(folders, key=lambda folder: folder.stat().st_mtime_ns, default=Path(self._workdir) / FOLDER)
        assert self._begun is not None
        self._say(f"profile of steps {self._begun + 1} to {self._step} in {newest}: tensorboard --logdir {self._workdir}")
        self._begun = None

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
