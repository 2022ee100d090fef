"""Independent jobs on several processes, with bounded memory and one line of progress."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from niso.errors import UserError

J = TypeVar("J")
R = TypeVar("R")


def run(function: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[R]:
    """The results of function(job) in the order they are ready; jobs are drawn only when a worker will soon be free.

    One worker means this process.  With more, function and jobs must be picklable, and the caller's script needs a
    `__main__` guard (processes are spawned: forking a process with threads can hang).  The first exception ends all.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_follow_parent) as pool:
        waiting: set[concurrent.futures.Future[R]] = set()
        try:
            for job in jobs:
                # Workers are spawned here and inherit the mask: until they have their handler Ctrl-C waits for them.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    waiting.add(pool.submit(function, job))
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                while len(waiting) > workers:  # one job in reserve, so that no worker waits for the next to be drawn
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in concurrent.futures.as_completed(waiting))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?): run the same command again, with fewer --workers; "
                "what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ends this worker when its parent is gone (a killed parent cannot tell it, and it would wait for ever).

    Ctrl-C reaches workers too: they leave at once and in silence, the parent says what there is to say.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """One updating line on a terminal, a line every half a minute elsewhere: shards, frames or images per second, time left."""

    def __init__(self, total: int, units: str = "frames", pieces: str = "shards", stream: TextIO | None = None):
        self._total, self._units, self._pieces = total, units, pieces
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._start = self._last = time.monotonic()
        self._done = self._records = 0

    def add(self, records: int) -> None:
        """Counts one finished shard of so many records, and prints if it is time to."""
        self._done += 1
        self._records += records
        now = time.monotonic()
        if not self._tty and now - self._last < 30 and self._done < self._total:
            return
        self._last = now
        elapsed = max(now - self._start, 1e-9)
        left = int(elapsed / self._done * (self._total - self._done))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        rate = self._records / elapsed
        speed = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        line = f"{self._done}/{self._total} {self._pieces}, {speed} {self._units}/s, {clock} left"
        end = "" if self._tty and self._done < self._total else "\n"
        print(f"\r{line:<60}" if self._tty else line, end=end, file=self._stream, flush=True)
