"""All windows of a set of videos, by number.

A window is (sequence, start, skip); its T frames are start + i (skip + 1), i = 0 .. T - 1, all within the sequence.  With
T = 2 it is a pair, else a run of T - 1 consecutive pairs with one skip.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Windows:
    """All valid windows of a split, numbered 0 .. size - 1 by sequence, skip and start, and never listed.

    Attributes:
        views: T, frames of a window.
        length_S: Frames of each sequence.
        skip_K: Distinct skips.
        end_S: One more than the number of each sequence's last window.
    """

    views: int
    length_S: np.ndarray
    skip_K: np.ndarray
    end_S: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, skips: Sequence[int], views: int) -> "Windows":
        """The windows of sequences of these lengths; sequences too short for a skip contribute none."""
        length_S, skip_K = np.asarray(lengths, np.int64), np.asarray(skips, np.int64)
        count_S = np.zeros_like(length_S)
        for skip in skip_K.tolist():
            count_S += _starts(length_S, skip, views)
        return cls(views, length_S, skip_K, np.cumsum(count_S))

    @property
    def size(self) -> int:
        """The number of windows."""
        return int(self.end_S[-1]) if self.end_S.size else 0

    def frames(self, start: int, skip: int) -> range:
        """The frames of a window, within its sequence."""
        return range(start, start + self.views * (skip + 1), skip + 1)

    def locate(self, window_N: np.ndarray) -> np.ndarray:
        """where_3xN: (sequence, start, skip) of the windows with these numbers, int64."""
        window_N = np.asarray(window_N, np.int64)
        sequence_N = np.searchsorted(self.end_S, window_N, side="right")
        count_NxK = _starts(self.length_S[sequence_N, None], self.skip_K, self.views)
        end_NxK = np.cumsum(count_NxK, axis=1)
        number_N = window_N - self.end_S[sequence_N] + end_NxK[:, -1]  # within its sequence
        column_N = np.sum(end_NxK <= number_N[:, None], axis=1)
        before_N = (end_NxK - count_NxK)[np.arange(window_N.size), column_N]
        return np.stack([sequence_N, number_N - before_N, self.skip_K[column_N]])

    def number(self, where_3xN: np.ndarray) -> np.ndarray:
        """window_N: the numbers of the windows at these (sequence, start, skip), which all exist; the inverse of `locate`."""
        sequence_N, start_N, skip_N = where_3xN
        count_NxK = _starts(self.length_S[sequence_N, None], self.skip_K, self.views)
        end_NxK = np.cumsum(count_NxK, axis=1)
        before_N = np.sum((end_NxK - count_NxK) * (self.skip_K == skip_N[:, None]), axis=1)
        return self.end_S[sequence_N] - end_NxK[:, -1] + before_N + start_N


def frames_needed(skip: int, views: int) -> int:
    """Frames of the shortest sequence with a window."""
    return (views - 1) * (skip + 1) + 1


def _starts(length: np.ndarray, skip: np.ndarray | int, views: int) -> np.ndarray:
    """How many start frames leave room for the whole window; length and skip are broadcast."""
    return np.maximum(0, length - (views - 1) * (skip + 1))
