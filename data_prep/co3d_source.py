"""What a CO3Dv2 folder holds, and which of its sequences are training and test data.

The layout is the one CO3Dv2 is published in: ROOT/<category>/{sequence,frame}_annotations.jgz are gzipped JSON lists,
image paths are relative to ROOT.  Only annotations are read here, those of the frames one category at a time.
"""

import collections
import dataclasses
import gzip
import json
import math
import pathlib
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from data_prep import sources
from niso import folders
from niso.errors import UserError

# Scores[category][sequence name]: viewpoint quality, bigger is better, None where the annotation has none.
Scores = dict[str, dict[str, float | None]]


@dataclasses.dataclass(frozen=True)
class Selected:
    """A sequence that is to be stored."""

    category: str
    name: str
    quality: float | None


Splits = dict[str, tuple[Selected, ...]]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame annotation: image path relative to ROOT, annotated size in pixels, PyTorch3D viewpoint or None."""

    path: str
    height: int
    width: int
    number: int
    viewpoint: dict[str, Any] | None


def find_categories(root: pathlib.Path, wanted: Collection[str] | None) -> list[str]:
    """The sorted categories to read: those wanted, or every folder of ROOT that holds annotations."""
    if folders.kind(root) != "folder":
        raise UserError(f"no folder {root}: --root is the CO3Dv2 folder that holds one folder per category")
    # Not by a pattern: fsspec would list all of a bucket's frames for it.
    named = sorted(name for name, is_folder in folders.entries(root) if is_folder)
    found = [name for name in named if (root / name / "sequence_annotations.jgz").exists()]
    if not found:
        raise UserError(f"{root} holds no <category>/sequence_annotations.jgz: is it the root of a CO3Dv2 folder?")
    unknown = sorted(set(wanted or ()) - set(found))
    if unknown:
        raise UserError(f"{root} has no category {', '.join(unknown)}; it has {_few(found)}")
    return sorted(set(wanted)) if wanted else found


def _few(names: Collection[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _read_annotations(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(sources.opened(path), "rb") as file:
            value = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: download the category again") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): download the category again") from error
    if not isinstance(value, list):
        raise UserError(f"{path} is not a list of annotations: download the category again")
    return value


def read_scores(root: pathlib.Path, categories: Collection[str]) -> Scores:
    """Every sequence of the categories with its quality; null and non-finite scores are None."""
    scores: Scores = {}
    for category in categories:
        path = root / category / "sequence_annotations.jgz"
        try:
            entries = [(entry["sequence_name"], entry["viewpoint_quality_score"]) for entry in _read_annotations(path)]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: an annotation lacks {error}: is this CO3D version 2?") from error
        scores[category] = {name: q if q is not None and math.isfinite(q) else None for name, q in entries}
    return scores


def select(scores: Scores, top_quantile: float, test_fraction: float) -> tuple[Splits, dict[str, int]]:
    """Training and test sequences by quality, and how many were left out per reason.

    The rule of the published Neural Isometries split: pool the scores of all categories, keep those at or above the
    quantile; per category sort by name.split("_"), the last int(test_fraction * n) are test; a category whose test part
    is empty is dropped.  Categories come in alphabetical order.
    """
    pooled = [score for names in scores.values() for score in names.values() if score is not None]
    if not pooled:
        raise UserError("no sequence has a finite viewpoint_quality_score to choose by: name sequences with --splits")
    threshold = float(np.quantile(pooled, top_quantile))
    left_out = {
        "sequences without quality score": sum(map(len, scores.values())) - len(pooled),
        "sequences below the quality quantile": sum(1 for score in pooled if score < threshold),
        "sequences of categories without test part": 0,
        "categories without test part": 0,
    }
    splits: dict[str, list[Selected]] = {"train": [], "test": []}
    for category, names in sorted(scores.items()):
        kept = [Selected(category, name, q) for name, q in names.items() if q is not None and q >= threshold]
        kept.sort(key=lambda sequence: sequence.name.split("_"))
        test = int(test_fraction * len(kept))
        if test == 0:
            left_out["categories without test part"] += 1
            left_out["sequences of categories without test part"] += len(kept)
            continue
        splits["train"] += kept[: len(kept) - test]
        splits["test"] += kept[len(kept) - test :]
    if not splits["test"]:
        largest = max(sum(q is not None and q >= threshold for q in names.values()) for names in scores.values())
        raise UserError(
            f"no sequence remains: a category needs {math.ceil(1 / test_fraction)} sequences for a test part at "
            f"--test_fraction {test_fraction:g}, the largest keeps {largest}; raise it, lower --top_quantile "
            f"{top_quantile:g}, or name the sequences with --splits FILE"
        )
    return {split: tuple(sequences) for split, sequences in splits.items()}, left_out


def splits_from_list(path: pathlib.Path, scores: Scores, root: pathlib.Path, partial: bool) -> Splits:
    """The splits that a file {"train" | "test": {category: [sequence names]}} names, categories in alphabetical order.

    partial: leave out the list's categories that `scores` does not hold; otherwise they are an error, as an unknown
    sequence always is.  One sequence may be in both splits.
    """
    try:
        listed: dict[str, dict[str, list[str]]] = json.loads(folders.read(path))
        pairs = [
            (split, category, list(dict.fromkeys(names)))
            for split, part in listed.items()
            for category, names in sorted(part.items())
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no list of splits {{train|test: {{category: [names]}}}} ({error})") from error
    if not set(listed) <= {"train", "test"} or not any(names for _, _, names in pairs):
        raise UserError(
            f"{path}: expected {{train|test: {{category: [names]}}}} with at least one name, "
            f"found the splits {', '.join(listed) or 'none'}"
        )
    absent = {category for _, category, _ in pairs} - set(scores)
    if absent and not partial:
        raise UserError(
            f"{path} names categories that {root} does not have: {_few(absent)}; download them or choose with --categories"
        )
    pairs = [pair for pair in pairs if pair[1] not in absent]
    unknown = {f"{category}/{name}" for _, category, names in pairs for name in names if name not in scores[category]}
    if unknown:
        raise UserError(f"{path} names sequences that {root} does not have: {_few(unknown)}")
    splits: dict[str, list[Selected]] = collections.defaultdict(list)
    for split, category, names in pairs:
        splits[split] += [Selected(category, name, scores[category][name]) for name in names]
    if not any(splits.values()):
        raise UserError(f"{path} names no sequence of the chosen categories {', '.join(sorted(scores))}")
    return {split: tuple(splits[split]) for split in ("train", "test") if splits.get(split)}


def read_frames(root: pathlib.Path, category: str, names: Collection[str]) -> Mapping[str, list[Frame]]:
    """The frames of these sequences of one category, sorted by frame number; a sequence without frames has none."""
    path = root / category / "frame_annotations.jgz"
    frames: dict[str, list[Frame]] = {name: [] for name in names}
    try:
        for entry in _read_annotations(path):
            if entry["sequence_name"] in frames:
                height, width = entry["image"]["size"]
                frames[entry["sequence_name"]].append(
                    Frame(entry["image"]["path"], height, width, entry["frame_number"], entry.get("viewpoint"))
                )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: malformed frame annotation ({error!r}): is this CO3D version 2?") from error
    for sequence in frames.values():
        sequence.sort(key=lambda frame: frame.number)
    return frames
