"""Records to host batches of windows of frames, such as pairs.

The training stream is a function of (seed, position).  Window numbers are shuffled globally, repeated and batched, each
host takes its rows of the batch, and only then are frames read and decoded.  So a host touches no frame it does not
use, resuming costs nothing, and neither threads, workers nor hosts change a batch.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import grain.python as grain
import numpy as np

from niso.data import datasets, records, synthetic
from niso.data.split import Batch, Split, describe
from niso.data.windows import Windows
from niso.errors import UserError

Rows = slice | Sequence[int]

# What the reference implementation moves to the device for one example: the whole video, padded to the longest one.
REFERENCE_BYTES = 12_600_000


@dataclasses.dataclass(frozen=True)
class Data:
    """Every key of config.data.

    Attributes:
        dataset: Row of datasets.py.
        records: Folder of records, when twin is "".
        twin: "" or the built-in twin to use instead: "tiny", "small" or "full", made into the cache folder if absent.
        size: Edge of the frames in pixels; must be the records' own.
        views: T, frames of an example: 2 for pairs; more for runs of T - 1 consecutive pairs with one skip.
        poses: Whether batches have relative camera poses.
        max_skip: Training examples have 0..max_skip frames between two neighbouring views.
        test_skips: Frames between neighbouring views of the examples that are evaluated.
        test_every: Every n-th example of the test split is evaluated.
        threads: Threads that read and decode, in each process that does; more than `prefetch` have nothing to do.
        prefetch: Batches read ahead.
        workers: Processes that read and decode; 0 for threads of this one.  Needs parsed absl flags and a main guard.
    """

    dataset: str
    records: str
    twin: str
    size: int
    views: int
    poses: bool
    max_skip: int
    test_skips: tuple[int, ...]
    test_every: int
    threads: int
    prefetch: int
    workers: int

    @property
    def example(self) -> str:
        """What an example is, in words."""
        return describe(self.views)

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many examples."""
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "frames_BxTxHxWxC": ((batch, self.views, self.size, self.size, 3), np.dtype(np.uint8)),
            "skip_B": ((batch,), np.dtype(np.int32)),
            "weight_B": ((batch,), np.dtype(np.float32)),
        }
        if self.poses:
            shapes["relative_BxPx4x4"] = ((batch, self.views - 1, 4, 4), np.dtype(np.float32))
        return shapes


@dataclasses.dataclass(frozen=True)
class _ReadRows:
    """Maps the addresses of a global batch to this host's rows of the batch itself."""

    split: Split
    rows: Rows

    def __call__(self, address: Batch) -> Batch:
        where_3xB = self.split.windows.locate(address["window_B"][self.rows])
        return self.split.batch(where_3xB, address["weight_B"][self.rows])


@dataclasses.dataclass(frozen=True)
class _TestAddresses:
    """Addresses of the test batches: every n-th window once, in order; copies of the last one at weight 0 fill up."""

    size: int
    every: int
    batch: int

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __getitem__(self, n: int) -> Batch:
        position_B = n * self.batch + np.arange(self.batch)
        return {"window_B": self.every * np.minimum(position_B, self.size - 1), "weight_B": position_B < self.size}


def _train_addresses(windows: Sequence[int]) -> Batch:
    return {"window_B": np.asarray(windows), "weight_B": np.ones(len(windows))}


class Batches:
    """An iterator of batches that owns threads or processes; close it, or use it as a context manager.

    Reading ahead begins at once.  An error of a thread or worker process is raised by the `next` that would have
    returned its batch, a UserError as itself however grain wrapped it.
    """

    def __init__(self, dataset: grain.MapDataset, threads: int, prefetch: int, workers: int):
        each = -(-prefetch // workers) if workers else prefetch
        # grain warns about threads beyond the buffer.
        options = grain.ReadOptions(num_threads=min(threads, each), prefetch_buffer_size=each)
        stream = dataset.to_iter_dataset(options)
        if workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, each)))
        self._iterator = iter(stream)
        self._iterator.start_prefetch()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            self.close()
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None or cause is error:
                raise
            raise cause from None

    def close(self) -> None:
        """Ends the threads and processes; may be called twice."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class PairDataset:
    """Examples from the two splits of a folder of records, pairs of frames or runs of pairs; `open_dataset` makes it.

    A batch is {"frames_BxTxHxWxC": uint8 RGB, "skip_B": int32, frames between neighbouring views, "weight_B": float32,
    1 or 0 for padding} and, with data.poses, "relative_BxPx4x4", P = T - 1: float32, camera t + 1 seen from camera t.
    `rows` are the rows of the global batch that this host wants, in that order.
    """

    def __init__(self, data: Data, train: Split, test: Split):
        self.data = data
        self._train, self._test = train, test
        self.train_size = train.windows.size
        self.test_size = -(-test.windows.size // data.test_every)

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many examples."""
        return self.data.batch_shapes(batch)

    def train_batches(self, *, batch: int, seed: int, start: int, steps: int, rows: Rows) -> Batches:
        """This host's rows of the global batches start .. steps - 1, each `batch` rows in all.

        Every valid example comes once per epoch, in an order of its own in each epoch; epochs follow each other without
        a gap, so a batch may be larger than an epoch.  Batch n depends on (seed, batch, n) alone.
        """
        # grain shuffles epoch e with seed + e: neighbouring seeds would walk through each other's epochs.
        shuffle = int(np.random.SeedSequence(seed).generate_state(1)[0])
        addresses = (
            grain.MapDataset.range(self.train_size)
            .shuffle(seed=shuffle)
            .repeat(max(1, -(-steps * batch // self.train_size)))
            .batch(batch, drop_remainder=True, batch_fn=_train_addresses)
        )
        return self._batches(addresses[start:steps], self._train, rows)

    def test_batches(self, *, batch: int, rows: Rows) -> Batches:
        """This host's rows of the evaluated examples: each of the test_size ones once, in a fixed order.

        The last global batch is filled with copies of its last example at weight 0.
        """
        addresses = grain.MapDataset.source(_TestAddresses(self.test_size, self.data.test_every, batch))
        return self._batches(addresses, self._test, rows)

    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) examples for figures, spread evenly over the split, its skips in turn; weights 1."""
        split = self._train if train else self._test
        windows = split.windows
        by_skip = [one for skip in windows.skip_K if (one := Windows.of(windows.length_S, [skip], windows.views)).size]
        # Example n of count lies at the fraction (n + 1/2) / count of the examples of its skip.
        takes = [(by_skip[n % len(by_skip)], (2 * n + 1) / (2 * count)) for n in range(count)]
        where_3xB = np.concatenate([one.locate(np.array([int(at * one.size)])) for one, at in takes], axis=1)
        return split.batch(where_3xB, np.ones(count))

    def bytes_per_example(self, count: int = 64) -> dict[str, float]:
        """Mean bytes per training example: "disk" (its records as stored), "device" (its share of a batch), "reference".

        The first is measured by reading `count` examples spread over the split; the last is what the published
        implementation moves.
        """
        train, disk = self._train, 0
        where_3xN = train.windows.locate(np.linspace(0, self.train_size - 1, count).astype(np.int64))
        for sequence, start, skip in where_3xN.T.tolist():
            found = train.read(sequence, train.windows.frames(start, skip), train.schema)
            disk += sum(len(records.encode(example, train.schema)) for _, example in found)
        device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.batch_shapes(1).values())
        return {"disk": disk / count, "device": float(device), "reference": float(REFERENCE_BYTES)}

    def sequences(self, split: str) -> list[records.Sequence]:
        """The sequences of the "train" or "test" split, whatever their length; read_sequence and poses count them so."""
        return list(self._split(split).reader.sequences)

    def read_sequence(self, split: str, index: int, frames: Sequence[int] | slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(frames_TxHxWxC uint8 RGB, pose_Tx4x4 float64) of a sequence: all its frames, or those that numpy would index.

        Poses are the records' own, OpenCV camera-to-world, whether or not batches have poses.

        Raises:
            UserError: a record is damaged, or a pose is not finite.
            IndexError: no such sequence or frame: a defect of the caller.
        """
        return self._split(split).read_sequence(index, slice(None) if frames is None else frames, self.data.threads)

    def poses(self, split: str, at_most: int | None = None) -> list[np.ndarray]:
        """pose_Tx4x4 float64 of every sequence of a split, or of `at_most` evenly spread ones; decodes no picture.

        Raises:
            UserError: a record is damaged, or a pose is not finite.
        """
        chosen = self._split(split)  # one thread: parsing holds the interpreter, more take longer
        count = len(chosen.reader.sequences)
        return [chosen.poses(int(index)) for index in np.linspace(0, count - 1, min(count, at_most or count))]

    def _split(self, name: str) -> Split:
        return {"train": self._train, "test": self._test}[name]

    def _batches(self, addresses: grain.MapDataset, split: Split, rows: Rows) -> Batches:
        data = self.data
        rows = rows if isinstance(rows, slice) else list(rows)
        return Batches(addresses.map(_ReadRows(split, rows)), data.threads, data.prefetch, data.workers)


def open_dataset(data: Data) -> PairDataset:
    """The examples of data.records, or of the built-in twin, which is made first if need be.

    Raises:
        UserError: a value out of range, an unknown dataset or twin; records that are missing, of another dataset or
            size, or without a split; a split without a valid example.
    """
    _check_ranges(data)
    row = datasets.find(data.dataset)
    if not data.twin and not data.records:
        raise UserError(f"no records: set --config.data.records to a folder made with `{row.command} FOLDER`, {row.quick}")
    root = synthetic.ensure_twin(data) if data.twin else pathlib.Path(data.records).expanduser()
    make = f"{row.command} {root} --size {data.size}"
    if not (root / "manifest.json").is_file():
        raise UserError(f"no records in {root}: make them with `{make}`, {row.quick}")
    manifest = records.Manifest.read(root)
    if manifest.dataset != data.dataset:
        raise UserError(f"{root} holds {manifest.dataset}, not {data.dataset}: set --config.data.records to another folder")
    if manifest.size != data.size:
        remedy = f"set --config.data.size={manifest.size}, or make others with --size {data.size}"
        raise UserError(f"the records in {root} are {manifest.size} pixels wide, data.size is {data.size}: {remedy}")
    train, test = row.splits
    return PairDataset(
        data,
        train=Split.open(root, train, row.schema, range(data.max_skip + 1), data.views, data.poses),
        test=Split.open(root, test, row.schema, data.test_skips, data.views, data.poses),
    )


def _check_ranges(data: Data) -> None:
    """Raises a UserError for a value that cannot be meant."""
    least = {"size": 1, "views": 2, "max_skip": 0, "test_every": 1, "threads": 0, "prefetch": 0, "workers": 0}
    for name, minimum in least.items():
        if getattr(data, name) < minimum:
            raise UserError(f"config.data.{name} is {getattr(data, name)}: it must be at least {minimum}")
    skips = data.test_skips
    if not skips or min(skips) < 0 or len(set(skips)) < len(skips):
        raise UserError(f"config.data.test_skips is {skips}: it must be one or more different skips, each at least 0")
    if data.twin and data.records:
        asked = f"data.twin={data.twin} and data.records={data.records}"
        raise UserError(f"both {asked} are set: set --config.data.twin= or --config.data.records= to nothing")
