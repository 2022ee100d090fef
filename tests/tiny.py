"""The smallest pose_encode that still has every part: 16 x 16 frames, two levels, rank 8."""

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.pose_encode import get_config
from niso.config import Experiment
from niso.step import Program
from tests.conftest import mesh_of

SIZE = 16


def config(**overrides: Any) -> ConfigDict:
    """The config of the tiny experiment, with dotted overrides written `task__alpha=0.0`."""
    tiny = get_config("quick")
    values = {
        "steps": 200, "batch": 8, "data.size": SIZE, "task.widths": (4, 8), "task.latent_channels": 8, "task.rank": 8,
        "optimizer.warmup": 5, "optimizer.peak": 3e-3, "log.every": 10,
    }  # fmt: skip
    tiny.update_from_flattened_dict(values | {name.replace("__", "."): value for name, value in overrides.items()})
    return tiny


def experiment(**overrides: Any) -> Experiment:
    return Experiment.from_config(config(**overrides))


def shapes(e: Experiment) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Names, shapes and types of a batch, as the pipeline declares them."""
    return e.data.batch_shapes(e.batch)


@functools.cache
def program(data: int = 1, space: int = 1, **overrides: Any) -> Program:
    """Compiled once per session: a Program has no state."""
    e = experiment(**overrides)
    return Program(e, mesh_of(data, space), shapes(e))


def batch(seed: int = 0, rows: int = 8, size: int = SIZE) -> dict[str, np.ndarray]:
    """Pairs of smooth random images and their cyclic shifts."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(rows, size // 4, size // 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    smooth = sum(np.roll(coarse, (i, j), axis=(1, 2)) for i in range(4) for j in range(4)) / 16
    moved = np.stack([np.roll(one, random.integers(0, 4, 2), axis=(0, 1)) for one in smooth])
    frames = np.clip(90 * np.stack([smooth, moved], axis=1) + 128, 0, 255).astype(np.uint8)
    skip = np.resize(np.array([0, 1, 3, 5], np.int32), rows)
    return {"frames_BxTxHxWxC": frames, "skip_B": skip, "weight_B": np.ones(rows, np.float32)}


def place(p: Program, host: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return p.place(host)
