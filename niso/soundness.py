"""Whether a run is still finite; and when it is not, since which step and on which batch."""

import collections
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from niso import metrics
from niso.checkpoint import Checkpoints
from niso.data.stream import Examples
from niso.errors import UserError
from niso.metrics import Metrics
from niso.step import Program, TrainState

REMEMBERED = 1_000  # windows of metrics that are kept, each a few dozen numbers on the devices
NAMED = 10  # items of a batch


class Soundness:
    """Knows the last step that was seen to be finite, and stops the run at one that is not.

    Nothing is computed for it: the sums of metrics that every step returns are kept until they are known to be finite. Once one is
    not, nor are those after it in its window; so the first bad step is found by looking at them again.
    """

    def __init__(self, program: Program, dataset: Examples, checkpoints: Checkpoints, step: int):
        self._program, self._dataset, self._checkpoints = program, dataset, checkpoints
        self._step = step
        self._windows: collections.deque[tuple[int, Metrics]] = collections.deque(maxlen=REMEMBERED)

    def remember(self, step: int, window: Metrics) -> None:
        """Keeps what `step` returned, unread."""
        self._windows.append((step, window))

    def check(self, step: int, values: list[dict[str, float]], state: TrainState | None = None) -> None:
        """Stops the run if a metric of the steps up to `step`, or anything in the state about to be used or saved, is not finite.

        Args:
          values: the metrics of each replica.

        Raises:
          UserError: one is not. It names the first such step and the records of its batch.
        """
        broken = sorted({name for of_one in values for name in _broken(of_one)})
        if broken:
            culprit = self._first_broken()
        elif state is not None and not (finite_R := _finite(state, self._program.replicas.count)).all():
            broken, culprit = ["parameters or optimiser state"], (step, int(np.argmin(finite_R)))
        else:
            self._step = step
            while self._windows and self._windows[0][0] <= step:
                self._windows.popleft()
            return
        raise UserError(
            f"{', '.join(broken)} not finite in steps {self._step + 1} to {step}; nothing of them was saved, "
            f"{self._checkpoints.newest()}: lower optimizer.peak, set optimizer.clip=1.0 or a task.ridge of 1e-4, "
            f"then resume with --accept_config_changes{self._name(*culprit) if culprit else ''}"
        )

    def _first_broken(self) -> tuple[int, int] | None:
        """The first step with a metric that is not finite, and the number of the replica; None where it is no longer known."""
        for step, window in self._windows:
            for replica, of_one in enumerate(metrics.by_replica(window)):
                if _broken(of_one):
                    # Where earlier ones have been forgotten it may have been one of these.
                    return None if step > self._step + 1 and step == self._windows[0][0] else (step, replica)
        return None

    def _name(self, step: int, replica: int) -> str:
        """Says that it began at `step`, and what its batch was."""
        e = self._program.experiment
        seed = self._program.replicas.seeds[replica]
        items = self._dataset.name_batch(batch=e.batch, seed=seed, n=step - 1)
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        of = f" of the replica with seed {seed}" if self._program.replicas.count > 1 else ""
        return f". It began in step {step}{of}, on {'; '.join(items[:NAMED])}{more}"


def _broken(values: dict[str, float]) -> list[str]:
    return [name for name, value in values.items() if not math.isfinite(value)]


def _finite(state: TrainState, replicas: int) -> np.ndarray:
    """finite_R: whether all floating-point numbers of each replica's state are.

    Of a state, too, because a finite loss says nothing of the update after it.
    """
    return np.reshape(jax.device_get(_all_finite(state, replicas > 1)), replicas)


@partial(jax.jit, static_argnums=1)
def _all_finite(state: TrainState, by_replica: bool) -> Array:
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(by_replica), leaf.ndim))) for leaf in numbers]
    return jnp.all(jnp.stack(finite), axis=0)
