"""Whole held-out videos through a model with a pose head: every frame encoded once, its pose chained at every stride."""

import numpy as np

from niso.data.pipeline import PairDataset
from niso.errors import RecordError
from niso.geometry import camera, trajectory
from niso.inference import Model
from niso.poses import Sequence, Stride, frames_of

# Training videos behind the mean motion baseline, evenly spread: their poses cost 5 ms a video to read.
MEAN_OF = 500


def estimate(
    model: Model, dataset: PairDataset, strides: tuple[int, ...], limit: int, motions: dict[int, np.ndarray | None]
) -> dict[int, Stride]:
    """True and estimated camera-to-world poses of every test video at every stride, for `trajectories.score_all`.

    With data.unreadable=skip a video with a frame that cannot be read is said and left out.

    Args:
      limit: frames of a video that count, from its first. motions: what `mean_motions` found.
    """
    found: dict[int, list[Sequence]] = {stride: [] for stride in strides}
    for index, sequence in enumerate(dataset.sequences("test")):
        try:
            frames_TxHxWxC, truth_Tx4x4 = dataset.read_sequence("test", index, slice(0, limit))
        except RecordError as error:
            dataset.leave_out("test", index, error)
            continue
        relatives = model.relative_poses(model.encode(frames_TxHxWxC), strides)
        for stride, relative_Px4x4 in relatives.items():
            chosen_Nx4x4 = truth_Tx4x4[frames_of(len(truth_Tx4x4), stride, limit)]
            estimate_Nx4x4 = trajectory.compose(chosen_Nx4x4[0], relative_Px4x4.astype(np.float64))
            found[stride].append(Sequence(f"{sequence.category}/{sequence.name}", chosen_Nx4x4, estimate_Nx4x4))
    return {stride: Stride(tuple(sequences), motions[stride]) for stride, sequences in found.items()}


def mean_motions(dataset: PairDataset, strides: tuple[int, ...]) -> dict[int, np.ndarray | None]:
    """Stride -> mean relative pose of the training videos at it, 4 x 4, None where none is long enough: the baseline that knows
    the camera's habits and nothing else."""
    poses = dataset.poses("train", MEAN_OF)
    relatives = {
        b: [camera.relative_pose(pose_Tx4x4[:-b], pose_Tx4x4[b:]) for pose_Tx4x4 in poses if len(pose_Tx4x4) > b] for b in strides
    }
    return {b: trajectory.mean_motion(of_stride) if of_stride else None for b, of_stride in relatives.items()}
