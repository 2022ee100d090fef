"""The convolutional encoder and decoder of Neural Isometries: residual levels between a pixel grid and a latent grid."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from niso.models.convolution import Conv3x3

STEM = 48  # features of the per-pixel layer before the first level, as published


def grid_norm(features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Normalisation over the grid: mean and variance over H, W of each channel, then a scale and a shift per channel."""
    return nnx.LayerNorm(features, reduction_axes=(1, 2), feature_axes=-1, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Residual block: twice (norm, SiLU, 3 x 3 convolution), beside a Dense skip; B x H x W x inputs -> B x H x W x features.

    No biases: every path from here ends in a norm that takes the mean over the grid away, so their gradient would be rounding
    noise, which Adam scales up to full-sized steps.
    """

    def __init__(self, inputs: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = grid_norm(inputs, dtype, rngs)
        self.conv1 = Conv3x3(inputs, features, dtype=dtype, rngs=rngs)
        self.norm2 = grid_norm(features, dtype, rngs)
        self.conv2 = Conv3x3(features, features, dtype=dtype, rngs=rngs)
        self.skip = nnx.Linear(inputs, features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array, double: bool = False) -> Array:
        """With `double`, of the input on a grid twice as fine: what acts on single points is done before it is repeated."""
        finer = _double if double else lambda x_BxHxWxC: x_BxHxWxC
        inner_BxHxWxC = self.conv1(finer(jax.nn.silu(self.norm1(x_BxHxWxC))))
        return self.conv2(jax.nn.silu(self.norm2(inner_BxHxWxC))) + finer(self.skip(x_BxHxWxC))


class Level(nnx.Module):
    """`blocks` residual blocks at one resolution (with `double`, twice the input's), recomputed in the backward pass if `remat`."""

    def __init__(self, inputs: int, features: int, blocks: int, remat: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.remat = remat
        self.blocks = nnx.List([Block(inputs if i == 0 else features, features, dtype=dtype, rngs=rngs) for i in range(blocks)])

    def __call__(self, x_BxHxWxC: Array, double: bool = False) -> Array:
        run = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
        for index, block in enumerate(self.blocks):
            x_BxHxWxC = run(block, x_BxHxWxC, double and index == 0)
        return x_BxHxWxC


class Encoder(nnx.Module):
    """B x H x W x channels -> B x H' x W' x latent_channels, H' = H / 2^(levels − 1): 2 x 2 mean-pooling between levels."""

    def __init__(
        self, channels: int, widths: Sequence[int], blocks: int, latent_channels: int,
        *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.stem = nnx.Linear(channels, STEM, dtype=dtype, rngs=rngs)
        inputs = (STEM, *widths[:-1])
        self.levels = nnx.List([Level(i, w, blocks, remat, dtype=dtype, rngs=rngs) for i, w in zip(inputs, widths, strict=True)])
        self.norm = grid_norm(widths[-1], dtype, rngs)
        self.head = nnx.Linear(widths[-1], latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array) -> Array:
        x_BxHxWxC = jax.nn.silu(self.stem(x_BxHxWxC))
        for index, level in enumerate(self.levels):
            x_BxHxWxC = level(x_BxHxWxC if index == 0 else nnx.avg_pool(x_BxHxWxC, (2, 2), (2, 2)))
        return self.head(jax.nn.silu(self.norm(x_BxHxWxC)))


class Decoder(nnx.Module):
    """B x H' x W' x latent_channels -> B x H x W x channels: the encoder's levels reversed, nearest-neighbour doubling between."""

    def __init__(
        self, channels: int, widths: Sequence[int], blocks: int, latent_channels: int,
        *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs,
    ):  # fmt: skip
        features = tuple(reversed(widths))
        inputs = (latent_channels, *features[:-1])
        self.levels = nnx.List([Level(i, w, blocks, remat, dtype=dtype, rngs=rngs) for i, w in zip(inputs, features, strict=True)])
        self.norm = grid_norm(features[-1], dtype, rngs)
        self.head = nnx.Linear(features[-1], channels, dtype=dtype, rngs=rngs)

    def __call__(self, z_BxHxWxC: Array) -> Array:
        for index, level in enumerate(self.levels):
            z_BxHxWxC = level(z_BxHxWxC, double=index > 0)
        return self.head(jax.nn.silu(self.norm(z_BxHxWxC))).astype(jnp.float32)


def _double(x_BxHxWxC: Array) -> Array:
    """Every grid point repeated 2 x 2 (nearest neighbour), as a broadcast that stays local to a sharded row."""
    batch, height, width, channels = x_BxHxWxC.shape
    tiled = jnp.broadcast_to(x_BxHxWxC[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return tiled.reshape(batch, 2 * height, 2 * width, channels)
