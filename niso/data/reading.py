"""Reading one item of a split, readable or not: either that is an error, or it is said and the next one taken instead.

What is being read is known to whoever waits for it, and a worker process says what takes long by itself.
"""

import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from niso.data import watchdog
from niso.data.watchdog import Watchdog
from niso.errors import RecordError, UserError

FATAL, SKIP = "fatal", "skip"  # values of config.data.unreadable
IN_A_ROW = 64  # unreadable items; more of them are no accident

Value = TypeVar("Value")


class Reading:
    """How the items of one split are read; may be pickled (to a worker process) and shared between threads.

    Args:
        unreadable: "fatal": an item that cannot be read is an error. "skip": the next one that can be is taken instead.
    """

    def __init__(self, unreadable: str):
        self.skip = unreadable == SKIP
        self.limit = watchdog.LIMIT  # the same in worker processes
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._begun: dict[int, tuple[Callable[[int], str], int, float]] = {}  # thread -> (name, item, since)
        self._watchdog: Watchdog | None = None
        self._in_worker = False

    def __getstate__(self) -> dict[str, Any]:
        return {"skip": self.skip, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()
        self._in_worker = True  # it was sent there; nobody else could say what it reads

    def begun(self) -> dict[str, float]:
        """What threads of this process read at the moment, and since when (time.monotonic)."""
        return {name(item): since for name, item, since in self._begun.copy().values()}

    def read(self, item: int, size: int, read: Callable[[int], Value], name: Callable[[int], str]) -> tuple[int, Value]:
        """(number, value) of the item, or of the first one after it that can be read; after the last of `size` comes the first.

        Which one that is depends on the item and the records alone.  Each bad record is said once by every process.

        Args:
            read: From an item's number to its value.
            name: To what it is called.

        Raises:
            RecordError: it cannot be read, and nothing shall be skipped.
            UserError: nor can the IN_A_ROW - 1 after it.
        """
        if self._in_worker and self._watchdog is None:
            with self._lock:
                if self._watchdog is None:
                    self._watchdog = Watchdog(self.begun, _describe, self.limit)
                    threading.Thread(target=_end_with_parent, name="niso-parent", daemon=True).start()
        errors: list[RecordError] = []
        thread = threading.get_ident()
        for number in range(item, item + min(IN_A_ROW, size)):
            self._begun[thread] = name, number % size, time.monotonic()
            try:
                value = read(number % size)
            except RecordError as error:
                if not self.skip:
                    raise
                errors.append(error)
                continue
            finally:
                del self._begun[thread]
            if errors:
                self._say(errors, f"{name(number % size)} stand in for {name(item)}")
            return number % size, value
        raise UserError(f"{errors[0]}; and the {len(errors) - 1} that follow {name(item)} are no better: too many to be skipped")

    def leave_out(self, error: RecordError, name: str) -> None:
        """Says that what is called so is done without, because of `error`; raises that where nothing shall be skipped."""
        if not self.skip:
            raise error
        self._say([error], f"{name} is left out")

    def _say(self, errors: list[RecordError], consequence: str) -> None:
        with self._lock:
            for line in {str(error): None for error in errors if str(error) not in self._said}:
                self._said.add(line)
                print(f"niso: skipped: {line}; {consequence}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    """Ends this worker process once the one that it reads for is gone: killed, that one could not, and grain's workers stay."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _describe(name: str, seconds: float) -> str:
    return f"worker process {os.getpid()} on {platform.node()} has been reading {name} for {seconds:.0f} s"
