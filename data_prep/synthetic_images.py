"""Two photographs as a folder of images: a twin to rehearse with before ImageNet's 150 GB.

They ship with scikit-learn (a temple and a flower, 427 x 640, CC BY).  Each is cut into five upright strips, one of which is
test data, so that no pixel is in both splits; `data_prep.images` then takes thousands of random squares of each strip.
"""

import pathlib
from typing import Any

import numpy as np
from PIL import Image

from data_prep import samples

# Part of the twin's folder: raise it when the same twin gives other images.
VERSION = 1
_STRIPS, _HELD_OUT = 5, 3
# Twin -> options of data_prep.images: with ten strips 2,000, 40,000 and 200,000 images, a fifth of them test data.
PREPARATION: dict[str, dict[str, Any]] = {"tiny": {"crops": 200}, "small": {"crops": 4_000}, "full": {"crops": 20_000}}


def generate(folder: pathlib.Path, twin: str, workers: int = 1, progress: bool = True) -> None:
    """Writes the strips to folder/train and folder/test, PNG; the same ones for every twin, in no time.

    Raises:
        UserError: scikit-learn is not installed.
    """
    for p, photo_HxWxC in enumerate(samples.photographs()):
        for s, strip_HxWxC in enumerate(np.array_split(photo_HxWxC, _STRIPS, axis=1)):
            path = pathlib.Path(folder, "test" if s == _HELD_OUT else "train", f"photo-{p}-strip-{s}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(strip_HxWxC).save(path)
