"""What the tasks on latent isometries share: an encoder, an operator, and the map τ_Ω between two encoded observations."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from niso.errors import UserError
from niso.geometry import spectrum as spectral
from niso.models.autoencoder import Decoder, Encoder
from niso.models.operator import LatentMaps, NoOperator, Operator
from niso.tasks.base import Rules, Task

OPERATOR_RULES: Rules = (("operator/basis", ("space", None)), ("operator/mass", ("space",)), ("operator/eigenvalue", (None,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Task):
    """A task whose model has an `encoder` and an `operator`.

    Fields:
      size, channels: the observation, size x size x channels; or height x width x channels, where `size` is these two.
      widths, blocks, latent_channels: levels of the encoder, residual blocks in each, d.
      operator: learn Ω; False is the ablation without it.
      rank: k, at most the number of latent grid points. eigenvalues: "cumulative" or "clustered" (Operator).
      group: "O" (paper) or "SO" (reference code). ridge, damping: of the projection (geometry.polar).
      dtype: of the networks; operator and solve are float32. remat: recompute residual blocks in the backward pass.
    """

    size: int | tuple[int, int]
    channels: int
    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    operator: bool
    rank: int
    eigenvalues: str
    group: str
    ridge: float
    damping: float
    dtype: str
    remat: bool

    def __post_init__(self) -> None:
        check_choices(self, dtype=("float32", "bfloat16"))
        for key in ("channels", "blocks", "latent_channels"):
            if getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: must be at least 1")
        coarsest = 2 ** (len(self.widths) - 1)
        if not self.widths or min(self.widths) < 1 or any(side < coarsest or side % coarsest for side in self.shape):
            raise UserError(f"task.size={self.size} cannot be halved between the {len(self.widths)} levels of task.widths")
        check_operator(self, self.grid, "latent grid" if self.operator else None)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the observation, pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the latent grid."""
        height, width = self.shape
        return height // 2 ** (len(self.widths) - 1), width // 2 ** (len(self.widths) - 1)

    @property
    def points(self) -> int:
        """Points of the latent grid."""
        return math.prod(self.grid)

    def inherited(self) -> tuple[str, ...]:
        return ("operator", "eigenvalues", "group", "ridge")

    @property
    def order(self) -> int:
        """Edge of τ_Ω: k, or d without an operator."""
        return self.rank if self.operator else self.latent_channels

    def init_encoder(self, rngs: nnx.Rngs) -> Encoder:
        """The encoder at initialisation."""
        return Encoder(*self._network(), **self._options(rngs))

    def init_decoder(self, rngs: nnx.Rngs) -> Decoder:
        """The decoder at initialisation."""
        return Decoder(*self._network(), **self._options(rngs))

    def init_operator(self, rngs: nnx.Rngs) -> Operator | NoOperator:
        """Ω at initialisation, or none."""
        return Operator(self.points, self.rank, self.eigenvalues, rngs=rngs) if self.operator else NoOperator()

    def operator_rules(self) -> Rules:
        """Sharding of the operator's parameters: rows of the latent grid over `space`."""
        return OPERATOR_RULES if self.operator else ()

    def encode(self, model: Any, maps: LatentMaps, image_BxHxWxC: Array) -> Array:
        """E_Ω of observations, B x K x C: uint8, or floats in [−1, 1].

        Raises:
          UserError: their size or channels are not the task's.
        """
        if image_BxHxWxC.dtype == jnp.uint8:
            image_BxHxWxC = scaled(image_BxHxWxC)
        batch, *observation = image_BxHxWxC.shape
        if observation != [*self.shape, self.channels]:
            raise UserError(
                f"frames are {observation}, but task.size={self.size} and task.channels={self.channels}: make them agree"
            )
        z_BxHxWxC = model.encoder(image_BxHxWxC)
        return maps.project(z_BxHxWxC.reshape(batch, -1, self.latent_channels))

    def decode(self, model: Any, maps: LatentMaps, coefficients: Sequence[Array]) -> list[Array]:
        """D of several coefficients of one batch, each B x K x C, by one call of the decoder: B x H x W x channels each."""
        coefficient_BxSxKxC = jnp.stack(coefficients, axis=1)
        z_QxNxC = maps.unproject(coefficient_BxSxKxC.reshape(-1, *coefficient_BxSxKxC.shape[2:]))
        decoded_QxHxWxC = model.decoder(z_QxNxC.reshape(len(z_QxNxC), *self.grid, -1))
        decoded_BxSxHxWxC = decoded_QxHxWxC.reshape(-1, len(coefficients), *decoded_QxHxWxC.shape[1:])
        return [decoded_BxSxHxWxC[:, n] for n in range(len(coefficients))]

    def isometry(self, maps: LatentMaps, first_BxKxC: Array, second_BxKxC: Array) -> Array:
        """τ_Ω with τ_Ω first ≈ second, B x K x K (eq. 8)."""
        return spectral.solve_isometry(first_BxKxC, second_BxKxC, maps.mask_KxK, self._procrustes)

    def _procrustes(self, x_BxKxK: Array) -> Array:
        return self.procrustes(x_BxKxK, special=self.group == "SO", ridge=self.ridge, damping=self.damping)

    def _network(self) -> tuple[int, tuple[int, ...], int, int]:
        return self.channels, self.widths, self.blocks, self.latent_channels

    def _options(self, rngs: nnx.Rngs) -> dict[str, Any]:
        return {"dtype": jnp.dtype(self.dtype), "remat": self.remat, "rngs": rngs}


def check_operator(task: Any, grid: tuple[int, int], name: str | None = "grid") -> None:
    """Raises UserError where a task's operator and its group cannot be; `name`: what it calls the rows x columns points of Ω."""
    check_choices(task, eigenvalues=("cumulative", "clustered"), group=("O", "SO"))
    if not 0 < task.damping < 1:
        raise UserError(f"task.damping={task.damping}: a share of the largest singular value, between 0 and 1, such as 1e-7")
    if not 0 <= task.ridge < 1:
        raise UserError(f"task.ridge={task.ridge}: a share of the norm, from 0 (none) to less than 1, such as 1e-4")
    rows, columns = grid
    points = rows * columns
    if name and not 1 <= task.rank <= points:
        raise UserError(
            f"task.rank={task.rank}: the {name} has {rows} x {columns} = {points} points, choose a rank from 1 to {points}"
        )


def check_choices(task: Any, **allowed: tuple[str, ...]) -> None:
    """Raises UserError where a field of a task is none of the words that it may be."""
    for key, choices in allowed.items():
        if getattr(task, key) not in choices:
            raise UserError(f"task.{key}={getattr(task, key)!r}: choose one of {', '.join(choices)}")


def scaled(image_BxHxWxC: Array) -> Array:
    """uint8 observations as float32 in [−1, 1]."""
    return image_BxHxWxC.astype(jnp.float32) / 127.5 - 1.0
