"""Closed surfaces on the sphere to host batches: an example is one mesh, its heat-kernel signature on a grid, and its class.

The grid is finer than the network's: tasks draw Möbius maps and sample it on the device (niso/geometry/latlong.py), so the host
has nothing to compute and any number of views of a mesh cost its bytes once. A test set that is always the same has maps that are
functions of the example: of its number and, where each is evaluated several times, of the number of the copy.

Measured on four animals of 10,242 vertices, views of 96 x 192 under maps with |c| up to 0.7: the error against exact barycentric
interpolation is 0.0007 (root of the mean square; a view's standard deviation is 0.33) with 192 stored rows, 0.0014 with 96, 0.0004
with 384; to move vertices instead of points, which bends the faces, changes it by 0.0005. On a CPU exact interpolation takes
at least 30 ms a view, sampling a stored grid 3 ms.
"""

import dataclasses
import math
import pathlib

import numpy as np

from niso.data import records
from niso.data.reading import Reading
from niso.data.schemas import SIGNATURE
from niso.data.stills import TAKEN, Gallery
from niso.data.stream import Batch, Examples, Source, find_records
from niso.errors import UserError

CLIP = 2.5  # standard deviations that -1 and 1 stand for, as published
_ROUNDING = 1e-6  # of a channel's mean
_ENTRIES = ("signal_HxWxC", "low_C", "step_C", "label")
_MAPS = "map_KxXxY"


@dataclasses.dataclass(frozen=True)
class Surfaces(Source["SurfaceDataset"]):
    """The keys of config.data for surfaces, besides those of every Source; `size` is the rows of the stored grid.

    Attributes:
        test_copies: How often each test mesh is evaluated; for tasks that map each copy in another way.
        in_memory: Read all signals once at the start, 2 bytes for each point and channel, instead of those of every batch.
        stored_maps: How many of the Möbius maps that came with each mesh tasks shall take, instead of drawing any; 0: none.
    """

    test_copies: int
    in_memory: bool
    stored_maps: int

    @property
    def example(self) -> str:
        """What an example is, in words."""
        return "surface"

    def batch_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every entry of a batch of that many examples."""
        numbers = {name: ((batch,), np.dtype(np.int32)) for name in ("label_B", "item_B", "copy_B")}
        scales = {name: ((batch, SIGNATURE), np.dtype(np.float32)) for name in ("low_BxC", "step_BxC")}
        stored = {"map_BxKxXxY": ((batch, self.stored_maps, 4, 4), np.dtype(np.float32))} if self.stored_maps else {}
        return {
            "signal_BxHxWxC": ((batch, self.size, 2 * self.size, SIGNATURE), np.dtype(np.uint16)),
            "weight_B": ((batch,), np.dtype(np.float32)),
            **scales,
            **numbers,
            **stored,
        }

    def open(self) -> "SurfaceDataset":
        """The surfaces of the two splits.

        Raises:
            UserError: as `find_records`; a value out of range; with in_memory, a damaged record.
        """
        self.check(test_copies=1, stored_maps=0)
        if self.in_memory and self.workers:
            alternatives = "set --config.data.workers=0, or --config.data.in_memory=False"
            raise UserError(f"data.in_memory=True and data.workers={self.workers}: each would hold all signals; {alternatives}")
        row, root = find_records(self)
        schema = row.schema(self.size)
        facts = records.Manifest.read(root).facts
        if not facts.keys() >= {"classes", "mean", "std"}:
            raise UserError(f"the manifest of {root} lacks the signature's mean and deviation: run `{row.command} {root}` again")
        chosen = {name: schema[name] for name in _ENTRIES}
        if self.stored_maps:
            chosen[_MAPS] = dataclasses.replace(schema[_MAPS], shape=(self._check_maps(facts.get("maps", 0), root), 4, 4))
        train, test = (Gallery.open(root, name, chosen, 1, self.in_memory, self.unreadable, "surface") for name in row.splits)
        return SurfaceDataset(self, train, test, tuple(facts["classes"]), Scale.of(facts["mean"], facts["std"]))

    def _check_maps(self, there: int, root: pathlib.Path) -> int:
        """How many maps each mesh has; UserError where these are too few."""
        if self.stored_maps > there:
            again = "prepare those of a folder that has mobius_sphere (--layout cshrec11), into another --out"
            remedy = f"set --config.data.stored_maps={there}" if there else again
            raise UserError(
                f"data.stored_maps={self.stored_maps}, the records in {root} have {there} Möbius maps of each mesh: {remedy}, "
                "or draw maps with --config.data.stored_maps=0"
            )
        if self.test_copies > self.stored_maps:
            asked = f"data.test_copies={self.test_copies} and data.stored_maps={self.stored_maps}"
            raise UserError(
                f"{asked}: each copy is tested under a map of its own: set --config.data.test_copies={self.stored_maps}"
            )
        return there


@dataclasses.dataclass(frozen=True)
class Scale:
    """The channels' scale: mean_C and width_C, `CLIP` deviations over the training meshes; goes to worker processes."""

    mean_C: np.ndarray
    width_C: np.ndarray

    @classmethod
    def of(cls, mean: list[float], std: list[float]) -> "Scale":
        """From the manifest's numbers. Where meshes differ by less than float32 tells apart, as without limbs after long times,
        what is left of a channel is near 0, and not rounding at the size of a signal."""
        mean_C = np.array(mean, np.float64)
        return cls(mean_C, CLIP * np.maximum(std, _ROUNDING * np.abs(mean_C)))

    def entries(self, found: Batch) -> Batch:
        """low_BxC and step_BxC of the stored ones: what a signal is multiplied by and added to, standardised."""
        low_BxC, step_BxC = (found["low_C"] - self.mean_C) / self.width_C, found["step_C"] / self.width_C
        return {"low_BxC": low_BxC.astype(np.float32), "step_BxC": step_BxC.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Meshes:
    """The meshes of one split by number; can be pickled for a worker process."""

    scale: Scale
    gallery: Gallery
    stored_maps: int

    @property
    def reading(self) -> Reading:
        """How they are read."""
        return self.gallery.reading

    def name(self, item: int) -> str:
        """What the mesh with this number, or a copy of it, is called: with its record."""
        return self.gallery.name(item)

    def fetch(self, item_BxS: np.ndarray, weight_B: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The batch of the meshes with these numbers, and replaced_B, in whose place another was taken.

        Numbers go on beyond the last mesh with a further copy of the first one.
        """
        copy_B, item_B = np.divmod(item_BxS[:, 0], self.gallery.size)
        found = self.gallery.entries(item_B)
        batch = {
            "signal_BxHxWxC": found["signal_HxWxC"],
            **self.scale.entries(found),
            "label_B": found["label"].astype(np.int32),
            "item_B": found[TAKEN].astype(np.int32),
            "copy_B": copy_B.astype(np.int32),
            "weight_B": weight_B.astype(np.float32),
        }
        if self.stored_maps:
            batch["map_BxKxXxY"] = found[_MAPS][:, : self.stored_maps]
        return batch, found[TAKEN] != item_B


class SurfaceDataset(Examples):
    """Surfaces from the two splits of a folder of records; `pipeline.open_dataset` makes it.

    A batch is {"signal_BxHxWxC": uint16, H = data.size rows and W = 2 H columns; "low_BxC", "step_BxC": float32, so that
    clip(low + step signal, -1, 1) is the signature, standardised over the training meshes, 1 for 2.5 deviations; "label_B",
    "item_B", "copy_B": int32, the class, the mesh's number in its split and the number of the copy; "weight_B": float32, 1 or
    0 for padding; with `stored_maps` also "map_BxKxXxY": float32, 4 x 4 each}. The maps that sample a signal are linear in it:
    scale and clip afterwards.
    `classes` are the labels' names.
    """

    data: Surfaces

    def __init__(self, data: Surfaces, train: Gallery, test: Gallery, classes: tuple[str, ...], scale: Scale):
        item_ExC = np.arange(test.size)[:, None] + test.size * np.arange(data.test_copies)
        self.classes = classes
        self._train, self._test = (Meshes(scale, split, data.stored_maps) for split in (train, test))
        evaluated = item_ExC.reshape(-1, 1)  # the copies of a mesh follow each other
        super().__init__(data, self._train, self._test, items=train.size, stack=1, listed=True, evaluated=evaluated)

    def figure_batch(self, count: int, train: bool = False) -> Batch:
        """count fixed test (or training) examples for figures, the first of the split's fixed order and, where that ends, of a
        further copy of each; weights 1."""
        meshes = self._train if train else self._test
        copy_Ex1 = np.arange(count)[:, None] // meshes.gallery.size
        return meshes.fetch(meshes.gallery.order(count, 1) + meshes.gallery.size * copy_Ex1, np.ones(count))[0]

    def bytes_per_example(self) -> dict[str, float]:
        """Bytes per training example: "disk" (its signal as stored, with in_memory read at the start only), "device"."""
        gallery = self._train.gallery
        _, example = self._train.reading.read(0, gallery.size, gallery.read_one, gallery.name)
        device = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.batch_shapes(1).values())
        return {"disk": float(len(records.encode(example, gallery.reader.schema))), "device": float(device)}
