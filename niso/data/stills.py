"""Still images to host batches: an example is one image and its label, or several, one behind the other along the channels.

A task may make its observations from an image by random transformations. For a test set that is always the same these must be a
function of the example: single images so come with their number in the split and, where each is evaluated several times, with
the number of the copy.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import cast

import numpy as np

from niso import folders
from niso.data import datasets, records
from niso.data.reading import Reading
from niso.data.stream import Batch, Examples, Source, check_records, find_records
from niso.errors import RecordError, UserError

IMAGE, LABEL = "image_HxWxC", "label"
TAKEN = ""  # among entries of records: the numbers of the images that they are of
TEST_SET = "homnist"  # what test_records hold


@dataclasses.dataclass(frozen=True)
class Stills(Source["StillDataset"]):
    """The keys of config.data for still images, besides those of every Source.

    Attributes:
        stack: S, images of an example; an example of several has no label.
        test_examples: Examples of the test split that are evaluated.
        test_copies: How often each image among them is; for tasks that transform each copy in another way.
        test_records: Folder of homNIST's records (data_prep/homnist.py): its images, which are larger, are the test split
            then. "": the test split is the one of `records`.
        in_memory: Read all images once at the start, in a byte for each pixel and channel, instead of those of every batch.
    """

    stack: int
    test_examples: int
    test_copies: int
    test_records: str
    in_memory: bool

    @property
    def example(self) -> str:
        """What an example is, in words."""
        return "single image" if self.stack == 1 else f"stack of {self.stack} images"

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many training examples."""
        schema = datasets.find(self.dataset).schema(self.size)
        height, width, channels = _shape(schema)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "images_BxHxWxC": ((batch, height, width, channels * self.stack), np.dtype(np.uint8)),
            "weight_B": ((batch,), np.dtype(np.float32)),
        }
        if self.stack == 1:
            names = ("item_B", "copy_B", *(["label_B"] if LABEL in schema else []))
            shapes |= {name: ((batch,), np.dtype(np.int32)) for name in names}
        return shapes

    def open(self) -> "StillDataset":
        """The images of the two splits.

        Raises:
            UserError: as `find_records`; a value out of range; a split with fewer images than one example takes; with
                in_memory, a damaged record.
        """
        self.check(stack=1, test_examples=1, test_copies=1)
        if self.test_copies > 1 and (self.stack > 1 or self.test_examples % self.test_copies):
            asked = f"data.test_examples={self.test_examples}, data.test_copies={self.test_copies}, data.stack={self.stack}"
            raise UserError(f"{asked}: copies are of single images, and each has as many: choose a multiple, and stack=1")
        if self.in_memory and self.workers:
            alternatives = "set --config.data.workers=0, or --config.data.in_memory=False"
            raise UserError(f"data.in_memory=True and data.workers={self.workers}: each would hold all images; {alternatives}")
        self._check_test_records()
        row, root = find_records(self)
        places = [(root, row), self._test_folder() if self.test_records else (root, row)]
        train, test = (
            Gallery.open(folder, name, of.schema(of.size or self.size), self.stack, self.in_memory, self.unreadable)
            for name, (folder, of) in zip(row.splits, places, strict=True)
        )
        if (self.test_copies > 1 or self.test_records) and self.test_examples > test.size * self.test_copies:
            most = f"{test.size} images x {self.test_copies} copies = {test.size * self.test_copies}"
            raise UserError(f"config.data.test_examples is {self.test_examples}: there are at most {most}")
        return StillDataset(self, train, test)

    def _check_test_records(self) -> None:
        """Raises a UserError if test_records is set beside keys that contradict it."""
        if not self.test_records:
            return
        no_records = "or --config.data.test_records= to nothing"
        if self.stack > 1 or datasets.find(self.dataset).classes != datasets.TEST_SETS[TEST_SET].classes:
            asked = f"data.dataset={self.dataset} and data.stack={self.stack}"
            raise UserError(f"data.test_records is for single digits, not for {asked}: set dataset=mnist and stack=1, {no_records}")
        if self.test_copies > 1:
            asked = f"data.test_copies={self.test_copies} and data.test_records={self.test_records}"
            raise UserError(f"{asked}: the records have every copy already: set --config.data.test_copies=1, {no_records}")

    def _test_folder(self) -> tuple[pathlib.Path, datasets.Dataset]:
        """The folder test_records and the row of what it holds; UserError as `check_records`."""
        row, root = datasets.TEST_SETS[TEST_SET], folders.named(self.test_records, "config.data.test_records")
        check_records(root, TEST_SET, row, row.size or self.size, "test_records")
        return root, row


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images of one split and their labels, by number; can be pickled for a worker process.

    Attributes:
        reader: Of their records.
        end_S: One more than the number of each sequence's last image.
        reading: What is done about images that cannot be read.
        stored: Every entry of a record, of all images along a first axis, and which images these are (TAKEN);
            or None to read each when it is asked for.
        noun: What an image is called.
    """

    reader: records.Reader
    end_S: np.ndarray
    reading: Reading
    stored: Batch | None
    noun: str = "image"

    @classmethod
    def open(
        cls,
        root: pathlib.Path,
        name: str,
        schema: records.Schema,
        stack: int,
        in_memory: bool,
        unreadable: str,
        noun: str = "image",
    ) -> "Gallery":
        """The split `name` of the records in root; UserError where it has fewer than `stack` images, or reading them fails."""
        reader = records.Reader(root, name, schema)
        end_S = np.cumsum([sequence.length for sequence in reader.sequences], dtype=np.int64)
        gallery = cls(reader, end_S, Reading(unreadable), None, noun)
        if gallery.size < stack:
            remedy = f"prepare more {noun}s, or set --config.data.stack to at most {gallery.size}"
            raise UserError(f"the {name} split of {root} has {gallery.size} {noun}s, an example is a stack of {stack}: {remedy}")
        return dataclasses.replace(gallery, stored=gallery._read_all()) if in_memory else gallery

    @property
    def size(self) -> int:
        """The number of images."""
        return int(self.end_S[-1]) if self.end_S.size else 0

    def fetch(self, item_BxS: np.ndarray, weight_B: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The batch of the images with these numbers: image s of an example, of C channels, at channels Cs .. Cs + C - 1; and
        replaced_B, whether another was taken in the place of one of an example's images.

        Numbers go on beyond the last image with a further copy of the first one, and so on.
        """
        copy_N, item_N = np.divmod(item_BxS.ravel(), self.size)
        found = self.entries(item_N)
        image_BxSxHxWxC = found[IMAGE].reshape(*item_BxS.shape, *_shape(self.reader.schema))
        examples, stack, height, width, channels = image_BxSxHxWxC.shape
        stacked_BxHxWxSxC = np.empty((examples, height, width, stack, channels), np.uint8)
        for channel in range(channels):  # four times as fast as one copy in runs of three bytes
            stacked_BxHxWxSxC[..., channel] = np.moveaxis(image_BxSxHxWxC[..., channel], 1, -1)
        images_BxHxWxC = stacked_BxHxWxSxC.reshape(examples, height, width, stack * channels)
        batch: Batch = {"images_BxHxWxC": images_BxHxWxC, "weight_B": weight_B.astype(np.float32)}
        if stack == 1:
            batch |= {"item_B": found[TAKEN].astype(np.int32), "copy_B": copy_N.astype(np.int32)}
            if LABEL in found:
                batch["label_B"] = found[LABEL].astype(np.int32)
        return batch, (found[TAKEN] != item_N).reshape(item_BxS.shape).any(axis=1)

    def name(self, item: int) -> str:
        """What the image with this number, or a copy of it, is called: with its record."""
        shard, number = self._record(item % self.size)
        return f"{self.noun} {item % self.size} (record {number} of {shard})"

    def entries(self, item_N: np.ndarray) -> Batch:
        """Every entry of the records with these numbers, along a first axis."""
        return self._read(item_N) if self.stored is None else {name: value[item_N] for name, value in self.stored.items()}

    def order(self, examples: int, stack: int) -> np.ndarray:
        """item_ExS: that many examples in one fixed shuffled order of all images, from its start again where it ends.

        Shuffled, because neighbours may be crops of one photograph.  No example has an image twice.
        """
        # The one generator of numpy whose numbers are promised not to change with its version.
        item_N = np.random.RandomState(0).permutation(self.size)
        return item_N[np.arange(examples * stack) % self.size].reshape(examples, stack)

    def _read(self, item_N: np.ndarray) -> Batch:
        """The entries of the records of these images, and which images these are (TAKEN)."""
        return self._gather(map(self._readable, item_N.tolist()), len(item_N))

    def _read_all(self) -> Batch:
        """The same as `_read` of all numbers, a sequence at a time."""
        return self._gather(itertools.chain.from_iterable(map(self._whole, range(len(self.end_S)))), self.size)

    def _gather(self, found: Iterable[tuple[int, records.Example]], count: int) -> Batch:
        schema = self.reader.schema
        entries = {n: np.empty((count, *cast(tuple[int, ...], field.shape)), field.dtype) for n, field in schema.items()}
        entries[TAKEN] = np.empty(count, np.int64)
        for n, (taken, example) in enumerate(found):
            entries[TAKEN][n] = taken
            for name, value in example.items():
                entries[name][n] = value
        return entries

    def _readable(self, item: int) -> tuple[int, records.Example]:
        return self.reading.read(item, self.size, self.read_one, self.name)

    def _whole(self, place: int) -> Iterable[tuple[int, records.Example]]:
        """All images of a sequence."""
        sequence, end = self.reader.sequences[place], int(self.end_S[place])
        items = range(end - sequence.length, end)
        try:
            found = self.reader.read(sequence.shard, range(sequence.start, sequence.start + sequence.length))
        except RecordError:
            if not self.reading.skip:
                raise
            return map(self._readable, items)
        return zip(items, found, strict=True)

    def read_one(self, item: int) -> records.Example:
        """The record of the image with this number."""
        shard, number = self._record(item)
        return self.reader.read(shard, [number])[0]

    def _record(self, item: int) -> tuple[str, int]:
        """(shard, number) of an image's record."""
        place = int(np.searchsorted(self.end_S, item, side="right"))
        sequence = self.reader.sequences[place]
        return sequence.shard, sequence.start + sequence.length - (int(self.end_S[place]) - item)


def _shape(schema: records.Schema) -> tuple[int, ...]:
    """(H, W, C) of an image."""
    return cast(tuple[int, ...], schema[IMAGE].shape)


class StillDataset(Examples):
    """Images, or stacks of them, from the two splits of a folder of records; `pipeline.open_dataset` makes it.

    A batch is {"images_BxHxWxC": uint8 images behind each other, C = their channels times stack, "weight_B": float32, 1
    or 0 for padding}; where stack is 1 also, int32, "item_B", the images' numbers in their split, "copy_B" and, where they
    have labels, "label_B", numbers of the row's classes.  An epoch has every training image once, so train_size, the
    examples of an epoch, is the number of images // stack; the images that are evaluated are those of `Gallery.order`.
    """

    data: Stills

    def __init__(self, data: Stills, train: Gallery, test: Gallery):
        copy_C = test.size * np.arange(data.test_copies)
        item_ExS = test.order(data.test_examples // data.test_copies, data.stack)
        evaluated = (item_ExS[:, None] + copy_C[:, None]).reshape(-1, data.stack)  # the copies of an image follow each other
        super().__init__(data, train, test, items=train.size, stack=data.stack, listed=True, evaluated=evaluated)
        self._train, self._test = train, test

    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) examples for figures, the first of the split's fixed order; weights 1."""
        gallery = self._train if train else self._test
        return gallery.fetch(gallery.order(count, self.data.stack), np.ones(count))[0]

    def bytes_per_example(self) -> dict[str, float]:
        """Bytes per training example: "disk" (its records as stored, with in_memory read at the start only), "device"."""
        reader = self._train.reader
        _, example = self._train.reading.read(0, self._train.size, self._train.read_one, self._train.name)  # all are of one length
        device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.batch_shapes(1).values())
        return {"disk": float(self.data.stack * len(records.encode(example, reader.schema))), "device": float(device)}
