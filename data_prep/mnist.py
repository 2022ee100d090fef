"""MNIST to records: python -m data_prep.mnist --root MNIST --out RECORDS

Reads the four files of the MNIST database of handwritten digits, packed with gzip or not, and stores their digits as they
are, 28 x 28 and one channel, each with its label and in the files' order.  Fashion-MNIST, KMNIST and others come in files
of the same names: what is not MNIST is told by its checksum, and refused.  The unit of work is a shard, as in
data_prep.images: a run that was killed continues with the shards that are not finished.  Many machines share the work with
--task I/N, and --merge (data_prep/tasks.py).
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from data_prep import idx, record_folder, tasks
from niso import folders
from niso.data import records
from niso.errors import UserError

DATASET = "mnist"
SIZE = 28
CLASSES = 10
# Split -> the files of its images and of its labels, each perhaps with .gz behind it.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the unpacked files: every gzip may pack them another way.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_RECORDS_PER_SHARD = 10_000
_SOURCES = (
    "MNIST's four files are on the page of its authors (the MNIST database of handwritten digits, by LeCun, Cortes and Burges) "
    "and its mirrors, and in the folder MNIST/raw that torchvision.datasets.MNIST makes: set --root to a folder of them"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make: its file name in the folder `out`, and the digits of it."""

    out: str
    file: str
    image_NxHxW: np.ndarray
    label_N: np.ndarray


def prepare(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = SIZE,
    verify: bool = True,
    workers: int = 1,
    shards: int | None = None,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> records.Manifest | None:
    """Makes what is missing of the records of MNIST; returns their manifest (None from a task).

    Args:
        root: the folder of the four files.
        out: the folder of records; made if it does not exist.
        size: side of the images in pixels: 28, since they are stored as they are.
        verify: refuse files whose content is not MNIST's; False is for others of its layout, such as the built-in twin.
        workers: processes; one, which means this one, takes seconds.
        shards: files per split, at most one per digit; by default one per 10,000.
        task: "I/N": make one N-th of the shards, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the shards of all tasks, and make the records of them: what one run would have left behind.
        progress: print progress (stderr) and the summary (stdout).

    Raises:
        UserError: see the message.
    """
    share = tasks.parse(task, merge)
    record_folder.check(size, workers, shards, ("size", size, size == SIZE, f"{SIZE}, the digits' own"))
    root, out = folders.named(root, "--root"), folders.named(out, "--out")
    splits, source = read(root, verify)
    target = record_folder.Folder(
        out,
        DATASET,
        {"size": size, "shards": shards, "source": source},
        {
            split: record_folder.deal(split, range(len(label_N)), shards, _RECORDS_PER_SHARD)
            for split, (_, label_N) in splits.items()
        },
        units="images",
        changed=f"{root} has other digits than then",
        empty="no digit in split {split}",
        flags={"root": root, "size": None},  # there is no --size
    )

    def jobs(pending: record_folder.Plan[int]) -> Iterator[Job]:
        for file, numbers in pending.items():
            image_NxHxW, label_N = splits[file.partition("-")[0]]
            chosen = slice(numbers[0], numbers[-1] + 1)
            yield Job(str(out), file, image_NxHxW[chosen], label_N[chosen])

    return tasks.make(target, share, build, jobs, _summarise, workers, progress)


def read(root: pathlib.Path, verify: bool = True) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """(image_NxHxW, label_N), uint8, of every split, and a fingerprint of them all.

    Raises:
        UserError: a file is missing or damaged, or, with verify, not MNIST's; images and labels do not fit each other.
    """
    paths = [(name, path) for name in SHA256 for path in (root / f"{name}.gz", root / name)]
    found = {name: path for name, path in paths if folders.kind(path) == "file"}
    if missing := [name for name in SHA256 if name not in found]:
        raise UserError(f"no {' and no '.join(missing)} in {root}, with or without .gz; {_SOURCES}")
    splits, fingerprint = {}, hashlib.sha256()
    for split, (images, labels) in FILES.items():
        image_NxHxW, image_sum = _read_file(found[images], images, 3, verify)
        label_N, label_sum = _read_file(found[labels], labels, 1, verify)
        _check(found[images], image_NxHxW, found[labels], label_N)
        fingerprint.update(f"{image_sum} {label_sum} ".encode())
        splits[split] = image_NxHxW, label_N
    return splits, fingerprint.hexdigest()[:16]


def _read_file(path: pathlib.Path, name: str, axes: int, verify: bool) -> tuple[np.ndarray, str]:
    """The array in the file that MNIST calls `name`, and the SHA-256 of its content."""
    content = idx.read(path)
    array, found = idx.decode(content, axes, path), hashlib.sha256(content).hexdigest()
    if verify and found != SHA256[name]:
        sums = f"the SHA-256 of its content is {found[:16]}..., that of MNIST's {SHA256[name][:16]}..."
        raise UserError(f"{path} is damaged, or another dataset's: {sums}; fetch it again")
    return array, found


def _check(images: pathlib.Path, image_NxHxW: np.ndarray, labels: pathlib.Path, label_N: np.ndarray) -> None:
    """Refuses images and labels that are not digits in the layout of MNIST."""
    count, *edges = image_NxHxW.shape
    if edges != [SIZE, SIZE]:
        raise UserError(f"the images of {images} are {edges[0]} x {edges[1]} pixels, not {SIZE} x {SIZE}: take MNIST's files")
    if count != len(label_N) or not count:
        raise UserError(f"{images} has {count} images, {labels} has {len(label_N)} labels: take both from one source")
    if label_N.max() >= CLASSES:
        number = int(np.argmax(label_N >= CLASSES))
        raise UserError(f"{labels}: label {number} is {label_N[number]}, not 0 to {CLASSES - 1}: take MNIST's files")


def build(job: Job) -> record_folder.Part:
    """Makes the shard; depends on nothing but the job, so a second run gives equal bytes."""
    schema = records.still(SIZE, channels=1, labelled=True)
    with records.ShardWriter(folders.named(job.out) / job.file) as writer:
        for image_HxW, label in zip(job.image_NxHxW, job.label_N.astype(np.int64), strict=True):
            writer.write(records.encode({"image_HxWxC": image_HxW[..., None], "label": label}, schema))
    return record_folder.note(writer, [records.Sequence(job.file.partition(".")[0], "digits", job.file, 0, writer.count, None)], {})


def _summarise(kept: record_folder.Kept) -> None:
    for split, sequences in kept.items():
        print(f"{split}: {sum(sequence.length for sequence in sequences)} digits")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.mnist", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True, help=f"folder of {', '.join(SHA256)}, each perhaps with .gz")
    parser.add_argument("--out", required=True, help="folder for the records")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--shards", type=int, help="files per split (one per 10,000 digits)")
    tasks.add_flags(parser)
    return record_folder.command_line(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
