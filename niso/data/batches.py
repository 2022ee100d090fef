"""From the addresses of a global batch to this host's rows of the batch, in whichever thread or process reads them."""

import dataclasses
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from niso.data.addresses import Address
from niso.data.reading import Reading
from niso.data.watchdog import Watchdog
from niso.errors import LostError, UserError

Batch = dict[str, np.ndarray]
Rows = slice | Sequence[int]
Worker = multiprocessing.process.BaseProcess
REPLACED = "replaced_B"  # an entry of batches on their way to the process that counts them, from whichever fetched them


class Items(Protocol):
    """The items of one split and the means to read them; goes to worker processes.

    Attributes:
        reading: How they are read.
    """

    @property
    def reading(self) -> Reading: ...

    def fetch(self, item_BxS: np.ndarray, weight_B: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The batch of the examples of these items, and replaced_B, in which of them another item was taken in one's place."""

    def name(self, item: int) -> str:
        """What an item is called."""


@dataclasses.dataclass(frozen=True)
class FetchRows:
    """Maps the addresses of a global batch to this host's rows of the batch itself; `exact`: in it replaced examples weigh 0."""

    items: Items
    rows: Rows
    exact: bool

    def __call__(self, address: Address) -> Batch:
        batch, replaced_B = self.items.fetch(address["item_BxS"][self.rows], address["weight_B"][self.rows])
        replaced_B = replaced_B & (batch["weight_B"] > 0)  # not the copies that fill up the last batch
        if self.exact:
            batch["weight_B"][replaced_B] = 0
        return batch | {REPLACED: replaced_B}


class Batches:
    """An iterator of batches that owns threads or processes; close it, or use it as a context manager.

    Reading ahead begins at once.  An error of a thread or worker process is raised by the `next` that would have
    returned its batch, a UserError as itself however grain wrapped it, and a worker process that was killed as a
    LostError.  A `next` that takes long says so on stderr, and what is being read meanwhile.

    Attributes:
        replaced: Examples of the batches returned so far of which a record could not be read.
    """

    def __init__(self, iterator: Any, reading: Reading, name: str, first: int):
        """Of a grain iterator over what FetchRows returns, whose items `reading` reads.

        They are called `name` and a number, from `first` on.
        """
        self.replaced = 0
        self._reading, self._name, self._next = reading, name, first
        self._iterator = iterator
        self._iterator.start_prefetch()
        self._waiting: dict[str, float] = {}  # for which batch, since when
        self._watchdog = Watchdog(self._waiting.copy, self._describe, reading.limit)
        self._workers: dict[int | None, Worker] = {}  # all that were seen and have not ended as they should

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        name = f"{self._name} {self._next}"
        self._waiting[name] = time.monotonic()
        seen = self._workers | {one.pid: one for one in _workers()}
        self._workers = {pid: one for pid, one in seen.items() if one.exitcode != 0}
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            lost = _lost(error, {pid: one.exitcode for pid, one in self._workers.items() if one.exitcode}, name)
            self.close()
            if lost is not None:
                raise lost from None
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise cause from None
        finally:
            del self._waiting[name]
        self._next += 1
        self.replaced += int(batch.pop(REPLACED).sum())
        return batch

    def close(self) -> None:
        """Ends the threads and processes; may be called twice."""
        self._watchdog.close()
        self._iterator.close()

    def _describe(self, waiting: str, seconds: float) -> str:
        """One line about the batch that is waited for."""
        now = time.monotonic()
        found = [f"{name} for {now - since:.0f} s" for name, since in self._reading.begun().items()]
        found += [f"worker process {child.pid}" for child in _workers()]
        line = f"no data yet for {waiting} after {seconds:.0f} s, in process {os.getpid()} on {platform.node()}"
        return f"{line}; it waits for {', '.join(found) or 'no reader'}"

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _workers() -> list[Worker]:
    """The worker processes that live."""
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def _lost(error: Exception, ended: dict[int | None, int], waiting: str) -> LostError | None:
    """What grain's error says where a worker process has ended without a word, `ended` being exit codes by process."""
    if not isinstance(error, RuntimeError) or "terminated unexpectedly" not in str(error):
        return None
    which = ", ".join(f"{pid} ({f'signal {-code}' if code < 0 else f'exit code {code}'})" for pid, code in ended.items())
    return LostError(
        f"worker process {which or 'of unknown number'} on {platform.node()}, which reads data, was killed while {waiting} waited "
        "for it; most likely the machine is short of memory: lower data.workers or data.prefetch, or read in threads "
        "(data.workers=0), which change no batch. What was saved is intact; go on under such a config with --accept_config_changes"
    )
