"""CO3Dv2 to records: python -m data_prep.co3d --root CO3D_ROOT --out RECORDS

Chooses sequences by quality (or from a published list), crops every frame to its centre square, resizes it once, and
stores it as JPEG with an OpenCV camera-to-world pose and pixel intrinsics.  The unit of work is a shard: a run that was
killed continues with the shards that are not finished, and a deleted or truncated shard is made again, byte for byte.
Many machines share the work with --task I/N, and --merge (data_prep/tasks.py).
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

from data_prep import co3d_shard, co3d_source, record_folder, tasks
from data_prep.co3d_source import Selected
from niso import folders
from niso.data import records
from niso.errors import UserError

DATASET = "co3d"
_SEQUENCES_PER_SHARD = 8

Plan = record_folder.Plan[Selected]


def prepare(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    categories: Sequence[str] | None = None,
    top_quantile: float = 0.75,
    splits: str | os.PathLike[str] | None = None,
    test_fraction: float = 0.1,
    size: int = 144,
    workers: int = 1,
    shards: int | None = None,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> records.Manifest | None:
    """Makes what is missing of the records of a CO3Dv2 folder; returns their manifest (None from a task).

    Args:
        root: the CO3Dv2 folder, one folder per category in it.
        out: the folder of records; made if it does not exist.
        categories: the categories to read, all found by default; qualities are pooled over these.
        top_quantile: keep the sequences at or above this quantile of viewpoint quality, in [0, 1].
        splits: JSON file {train|test: {category: [names]}} that replaces the choice by quality.
        test_fraction: the part of every category's kept sequences that is test data, in (0, 1).
        size: side of the stored square images in pixels.
        workers: processes; one means this one.
        shards: files per split, at most one per sequence; by default one per 8 sequences, at most 1024.
        task: "I/N": make one N-th of the shards, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the shards of all tasks, and make the records of them: what one run would have left behind.
        progress: print progress (stderr) and the summary (stdout).

    Raises:
        UserError: see the message.
    """
    share = tasks.parse(task, merge)
    record_folder.check(
        size,
        workers,
        shards,
        ("top_quantile", top_quantile, 0 <= top_quantile <= 1, "between 0 and 1"),
        ("test_fraction", test_fraction, 0 < test_fraction < 1, "above 0 and below 1"),
    )
    root, out = folders.named(root, "--root"), folders.named(out, "--out")
    splits = None if splits is None else folders.named(splits, "--splits")
    names = co3d_source.find_categories(root, categories)
    scores = co3d_source.read_scores(root, names)
    if splits is not None:
        chosen = co3d_source.splits_from_list(splits, scores, root, partial=categories is not None)
        dropped: dict[str, int] = {}
    else:
        chosen, dropped = co3d_source.select(scores, top_quantile, test_fraction)
    options = {
        "categories": sorted(set(categories)) if categories else None,
        "top_quantile": None if splits is not None else top_quantile,
        "test_fraction": None if splits is not None else test_fraction,
        "splits": None if splits is None else splits.name,
        "size": size,
        "shards": shards,
        "source": _fingerprint(root, chosen),
    }
    target = record_folder.Folder(
        out,
        DATASET,
        options,
        {split: _plan(split, sequences, shards) for split, sequences in chosen.items()},
        units="frames",
        changed="other sequences are chosen, or the annotations of CO3D_ROOT or the list of splits have changed",
        empty="no usable sequence in split {split} (left out: {reasons}): are the images complete?",
        left_out=dropped,
        flags={"root": root, "splits": splits},
    )

    def jobs(pending: Plan) -> Iterator[co3d_shard.Job]:
        return _jobs(root, out, size, pending)

    return tasks.make(target, share, co3d_shard.build, jobs, _summarise, workers, progress)


def _fingerprint(root: pathlib.Path, chosen: co3d_source.Splits) -> str:
    """Changes when other sequences are chosen or the annotations of their frames do (judged by the files' sizes)."""
    categories = sorted({sequence.category for sequences in chosen.values() for sequence in sequences})
    sizes = []
    for category in categories:
        path = root / category / "frame_annotations.jgz"
        try:
            sizes.append(folders.size(path))
        except folders.failures() as error:
            raise UserError(f"cannot read {path}: {folders.reason(error)}; download the category again") from error
    what = [sizes, {split: [dataclasses.astuple(s) for s in sequences] for split, sequences in chosen.items()}]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _plan(split: str, sequences: Sequence[Selected], shards: int | None) -> Plan:
    return record_folder.deal(split, sequences, shards, _SEQUENCES_PER_SHARD)


def _jobs(root: pathlib.Path, out: pathlib.Path, size: int, pending: Plan) -> Iterator[co3d_shard.Job]:
    """The jobs as the categories are read, one after the other; a shard waits for the last category it needs."""
    wanted: dict[str, set[str]] = collections.defaultdict(set)
    for sequences in pending.values():
        for sequence in sequences:
            wanted[sequence.category].add(sequence.name)
    waiting = dict(pending)
    gathered: dict[str, list[tuple[Selected, tuple[co3d_source.Frame, ...]]]] = collections.defaultdict(list)
    for category in sorted(wanted):
        frames = co3d_source.read_frames(root, category, wanted[category])
        for file, sequences in list(waiting.items()):
            gathered[file] += [(s, tuple(frames[s.name])) for s in sequences if s.category == category]
            if len(gathered[file]) == len(sequences):
                del waiting[file]
                yield co3d_shard.Job(str(root), str(out), file, size, tuple(gathered.pop(file)))


def _summarise(kept: record_folder.Kept) -> None:
    for split, sequences in kept.items():
        frames = sum(sequence.length for sequence in sequences)
        categories = len({sequence.category for sequence in sequences})
        print(f"{split}: {len(sequences)} sequences of {categories} categories, {frames} frames")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.co3d", description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", required=True, help="CO3Dv2 folder, one folder per category in it")
    parser.add_argument("--out", required=True, help="folder for the records")
    parser.add_argument("--categories", nargs="+", help="read only these; qualities are pooled over them")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--top_quantile", type=float, default=0.75, help="keep this quality quantile and above (0.75)")
    choice.add_argument("--splits", help="JSON file {train|test: {category: [sequence names]}} to use instead")
    parser.add_argument("--test_fraction", type=float, default=0.1, help="test part of every category (0.1)")
    parser.add_argument("--size", type=int, default=144, help="side of the stored images in pixels (144)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument("--shards", type=int, help="files per split (one per 8 sequences, at most 1024)")
    tasks.add_flags(parser)
    return record_folder.command_line(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
