"""The homNIST test set to records: python -m data_prep.homnist --mat FILE --out RECORDS, or --mnist RECORDS_OF_MNIST --out RECORDS

homNIST (MacDonald, Ramasinghe and Lucey, Enabling Equivariance for Arbitrary Lie Groups, CVPR 2022): MNIST's 10,000 test digits,
padded by 6 to 40 x 40, under 32 random homographies each, the copies of a digit one behind the other.

--mat reads the published file.  Its homographies were drawn without a seed, so it cannot be made again.  Its images, 4.1 GB, are
in memory once while this runs; its homographies (hom_matrices) are not read.
--mnist makes a set by the same law, with the very homographies that tasks draw on the device where test_records is "": each a
function of (digit, copy, seed).  A digit is in memory at a time.

Both store pixels as whole grey levels, rounded.  The unit of work is a shard, as in data_prep.images: a run that was killed
continues with the shards that are not finished.  Many machines share the work with --task I/N, and --merge (data_prep/tasks.py).
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_prep import homnist_mat, record_folder, tasks
from niso import folders
from niso.data import records
from niso.errors import UserError
from niso.geometry import homography

DATASET, SPLIT = "homnist", "test"
SIZE, DIGIT = homnist_mat.SIZE, 28
COPIES, SEED = 32, 0
_RECORDS_PER_SHARD = 10_000
_BLOCK = 1_000  # images that are rounded at a time

# (image_NxHxW uint8, label_N), some images of a shard.
Block = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Published:
    """The images of the published file, uint8 or floats in [0, 1], and their labels; `take` counts images.

    Attributes:
        source: A fingerprint of them.
        each: What a shard takes of the numbers that `take` understands.
    """

    image_NxHxW: np.ndarray
    label_N: np.ndarray
    source: str
    each: int = _RECORDS_PER_SHARD

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, numbers: Sequence[int]) -> Iterator[Block]:
        """These images, which follow each other."""
        end = numbers[-1] + 1
        for first in range(numbers[0], end, _BLOCK):
            chosen = slice(first, min(first + _BLOCK, end))
            yield grey(self.image_NxHxW[chosen]), self.label_N[chosen]


@dataclasses.dataclass(frozen=True)
class Regenerated:
    """MNIST's test digits under the homographies of the held-out examples of a task; `take` counts digits, `copies` images each."""

    reader: records.Reader
    where: tuple[tuple[str, int], ...]  # shard and record of each digit
    copies: int
    seed: int
    source: str

    @classmethod
    def open(cls, root: pathlib.Path, copies: int, seed: int) -> "Regenerated":
        """Of the test split of a folder of records of MNIST; UserError where it is missing or holds something else."""
        make = f"make them with `python -m data_prep.mnist --root MNIST --out {root}`"
        if folders.kind(root / "manifest.json") != "file":
            raise UserError(f"no records of MNIST in {root}: {make}, and set --mnist to that folder")
        manifest = records.Manifest.read(root)
        if (manifest.dataset, manifest.size) != ("mnist", DIGIT) or not manifest.splits.get(SPLIT):
            splits = ", ".join(manifest.splits)
            there = f"{manifest.dataset}, {manifest.size} pixels wide ({splits})"
            raise UserError(f"{root} holds {there}, not MNIST's test split: {make}")
        reader = records.Reader(root, SPLIT, records.still(DIGIT, channels=1, labelled=True))
        where = tuple((s.shard, number) for s in reader.sequences for number in range(s.start, s.start + s.length))
        stored = " ".join(shard.sha256 for shard in manifest.splits[SPLIT])
        return cls(reader, where, copies, seed, hashlib.sha256(stored.encode()).hexdigest()[:16])

    @property
    def each(self) -> int:
        return max(1, _RECORDS_PER_SHARD // self.copies)

    def __len__(self) -> int:
        return len(self.where)

    def take(self, numbers: Sequence[int]) -> Iterator[Block]:
        """All copies of the first of these digits, then those of the next."""
        margin = (SIZE - DIGIT) // 2
        for number in numbers:
            shard, place = self.where[number]
            (digit,) = self.reader.read(shard, [place])
            padded_HxWxC = np.pad(np.float32(digit["image_HxWxC"]) / 255.0, ((margin, margin), (margin, margin), (0, 0)))
            warped = homography.held_out_copies(padded_HxWxC, number, copies=self.copies, seed=self.seed)
            yield grey(np.asarray(warped)[..., 0]), np.full(self.copies, digit["label"])


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make: its file name in the folder `out`, and the images of it, made when they are asked for."""

    out: str
    file: str
    blocks: Iterable[Block]


def prepare(
    out: str | os.PathLike[str],
    *,
    mat: str | os.PathLike[str] | None = None,
    mnist: str | os.PathLike[str] | None = None,
    copies: int | None = None,
    seed: int | None = None,
    shards: int | None = None,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> records.Manifest | None:
    """Makes what is missing of the records of a homNIST test set; returns their manifest (None from a task).

    Args:
        out: the folder of records; made if it does not exist.
        mat: the published file.
        mnist: or a folder of records of MNIST, whose test digits are warped.
        copies: of each of these, 32 by default.
        seed: of their homographies, task.test_seed of a run; 0 by default.
        shards: files, at most one per image (or per digit of mnist); by default one per 10,000 images.
        task: "I/N": make one N-th of the shards, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the shards of all tasks, and make the records of them: what one run would have left behind.
        progress: print progress (stderr) and the summary (stdout).

    Raises:
        UserError: see the message.
    """
    share = tasks.parse(task, merge)
    if (mat is None) == (mnist is None):
        which = "neither is set" if mat is None else "both are set"
        raise UserError(f"{which}: set --mat, to the published file, or --mnist, to records of MNIST to make a set from")
    out = folders.named(out, "--out")
    images: Published | Regenerated
    if mat is not None:
        if copies is not None or seed is not None:
            raise UserError(f"--copies and --seed are for --mnist: the homographies in {mat} are what they are, leave them out")
        record_folder.check(SIZE, 1, shards)
        source = folders.named(mat, "--mat")
        images = Published(*homnist_mat.read(source))
    else:
        copies, seed = COPIES if copies is None else copies, SEED if seed is None else seed
        rules = [("copies", copies, copies >= 1, "at least 1"), ("seed", seed, 0 <= seed < 2**31, "between 0 and 2147483647")]
        record_folder.check(SIZE, 1, shards, *rules)
        source = folders.named(mnist or "", "--mnist")
        images = Regenerated.open(source, copies, seed)
    target = record_folder.Folder(
        out,
        DATASET,
        {"size": SIZE, "shards": shards, "copies": copies, "seed": seed, "source": images.source},
        {SPLIT: record_folder.deal(SPLIT, range(len(images)), shards, images.each)},
        units="images",
        changed=f"{source} has other images than then",
        empty="no image in split {split}",
        flags={"mnist" if mat is None else "mat": source, "size": None},  # there is no --size
    )

    def jobs(pending: record_folder.Plan[int]) -> Iterator[Job]:
        for file, numbers in pending.items():
            yield Job(str(out), file, images.take(numbers))

    # In this process: the images of the file are in memory here, and jax warps with threads of its own.
    return tasks.make(target, share, build, jobs, _summarise, 1, progress)


def build(job: Job) -> record_folder.Part:
    """Makes the shard; depends on nothing but the job, so a second run on such a machine gives equal bytes."""
    schema = records.still(SIZE, channels=1, labelled=True)
    with records.ShardWriter(folders.named(job.out) / job.file) as writer:
        for image_NxHxW, label_N in job.blocks:
            for image_HxW, label in zip(image_NxHxW, label_N.astype(np.int64), strict=True):
                writer.write(records.encode({"image_HxWxC": image_HxW[..., None], "label": label}, schema))
    return record_folder.note(writer, [records.Sequence(job.file.partition(".")[0], "digits", job.file, 0, writer.count, None)], {})


def grey(image: np.ndarray) -> np.ndarray:
    """Grey levels 0 to 255, uint8, the nearest ones, of values in [0, 1]; uint8 is taken for grey levels already."""
    return image if image.dtype == np.uint8 else np.rint(255.0 * image).astype(np.uint8)


def _summarise(kept: record_folder.Kept) -> None:
    for split, sequences in kept.items():
        print(f"{split}: {sum(sequence.length for sequence in sequences)} images")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.homnist", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mat", help=f"the published file, with {' and '.join(homnist_mat.KEYS)}")
    parser.add_argument("--mnist", help="or a folder of records of MNIST, to make a set from")
    parser.add_argument("--out", required=True, help="folder for the records")
    parser.add_argument("--copies", type=int, help=f"homographies of each digit of --mnist ({COPIES})")
    parser.add_argument("--seed", type=int, help=f"of them, task.test_seed of a run ({SEED})")
    parser.add_argument("--shards", type=int, help="files (one per 10,000 images)")
    tasks.add_flags(parser)
    return record_folder.command_line(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
