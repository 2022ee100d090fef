"""Camera trajectories scored at several strides: python -m niso.trajectories POSES.npz [--json FILE] [--limit FRAMES]

POSES.npz may come from any program.  It holds arrays under the keys

    stride_<b>/<sequence>/truth_Tx4x4       true camera-to-world poses of every b-th frame of a sequence
    stride_<b>/<sequence>/estimate_Tx4x4    the estimated ones, as many; world and scale are arbitrary
    stride_<b>/mean_motion_4x4              optional: the training set's mean relative pose at this stride, a baseline
                                            (`niso.geometry.trajectory.mean_motion`); the table says where it is absent

Poses are rigid, in the OpenCV camera frame (x right, y down, z forward).  A sequence's name may contain slashes.  The frames
of a sequence are `frames_of(length, stride)`, and sequences that lack more than a fifth of the full count are left out.

Every stride prints, for the estimate and for baselines that see no image: the published ATE; absolute and relative pose errors;
accuracies over all pairs of frames.  An estimate that rests or is not finite is scored at the worst value, never left out.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from niso.errors import UserError
from niso.geometry import trajectory

LIMIT = 200  # frames of a video that the published evaluation looks at
ORTHONORMAL = 1e-3  # largest deviation of R^T R from the identity that still counts as a rotation
_TRUTH, _ESTIMATE, _MEAN = "truth_Tx4x4", "estimate_Tx4x4", "mean_motion_4x4"
_HUGE = 1e100  # as good as infinite: squares would overflow
_METRICS = ("ape_translation", "ape_relative", "ape_rotation", "rpe_translation", "rpe_relative", "rpe_rotation", "rpe_direction")
_COUNTS = ("used", "too_short", "still", "degenerate", "not_finite")
_ACCURACIES = ("rra_15", "rta_15", "maa_30")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One video: true and estimated camera-to-world poses of the same T frames.

    Raises:
        UserError: the arrays are not two stacks of as many poses, or a pose is not rigid.  Only the estimate may be not finite.
    """

    name: str
    truth_Tx4x4: np.ndarray
    estimate_Tx4x4: np.ndarray

    def __post_init__(self) -> None:
        truth, estimate = np.shape(self.truth_Tx4x4), np.shape(self.estimate_Tx4x4)
        if truth != estimate or len(truth) != 3 or truth[1:] != (4, 4):
            raise UserError(f"{self.name}: {_TRUTH} is {truth} and {_ESTIMATE} is {estimate}, both must be (T, 4, 4)")
        if not _finite(self.truth_Tx4x4):
            raise UserError(f"{self.name}: {_TRUTH} is not finite: leave out frames without a pose")
        _check_rigid(f"{self.name}: {_TRUTH}", self.truth_Tx4x4)
        if self.finite:
            _check_rigid(f"{self.name}: {_ESTIMATE}", self.estimate_Tx4x4)

    @property
    def finite(self) -> bool:
        """Whether the estimate is."""
        return _finite(self.estimate_Tx4x4)


@dataclasses.dataclass(frozen=True)
class Stride:
    """What is scored together: sequences at one stride, and the training set's mean relative pose there, if known."""

    sequences: tuple[Sequence, ...]
    mean_motion_4x4: np.ndarray | None = None


def frames_of(length: int, stride: int, limit: int = LIMIT) -> np.ndarray:
    """The frames of a video that the published evaluation uses: every stride-th of the first `limit`."""
    return np.arange(0, min(limit, length), stride)


def save(path: str | os.PathLike[str], strides: Mapping[int, Stride]) -> None:
    """Writes POSES.npz: see the module's docstring."""
    arrays = {}
    for stride, part in strides.items():
        for sequence in part.sequences:
            arrays[f"stride_{stride}/{sequence.name}/{_TRUTH}"] = np.asarray(sequence.truth_Tx4x4)
            arrays[f"stride_{stride}/{sequence.name}/{_ESTIMATE}"] = np.asarray(sequence.estimate_Tx4x4)
        if part.mean_motion_4x4 is not None:
            arrays[f"stride_{stride}/{_MEAN}"] = np.asarray(part.mean_motion_4x4)
    try:
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | os.PathLike[str]) -> dict[int, Stride]:
    """Reads POSES.npz, float64, strides ascending.

    Raises:
        UserError: the file cannot be read, a key is unknown or lacks its partner, or poses are malformed.
    """
    arrays = _read(path)
    names: dict[int, set[str]] = {}
    for key in arrays:
        stride, _, rest = key.partition("/")
        name, _, kind = rest.rpartition("/")
        number = stride.removeprefix("stride_")
        # isdecimal() alone takes other alphabets' digits; int() alone takes blanks and signs.
        known = stride != number and number.isascii() and number.isdecimal() and int(number) > 0
        if not known or not (rest == _MEAN or (name and kind in (_TRUTH, _ESTIMATE))):
            raise UserError(f"{path}: unknown key {key!r}, known are stride_<b>/<sequence>/{{{_TRUTH}, {_ESTIMATE}}} and {_MEAN}")
        names.setdefault(int(number), set()).update({name} - {""})
    strides = {}
    for stride_number, inside in sorted(names.items()):
        folder = f"stride_{stride_number}"
        sequences = []
        for name in sorted(inside):
            pair = [f"{folder}/{name}/{kind}" for kind in (_TRUTH, _ESTIMATE)]
            missing = [key for key in pair if key not in arrays]
            if missing:
                raise UserError(f"{path}: {missing[0]} is missing, its partner is there")
            try:
                sequences.append(Sequence(name, arrays[pair[0]], arrays[pair[1]]))
            except UserError as error:
                raise UserError(f"{path}: {folder}/{error}") from error
        mean_4x4 = arrays.get(f"{folder}/{_MEAN}")
        if mean_4x4 is not None:
            if mean_4x4.shape != (4, 4) or not _finite(mean_4x4):
                raise UserError(f"{path}: {folder}/{_MEAN} must be one finite pose (4, 4), it is {mean_4x4.shape}")
            _check_rigid(f"{path}: {folder}/{_MEAN}", mean_4x4[None])
        strides[stride_number] = Stride(tuple(sequences), mean_4x4)
    return strides


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not an npz file of plain arrays ({error})") from error
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {key} holds {array.dtype}, it must hold real numbers")
    return {key: array.astype(np.float64) for key, array in arrays.items()}


def _finite(array: np.ndarray) -> bool:
    return bool((np.abs(array) < _HUGE).all())


def _check_rigid(what: str, pose_Tx4x4: np.ndarray) -> None:
    off_T = trajectory.off_rigid(np.asarray(pose_Tx4x4, np.float64))
    bad = np.flatnonzero(off_T > ORTHONORMAL)
    if bad.size:
        why = f"off by {off_T[bad[0]]:.2g}" if np.isfinite(off_T[bad[0]]) else "it mirrors"
        raise UserError(f"{what}: pose {bad[0]} is not rigid, {why}: expected [R t; 0 0 0 1] with a rotation R")


def score_all(strides: Mapping[int, Stride], limit: int = LIMIT) -> dict[str, float]:
    """The scores of every stride, under names like stride_2/ate_ref. `limit` is that of `frames_of`."""
    scores = {}
    for stride, part in sorted(strides.items()):
        values = score(part.sequences, part.mean_motion_4x4, len(frames_of(limit, stride, limit)))
        scores.update({f"stride_{stride}/{name}": value for name, value in values.items()})
    return scores


def score(
    sequences: Iterable[Sequence], mean_motion_4x4: np.ndarray | None = None, full_length: int | None = None
) -> dict[str, float]:
    """The scores of sequences at one stride, as flat names; those of a baseline begin with its name, as baseline_forward/ate_ref.

    sequences_used, _too_short (fewer than int(0.8 full_length) frames, or than 3), _still (the *truth* rests after its first
    pose: there is nothing to estimate), _degenerate (used, but the estimate rests or is not finite), _not_finite (of these).

    ate_ref: square root of the mean over sequences of `trajectory.procrustes_error` of the positions without the first, as
    published; ate_ref_bound: its largest possible value for these lengths; ate_ref_ratio: their ratio.
    ape_*, rpe_*: means over sequences of the fields of `trajectory.Ape` and `Rpe`.  ape_translation and rpe_translation are in
    the sequences' own units, which are arbitrary in CO3D: compare the relative ones.
    rra_15, rta_15, maa_30: shares of the pairs of frames of all sequences together (`trajectory.pair_accuracy`).

    An estimate that rests has the largest ate_ref and relative errors of 1; one that is not finite the same, with all angles
    180 degrees.  Without a usable sequence there are only the counts.

    Args:
        mean_motion_4x4: the training set's mean relative pose at this stride; its baseline is left out where there is none.
        full_length: number of frames of a long video at this stride; None leaves out no short sequence.
    """
    sequences = list(sequences)
    least = max(3, int(0.8 * (full_length or 0)))
    long = [sequence for sequence in sequences if len(sequence.truth_Tx4x4) >= least]
    used = [sequence for sequence in long if trajectory.spread(sequence.truth_Tx4x4[1:, :3, 3]) > 0]
    not_finite = [not sequence.finite for sequence in used]
    rests = [not bad and trajectory.spread(x.estimate_Tx4x4[1:, :3, 3]) == 0 for x, bad in zip(used, not_finite, strict=True)]
    counts = (len(used), len(sequences) - len(long), len(long) - len(used), sum(not_finite) + sum(rests), sum(not_finite))
    scores = {f"sequences_{name}": float(count) for name, count in zip(_COUNTS, counts, strict=True)}
    if not used:
        return scores
    truths = [np.asarray(sequence.truth_Tx4x4, np.float64) for sequence in used]
    scores |= _means(truths, [np.asarray(sequence.estimate_Tx4x4, np.float64) for sequence in used])
    for name in trajectory.baselines(truths[0], mean_motion_4x4):
        values = _means(truths, [trajectory.baselines(truth_Tx4x4, mean_motion_4x4)[name] for truth_Tx4x4 in truths])
        scores |= {f"baseline_{name}/{metric}": value for metric, value in values.items()}
    return scores


def _means(truths: list[np.ndarray], estimates: list[np.ndarray]) -> dict[str, float]:
    """The scores of one way to estimate all sequences."""
    rows = [_errors(truth, estimate) for truth, estimate in zip(truths, estimates, strict=True)]
    square_S, accuracy_Sx3x2 = np.array([row[0] for row in rows]), np.array([row[2] for row in rows])
    ate, bound = np.sqrt(square_S.mean()), np.sqrt(np.mean([1 / (3 * (len(truth) - 1)) for truth in truths]))
    scores = {"ate_ref": float(ate), "ate_ref_bound": float(bound), "ate_ref_ratio": float(ate / bound)}
    scores |= dict(zip(_METRICS, np.mean([row[1] for row in rows], axis=0).tolist(), strict=True))
    total_3, count_3 = accuracy_Sx3x2.sum(axis=0).T
    return scores | dict(zip(_ACCURACIES, (total_3 / count_3).tolist(), strict=True))


def _errors(truth_Tx4x4: np.ndarray, estimate_Tx4x4: np.ndarray) -> tuple[float, tuple[float, ...], np.ndarray]:
    """Mean square of Procrustes analysis, the _METRICS, and `trajectory.pair_accuracy`, of one sequence."""
    if _finite(estimate_Tx4x4):
        square = trajectory.procrustes_error(truth_Tx4x4[1:, :3, 3], estimate_Tx4x4[1:, :3, 3])
        metrics = (*trajectory.ape(truth_Tx4x4, estimate_Tx4x4), *trajectory.rpe(truth_Tx4x4, estimate_Tx4x4))
        return square, metrics, trajectory.pair_accuracy(*trajectory.pair_errors(truth_Tx4x4, estimate_Tx4x4))
    still = _errors(truth_Tx4x4, trajectory.baselines(truth_Tx4x4)["true_rotations"])  # has the bounds of the translations
    _, count_3 = still[2].T
    ape, relative, _, rpe, rpe_relative, *_ = still[1]
    return still[0], (ape, relative, 180.0, rpe, rpe_relative, 180.0, 180.0), np.stack([np.zeros(3), count_3], axis=1)


_COLUMNS = (  # heading, score, how it is written
    ("ate_ref", "ate_ref", ".4f"), ("of bound", "ate_ref_ratio", ".3f"),
    ("APE", "ape_translation", ".3g"), ("/spread", "ape_relative", ".4f"), ("APE rot", "ape_rotation", ".2f"),
    ("RPE", "rpe_translation", ".3g"), ("/step", "rpe_relative", ".4f"), ("RPE rot", "rpe_rotation", ".3f"),
    ("RPE dir", "rpe_direction", ".2f"), ("RRA@15", "rra_15", ".1%"), ("RTA@15", "rta_15", ".1%"), ("mAA@30", "maa_30", ".1%"),
)  # fmt: skip
_LEGEND = """ate_ref: published ATE, and its share of its upper bound. APE: after Sim(3) alignment; in world units, of the spread.
RPE: consecutive frames; in world units, of the true step. rot, dir: degrees. RRA, RTA, mAA: all pairs of frames, in percent."""


def table(scores: Mapping[str, float]) -> str:
    """The result of `score_all` as plain text of at most 132 columns: per stride a line of counts, the estimate, the baselines."""
    lines = []
    for folder in sorted({name.partition("/")[0] for name in scores}, key=lambda folder: int(folder.removeprefix("stride_"))):
        used, *rest = (int(scores[f"{folder}/sequences_{count}"]) for count in _COUNTS)
        words = "{} sequences used, {} too short, {} whose truth rests; {} estimates degenerate ({} not finite), not left out"
        lines.append(f"{folder.replace('_', ' ')}: {words.format(used, *rest)}")
        if not used:
            lines += ["  nothing to score", ""]
            continue
        lines.append(" " * 16 + "".join(f"{heading:>9}" for heading, _, _ in _COLUMNS))
        for label, prefix in [("estimate", ""), *((name, f"baseline_{name}/") for name in trajectory.BASELINES)]:
            values = [(scores.get(f"{folder}/{prefix}{name}"), form) for _, name, form in _COLUMNS]
            absent = f"  left out: the file has no {folder}/{_MEAN}" if values[0][0] is None else ""
            cells = absent or "".join(f"{value:>9{form}}" for value, form in values)
            lines.append(f"  {label.replace('_', ' '):<14}{cells}")
        lines.append("")
    return "\n".join([*lines, _LEGEND])


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user."""
    parser = argparse.ArgumentParser(prog="python -m niso.trajectories", description="Scores camera trajectories.")
    parser.add_argument("poses", metavar="POSES.npz", help="true and estimated poses, see the module's docstring")
    parser.add_argument("--json", metavar="FILE", help="write the scores there, too")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"frames of a video that were looked at, at most ({LIMIT})")
    options = parser.parse_args(argv)
    try:
        if options.limit < 1:
            raise UserError(f"--limit is {options.limit}, it must be at least 1")
        scores = score_all(load(options.poses), options.limit)
        if not any(value for name, value in scores.items() if name.endswith("/sequences_used")):
            raise UserError(f"{options.poses}: no sequence can be scored with --limit {options.limit}; are the videos shorter?")
        if options.json:
            _write(options.json, json.dumps(scores, indent=1) + "\n")
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2
    print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
