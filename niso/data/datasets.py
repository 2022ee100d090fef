"""The table of datasets: what a record holds, which splits there are, and how to get them."""

import dataclasses

from niso.data import records
from niso.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row.

    Attributes:
        schema: Entries of a record.
        splits: Names of the splits, the one to train on first.
        command: What the user types to make the records; the folder to make follows.
        quick: What the user can do without them.
        classes: Names of the labels, by number; empty where there are none.
    """

    schema: records.Schema
    splits: tuple[str, ...]
    command: str
    quick: str
    classes: tuple[str, ...] = ()


DATASETS = {
    # Posed video in the CO3Dv2 layout; a record is one frame.
    "co3d": Dataset(
        schema=records.FRAME,
        splits=("train", "test"),
        command="python -m data_prep.co3d --root CO3D_ROOT --out",
        quick="or run --config=configs/pose_encode.py:quick, which needs none",
    ),
}


def find(name: str) -> Dataset:
    """The row called name; UserError for an unknown one."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: --config.data.dataset is one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
