"""Posed video to host batches of windows of frames, such as pairs; and the door to every kind of dataset."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from niso.data import datasets, records
from niso.data.split import Split, describe
from niso.data.stills import Stills
from niso.data.stream import Batch, Batches, Examples, Opened, Rows, Source, find_records
from niso.data.surfaces import Surfaces
from niso.data.windows import Windows
from niso.errors import RecordError, UserError

__all__ = ["Batch", "Batches", "Data", "Examples", "PairDataset", "Rows", "Source", "Stills", "kind_of", "open_dataset"]

# What the reference implementation moves to the device for one example: the whole video, padded to the longest one.
REFERENCE_BYTES = 12_600_000


@dataclasses.dataclass(frozen=True)
class Data(Source["PairDataset"]):
    """The keys of config.data for windows of frames, besides those of every Source.

    Attributes:
        views: T, frames of an example: 2 for pairs; more for runs of T - 1 consecutive pairs with one skip.
        poses: Whether batches have relative camera poses.
        max_skip: Training examples have 0..max_skip frames between two neighbouring views.
        test_skips: Frames between neighbouring views of the examples that are evaluated.
        test_every: Every n-th example of the test split is evaluated.
    """

    views: int
    poses: bool
    max_skip: int
    test_skips: tuple[int, ...]
    test_every: int

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

    def open(self) -> "PairDataset":
        """The windows of the two splits; UserError as `open_dataset`."""
        self.check(views=2, max_skip=0, test_every=1)
        skips = self.test_skips
        if not skips or min(skips) < 0 or len(set(skips)) < len(skips):
            raise UserError(f"config.data.test_skips is {skips}: it must be one or more different skips, each at least 0")
        row, root = find_records(self)
        train, test = row.splits
        schema = row.schema(self.size)
        return PairDataset(
            self,
            train=Split.open(root, train, schema, range(self.max_skip + 1), self.views, self.poses, self.unreadable),
            test=Split.open(root, test, schema, skips, self.views, self.poses, self.unreadable),
        )


class PairDataset(Examples):
    """Examples from the two splits of a folder of records, pairs of frames or runs of pairs; `open_dataset` makes it.

    A batch is {"frames_BxTxHxWxC": uint8 RGB, "skip_B": int32, frames between neighbouring views, "weight_B": float32,
    1 or 0 for padding} and, with data.poses, "relative_BxPx4x4", P = T - 1: float32, camera t + 1 seen from camera t.
    """

    data: Data

    def __init__(self, data: Data, train: Split, test: Split):
        evaluated = range(0, test.windows.size, data.test_every)
        super().__init__(data, train, test, items=train.windows.size, stack=1, listed=False, evaluated=evaluated)
        self._train, self._test = train, test

    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) examples for figures, spread evenly over the split, its skips in turn; weights 1."""
        split = self._train if train else self._test
        windows = split.windows
        by_skip = [one for skip in windows.skip_K if (one := Windows.of(windows.length_S, [skip], windows.views)).size]
        # Example n of count lies at the fraction (n + 1/2) / count of the examples of its skip.
        takes = [(by_skip[n % len(by_skip)], (2 * n + 1) / (2 * count)) for n in range(count)]
        where_3xB = np.concatenate([one.locate(np.array([int(at * one.size)])) for one, at in takes], axis=1)
        return split.fetch(windows.number(where_3xB)[:, None], np.ones(count))[0]

    def bytes_per_example(self, count: int = 64) -> dict[str, float]:
        """Mean bytes per training example: "disk" (its records as stored), "device" (its share of a batch), "reference".

        The first is measured by reading `count` examples spread over the split; the last is what the published
        implementation moves.
        """
        disk = 0
        for item in np.linspace(0, self.train_size - 1, count).astype(np.int64).tolist():
            disk += self._train.reading.read(item, self.train_size, self._train.stored_bytes, self._train.name)[1]
        device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.batch_shapes(1).values())
        return {"disk": disk / count, "device": float(device), "reference": float(REFERENCE_BYTES)}

    def sequences(self, split: str) -> list[records.Sequence]:
        """The sequences of the "train" or "test" split, whatever their length; read_sequence and poses count them so."""
        return list(self._split(split).reader.sequences)

    def read_sequence(self, split: str, index: int, frames: Sequence[int] | slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(frames_TxHxWxC uint8 RGB, pose_Tx4x4 float64) of a sequence: all its frames, or those that numpy would index.

        Poses are the records' own, OpenCV camera-to-world, whether or not batches have poses.

        Raises:
            RecordError: a record is damaged, or a pose is not finite, whatever data.unreadable says.
            UserError: a shard is missing or truncated.
            IndexError: no such sequence or frame: a defect of the caller.
        """
        return self._split(split).read_sequence(index, slice(None) if frames is None else frames, self.data.threads)

    def poses(self, split: str, at_most: int | None = None) -> list[np.ndarray]:
        """pose_Tx4x4 float64 of every sequence of a split, or of `at_most` evenly spread ones; decodes no picture.

        With data.unreadable=skip, sequences with a damaged record or a pose that is not finite are left out.

        Raises:
            UserError: a record is damaged, or a pose is not finite.
        """
        chosen, found = self._split(split), []  # one thread: parsing holds the interpreter, more take longer
        count = len(chosen.reader.sequences)
        for index in np.linspace(0, count - 1, min(count, at_most or count)).astype(int).tolist():
            try:
                found.append(chosen.poses(index))
            except RecordError as error:
                self.leave_out(split, index, error)
        return found

    def leave_out(self, split: str, index: int, error: RecordError) -> None:
        """Says that a sequence is left out because of `error`; raises that, unless data.unreadable is "skip"."""
        chosen = self._split(split)
        chosen.reading.leave_out(error, f"sequence {chosen.reader.sequences[index].name}")

    def _split(self, name: str) -> Split:
        return {"train": self._train, "test": self._test}[name]


# The section config.data is the class of its dataset's kind.
KINDS: dict[str, type[Source]] = {"windows": Data, "stills": Stills, "surfaces": Surfaces}


def kind_of(dataset: str) -> type[Source]:
    """The class of the section config.data of that dataset; UserError for an unknown one."""
    return KINDS[datasets.find(dataset).kind]


def open_dataset(data: Source[Opened]) -> Opened:
    """The examples of data.records, or of the built-in twin, which is made first if need be.

    Raises:
        UserError: a value out of range, an unknown dataset or twin; records that are missing, of another dataset or
            size, or without a split; a split without a valid example.
    """
    return data.open()
