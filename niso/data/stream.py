"""What all datasets have in common: a section of the config, a folder of records, and host batches out of it.

The training stream is a function of (seed, position).  Item numbers (windows of frames, images) are shuffled globally,
repeated, put together to examples and batches, each host takes its rows of the batch, and only then is anything read.
So a host touches no record it does not use, resuming costs nothing, and neither threads, workers nor hosts change a
batch.
"""

import abc
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Generic, TypeVar

import grain.python as grain
import numpy as np

from niso import folders
from niso.data import datasets, records, synthetic
from niso.data.addresses import HeldOutAddresses, ListedAddresses, train_addresses
from niso.data.batches import Batch, Batches, FetchRows, Items, Rows
from niso.data.reading import FATAL, SKIP
from niso.errors import LostError, UserError

Opened = TypeVar("Opened")
# Memory that killed workers leave behind is cleared away by Python's tracker, which would warn of it below the line that matters.
QUIET = "ignore:resource_tracker:UserWarning"


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC, Generic[Opened]):
    """The keys of config.data that every kind of dataset has.

    Attributes:
        dataset: Row of datasets.py; it says which kind this is.
        records: Folder of records, when twin is "".
        twin: "" or the built-in twin to use instead: "tiny", "small" or "full", made into the cache folder if absent.
        size: Edge of the pictures in pixels; must be the records' own.
        threads: Threads that read and decode, in each process that does; more than `prefetch` have nothing to do.
        prefetch: Batches read ahead.
        workers: Processes that read and decode; 0 for threads of this one.  Needs parsed absl flags and a main guard.
        unreadable: "fatal": a record that cannot be read ends the run. "skip": the next example that can be read is trained on
            in the place of one that cannot, which is evaluated with weight 0.
    """

    dataset: str
    records: str
    twin: str
    size: int
    threads: int
    prefetch: int
    workers: int
    unreadable: str

    @property
    @abc.abstractmethod
    def example(self) -> str:
        """What an example is, in words."""

    @abc.abstractmethod
    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many examples."""

    @abc.abstractmethod
    def open(self) -> Opened:
        """The dataset, checked; UserError as in `find_records`, or for a value out of range or a split without an example."""

    def check(self, **least: int) -> None:
        """Raises a UserError for a value that cannot be meant; `least` are the smallest values of the kind's own keys."""
        for name, minimum in ({"size": 1} | least | {"threads": 0, "prefetch": 0, "workers": 0}).items():
            if getattr(self, name) < minimum:
                raise UserError(f"config.data.{name} is {getattr(self, name)}: it must be at least {minimum}")
        if self.unreadable not in (FATAL, SKIP):
            raise UserError(f"config.data.unreadable is {self.unreadable!r}: it must be {FATAL} or {SKIP}")
        if self.twin and self.records:
            asked = f"data.twin={self.twin} and data.records={self.records}"
            raise UserError(f"both {asked} are set: set --config.data.twin= or --config.data.records= to nothing")


def find_records(data: Source) -> tuple[datasets.Dataset, pathlib.Path]:
    """The row of data.dataset and the folder data.records, or that of the built-in twin, which is made first if need be.

    Raises:
        UserError: an unknown dataset or twin; a size that the dataset does not come in; records that are missing, of
            another dataset or size, or without a split.
    """
    row = datasets.find(data.dataset)
    if row.size not in (None, data.size):
        remedy = f"set --config.data.size={row.size}"
        raise UserError(f"config.data.size is {data.size}, the pictures of {data.dataset} are {row.size} pixels wide: {remedy}")
    if not data.twin and not data.records:
        raise UserError(f"no records: set --config.data.records to a folder made with `{row.command} FOLDER`, {row.quick}")
    root = synthetic.ensure_twin(data) if data.twin else folders.named(data.records, "config.data.records")
    check_records(root, data.dataset, row, data.size)
    return row, root


def check_records(root: pathlib.Path, name: str, row: datasets.Dataset, size: int, key: str = "records") -> None:
    """Raises a UserError if root is no folder of finished records of that row, called name, and of that size, with every split.

    `key` is the one of config.data that names the folder.
    """
    make = f"{row.command} {root}" + ("" if row.size else f" --size {size}")
    try:
        missing, shared = folders.kind(root / "manifest.json") != "file", root / "parts" / "tasks.json"  # of data_prep/tasks.py
        begun = missing and folders.kind(shared) == "file"
    except folders.failures() as error:
        raise LostError(f"cannot read the records in {root}: {folders.reason(error)}; run the same command again") from error
    if missing:
        if begun:
            raise UserError(
                f"the records in {root} are not merged yet: run the command of their tasks with --merge in place of --task"
            )
        raise UserError(f"no records in {root}: make them with `{make}`, {row.quick}")
    manifest = records.Manifest.read(root)
    if manifest.dataset != name:
        raise UserError(f"{root} holds {manifest.dataset}, not {name}: set --config.data.{key} to another folder")
    if manifest.size != size:
        remedy = f"make others with `{row.command} FOLDER`"
        if not row.size:
            remedy = f"set --config.data.size={manifest.size}, or make others with --size {size}"
        raise UserError(f"the records in {root} are {manifest.size} pixels wide, data.size is {size}: {remedy}")
    for split in row.splits:
        if not manifest.splits.get(split):
            raise UserError(f"the records in {root} have no {split} split: prepare them again, from more {row.units}")


class Examples(abc.ABC):
    """The examples of the two splits of a folder of records: what the trainer needs of a dataset, whatever its kind.

    An example is `stack` items.  `rows` are the rows of the global batch that this host wants, in that order.

    Attributes:
        data: The section of the config.
        train_size: Training examples per epoch.
        test_size: Examples that are evaluated.
    """

    def __init__(
        self, data: Source, train: Items, test: Items, *, items: int, stack: int, listed: bool, evaluated: Sequence | np.ndarray
    ):
        """Of that many training items; `evaluated[n]` is the item, or the items, of test example n.

        `listed`: an epoch's order is kept as a list, 8 bytes an item, instead of computed item by item, 9 us each.
        """
        self.data = data
        self._train_items, self._test_items = train, test
        self._opened: list[Batches] = []  # of training examples
        self._items, self._stack, self._listed, self._evaluated = items, stack, listed, evaluated
        self.train_size, self.test_size = items // stack, len(evaluated)

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many examples."""
        return self.data.batch_shapes(batch)

    @property
    def replaced(self) -> int | None:
        """Training examples, of those that this process read, in whose place another was taken; None where that is an error."""
        return sum(batches.replaced for batches in self._opened) if self.data.unreadable == SKIP else None

    def train_batches(self, *, batch: int, seed: int, start: int, steps: int, rows: Rows) -> Batches:
        """This host's rows of the global batches start .. steps - 1, each `batch` rows in all.

        Every item comes once per epoch, in an order of its own in each epoch; epochs follow each other without a gap, so
        a batch may be larger than an epoch.  Batch n depends on (seed, batch, n) alone.
        """
        addresses = self._addresses(batch, seed, steps)[start:steps]
        self._opened.append(self._batches(addresses, self._train_items, rows, False, "step", start + 1))
        return self._opened[-1]

    def _addresses(self, batch: int, seed: int, steps: int) -> grain.MapDataset:
        """The addresses of that many training batches."""
        if self._listed:
            return grain.MapDataset.source(ListedAddresses(self._items, self._stack, batch, seed, steps))
        # grain shuffles epoch e with seed + e: neighbouring seeds would walk through each other's epochs.
        shuffle = int(np.random.SeedSequence(seed).generate_state(1)[0])
        each = batch * self._stack
        return (
            grain.MapDataset.range(self._items)
            .shuffle(seed=shuffle)
            .repeat(max(1, -(-steps * each // self._items)))
            .batch(each, drop_remainder=True, batch_fn=functools.partial(train_addresses, self._stack))
        )

    def name_batch(self, *, batch: int, seed: int, n: int) -> list[str]:
        """What the items of global training batch n are called, in its order; with data.unreadable=skip others may stand in for
        some of them."""
        item_BxS = self._addresses(batch, seed, n + 1)[n]["item_BxS"]
        return [self._train_items.name(item) for item in item_BxS.ravel().tolist()]

    def test_batches(self, *, batch: int, rows: Rows) -> Batches:
        """This host's rows of the evaluated examples: each of the test_size ones once, in a fixed order.

        The last global batch is filled with copies of its last example at weight 0.  One that cannot be read has weight 0 too.
        """
        addresses = grain.MapDataset.source(HeldOutAddresses(self._evaluated, batch))
        return self._batches(addresses, self._test_items, rows, True, "test batch", 1)

    @abc.abstractmethod
    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) examples for figures; weights 1."""

    @abc.abstractmethod
    def bytes_per_example(self) -> dict[str, float]:
        """Mean bytes per training example: "disk" (its records as stored), "device" (its share of a batch)."""

    def _batches(self, addresses: grain.MapDataset, items: Items, rows: Rows, exact: bool, name: str, first: int) -> Batches:
        data = self.data
        rows = rows if isinstance(rows, slice) else list(rows)
        each = -(-data.prefetch // data.workers) if data.workers else data.prefetch
        # grain warns about threads beyond the buffer.
        options = grain.ReadOptions(num_threads=min(data.threads, each), prefetch_buffer_size=each)
        stream = addresses.map(FetchRows(items, rows, exact)).to_iter_dataset(options)
        if data.workers:
            if QUIET not in sys.warnoptions:
                sys.warnoptions.append(QUIET)  # the tracker is another process, which gets the options of this one
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=max(1, each)))
        return Batches(iter(stream), items.reading, name, first)
