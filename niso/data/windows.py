"""All pairs of frames of a set of videos, by number.

A pair is (sequence, start frame, skip); its frames are start and start + skip + 1, both within the sequence.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All valid pairs of a split, numbered 0 .. size - 1 by sequence, skip and start, and never listed.

    Attributes:
        length_S: Frames of each sequence.
        skip_K: Distinct skips.
        end_S: One more than the number of each sequence's last pair.
    """

    length_S: np.ndarray
    skip_K: np.ndarray
    end_S: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, skips: Sequence[int]) -> "Pairs":
        """The pairs of sequences of these lengths; sequences too short for a skip contribute none."""
        length_S, skip_K = np.asarray(lengths, np.int64), np.asarray(skips, np.int64)
        count_S = np.zeros_like(length_S)
        for skip in skip_K:
            count_S += _starts(length_S, skip)
        return cls(length_S, skip_K, np.cumsum(count_S))

    @property
    def size(self) -> int:
        """The number of pairs."""
        return int(self.end_S[-1]) if self.end_S.size else 0

    def locate(self, pair_N: np.ndarray) -> np.ndarray:
        """where_3xN: (sequence, start, skip) of the pairs with these numbers, int64."""
        pair_N = np.asarray(pair_N, np.int64)
        sequence_N = np.searchsorted(self.end_S, pair_N, side="right")
        count_NxK = _starts(self.length_S[sequence_N, None], self.skip_K)
        end_NxK = np.cumsum(count_NxK, axis=1)
        number_N = pair_N - self.end_S[sequence_N] + end_NxK[:, -1]  # within its sequence
        column_N = np.sum(end_NxK <= number_N[:, None], axis=1)
        before_N = (end_NxK - count_NxK)[np.arange(pair_N.size), column_N]
        return np.stack([sequence_N, number_N - before_N, self.skip_K[column_N]])


def _starts(length: np.ndarray, skip: np.ndarray) -> np.ndarray:
    """How many start frames leave room for a second frame; the arguments are broadcast."""
    return np.maximum(0, length - 1 - skip)
