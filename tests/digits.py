"""The smallest Homography MNIST that still has every part: two levels, rank 8, images that are no digits."""

import functools
import importlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from niso.config import Experiment
from niso.step import Program
from tests.conftest import mesh_of

TINY = {"batch": 8, "task.widths": (4, 8), "task.latent_channels": 8, "task.rank": 8, "optimizer.warmup": 5, "log.every": 10}
HEAD = {"task.head_width": 8, "task.gram": 4}


def config(stage: str, arm: str = "", family: str = "hmnist", **overrides: Any) -> ConfigDict:
    """Of hmnist_encode or hmnist_pred, `stage` "encode" or "pred"; or of another `family` of two stages."""
    tiny = importlib.import_module(f"configs.{family}_{stage}").get_config("quick" + (f"-{arm}" if arm else ""))
    values = TINY | (HEAD | {"task.warm_start": ()} if stage == "pred" else {})
    tiny.update_from_flattened_dict(values | {name.replace("__", "."): value for name, value in overrides.items()})
    return tiny


def experiment(stage: str, arm: str = "", family: str = "hmnist", **overrides: Any) -> Experiment:
    return Experiment.from_config(config(stage, arm, family, **overrides))


@functools.cache
def program(stage: str, arm: str = "", data: int = 1, space: int = 1, **overrides: Any) -> Program:
    e = experiment(stage, arm, **overrides)
    return Program(e, mesh_of(data, space), e.data.batch_shapes(e.batch))


def batch(seed: int = 0, rows: int = 8) -> dict[str, np.ndarray]:
    """Smooth blobs on black, the place and the shape of which is the label's and the example's own."""
    random = np.random.default_rng(seed)
    label_B = random.integers(0, 10, rows).astype(np.int32)
    y_Hx1, x_W = np.arange(28)[:, None], np.arange(28)
    images = np.zeros((rows, 28, 28))
    for image_HxW, label in zip(images, label_B, strict=True):
        for n in range(3):
            a, b = 14 + 6 * np.cos(label + 2 * n) + random.normal(), 14 + 6 * np.sin(label * n) + random.normal()
            image_HxW += 255 * np.exp(-((y_Hx1 - a) ** 2 + (x_W - b) ** 2) / (4 + label))
    return {
        "images_BxHxWxC": np.clip(images, 0, 255).astype(np.uint8)[..., None],
        "weight_B": np.ones(rows, np.float32),
        "item_B": random.integers(0, 1000, rows).astype(np.int32),
        "copy_B": random.integers(0, 32, rows).astype(np.int32),
        "label_B": label_B,
    }
