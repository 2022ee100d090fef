"""Camera trajectories scored at several strides: python -m niso.trajectories POSES.npz [--json FILE] [--limit FRAMES]

POSES.npz may come from any program: niso.poses says what it holds.  The frames of a sequence are `frames_of(length, stride)`,
and sequences that lack more than a fifth of the full count are left out.

Every stride prints, for the estimate and for baselines that see no image: the published ATE; absolute and relative pose errors;
accuracies over all pairs of frames.  An estimate that rests or is not finite is scored at the worst value, never left out.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from niso import folders
from niso.errors import UserError
from niso.geometry import trajectory
from niso.poses import LIMIT, MEAN, Sequence, Stride, finite, frames_of, load

_METRICS = ("ape_translation", "ape_relative", "ape_rotation", "rpe_translation", "rpe_relative", "rpe_rotation", "rpe_direction")
_COUNTS = ("used", "too_short", "still", "degenerate", "not_finite")
_ACCURACIES = ("rra_15", "rta_15", "maa_30")


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
    if finite(estimate_Tx4x4):
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
            absent = f"  left out: the file has no {folder}/{MEAN}" if values[0][0] is None else ""
            cells = absent or "".join(f"{value:>9{form}}" for value, form in values)
            lines.append(f"  {label.replace('_', ' '):<14}{cells}")
        lines.append("")
    return "\n".join([*lines, _LEGEND])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user."""
    parser = argparse.ArgumentParser(prog="python -m niso.trajectories", description="Scores camera trajectories.")
    parser.add_argument("poses", metavar="POSES.npz", help="true and estimated poses, see the module's docstring")
    parser.add_argument("--json", metavar="FILE", help="write the scores there, too")
    parser.add_argument("--limit", type=int, help=f"frames of a video that were looked at, at most (the file's, or {LIMIT})")
    options = parser.parse_args(argv)
    try:
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit is {options.limit}, it must be at least 1")
        out = None if options.json is None else folders.here(options.json, "--json")
        strides, limit = load(options.poses)
        limit = options.limit or limit
        scores = score_all(strides, limit)
        if not any(value for name, value in scores.items() if name.endswith("/sequences_used")):
            raise UserError(f"{options.poses}: no sequence can be scored with --limit {limit}; are the videos shorter?")
        if out is not None:
            _write(out, json.dumps(scores, indent=1) + "\n")
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2
    print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
