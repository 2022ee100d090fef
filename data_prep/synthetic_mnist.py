"""Small handwritten digits in MNIST's files: a twin to rehearse with where MNIST is not at hand.

They ship with scikit-learn: 1,797 digits of 8 x 8 pixels.  Each is enlarged to the 20 x 20 pixels in the middle of 28 x 28 that
MNIST's digits fill.  The last fifth, in part by other hands than the rest, is test data.
"""

import pathlib
from typing import Any

import numpy as np
from PIL import Image

from data_prep import idx, mnist, samples

# Part of the twin's folder: raise it when the same twin gives other images.
VERSION = 1
_TEST = 360
# Pixels around a digit of 8 x 8 from which the enlarged one is made, of which MNIST's margin takes 1.6.
_MARGIN, _SHOWN = 2, 1.6
# Twin -> options of data_prep.mnist: there is one set, so every twin is it.
PREPARATION: dict[str, dict[str, Any]] = {twin: {"verify": False} for twin in ("tiny", "small", "full")}


def generate(folder: pathlib.Path, twin: str, workers: int = 1, progress: bool = True) -> None:
    """Writes the four files, not packed, to folder; the same ones for every twin, in no time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    small_NxHxW, label_N = samples.digits()
    image_NxHxW = np.stack([_enlarge(small_HxW) for small_HxW in small_NxHxW])
    for split, part in {"train": slice(-_TEST), "test": slice(-_TEST, None)}.items():
        for name, array in zip(mnist.FILES[split], (image_NxHxW, label_N.astype(np.uint8)), strict=True):
            pathlib.Path(folder, name).write_bytes(idx.encode(array[part]))


def _enlarge(small_HxW: np.ndarray) -> np.ndarray:
    """image_HxW, 28 x 28 uint8, from values 0 .. 16: bicubic, so 2.5 pixels for one, cut where it overshoots."""
    wide = Image.fromarray(np.pad(small_HxW, _MARGIN).astype(np.float32))
    edges = _MARGIN - _SHOWN, wide.width - (_MARGIN - _SHOWN)
    box = (edges[0], edges[0], edges[1], edges[1])
    large = wide.resize((mnist.SIZE, mnist.SIZE), Image.Resampling.BICUBIC, box=box)
    return np.clip(np.rint(np.asarray(large) * (255 / 16)), 0, 255).astype(np.uint8)
