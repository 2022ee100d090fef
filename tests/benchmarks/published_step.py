"""The published train step of pairs, so that niso's can be measured against it in the same run (NUMERICS.md, section 3).

Parameters, batch and loss are niso's. What the published step does on the way there, and niso's does not:
  - all four latents are decoded in one batch, though the loss reads only the two that were carried over;
  - the Procrustes projection is differentiated through its SVD, damped by an absolute 1e-8 (tests/reference_solve.py), so
    gradients differ;
  - the weight gradients of the 3 x 3 convolutions are XLA's own, those of niso.models.convolution.whole.
Everything else is niso's, Φ once per update and the donated state included: less than the published code does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax import Array

from niso.config import Experiment
from niso.errors import UserError
from niso.metrics import Metrics
from niso.models.convolution import Conv3x3
from niso.models.operator import LatentMaps
from niso.tasks.autoencode import Autoencode, Autoencoder
from niso.tasks.base import Batch
from niso.tasks.regimes import Views
from tests import reference_solve


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsPublished(Autoencode):
    """Autoencode of pairs, computed as the published step does.

    Fields:
      beside: coefficients, each B x K x C, that are decoded along with those that are asked for; of one batch, inside its loss.
    """

    beside: tuple[Array, ...] = dataclasses.field(default=(), compare=False)

    def init_model(self, rngs: nnx.Rngs) -> Autoencoder:
        """niso's at the same parameters, under the same paths."""
        model = super().init_model(rngs)
        levels: list[Any] = [*model.encoder.levels, *model.decoder.levels]
        for block in (block for level in levels for block in level.blocks):
            block.conv1, block.conv2 = plain(block.conv1), plain(block.conv2)
        return model

    def decode(self, model: Any, maps: LatentMaps, coefficients: Sequence[Array]) -> list[Array]:
        """D of the coefficients, from one call of the decoder for these and those beside them.

        The compiler does not take the others out: after the convolutions and their gradients they are examples like any.
        """
        return super().decode(model, maps, [*coefficients, *self.beside])[: len(coefficients)]

    def _losses(self, model: Autoencoder, batch: Batch, seen: Views) -> Metrics:
        untransformed = tuple(seen.coefficient_BxTxKxC[:, view] for view in range(seen.coefficient_BxTxKxC.shape[1]))
        return Autoencode._losses(dataclasses.replace(self, beside=untransformed), model, batch, seen)


def plain(conv: Conv3x3) -> nnx.Conv:
    """The same convolution with the same kernel, whose gradients are those that JAX and XLA make of it."""
    size = conv.in_features, conv.out_features, conv.kernel_size
    found = nnx.Conv(*size, use_bias=False, dtype=conv.dtype, rngs=nnx.Rngs(0))
    found.kernel = conv.kernel
    return found


def experiment(name: str, e: Experiment) -> Experiment:
    """A config's experiment with the published step.

    Raises:
      UserError: its task has no such step: it is not `autoencode`, not of pairs, or has a ridge.
    """
    if type(e.task) is not Autoencode or e.task.regime != "pairs":
        raise UserError(f"--as_published: {name} does not train on pairs: choose pose_encode, or --set task.regime=pairs")
    if e.task.ridge:
        raise UserError(f"--as_published: the published solve has no ridge, as task.ridge={e.task.ridge} of {name}: set it to 0")
    fields = {field.name: getattr(e.task, field.name) for field in dataclasses.fields(e.task)}
    return dataclasses.replace(e, task=AsPublished(**fields | {"procrustes": reference_solve.polar_factor}))
