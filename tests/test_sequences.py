"""Whole videos: which frames are chained at which stride, from where, and what the baseline is taken from."""

import types
from typing import Any

import numpy as np
import pytest

from niso import sequences, trajectories
from niso.geometry import camera, trajectory
from tests.test_trajectory import turntable

LENGTHS, LIMIT, STRIDES = (40, 23, 61), 50, (1, 3, 7)


class Videos:
    """A data set of turntables, whose frames are nothing but their numbers."""

    def __init__(self) -> None:
        self.pose = [turntable(seed, length) for seed, length in enumerate(LENGTHS)]
        for index, pose_Tx4x4 in enumerate(self.pose):
            pose_Tx4x4[:, :3, 3] *= 10.0**index  # every video has a scale of its own
        self.asked: list[int | None] = []

    def sequences(self, split: str) -> list[Any]:
        assert split == "test"
        return [types.SimpleNamespace(category="category", name=str(index), length=length) for index, length in enumerate(LENGTHS)]

    def read_sequence(self, split: str, index: int, frames: slice) -> tuple[np.ndarray, np.ndarray]:
        assert split == "test"
        number_T = np.arange(LENGTHS[index])[frames]
        return np.stack([np.full_like(number_T, index), number_T], axis=1), self.pose[index][frames]

    def poses(self, split: str, at_most: int | None = None) -> list[np.ndarray]:
        assert split == "train"
        self.asked.append(at_most)
        return self.pose


class Oracle:
    """A model that knows the poses, up to a scale that differs from stride to stride, and counts the frames that it encodes."""

    def __init__(self, videos: Videos):
        self.videos, self.encoded = videos, 0

    def encode(self, frames_Tx2: np.ndarray) -> np.ndarray:
        self.encoded += len(frames_Tx2)
        return frames_Tx2

    def relative_poses(self, coefficient_Tx2: np.ndarray, strides: tuple[int, ...]) -> dict[int, np.ndarray]:
        found = {}
        for stride in strides:
            chosen_Nx2 = coefficient_Tx2[::stride]
            pose_Nx4x4 = np.stack([self.videos.pose[index][number] for index, number in chosen_Nx2])
            relative_Px4x4 = camera.relative_pose(pose_Nx4x4[:-1], pose_Nx4x4[1:])
            relative_Px4x4[:, :3, 3] *= 0.1 * stride
            found[stride] = relative_Px4x4
        return found


def test_an_oracle_scores_nothing_and_encodes_every_frame_once() -> None:
    videos = Videos()
    model, motions = Oracle(videos), sequences.mean_motions(videos, STRIDES)  # type: ignore[arg-type]
    found = sequences.estimate(model, videos, STRIDES, LIMIT, motions)  # type: ignore[arg-type]
    assert model.encoded == sum(min(length, LIMIT) for length in LENGTHS)
    assert videos.asked == [sequences.MEAN_OF]
    for stride, part in found.items():
        assert [sequence.name for sequence in part.sequences] == ["category/0", "category/1", "category/2"]
        for sequence, length in zip(part.sequences, LENGTHS, strict=True):
            assert len(sequence.truth_Tx4x4) == -(-min(length, LIMIT) // stride)
            np.testing.assert_array_equal(sequence.estimate_Tx4x4[0], sequence.truth_Tx4x4[0])
    scores = trajectories.score_all(found, LIMIT)
    for stride in STRIDES:
        assert scores[f"stride_{stride}/sequences_used"] == 2 and scores[f"stride_{stride}/sequences_too_short"] == 1
        assert scores[f"stride_{stride}/ate_ref"] < 1e-6 < 1e-3 < scores[f"stride_{stride}/baseline_mean_motion/ate_ref"]
        assert scores[f"stride_{stride}/rpe_rotation"] < 1e-3 and scores[f"stride_{stride}/rpe_direction"] < 1e-3


def test_mean_motion_is_that_of_its_stride() -> None:
    videos = Videos()
    motions = sequences.mean_motions(videos, (2, 60, 100))  # type: ignore[arg-type]
    by_hand = trajectory.mean_motion([camera.relative_pose(p[:-2], p[2:]) for p in videos.pose])
    np.testing.assert_allclose(motions[2], by_hand)
    last = camera.relative_pose(videos.pose[2][0], videos.pose[2][60])
    assert trajectory.rotation_angle((motions[60][:3, :3].T @ last[:3, :3])[None])[0] == pytest.approx(0.0, abs=1e-6)
    assert motions[100] is None  # no training video is as long
