"""Records to host batches of frame pairs.

The training stream is a function of (seed, position).  Pair numbers are shuffled globally, repeated and batched, each
host takes its rows of the batch, and only then are frames read and decoded.  So a host touches no frame it does not
use, resuming costs nothing, and neither threads, workers nor hosts change a batch.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grain.python as grain
import numpy as np

from niso.data import datasets, records, synthetic, transforms
from niso.data.pairs import Pairs
from niso.errors import UserError

Batch = dict[str, np.ndarray]
Rows = slice | Sequence[int]

# What the reference implementation moves to the device for one pair: the whole video, padded to the longest one.
REFERENCE_BYTES_PER_PAIR = 12_600_000


@dataclasses.dataclass(frozen=True)
class Data:
    """Every key of config.data.

    Attributes:
        dataset: Row of datasets.py.
        records: Folder of records, when twin is "".
        twin: "" or the built-in twin to use instead: "tiny", "small" or "full", made into the cache folder if absent.
        size: Edge of the frames in pixels; must be the records' own.
        max_skip: Training pairs have 0..max_skip frames between them.
        test_skips: Frames between the pairs that are evaluated.
        test_every: Every n-th pair of the test split is evaluated.
        threads: Threads that read and decode, in each process that does; more than `prefetch` have nothing to do.
        prefetch: Batches read ahead.
        workers: Processes that read and decode; 0 for threads of this one.  Needs parsed absl flags and a main guard.
    """

    dataset: str
    records: str
    twin: str
    size: int
    max_skip: int
    test_skips: tuple[int, ...]
    test_every: int
    threads: int
    prefetch: int
    workers: int


@dataclasses.dataclass(frozen=True)
class _Split:
    """Pairs of one split and the means to read their frames; can be pickled for a worker process."""

    reader: records.Reader
    pairs: Pairs
    size: int

    def examples(self, where_3xB: np.ndarray) -> Iterator[tuple[int, int, str, records.Example]]:
        """(b, t, the record's name, the record) of both frames t of every pair b, read one pair after the other."""
        for b, (sequence, start, skip) in enumerate(where_3xB.T.tolist()):
            video = self.reader.sequences[sequence]
            first = video.start + start
            numbers = [first, first + skip + 1]
            for t, (number, example) in enumerate(zip(numbers, self.reader.read(video.shard, numbers), strict=True)):
                yield b, t, f"record {number} of {self.reader.root / video.shard}", example

    def batch(self, where_3xB: np.ndarray, weight_B: np.ndarray) -> Batch:
        """The batch of the pairs at these (sequence, start, skip), read and decoded."""
        frames_BxTxHxWxC = np.empty((len(weight_B), 2, self.size, self.size, 3), np.uint8)
        for b, t, name, example in self.examples(where_3xB):
            frame_HxWxC = transforms.decode_jpeg(cast(bytes, example["image_jpeg"]), name)
            if frame_HxWxC.shape != frames_BxTxHxWxC.shape[2:]:
                height, width, _ = frame_HxWxC.shape
                size = f"{width}x{height} pixels, its manifest says {self.size}"
                raise UserError(f"the picture in {name} has {size}: prepare the records again")
            frames_BxTxHxWxC[b, t] = frame_HxWxC
        return {
            "frames_BxTxHxWxC": frames_BxTxHxWxC,
            "skip_B": where_3xB[2].astype(np.int32),
            "weight_B": weight_B.astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class _ReadRows:
    """Maps the addresses of a global batch to this host's rows of the batch itself."""

    split: _Split
    rows: Rows

    def __call__(self, address: Batch) -> Batch:
        return self.split.batch(self.split.pairs.locate(address["pair_B"][self.rows]), address["weight_B"][self.rows])


@dataclasses.dataclass(frozen=True)
class _TestAddresses:
    """Addresses of the test batches: every n-th pair once, in order; copies of the last one at weight 0 fill up."""

    size: int
    every: int
    batch: int

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __getitem__(self, n: int) -> Batch:
        position_B = n * self.batch + np.arange(self.batch)
        return {"pair_B": self.every * np.minimum(position_B, self.size - 1), "weight_B": position_B < self.size}


def _train_addresses(pairs: Sequence[int]) -> Batch:
    return {"pair_B": np.asarray(pairs), "weight_B": np.ones(len(pairs))}


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
    """Pairs of frames from the two splits of a folder of records; `open_dataset` makes it.

    A batch is {"frames_BxTxHxWxC": uint8 RGB, T = 2, "skip_B": int32, frames between the two, "weight_B": float32, 1
    or 0 for padding}.  `rows` are the rows of the global batch that this host wants, in that order.
    """

    def __init__(self, data: Data, train: _Split, test: _Split):
        self.data = data
        self._train, self._test = train, test
        self.train_size = train.pairs.size
        self.test_size = -(-test.pairs.size // data.test_every)

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many rows."""
        size = self.data.size
        return {
            "frames_BxTxHxWxC": ((batch, 2, size, size, 3), np.dtype(np.uint8)),
            "skip_B": ((batch,), np.dtype(np.int32)),
            "weight_B": ((batch,), np.dtype(np.float32)),
        }

    def train_batches(self, *, batch: int, seed: int, start: int, steps: int, rows: Rows) -> Batches:
        """This host's rows of the global batches start .. steps - 1, each `batch` rows in all.

        Every valid pair comes once per epoch, in an order of its own in each epoch; epochs follow each other without
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
        """This host's rows of the evaluated pairs: each of the test_size pairs once, in a fixed order.

        The last global batch is filled with copies of its last pair at weight 0.
        """
        addresses = grain.MapDataset.source(_TestAddresses(self.test_size, self.data.test_every, batch))
        return self._batches(addresses, self._test, rows)

    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) pairs for figures, spread evenly over the split, its skips in turn; weights 1."""
        split = self._train if train else self._test
        pairs = split.pairs
        by_skip = [one for skip in pairs.skip_K if (one := Pairs.of(pairs.length_S, [skip])).size]
        # Pair n of count lies at the fraction (n + 1/2) / count of the pairs of its skip.
        takes = [(by_skip[n % len(by_skip)], (2 * n + 1) / (2 * count)) for n in range(count)]
        where_3xB = np.concatenate([one.locate(np.array([int(at * one.size)])) for one, at in takes], axis=1)
        return split.batch(where_3xB, np.ones(count))

    def bytes_per_pair(self, count: int = 64) -> dict[str, float]:
        """Mean bytes per training pair: "disk" (its records as stored), "device" (its share of a batch), "reference".

        The first is measured by reading `count` pairs spread over the split; the last is what the published
        implementation moves.
        """
        where_3xN = self._train.pairs.locate(np.linspace(0, self.train_size - 1, count).astype(np.int64))
        schema = datasets.find(self.data.dataset).schema
        whole = records.Reader(self._train.reader.root, self._train.reader.split, schema)
        train = dataclasses.replace(self._train, reader=whole)
        disk = sum(len(records.encode(example, schema)) for *_, example in train.examples(where_3xN))
        device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.batch_shapes(1).values())
        return {"disk": disk / count, "device": float(device), "reference": float(REFERENCE_BYTES_PER_PAIR)}

    def _batches(self, addresses: grain.MapDataset, split: _Split, rows: Rows) -> Batches:
        data = self.data
        rows = rows if isinstance(rows, slice) else list(rows)
        return Batches(addresses.map(_ReadRows(split, rows)), data.threads, data.prefetch, data.workers)


def open_dataset(data: Data) -> PairDataset:
    """The pairs of data.records, or of the built-in twin, which is made first if need be.

    Raises:
        UserError: a value out of range, an unknown dataset or twin; records that are missing, of another dataset or
            size, or without a split; a split without a valid pair.
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
        train=_open_split(root, manifest, train, row.schema, range(data.max_skip + 1)),
        test=_open_split(root, manifest, test, row.schema, data.test_skips),
    )


def _open_split(root: pathlib.Path, manifest: records.Manifest, name: str, schema: records.Schema, skips: Sequence[int]) -> _Split:
    if not manifest.splits.get(name):
        raise UserError(f"the records in {root} have no {name} split: prepare them again, from more sequences")
    # Parsing the poses too, which no pair uses, would cost a tenth of the whole.
    reader = records.Reader(root, name, {"image_jpeg": schema["image_jpeg"]})
    pairs = Pairs.of([sequence.length for sequence in reader.sequences], skips)
    if not pairs.size:
        needed = f"none of its {len(reader.sequences)} sequences has {min(skips) + 2} frames"
        raise UserError(f"the {name} split of {root} has no pair of frames: {needed}, prepare longer videos")
    return _Split(reader, pairs, manifest.size)


def _check_ranges(data: Data) -> None:
    """Raises a UserError for a value that cannot be meant."""
    least = {"size": 1, "max_skip": 0, "test_every": 1, "threads": 0, "prefetch": 0, "workers": 0}
    for name, minimum in least.items():
        if getattr(data, name) < minimum:
            raise UserError(f"config.data.{name} is {getattr(data, name)}: it must be at least {minimum}")
    skips = data.test_skips
    if not skips or min(skips) < 0 or len(set(skips)) < len(skips):
        raise UserError(f"config.data.test_skips is {skips}: it must be one or more different skips, each at least 0")
    if data.twin and data.records:
        asked = f"data.twin={data.twin} and data.records={data.records}"
        raise UserError(f"both {asked} are set: set --config.data.twin= or --config.data.records= to nothing")
