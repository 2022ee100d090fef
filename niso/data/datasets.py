"""The tables of datasets: what a record holds, which splits there are, and how to get them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from niso.data import records
from niso.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row.

    Attributes:
        kind: What an example is: a window of frames of a video, a stack of still images, or a surface.
        units: What the user prepares more of where there are too few.
        schema: Entries of a record whose pictures have that edge.
        splits: Names of the splits, the one to train on first.
        command: What the user types to make the records; the folder to make follows.
        quick: What the user can do without them.
        classes: Names of the labels, by number; empty where there are none, or the manifest has them.
        size: The only edge that its pictures come in, in pixels; None where the preparation resizes them to any.
    """

    kind: Literal["windows", "stills", "surfaces"]
    units: str
    schema: Callable[[int], records.Schema]
    splits: tuple[str, ...]
    command: str
    quick: str
    classes: tuple[str, ...] = ()
    size: int | None = None


DATASETS = {
    # Posed video in the CO3Dv2 layout; a record is one frame.
    "co3d": Dataset(
        kind="windows",
        units="sequences",
        schema=lambda size: records.FRAME,
        splits=("train", "test"),
        command="python -m data_prep.co3d --root CO3D_ROOT --out",
        quick="or run --config=configs/pose_encode.py:quick, which needs none",
    ),
    # Any folder of images, ImageNet for one; a record is one of them.
    "images": Dataset(
        kind="stills",
        units="images",
        schema=records.still,
        splits=("train", "test"),
        command="python -m data_prep.images --root IMAGES --out",
        quick="or run --config=configs/toric_laplacian.py:quick, which needs none",
    ),
    # The MNIST database of handwritten digits; a record is one of them, unpadded, and its label.
    "mnist": Dataset(
        kind="stills",
        units="digits",
        schema=functools.partial(records.still, channels=1, labelled=True),
        splits=("train", "test"),
        command="python -m data_prep.mnist --root MNIST --out",
        quick="or run --config=configs/hmnist_encode.py:quick, which needs none",
        classes=tuple("0123456789"),
        size=28,
    ),
    # Closed meshes of genus 0, SHREC'11's for one; a record is one of them on the sphere, and its class.
    "shapes": Dataset(
        kind="surfaces",
        units="meshes",
        schema=records.surface,
        splits=("train", "test"),
        command="python -m data_prep.shapes --root MESHES --out",
        quick="or set --config.data.twin=small, which needs none",
    ),
}
# Those that have no images to train on: datasets of other images are tested on them.
TEST_SETS = {
    # MNIST's test digits, padded, under random homographies: 32 copies of each, one behind the other.
    "homnist": Dataset(
        kind="stills",
        units="digits",
        schema=functools.partial(records.still, channels=1, labelled=True),
        splits=("test",),
        command="python -m data_prep.homnist --mat FILE --out",
        quick="or set --config.data.test_records= to nothing: such a set is then made of the test digits as it is needed",
        classes=tuple("0123456789"),
        size=40,
    ),
}


def find(name: str) -> Dataset:
    """The row called name, of a dataset to train on; UserError for an unknown one."""
    if name in TEST_SETS:
        remedy = "choose another --config.data.dataset, and set --config.data.test_records to the folder of this one"
        raise UserError(f"data.dataset={name} has no images to train on: {remedy}")
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: --config.data.dataset is one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
