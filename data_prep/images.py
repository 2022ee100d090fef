"""A folder of images to records: python -m data_prep.images --root IMAGES --out RECORDS

Any folder tree of pictures (ImageNet for one): each is cut to its centre square, or with --crops N to N random squares,
and resized to `size`.  Where the tree has a folder train/ and one val/ or test/, these are the splits; else pictures are
dealt to them by a hash of their names, so that more pictures do not move others.  The unit of work is a shard: a run that
was killed continues with the shards that are not finished, and a deleted or truncated shard is made again, byte for byte.
Many machines share the work with --task I/N, and --merge (data_prep/tasks.py).
"""

import argparse
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator

from data_prep import image_shard, record_folder, tasks
from niso import folders
from niso.data import records
from niso.errors import LostError, UserError

DATASET = "images"
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_RECORDS_PER_SHARD = 4_000
_TEST_FRACTION = 0.1
# What a tree may call the folder of its test split; the first that is there is taken.
_HELD_OUT = ("val", "test")

Splits = dict[str, list[str]]


def prepare(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 16,
    test_fraction: float | None = None,
    crops: int = 0,
    seed: int = 0,
    workers: int = 1,
    shards: int | None = None,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> records.Manifest | None:
    """Makes what is missing of the records of a folder of images; returns their manifest (None from a task).

    Args:
        root: the folder; whatever is in folders below it counts, but for names that begin with a dot.
        out: the folder of records; made if it does not exist.
        size: side of the stored square images in pixels.
        test_fraction: the part of the pictures that is test data, in (0, 1), 0.1 by default; not for a tree that says so.
        crops: random squares of every picture; 0 for the one in its middle.
        seed: of the choice of test pictures and of the random squares.
        workers: processes; one means this one.
        shards: files per split, at most one per picture; by default one per 4,000 records, at most 1024.
        task: "I/N": make one N-th of the shards, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the shards of all tasks, and make the records of them: what one run would have left behind.
        progress: print progress (stderr) and the summary (stdout).

    Raises:
        UserError: see the message.
    """
    share = tasks.parse(task, merge)
    fraction = _TEST_FRACTION if test_fraction is None else test_fraction
    record_folder.check(
        size,
        workers,
        shards,
        ("test_fraction", fraction, 0 < fraction < 1, "above 0 and below 1"),
        ("crops", crops, crops >= 0, "at least 0"),
        ("seed", seed, seed >= 0, "at least 0"),
    )
    root, out = folders.named(root, "--root"), folders.named(out, "--out")
    splits, dealt = choose(root, test_fraction, seed)
    options = {
        "test_fraction": fraction if dealt else None,
        "size": size,
        "crops": crops,
        "seed": seed,
        "shards": shards,
        "source": _fingerprint(splits),
    }
    each = max(1, _RECORDS_PER_SHARD // max(1, crops))
    target = record_folder.Folder(
        out,
        DATASET,
        options,
        {split: record_folder.deal(split, pictures, shards, each) for split, pictures in splits.items()},
        units="images",
        changed=f"{root} has other pictures than then",
        empty="no usable image in split {split} (left out: {reasons}): are these pictures?",
        flags={"root": root},
    )

    def jobs(pending: record_folder.Plan[str]) -> Iterator[image_shard.Job]:
        for file, pictures in pending.items():
            yield image_shard.Job(str(root), str(out), file, size, crops, seed, pictures)

    return tasks.make(target, share, image_shard.build, jobs, _summarise, workers, progress)


def choose(root: pathlib.Path, test_fraction: float | None, seed: int) -> tuple[Splits, bool]:
    """The pictures of every split as sorted paths within root, and whether they were dealt to them by hash.

    Raises:
        UserError: there is no such folder, a split has no picture, or test_fraction is given though the tree has splits.
    """
    if folders.kind(root) != "folder":
        raise UserError(f"no folder {root}: set --root to a folder of pictures ({', '.join(PICTURES)})")
    held_out = next((name for name in _HELD_OUT if folders.kind(root / name) == "folder"), None)
    if held_out is not None and folders.kind(root / "train") == "folder":
        if test_fraction is not None:
            remedy = "leave out --test_fraction, or set --root to one of them"
            raise UserError(f"{root} has folders of its own for the splits, train/ and {held_out}/: {remedy}")
        sorted_out = {split: sorted(find(root, folder)) for split, folder in (("train", "train"), ("test", held_out))}
        for split, found in sorted_out.items():
            if not found:
                folder = root / ("train" if split == "train" else held_out)
                raise UserError(f"no picture ({', '.join(PICTURES)}) in {folder}, which is to be the {split} split")
        return sorted_out, False
    pictures = sorted(find(root))
    if not pictures:
        raise UserError(f"no picture in {root} or a folder below it ({', '.join(PICTURES)}): set --root to another folder")
    limit = _TEST_FRACTION if test_fraction is None else test_fraction
    splits: Splits = {"train": [], "test": []}
    for picture in pictures:
        splits["test" if _share(seed, picture) < limit else "train"].append(picture)
    for split, found in splits.items():
        if not found:
            remedy = "choose another --test_fraction or --seed, or sort them into folders train/ and test/"
            raise UserError(f"of {len(pictures)} pictures in {root} none falls to the {split} split: {remedy}")
    return splits, True


def find(root: pathlib.Path, below: str = "") -> Iterator[str]:
    """The pictures in root/below and all folders in it, as paths within root with /, in no order; links are followed."""
    seen: set[tuple[int, int] | str] = set()
    waiting = [below]
    while waiting:
        folder = waiting.pop()
        try:
            place = _place(root / folder)
            if place in seen:  # a link to a folder above it
                continue
            seen.add(place)
            for name, is_folder in folders.entries(root / folder):
                if name.startswith("."):
                    continue
                path = f"{folder}/{name}" if folder else name
                if is_folder:
                    waiting.append(path)
                elif name.lower().endswith(PICTURES):
                    yield path
        except folders.failures() as error:
            kind = LostError if folders.remote(root) else UserError
            raise kind(f"cannot read the folder {root / folder}: {folders.reason(error)}") from error


def _place(folder: pathlib.Path) -> tuple[int, int] | str:
    """The same for every link to a folder, which there are none of in a bucket."""
    if folders.remote(folder):
        return os.fspath(folder)
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _share(seed: int, picture: str) -> float:
    """A number in [0, 1) that is the picture's own."""
    digest = hashlib.blake2b(f"{seed}/{picture}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _fingerprint(splits: Splits) -> str:
    """Changes when other pictures are found; their names are all that is looked at."""
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        digest.update("\0".join((split, *pictures, "")).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _summarise(kept: record_folder.Kept) -> None:
    for split, sequences in kept.items():
        print(f"{split}: {sum(sequence.length for sequence in sequences)} images")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.images", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True, help="folder of pictures, in folders of any depth; or of train/ and val/ or test/")
    parser.add_argument("--out", required=True, help="folder for the records")
    parser.add_argument("--size", type=int, default=16, help="side of the stored images in pixels (16)")
    parser.add_argument("--test_fraction", type=float, help="test part of the pictures, where the tree has no splits (0.1)")
    parser.add_argument("--crops", type=int, default=0, help="random squares of every picture (0: its centre square)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the random squares (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument("--shards", type=int, help="files per split (one per 4,000 records, at most 1024)")
    tasks.add_flags(parser)
    return record_folder.command_line(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
