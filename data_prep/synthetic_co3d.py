"""Writes posed video in CO3Dv2's layout, ray-cast from random scenes: a twin to rehearse with before the 5.5 TB.

    python -m data_prep.synthetic_co3d --out ROOT --size small --workers 8

The twin has the real data's awkward cases on purpose (data_prep/twin.py): arbitrary world frames, portrait pictures,
three ways to write intrinsics, missing frames, null viewpoints, file names that do not follow the frame number, and
poses that are noisy where the quality score is low. A killed run continues where it was: every file appears under its
name complete or not at all, and a category's annotations come after its images. Many machines share the work with
--task I/N, and --merge, which writes the annotations (data_prep/tasks.py).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from time import monotonic

from PIL import Image

from data_prep import pool, record_folder, tasks, turntable, twin_folder
from data_prep.raycast import render
from data_prep.twin import SIZES, Sequence, annotated_cameras, cameras, plan, scene
from data_prep.twin_folder import Twin, write
from niso import folders
from niso.errors import UserError

SUBSET = "fewview_dev"
# Part of twin.json: raise it when the same options give other pictures, so that no twin is half old, half new.
VERSION = 1
# Twin -> options of data_prep.co3d. tiny has three sequences per category.
PREPARATION = {name: {"top_quantile": 0.0, "test_fraction": 1 / 3 if name == "tiny" else 0.1} for name in SIZES}


def frame_annotations(sequence: Sequence) -> list[dict[str, object]]:
    """CO3Dv2's frame annotations of one sequence, in order of time."""
    similarity = turntable.random_similarity(sequence.rng("world"))
    annotations: list[dict[str, object]] = []
    for t, camera in enumerate(annotated_cameras(sequence)):
        if t in sequence.no_annotation:
            continue
        viewpoint = turntable.viewpoint(camera, similarity, sequence.intrinsics_format)
        annotations.append(
            {
                "sequence_name": sequence.name,
                "frame_number": t,
                "frame_timestamp": t / 10,
                "image": {"path": sequence.image_path(t), "size": [sequence.height, sequence.width]},
                "depth": None,
                "mask": None,
                "viewpoint": None if t in sequence.no_viewpoint else viewpoint,
                "meta": None,
            }
        )
    return annotations


def sequence_annotation(sequence: Sequence) -> dict[str, object]:
    """CO3Dv2's annotation of one sequence."""
    return {
        "sequence_name": sequence.name,
        "category": sequence.category,
        "video": None,
        "point_cloud": None,
        "viewpoint_quality_score": sequence.quality,
    }


def set_lists(sequences: list[Sequence]) -> dict[str, list[list[object]]]:
    """{train, val, test: [[sequence_name, frame_number, image_path], ...]} of a category; val, test: a tenth each."""
    held_out = max(1, len(sequences) // 10)
    parts = {
        "train": sequences[: -2 * held_out],
        "val": sequences[-2 * held_out : -held_out],
        "test": sequences[-held_out:],
    }
    return {
        split: [
            [sequence.name, t, sequence.image_path(t)]
            for sequence in part
            for t in range(sequence.frames)
            if t not in sequence.no_annotation
        ]
        for split, part in parts.items()
    }


def write_images(out: Path, sequence: Sequence, again: bool = False) -> Sequence:
    """Renders the frames that are not there yet, or all of them again; returns the sequence."""
    todo = [t for t in sequence.image_numbers if again or not (out / sequence.image_path(t)).exists()]
    if todo:
        film, still_life = cameras(sequence), scene(sequence)
        for t in todo:
            picture = Image.fromarray(render(still_life, film[t], sequence.antialias))
            buffer = BytesIO()
            picture.save(buffer, "JPEG", quality=92)
            write(out / sequence.image_path(t), buffer.getvalue())
    return sequence


def build(out: Path, sequence: Sequence) -> record_folder.Part:
    """Makes a sequence of a task's, whatever a run that was killed or a damage has left of it."""
    return twin_folder.note(out, write_images(out, sequence, again=True))


def write_annotations(out: Path, sequences: list[Sequence]) -> None:
    """The annotation files of one category; frame_annotations.jgz, which readers look for, last."""
    folder = out / sequences[0].category
    frames = [annotation for sequence in sequences for annotation in frame_annotations(sequence)]
    write(folder / "set_lists" / f"set_lists_{SUBSET}.json", _json(set_lists(sequences)))
    write(folder / "sequence_annotations.jgz", _jgz([sequence_annotation(sequence) for sequence in sequences]))
    write(folder / "frame_annotations.jgz", _jgz(frames))


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _jgz(value: object) -> bytes:
    return gzip.compress(_json(value), mtime=0)  # without the time of day: same seed, same bytes


def generate(
    out: str | os.PathLike[str],
    size: str,
    seed: int = 0,
    workers: int = 1,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> None:
    """Writes the twin of that size ("tiny", "small", "full") under out, or completes one begun with the same options.

    Args:
        out: root folder of the twin; made if it does not exist.
        size: of the twin.
        seed: of all that is random in it.
        workers: processes that render; one means this one.
        task: "I/N": make one N-th of the sequences, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the sequences of all tasks, and write what concerns all: what one run would have left behind.
        progress: print progress (stderr), and what a task and a merge have done (stdout).

    Raises:
        UserError: an unknown size, a folder that holds other data, or, of a task and a merge, see tasks.make.
    """
    share = tasks.parse(task, merge)
    if folders.remote(out):
        raise UserError(f"--out {out} is in a bucket: make the twin in a folder of this machine, and copy that")
    out = folders.named(out, "--out")
    if size not in SIZES:
        raise UserError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    if seed < 0 or workers < 1:
        raise UserError(f"seed must be 0 or more and workers 1 or more, not {seed} and {workers}")
    categories: dict[str, list[Sequence]] = {}
    for sequence in plan(SIZES[size], seed):
        categories.setdefault(sequence.category, []).append(sequence)
    twin = Twin(
        out,
        "synthetic_co3d",
        {"size": size, "seed": seed, "version": VERSION},
        {category: {sequence.folder: (sequence,) for sequence in members} for category, members in categories.items()},
        units="frames",
        changed="",  # this and the next are of what is read, which is nothing
        empty="",
        flags={"version": None},  # there is no --version
        pieces="sequences",
        annotate=partial(write_annotations, out),
        subsets=_json({category: [SUBSET] for category in categories}),
    )
    with _single_threaded_children():
        if share == tasks.Share() and not twin.is_shared():
            _make(twin, categories, workers, progress)
        elif not (twin.is_begun() and twin.is_finished(progress)):
            tasks.make(twin, share, partial(build, out), _jobs, _summarise, workers, progress)


def _make(twin: Twin, categories: dict[str, list[Sequence]], workers: int, progress: bool) -> None:
    """One run: makes the frames that are missing, and what concerns a category when it has them all."""
    twin.begin()
    sequences = [sequence for members in categories.values() for sequence in members]
    report = _progress(sum(sequence.frames for sequence in sequences)) if progress else lambda frames: None
    missing = {category: len(members) for category, members in categories.items()}
    for sequence in pool.run(partial(write_images, twin.out), sequences, workers):
        report(sequence.frames)
        missing[sequence.category] -= 1
        if not missing[sequence.category]:
            write_annotations(twin.out, categories[sequence.category])
    twin.end()


def _jobs(pending: record_folder.Plan[Sequence]) -> Iterator[Sequence]:
    return (sequence for (sequence,) in pending.values())


def _summarise(kept: record_folder.Kept) -> None:
    for category, sequences in kept.items():
        print(f"{category}: {len(sequences)} sequences, {sum(sequence.length for sequence in sequences)} images")


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside use one thread each, or the BLAS pools of all workers would fight over the cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _progress(total: int) -> Callable[[int], None]:
    """A function of the frames just finished: one updating line on a terminal, else a line every tenth of the work."""
    start, done, printed = monotonic(), 0, 0

    def report(frames: int) -> None:
        nonlocal done, printed
        done += frames
        elapsed = monotonic() - start
        line = f"{done}/{total} frames, {elapsed:.0f} s, {elapsed / done * (total - done):.0f} s to go"
        if sys.stderr.isatty():
            bar = "#" * (30 * done // total)
            print(f"\r[{bar:30}] {line:50}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif 10 * done // total > printed:
            printed = 10 * done // total
            print(line, file=sys.stderr, flush=True)

    return report


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m data_prep.synthetic_co3d", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="root folder of the twin; made if missing")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    tasks.add_flags(parser, "sequences", "the twin")
    return record_folder.command_line(generate, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
