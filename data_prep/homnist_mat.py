"""The published file of the homNIST test set, in MATLAB's version 5 format: images and labels, checked."""

import hashlib
import pathlib
from typing import Any

import numpy as np
import scipy.io

from data_prep import sources
from niso import folders
from niso.errors import UserError

SIZE, CLASSES = 40, 10
KEYS = ("img_data", "labels")
_BLOCK = 1_000  # images that are looked at together
_OVERSHOOT = 1e-3  # of 0 or 1, by interpolation: rounded away
_FEWEST_ONES, _LYING = 100, 1.5
_FETCH = "fetch it again, or make such a set from MNIST: --mnist RECORDS_OF_MNIST"


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, str]:
    """image_NxHxW, uint8 or floats in [0, 1], label_N, int64, and a fingerprint of the file.

    The array of the file is in memory once; a file in a bucket is copied to this machine while it is read.

    Raises:
        UserError: no such file, or none of MATLAB's; truncated; without a key; other shapes or values.
    """
    if folders.kind(path) != "file":
        raise UserError(f"no file {path}: set --mat to the published homNIST test set, a .mat file with {' and '.join(KEYS)}")
    with sources.on_disk(path) as copy:
        found, digest = _load(copy, path), _digest(copy)
    image_NxHxW, label_N = _images(found[KEYS[0]], path), _labels(found[KEYS[1]], path)
    if len(image_NxHxW) != len(label_N) or not len(label_N):
        raise UserError(f"{path} has {len(image_NxHxW)} images and {len(label_N)} labels: it is no homNIST set; {_FETCH}")
    _check_values(image_NxHxW, path)
    _check_upright(image_NxHxW[np.flatnonzero(label_N == 1)[:_BLOCK]], path)
    return image_NxHxW, label_N, digest


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _load(copy: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """What the file has under KEYS; errors call it by its path."""
    try:
        found = scipy.io.loadmat(copy, appendmat=False, variable_names=KEYS)
    except NotImplementedError as error:
        convert = "img_data = uint8(255 * img_data); save('homnist.mat', 'img_data', 'labels', '-v7')"
        raise UserError(f"{path} is of MATLAB's version 7.3 (HDF5), which is not read: convert it, in MATLAB: {convert}") from error
    except MemoryError as error:
        needed = f"{folders.size(copy) / 1e9:.1f} GB"
        raise UserError(f"{path} does not fit into memory, of which it needs {needed}: take a larger machine") from error
    except Exception as error:  # which one depends on where the file ends
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        raise UserError(f"{path} is truncated, damaged or no file of MATLAB's ({error}); {_FETCH}") from error
    if missing := [key for key in KEYS if key not in found]:
        raise UserError(f"{path} has no {' and no '.join(missing)}: it is truncated, or no homNIST set; {_FETCH}")
    return found


def _images(array: Any, path: pathlib.Path) -> np.ndarray:
    """A view of the images as N x H x W.

    Axes of length 1 say nothing, and N x 1600 is N x 40 x 40 row by row, as numpy does it; `_check_upright` would tell.
    """
    if not isinstance(array, np.ndarray) or not (array.dtype.kind == "f" or array.dtype == np.uint8):
        raise UserError(f"img_data of {path} is of type {getattr(array, 'dtype', type(array))}, neither floats nor uint8; {_FETCH}")
    shape = tuple(length for length in array.shape if length != 1)
    count = array.size // SIZE**2
    batch = () if count == 1 else (count,)
    if shape not in ((*batch, SIZE, SIZE), (*batch, SIZE**2)):
        expected = f"N x {SIZE} x {SIZE} or N x {SIZE**2}"
        raise UserError(f"img_data of {path} is {_times(array)}, not {expected}: exchange its axes, or {_FETCH}")
    return array.reshape(count, SIZE, SIZE)


def _labels(array: Any, path: pathlib.Path) -> np.ndarray:
    """label_N, int64: the file has them as N x 1, a vector to MATLAB, which against N numbers would broadcast to N x N."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or sum(length != 1 for length in array.shape) > 1:
        what = f"{_times(array)} of type {array.dtype}" if isinstance(array, np.ndarray) else f"of type {type(array)}"
        raise UserError(f"labels of {path} are {what}, not one number per image; {_FETCH}")
    label_N = array.ravel()
    if (wrong_N := ~np.isin(label_N, np.arange(CLASSES))).any():
        number = int(np.argmax(wrong_N))
        raise UserError(f"label {number} of {path} is {label_N[number]}, not 0 to {CLASSES - 1}; {_FETCH}")
    return label_N.astype(np.int64)


def _times(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))


def _check_values(image_NxHxW: np.ndarray, path: pathlib.Path) -> None:
    """Refuses floats that are not in [0, 1], NaN among them."""
    if image_NxHxW.dtype == np.uint8:
        return
    for first in range(0, len(image_NxHxW), _BLOCK):
        block_NxHxW = image_NxHxW[first : first + _BLOCK]
        wrong_NxHxW = ~((block_NxHxW >= -_OVERSHOOT) & (block_NxHxW <= 1 + _OVERSHOOT))
        if wrong_NxHxW.any():
            place = np.unravel_index(int(np.argmax(wrong_NxHxW)), wrong_NxHxW.shape)
            found = f"image {first + int(place[0])} of {path} has a pixel of {block_NxHxW[place]:g}"
            raise UserError(f"{found}: floats must be in [0, 1], store grey levels as uint8; or {_FETCH}")


def _check_upright(one_NxHxW: np.ndarray, path: pathlib.Path) -> None:
    """Refuses images whose rows and columns are exchanged, by their ones: these are taller than wide."""
    if len(one_NxHxW) < _FEWEST_ONES:
        return
    mean_HxW = one_NxHxW.mean(0, dtype=np.float64)
    if _spread(mean_HxW.sum(0)) > _LYING * _spread(mean_HxW.sum(1)):
        raise UserError(f"the ones of {path} lie on their side: exchange the rows and columns of img_data, or {_FETCH}")


def _spread(mass_N: np.ndarray) -> float:
    """The variance of the places of a mass."""
    place_N, mass_N = np.arange(len(mass_N)), mass_N + 1e-9
    mean = np.average(place_N, weights=mass_N)
    return float(np.average((place_N - mean) ** 2, weights=mass_N))
