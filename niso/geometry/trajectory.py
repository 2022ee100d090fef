"""Trajectories of a camera: chaining, alignment by a similarity, errors of an estimate against the truth; numpy, float64.

A trajectory is a stack of rigid camera-to-world poses (T, 4, 4) in the OpenCV frame.  A monocular estimate has a world and a
scale of its own, so every error here is invariant to a similarity of the estimate (rotation, shift, scale > 0).  A truth whose
positions have no extent asks nothing: the errors of its translations are not defined.

Conventions that evaluations differ in:
- *Sim(3) alignment* uses a proper rotation and all poses, the first included.  Where positions leave its rotation open (all of
  them on one line, or in one point) the cameras' own rotations decide among the equally good ones.
- *The angle between translation directions* is in [0, 180] degrees, in the frame of the pair's first camera, and has a sign:
  backwards is 180.  (Published RTA code often takes it modulo 180, which cannot tell t from -t.)  An estimate that rests has no
  direction and counts as 90 degrees, what a random one has on average; pairs whose truth rests are no question and left out.
- *RRA, RTA, mAA* look at all pairs i < j of a trajectory, as is usual on CO3D; RPE at consecutive frames.

Sources: S. Umeyama, PAMI 13(4), 1991, equations 40-42 (alignment); J. Sturm et al., IROS 2012 (APE as ATE, RPE); Y. Jin et al.,
IJCV 129, 2021 (mAA).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_ROUNDING = 1e-12  # of the largest coordinate: what lies within is one point
_COLLINEAR = 1e-9  # second singular value of the covariance, of the first
BASELINES = ("forward", "mean_motion", "true_rotations")
RANDOM_DIRECTION = 90.0  # degrees: mean angle between a direction and a uniformly random one


class Ape(NamedTuple):
    """Absolute pose error after Sim(3) alignment: root mean squares over all poses of a trajectory.

    translation is in the truth's unit, translation_relative a share of the truth's `spread` (1: as if it never moved),
    rotation in degrees.
    """

    translation: float
    translation_relative: float
    rotation: float


class Rpe(NamedTuple):
    """Relative pose error of consecutive poses (delta 1).

    translation is the root mean square of |s t' - t|, in the truth's unit, where t and t' are the true and the estimated
    step, each in the frame of its own first camera, and s is the scale of the Sim(3) alignment of the whole trajectory
    (its rotation and shift cancel); translation_relative is its share of the true steps' root mean square (1: as if it
    never moved); rotation the root mean square angle and direction the mean angle between t and t', in degrees.
    """

    translation: float
    translation_relative: float
    rotation: float
    direction: float


def compose(first_4x4: ArrayLike, relative_Tx4x4: ArrayLike) -> np.ndarray:
    """The poses (T + 1, 4, 4) that start at the first and chain relative ones: g_{i+1} = g_i r_i.

    The inverse of `camera.relative_pose(pose[:-1], pose[1:])`.
    """
    poses = [np.asarray(first_4x4, np.float64)]
    for relative_4x4 in np.asarray(relative_Tx4x4, np.float64):
        poses.append(poses[-1] @ relative_4x4)
    return np.stack(poses)


def off_rigid(pose_Tx4x4: np.ndarray) -> np.ndarray:
    """How far (T,) matrices are from rigid poses: the largest entry of R^T R - I and of the last row's deviation; inf mirrors."""
    r_Tx3x3 = pose_Tx4x4[:, :3, :3]
    rotation_T = np.abs(np.swapaxes(r_Tx3x3, 1, 2) @ r_Tx3x3 - np.eye(3)).max(axis=(1, 2))
    row_T = np.abs(pose_Tx4x4[:, 3] - [0, 0, 0, 1]).max(axis=1)
    return np.where(np.linalg.det(r_Tx3x3) < 0, np.inf, np.maximum(rotation_T, row_T))


def spread(position_Nx3: np.ndarray) -> float:
    """Root mean squared distance of positions to their mean; exactly 0 where rounding is all that sets them apart."""
    size = _root_mean_square(position_Nx3 - position_Nx3.mean(axis=0))
    return size if size > _ROUNDING * np.abs(position_Nx3).max() else 0.0


def nearest_rotation(matrix_3x3: np.ndarray) -> np.ndarray:
    """The rotation R that maximises tr(R^T A): the special orthogonal Procrustes projection of A."""
    u_3x3, _, vt_3x3 = np.linalg.svd(matrix_3x3)
    return (u_3x3 * [1, 1, np.sign(np.linalg.det(u_3x3 @ vt_3x3))]) @ vt_3x3


def umeyama(source_Nx3: np.ndarray, target_Nx3: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale s >= 0, proper rotation R (3, 3) and translation t (3,) that minimise the sum of |target - (s R source + t)|^2.

    Raises:
        ValueError: all source points are one, so that no scale fits better than another.
    """
    extent = spread(source_Nx3)
    if extent == 0:
        raise ValueError("the source points have no extent")
    source_3, target_3 = source_Nx3.mean(axis=0), target_Nx3.mean(axis=0)
    covariance_3x3 = (target_Nx3 - target_3).T @ (source_Nx3 - source_3) / len(source_Nx3)
    rotation_3x3 = nearest_rotation(covariance_3x3)
    scale = max(float(np.sum(rotation_3x3 * covariance_3x3)) / extent**2, 0.0)
    return scale, rotation_3x3, target_3 - scale * rotation_3x3 @ source_3


def align(estimate_Tx4x4: np.ndarray, truth_Tx4x4: np.ndarray) -> tuple[np.ndarray, float]:
    """The estimate moved by a similarity onto the truth (T, 4, 4), and that similarity's scale.

    Positions are aligned by `umeyama`.  If they leave the rotation open, about a line or altogether, it is the one that
    brings the cameras' rotations nearest to the true ones (chordal distance).  An estimate that rests gets scale 0 and
    the mean of the true positions, the best that a single point can do.
    """
    estimate_Tx3, truth_Tx3 = estimate_Tx4x4[:, :3, 3], truth_Tx4x4[:, :3, 3]
    rests = spread(estimate_Tx3) == 0
    scale, rotation_3x3, translation_3 = (0.0, np.eye(3), truth_Tx3.mean(axis=0)) if rests else umeyama(estimate_Tx3, truth_Tx3)
    open_3x3 = np.einsum("tij,tkj->ik", truth_Tx4x4[:, :3, :3], rotation_3x3 @ estimate_Tx4x4[:, :3, :3])
    turn_3x3 = _open_turn(estimate_Tx3, truth_Tx3, open_3x3) if not rests else nearest_rotation(open_3x3)
    aligned_Tx4x4 = np.array(estimate_Tx4x4, np.float64)
    aligned_Tx4x4[:, :3, :3] = turn_3x3 @ rotation_3x3 @ estimate_Tx4x4[:, :3, :3]
    aligned_Tx4x4[:, :3, 3] = scale * estimate_Tx3 @ rotation_3x3.T + translation_3
    return aligned_Tx4x4, scale


def _open_turn(estimate_Tx3: np.ndarray, truth_Tx3: np.ndarray, open_3x3: np.ndarray) -> np.ndarray:
    """The rotation Q that maximises tr(Q^T open) among those that leave the aligned positions as they are.

    Collinear positions leave a turn by phi about their line a: tr(Q^T A) = cos phi (tr A - a.Aa) + sin phi tr([a]x^T A) + a.Aa.
    """
    covariance_3x3 = (truth_Tx3 - truth_Tx3.mean(axis=0)).T @ (estimate_Tx3 - estimate_Tx3.mean(axis=0))
    u_3x3, size_3, _ = np.linalg.svd(covariance_3x3)
    if size_3[1] > _COLLINEAR * size_3[0]:
        return np.eye(3)
    x, y, z = axis_3 = u_3x3[:, 0]
    cross_3x3 = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    line_3x3 = np.outer(axis_3, axis_3)
    phi = np.arctan2(np.sum(cross_3x3 * open_3x3), np.trace(open_3x3) - axis_3 @ open_3x3 @ axis_3)
    return np.cos(phi) * (np.eye(3) - line_3x3) + np.sin(phi) * cross_3x3 + line_3x3


def procrustes_error(truth_Nx3: np.ndarray, estimate_Nx3: np.ndarray) -> float:
    """Mean of squares over the n x 3 entries of the difference after Procrustes analysis: the published ATE of a sequence.

    Both sets are brought to zero mean and unit Frobenius norm, the second then turned *or reflected* and scaled onto the
    first.  The result lies in [0, 1 / (3 n)].  An estimate without extent cannot be standardised and gets the upper bound;
    the reference (scipy.spatial.procrustes) raises there, and leaves such sequences out.

    Raises:
        ValueError: the truth has no extent.
    """
    if spread(truth_Nx3) == 0:
        raise ValueError("the true positions have no extent")
    if spread(estimate_Nx3) == 0:
        return 1 / truth_Nx3.size
    truth_Nx3, estimate_Nx3 = truth_Nx3 - truth_Nx3.mean(axis=0), estimate_Nx3 - estimate_Nx3.mean(axis=0)
    truth_Nx3, estimate_Nx3 = truth_Nx3 / np.linalg.norm(truth_Nx3), estimate_Nx3 / np.linalg.norm(estimate_Nx3)
    u_3x3, size_3, vt_3x3 = np.linalg.svd(estimate_Nx3.T @ truth_Nx3)
    # The residual itself, not 1 - sum(size)^2: a small error would drown in the rounding of 1.
    return float(np.mean((truth_Nx3 - size_3.sum() * estimate_Nx3 @ (u_3x3 @ vt_3x3)) ** 2))


def ape(truth_Tx4x4: np.ndarray, estimate_Tx4x4: np.ndarray) -> Ape:
    """The absolute pose error of an estimate; its translation is the truth's spread for an estimate that rests."""
    aligned_Tx4x4, _ = align(estimate_Tx4x4, truth_Tx4x4)
    translation = _root_mean_square(aligned_Tx4x4[:, :3, 3] - truth_Tx4x4[:, :3, 3])
    angle_T = rotation_angle(np.swapaxes(aligned_Tx4x4[:, :3, :3], 1, 2) @ truth_Tx4x4[:, :3, :3])
    return Ape(translation, translation / spread(truth_Tx4x4[:, :3, 3]), float(np.sqrt(np.mean(angle_T**2))))


def rpe(truth_Tx4x4: np.ndarray, estimate_Tx4x4: np.ndarray) -> Rpe:
    """The relative pose error of an estimate's consecutive poses."""
    _, scale = align(estimate_Tx4x4, truth_Tx4x4)
    first_P, second_P = np.arange(len(truth_Tx4x4) - 1), np.arange(1, len(truth_Tx4x4))
    true_Px3, estimated_Px3 = _translation(truth_Tx4x4, first_P, second_P), _translation(estimate_Tx4x4, first_P, second_P)
    rotation_P, direction_P = pair_errors(truth_Tx4x4, estimate_Tx4x4, first_P, second_P)
    translation = _root_mean_square(scale * estimated_Px3 - true_Px3)
    relative = translation / _root_mean_square(true_Px3)
    return Rpe(translation, relative, float(np.sqrt(np.mean(rotation_P**2))), float(np.nanmean(direction_P)))


def pair_errors(
    truth_Tx4x4: np.ndarray, estimate_Tx4x4: np.ndarray, first_P: np.ndarray | None = None, second_P: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Errors (P,) of relative rotations and of translation directions, degrees; of all pairs i < j where none are given.

    A direction's error is NaN where the truth rests, and 90 where only the estimate does.
    """
    if first_P is None or second_P is None:
        first_P, second_P = np.triu_indices(len(truth_Tx4x4), 1)
    # The error of a pair's relative rotation is conjugate to B_j B_i^T with B = (estimated rotation) (true rotation)^T.
    both_Tx3x3 = estimate_Tx4x4[:, :3, :3] @ np.swapaxes(truth_Tx4x4[:, :3, :3], 1, 2)
    rotation_P = rotation_angle(both_Tx3x3[second_P] @ np.swapaxes(both_Tx3x3[first_P], 1, 2))
    true_Px3, estimated_Px3 = (_translation(pose_Tx4x4, first_P, second_P) for pose_Tx4x4 in (truth_Tx4x4, estimate_Tx4x4))
    cross_P, dot_P = np.linalg.norm(np.cross(true_Px3, estimated_Px3), axis=1), np.sum(true_Px3 * estimated_Px3, axis=1)
    direction_P = np.degrees(np.arctan2(cross_P, dot_P))  # exact for small and for large angles, unlike arccos
    direction_P[~estimated_Px3.any(axis=1)] = RANDOM_DIRECTION
    direction_P[~true_Px3.any(axis=1)] = np.nan
    return rotation_P, direction_P


def pair_accuracy(rotation_P: np.ndarray, direction_P: np.ndarray) -> np.ndarray:
    """(total, count) of RRA@15, RTA@15 and mAA@30 (3, 2): they add up over sequences, a share is total / count.

    RRA@15, RTA@15: pairs whose rotation, direction is off by less than 15 degrees.  mAA@30: mean over the thresholds
    1, 2, ..., 30 degrees of the share of pairs with both below it; of a pair whose truth rests the rotation decides.
    """
    asked_P = ~np.isnan(direction_P)
    worst_P = np.fmax(rotation_P, direction_P)
    passed_P = np.clip(30 - np.floor(worst_P), 0, 30) / 30  # share of the thresholds that lie above the error
    shares = (rotation_P < 15, direction_P[asked_P] < 15, passed_P)
    return np.array([(np.sum(share_P), len(share_P)) for share_P in shares], np.float64)


def mean_motion(relatives: list[np.ndarray]) -> np.ndarray:
    """The mean (4, 4) of sequences' relative poses (each N_s x 4 x 4), pooled over all of them.

    Rotation: the chordal mean, the projection of the matrices' mean onto SO(3) (Hartley et al., IJCV 103, 2013).
    Translation: every sequence's is first divided by its mean length, because every sequence has a scale of its own;
    a sequence that rests adds zeros.
    """
    translations = []
    for relative_Nx4x4 in relatives:
        length = np.linalg.norm(relative_Nx4x4[:, :3, 3], axis=1).mean()
        translations.append(relative_Nx4x4[:, :3, 3] / (length if length > 0 else 1.0))
    mean_4x4 = np.eye(4)
    mean_4x4[:3, :3] = nearest_rotation(np.concatenate(relatives)[:, :3, :3].mean(axis=0))
    mean_4x4[:3, 3] = np.concatenate(translations).mean(axis=0)
    return mean_4x4


def baselines(truth_Tx4x4: np.ndarray, mean_motion_4x4: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Estimates (T, 4, 4) that see no image, from the true first pose on.

    forward: no rotation, one unit along the optical axis per step; mean_motion: the training set's mean relative pose, where
    it is given; true_rotations: the true rotations, without moving.
    """
    forward_4x4 = np.eye(4)
    forward_4x4[2, 3] = 1
    steps = {"forward": forward_4x4} | ({} if mean_motion_4x4 is None else {"mean_motion": np.asarray(mean_motion_4x4)})
    count = len(truth_Tx4x4) - 1
    chained = {name: compose(truth_Tx4x4[0], np.repeat(step[None], count, axis=0)) for name, step in steps.items()}
    still_Tx4x4 = np.array(truth_Tx4x4, np.float64)
    still_Tx4x4[:, :3, 3] = truth_Tx4x4[0, :3, 3]
    return {**chained, "true_rotations": still_Tx4x4}


def rotation_angle(rotation_Nx3x3: np.ndarray) -> np.ndarray:
    """Angles (N,) of rotations in degrees, [0, 180]; by atan2, because arccos of the trace loses half the digits near 0."""
    r = rotation_Nx3x3
    twice_sine_Nx3 = np.stack([r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]], axis=-1)
    return np.degrees(np.arctan2(np.linalg.norm(twice_sine_Nx3, axis=-1), np.trace(r, axis1=1, axis2=2) - 1))


def _translation(pose_Tx4x4: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    """The second camera's centre (P, 3) in the first one's frame; exactly 0 where rounding is all that sets them apart."""
    position_Tx3 = pose_Tx4x4[:, :3, 3]
    step_Px3 = position_Tx3[second_P] - position_Tx3[first_P]
    step_Px3[np.linalg.norm(step_Px3, axis=1) <= _ROUNDING * np.abs(position_Tx3).max()] = 0
    return np.einsum("pji,pj->pi", pose_Tx4x4[first_P, :3, :3], step_Px3)


def _root_mean_square(vector_Nx3: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sum(vector_Nx3**2, axis=-1))))
