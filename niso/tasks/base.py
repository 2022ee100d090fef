"""What every task offers the trainer, and how one is found by its name."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from niso.errors import UserError
from niso.geometry.polar import polar_factor
from niso.geometry.spectrum import Procrustes
from niso.metrics import Metrics

Batch = dict[str, Array]
SHARED = ("__init__", "base", "latent", "regimes", "views")  # files of tasks/ that hold no task
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that can be optimised. Pure: it knows neither config nor mesh nor step nor disk.

    Fields common to all tasks:
      trainable: regular expression over parameter paths; the others are frozen: no gradient, no moments, no decay.
      warm_start: ((regular expression over parameter paths, run directory), ...): parameters taken from finished runs.
      procrustes: κ of eq. 8, set by the trainer to one whose batch is split over the mesh.
    """

    trainable: str
    warm_start: tuple[tuple[str, str], ...]
    procrustes: Procrustes = dataclasses.field(default=polar_factor, compare=False)

    def check_data(self, data: Any) -> None:
        """Raises UserError where keys of the config's `data` section contradict the task; by default none do."""

    def init_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model at initialisation."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch) -> tuple[Array, Metrics]:
        """(scalar to minimise, metrics of the same batch)."""
        raise NotImplementedError

    def rules(self) -> Rules:
        """Sharding table: (regular expression over parameter paths, mesh axis of each dimension); first match wins."""
        raise NotImplementedError

    def at(self, progress: Array) -> "Task":
        """The task at a fraction of the run, from 0 to 1: weights of losses may change on the way; by default nothing does."""
        return self

    def draw(self, batch: Batch, key: Array) -> Batch:
        """The batch with this step's random choices made: a function of the key only. No choices by default."""
        return batch

    def draw_held_out(self, batch: Batch, key: Array) -> Batch:
        """`draw` for batches that are evaluated or looked at. A task whose test set is the same for every run ignores the key."""
        return self.draw(batch, key)

    def evaluate(self, model: Any, batch: Batch) -> Metrics:
        """Metrics of a held-out batch; examples with `weight_B` 0 are padding."""
        return self.loss(model, batch)[1]

    def inspect(self, model: Any, batch: Batch) -> dict[str, Array]:
        """Arrays to look at (jitted); one-dimensional ones become histograms, all go to `figures`."""
        return {}

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `inspect` returned, drawn on the host: title -> H x W x 3 uint8."""
        return {}

    def examination(self, model: Any) -> dict[str, Array]:
        """What `examine` needs to know of a model (jitted); nothing where the task has nothing to examine."""
        return {}

    def examine(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Figures of merit of the parameters themselves, on the host, from what `examination` returned; they join the metrics
        of every evaluation."""
        return {}

    def inherited(self) -> tuple[str, ...]:
        """Fields that must be those of the runs that parameters are taken from: what the parameters mean depends on them."""
        return ()

    def trajectory_strides(self) -> tuple[int, ...]:
        """Strides at which camera trajectories of whole test videos are estimated and scored; none by default."""
        return ()

    def trajectory_limit(self) -> int:
        """Frames of a video that count there, from its first."""
        return 0

    def summary(self, metrics: dict[str, float]) -> list[str]:
        """Lines that tell a person what these evaluation metrics say."""
        return [f"{name} {value:.4g}" for name, value in metrics.items()]


def load(name: str) -> type[Task]:
    """The task class of `niso/tasks/<name>.py`: the class named like the file, in capitals.

    Raises:
      UserError: no such file.
    """
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in SHARED)
    if name not in files:
        raise UserError(f"task.name={name!r}: there is no task of that name; there are {', '.join(files)}")
    return getattr(importlib.import_module(f"niso.tasks.{name}"), "".join(part.capitalize() for part in name.split("_")))
