"""Says on stderr what takes unusually long, while it does."""

import sys
import threading
import time
from collections.abc import Callable, Mapping

LIMIT = 30.0  # seconds until something is said to take long; then again after twice as long, and so on


class Watchdog:
    """A thread that looks at what has begun and not ended, until `close`.

    Args:
        begun: What is under way, and since when (time.monotonic); called every LIMIT / 10.
        describe: One line about one of these, which has taken that many seconds.
        limit: Seconds.
    """

    def __init__(self, begun: Callable[[], Mapping[str, float]], describe: Callable[[str, float], str], limit: float):
        self._begun, self._describe, self._limit = begun, describe, limit
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="niso-watchdog", daemon=True).start()

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._closed.set()

    def _watch(self) -> None:
        said: dict[tuple[str, float], int] = {}  # how often
        while not self._closed.wait(self._limit / 10):
            said = {task: said.get(task, 0) for task in self._begun().items()}
            for (what, since), times in said.items():
                took = time.monotonic() - since
                if took >= self._limit * 2**times:
                    said[what, since] += 1
                    print(f"niso: {self._describe(what, took)}", file=sys.stderr, flush=True)
