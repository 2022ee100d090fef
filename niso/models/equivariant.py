"""Classification heads: one that no orthogonal map of its spectral coefficients can change, and an ordinary one beside it.

The first is the "vector neuron" network of Neural Isometries (after Deng et al., Vector Neurons, ICCV 2021). The K coefficients
of one channel are a vector that O(K) turns; layers mix channels, and use what happens along K through inner products alone.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

FLOOR = 1e-6  # below every divisor: ‖k‖² of a neuron, ε of a norm


class VectorNorm(nnx.Module):
    """Every channel's vector to the length √K, times a scale per channel: B x K x C -> B x K x C, float32, O(K)-equivariant.

    scale · x · rsqrt(mean over K of x² + ε), both learned per channel. ε = e² + 1e-6 with e the parameter, as the operator's
    mass is m² + 1e-8: positive whatever the optimiser does. It begins at 1e-3 (Neural Isometries' reference: |ε| + 1e-6).
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.root_epsilon = nnx.Param(jnp.full((channels,), 1e-3**0.5, jnp.float32))

    def __call__(self, x_BxKxC: Array) -> Array:
        x_BxKxC = x_BxKxC.astype(jnp.float32)
        square_Bx1xC = jnp.mean(x_BxKxC**2, axis=1, keepdims=True)
        epsilon_C = self.root_epsilon[...] ** 2 + FLOOR
        return x_BxKxC * (self.scale[...] * jax.lax.rsqrt(square_Bx1xC + epsilon_C))


class VectorNeuron(nnx.Module):
    """Linear in the channels, then the vectors' SiLU: B x K x inputs -> B x K x features, float32, O(K)-equivariant.

    q + silu(−⟨q, k⟩) · k / (‖k‖² + 1e-6) with q, k bias-free Dense layers of the input and inner products over K: where q points
    against the learned direction k, its part along k is (softly) taken away. What is added is never longer than q, so the
    division is harmless at k = 0. Products of matrices are in `dtype`, the rest in float32.
    """

    def __init__(self, inputs: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.query = nnx.Linear(inputs, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(inputs, features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxKxC: Array) -> Array:
        q_BxKxC = self.query(x_BxKxC).astype(jnp.float32)
        k_BxKxC = self.key(x_BxKxC).astype(jnp.float32)
        inner_Bx1xC = jnp.sum(q_BxKxC * k_BxKxC, axis=1, keepdims=True)
        square_Bx1xC = jnp.sum(k_BxKxC**2, axis=1, keepdims=True)
        return q_BxKxC + jax.nn.silu(-inner_Bx1xC) / (square_Bx1xC + FLOOR) * k_BxKxC


class VectorLayer(nnx.Module):
    """Norm, then neuron: B x K x inputs -> B x K x features, float32, O(K)-equivariant."""

    def __init__(self, inputs: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = VectorNorm(inputs)
        self.neuron = VectorNeuron(inputs, features, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxKxC: Array) -> Array:
        return self.neuron(self.norm(x_BxKxC))


class EquivariantHead(nnx.Module):
    """E_Ω(ψ) -> logits that no Q in O(K) changes, B x K x channels -> B x classes, float32 (Neural Isometries' classifier).

    Any K, which is no argument: no parameter has that axis. Two MLPs of vector layers, a bias-free Dense skip beside the first,
    one more vector layer to `gram` features, their Gram matrix over K, Dense, SiLU, Dense.

    Where the published description leaves a choice:
    - `layers` (1 or more) counts the vector layers of both MLPs together, the first has the larger half: 2 is 1 + 1, 4 is 2 + 2.
      (The reference code makes layers // 2 + 1 for each MLP and, counting norms as layers, runs 1 + 1 of them in either case.)
    - The hidden Dense layer is 4 times as wide as its input, the upper triangle: 4 · gram (gram + 1) / 2, of 64 features 8,320.
    - The Gram matrix is divided by √K, as the scores of attention are: inner products of unrelated vectors that the norms have
      made √K long then have unit variance, as the Dense layer's initialisation expects. (The reference code does not divide.)

    Gram matrix and logits are computed in float32 whatever the layers compute in. Invariance is up to rounding: some 4e-6 of
    the logits' size in float32; products of matrices in bfloat16 (or TensorFloat32) round the turned entries by 1e-3.
    """

    def __init__(
        self, channels: int, layers: int, width: int, classes: int, *, gram: int = 64, dtype: DTypeLike, rngs: nnx.Rngs
    ):  # fmt: skip
        def mlp(inputs: int, count: int) -> nnx.List:
            pairs = itertools.pairwise([inputs, *[width] * count])
            return nnx.List([VectorLayer(i, o, dtype=dtype, rngs=rngs) for i, o in pairs])

        self.first = mlp(channels, layers - layers // 2)
        self.skip = nnx.Linear(channels, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.second = mlp(width, layers // 2)
        self.last = VectorLayer(width, gram, dtype=dtype, rngs=rngs)
        entries = gram * (gram + 1) // 2
        self.hidden = nnx.Linear(entries, 4 * entries, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(4 * entries, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, coefficient_BxKxC: Array) -> Array:
        gram_BxE = gram_entries(self.vectors(coefficient_BxKxC))
        return self.output(jax.nn.silu(self.hidden(gram_BxE)))

    def vectors(self, coefficient_BxKxC: Array) -> Array:
        """What the Gram matrix is made of, B x K x gram, float32: of Q E_Ω(ψ) it is Q times what it is of E_Ω(ψ)."""
        x_BxKxC = coefficient_BxKxC
        for layer in self.first:
            x_BxKxC = layer(x_BxKxC)
        x_BxKxC = x_BxKxC + self.skip(coefficient_BxKxC)
        for layer in self.second:
            x_BxKxC = layer(x_BxKxC)
        return self.last(x_BxKxC)


def gram_entries(x_BxKxC: Array) -> Array:
    """Inner products over K of all pairs of channels, and each with itself, over √K: B x C (C + 1) / 2, row by row."""
    _, order, channels = x_BxKxC.shape
    gram_BxCxC = jnp.einsum("bkc,bkd->bcd", x_BxKxC, x_BxKxC, precision="highest") / order**0.5
    return gram_BxCxC[:, *jnp.triu_indices(channels)]


class MLPHead(nnx.Module):
    """Latents of any shape -> logits by an ordinary network: B x ... (`features` numbers) -> B x classes, float32.

    `layers` (1 or more) Dense layers of `width` with SiLU and an output layer, in float32 whatever the others compute in. For
    latents without an operator, where there is nothing to be invariant to.
    """

    def __init__(self, features: int, layers: int, width: int, classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inputs = (features, *[width] * (layers - 1))
        self.layers = nnx.List([nnx.Linear(i, width, dtype=dtype, rngs=rngs) for i in inputs])
        self.output = nnx.Linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, z_BxNxC: Array) -> Array:
        x_BxC = z_BxNxC.reshape(len(z_BxNxC), -1)
        for layer in self.layers:
            x_BxC = jax.nn.silu(layer(x_BxC))
        return self.output(x_BxC)
