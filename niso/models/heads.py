"""Heads: small networks that read an answer off what the encoder and the operator found."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # nine numbers of the pose that does nothing


class PoseHead(nnx.Module):
    """vec(τ_Ω) -> nine numbers of a relative pose (geometry.se3), B x K x K -> B x 9, float32 (Neural Isometries).

    `layers` (2 or more) Dense layers of `width` with SiLU, the first one's output added to the last one's, and an output layer.
    """

    def __init__(self, order: int, layers: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inputs = (order**2, *[width] * (layers - 1))
        self.layers = nnx.List([nnx.Linear(i, width, dtype=dtype, rngs=rngs) for i in inputs])
        # Beginning at the identity: frames of a video are a few degrees apart. In float32 whatever the layers compute in:
        # bfloat16 has no numbers between 1 and 1 - 1/256, a step of five degrees in a cosine.
        self.output = nnx.Linear(
            width, 9, dtype=jnp.float32, rngs=rngs,
            kernel_init=nnx.initializers.normal(1e-3), bias_init=lambda key, shape, dtype: jnp.array(IDENTITY, dtype),
        )  # fmt: skip

    def __call__(self, tau_BxKxK: Array) -> Array:
        batch, order, _ = tau_BxKxK.shape
        # The rows of an orthogonal matrix have length 1, its entries a root mean square of 1/√k: to unit variance, as the
        # layers' initialisation expects of its input.
        x_BxC = math.sqrt(order) * tau_BxKxK.reshape(batch, -1)
        first_BxC = x_BxC = jax.nn.silu(self.layers[0](x_BxC))
        for layer in self.layers[1:]:
            x_BxC = jax.nn.silu(layer(x_BxC))
        return self.output(x_BxC + first_BxC)
