"""True and estimated camera poses of videos at several strides, and the npz file that carries them from program to program.

It holds arrays under the keys

    stride_<b>/<sequence>/truth_Tx4x4       true camera-to-world poses of every b-th frame of a sequence
    stride_<b>/<sequence>/estimate_Tx4x4    the estimated ones, as many; world and scale are arbitrary
    stride_<b>/mean_motion_4x4              optional: the training set's mean relative pose at this stride, a baseline
                                            (`niso.geometry.trajectory.mean_motion`); the table says where it is absent
    limit                                   optional: frames of a video that count, from its first; 200 where absent

Poses are rigid, in the OpenCV camera frame (x right, y down, z forward).  A sequence's name may contain slashes.
"""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from niso.errors import UserError
from niso.geometry import trajectory

LIMIT = 200  # frames of a video that the published evaluation looks at
ORTHONORMAL = 1e-3  # largest deviation of R^T R from the identity that still counts as a rotation
_TRUTH, _ESTIMATE, MEAN = "truth_Tx4x4", "estimate_Tx4x4", "mean_motion_4x4"
_HUGE = 1e100  # as good as infinite: squares would overflow


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
        if not finite(self.truth_Tx4x4):
            raise UserError(f"{self.name}: {_TRUTH} is not finite: leave out frames without a pose")
        _check_rigid(f"{self.name}: {_TRUTH}", self.truth_Tx4x4)
        if self.finite:
            _check_rigid(f"{self.name}: {_ESTIMATE}", self.estimate_Tx4x4)

    @property
    def finite(self) -> bool:
        """Whether the estimate is."""
        return finite(self.estimate_Tx4x4)


@dataclasses.dataclass(frozen=True)
class Stride:
    """What is scored together: sequences at one stride, and the training set's mean relative pose there, if known."""

    sequences: tuple[Sequence, ...]
    mean_motion_4x4: np.ndarray | None = None


def frames_of(length: int, stride: int, limit: int = LIMIT) -> np.ndarray:
    """The frames of a video that the published evaluation uses: every stride-th of the first `limit`."""
    return np.arange(0, min(limit, length), stride)


def save(path: str | os.PathLike[str], strides: Mapping[int, Stride], limit: int = LIMIT) -> None:
    """Writes POSES.npz: see the module's docstring.

    Raises:
        ValueError: two sequences of one name at a stride.
        UserError: the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"limit": np.array(limit)}
    for stride, part in strides.items():
        if len({sequence.name for sequence in part.sequences}) < len(part.sequences):
            raise ValueError(f"two sequences of one name at stride {stride}: one would overwrite the other")
        for sequence in part.sequences:
            arrays[f"stride_{stride}/{sequence.name}/{_TRUTH}"] = np.asarray(sequence.truth_Tx4x4)
            arrays[f"stride_{stride}/{sequence.name}/{_ESTIMATE}"] = np.asarray(sequence.estimate_Tx4x4)
        if part.mean_motion_4x4 is not None:
            arrays[f"stride_{stride}/{MEAN}"] = np.asarray(part.mean_motion_4x4)
    try:
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | os.PathLike[str]) -> tuple[dict[int, Stride], int]:
    """(what POSES.npz holds, float64, strides ascending; its limit).

    Raises:
        UserError: the file cannot be read, a key is unknown or lacks its partner, or poses are malformed.
    """
    arrays = _read(path)
    limit = arrays.pop("limit", np.array(LIMIT))
    if limit.shape != () or not (limit >= 1 and float(limit).is_integer()):
        raise UserError(f"{path}: limit must be one whole number, at least 1")
    names: dict[int, set[str]] = {}
    for key in arrays:
        stride, _, rest = key.partition("/")
        name, _, kind = rest.rpartition("/")
        number = stride.removeprefix("stride_")
        # isdecimal() alone takes other alphabets' digits; int() alone takes blanks and signs.
        known = stride != number and number.isascii() and number.isdecimal() and int(number) > 0
        if not known or not (rest == MEAN or (name and kind in (_TRUTH, _ESTIMATE))):
            raise UserError(f"{path}: unknown key {key!r}, known are stride_<b>/<sequence>/{{{_TRUTH}, {_ESTIMATE}}} and {MEAN}")
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
        mean_4x4 = arrays.get(f"{folder}/{MEAN}")
        if mean_4x4 is not None:
            if mean_4x4.shape != (4, 4) or not finite(mean_4x4):
                raise UserError(f"{path}: {folder}/{MEAN} must be one finite pose (4, 4), it is {mean_4x4.shape}")
            _check_rigid(f"{path}: {folder}/{MEAN}", mean_4x4[None])
        strides[stride_number] = Stride(tuple(sequences), mean_4x4)
    return strides, int(limit)


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


def finite(array: np.ndarray) -> bool:
    """Whether squares of all numbers are."""
    return bool((np.abs(array) < _HUGE).all())


def _check_rigid(what: str, pose_Tx4x4: np.ndarray) -> None:
    off_T = trajectory.off_rigid(np.asarray(pose_Tx4x4, np.float64))
    bad = np.flatnonzero(off_T > ORTHONORMAL)
    if bad.size:
        why = f"off by {off_T[bad[0]]:.2g}" if np.isfinite(off_T[bad[0]]) else "it mirrors"
        raise UserError(f"{what}: pose {bad[0]} is not rigid, {why}: expected [R t; 0 0 0 1] with a rotation R")
