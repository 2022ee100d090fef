"""Writes posed video in CO3Dv2's layout, ray-cast from random scenes: a twin to rehearse with before the 5.5 TB.

    python -m data_prep.synthetic_co3d --out ROOT --size small --workers 8

The twin has the real data's awkward cases on purpose (data_prep/twin.py): arbitrary world frames, portrait pictures,
three ways to write intrinsics, missing frames, null viewpoints, file names that do not follow the frame number, and
poses that are noisy where the quality score is low. A killed run continues where it was: every file appears under its
name complete or not at all, and a category's annotations come after its images.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from time import monotonic

from PIL import Image

from data_prep import turntable
from data_prep.raycast import render
from data_prep.twin import SIZES, Sequence, annotated_cameras, cameras, plan, scene
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


def write_images(out: Path, sequence: Sequence) -> int:
    """Renders the frames that are not there yet; how many those were."""
    todo = [t for t in range(sequence.frames) if t not in sequence.no_image]
    todo = [t for t in todo if not (out / sequence.image_path(t)).exists()]
    if todo:
        film, still_life = cameras(sequence), scene(sequence)
        for t in todo:
            picture = Image.fromarray(render(still_life, film[t], sequence.antialias))
            buffer = BytesIO()
            picture.save(buffer, "JPEG", quality=92)
            _write(out / sequence.image_path(t), buffer.getvalue())
    return len(todo)


def write_annotations(out: Path, sequences: list[Sequence]) -> None:
    """The annotation files of one category; frame_annotations.jgz, which readers look for, last."""
    folder = out / sequences[0].category
    frames = [annotation for sequence in sequences for annotation in frame_annotations(sequence)]
    _write(folder / "set_lists" / f"set_lists_{SUBSET}.json", _json(set_lists(sequences)))
    _write(folder / "sequence_annotations.jgz", _jgz([sequence_annotation(sequence) for sequence in sequences]))
    _write(folder / "frame_annotations.jgz", _jgz(frames))


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _jgz(value: object) -> bytes:
    return gzip.compress(_json(value), mtime=0)  # without the time of day: same seed, same bytes


def _write(path: Path, content: bytes) -> None:
    """All of the file under its name or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def generate(out: Path, size: str, seed: int = 0, workers: int = 1, progress: bool = True) -> None:
    """Writes the twin of that size ("tiny", "small", "full") under out, or completes one begun with the same options.

    Raises UserError for an unknown size and for a folder that holds other data.
    """
    if size not in SIZES:
        raise UserError(f"no size {size!r}; choose one of {', '.join(SIZES)}")
    if seed < 0 or workers < 1:
        raise UserError(f"seed must be 0 or more and workers 1 or more, not {seed} and {workers}")
    sequences = plan(SIZES[size], seed)
    categories: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        categories.setdefault(sequence.category, []).append(sequence)
    _claim(out, {"size": size, "seed": seed, "version": VERSION})
    report = _progress(sum(sequence.frames for sequence in sequences)) if progress else lambda frames: None
    missing = {category: len(members) for category, members in categories.items()}
    for sequence in _write_all(out, sequences, workers):
        report(sequence.frames)
        missing[sequence.category] -= 1
        if not missing[sequence.category]:
            write_annotations(out, categories[sequence.category])
    _write(out / "category_to_subset_name_list.json", _json({category: [SUBSET] for category in categories}))


def _claim(out: Path, options: dict[str, object]) -> None:
    """Marks the folder as this twin's, or refuses it."""
    marker = out / "twin.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != options:
            raise UserError(f"{out} holds a twin with {found}, not {options}: choose another folder or remove it")
    elif (out / "category_to_subset_name_list.json").exists():
        raise UserError(f"{out} holds a CO3D data set that is no twin: choose another folder")
    else:
        _write(marker, _json(options))


def _write_all(out: Path, sequences: list[Sequence], workers: int) -> Iterator[Sequence]:
    """Renders all sequences, in this process or in `workers` others; yields each one when its images are complete."""
    if workers == 1:
        for sequence in sequences:
            write_images(out, sequence)
            yield sequence
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_with_parent)
    with executor as pool, _single_threaded_children():
        futures = {pool.submit(write_images, out, sequence): sequence for sequence in sequences}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """Ends this worker when the run is killed: an orphan would write the same files as the run that continues."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside use one thread each, or the BLAS pools of all workers would fight over the cores."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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
    """The command line; 0, or 2 after one line on stderr that says what to change."""
    parser = argparse.ArgumentParser("python -m data_prep.synthetic_co3d", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="root folder of the twin; made if missing")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    options = parser.parse_args(argv)
    try:
        if folders.remote(options.out):
            raise UserError(f"--out {options.out} is in a bucket: make the twin in a folder of this machine, and copy that")
        generate(folders.named(options.out, "--out"), options.size, options.seed, options.workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
