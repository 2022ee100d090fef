"""The smallest experiment on surfaces that still has every part: 8 x 16 observations, two levels, rank 8, smooth functions."""

import functools
from typing import Any

import numpy as np

from niso.config import Experiment
from niso.geometry import latlong
from niso.step import Program
from tests import digits
from tests.conftest import mesh_of

ROWS = 12  # of the stored grid
TINY = {"data__size": ROWS, "task__size": (8, 16)}


def experiment(stage: str, arm: str = "", **overrides: Any) -> Experiment:
    """Of cshrec11_encode or cshrec11_pred, `stage` "encode" or "pred"."""
    return digits.experiment(stage, arm, family="cshrec11", **(TINY | overrides))


@functools.cache
def program(stage: str, arm: str = "", data: int = 1, space: int = 1, **overrides: Any) -> Program:
    e = experiment(stage, arm, **overrides)
    return Program(e, mesh_of(data, space), e.data.batch_shapes(e.batch))


def batch(seed: int = 0, rows: int = 8) -> dict[str, np.ndarray]:
    """Functions with two bumps each, the places of which are the label's and the example's own."""
    random = np.random.default_rng(seed)
    label_B = random.integers(0, 8, rows).astype(np.int32)
    point_Nx3 = latlong.points(ROWS, 2 * ROWS)
    centre_Lx2x3 = np.random.default_rng(100).normal(size=(8, 2, 3))
    centre_Bx2x3 = centre_Lx2x3[label_B] + 0.2 * random.normal(size=(rows, 2, 3))
    centre_Bx2x3 /= np.linalg.norm(centre_Bx2x3, axis=-1, keepdims=True)
    sharpness_C = np.linspace(1, 6, 16)
    near_BxNx2 = np.einsum("nx,bjx->bnj", point_Nx3, centre_Bx2x3) - 1
    bump_BxNxC = np.exp(near_BxNx2[..., None] * sharpness_C).mean(axis=2)
    return {
        "signal_BxHxWxC": np.round(65_535 * bump_BxNxC).astype(np.uint16).reshape(rows, ROWS, 2 * ROWS, 16),
        "low_BxC": np.full((rows, 16), -0.9, np.float32),
        "step_BxC": np.full((rows, 16), 2.5 / 65_535, np.float32),
        "weight_B": np.ones(rows, np.float32),
        "item_B": random.integers(0, 1000, rows).astype(np.int32),
        "copy_B": random.integers(0, 30, rows).astype(np.int32),
        "label_B": label_B,
    }
