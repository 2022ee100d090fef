"""The 3 x 3 convolution of the residual blocks, with a weight gradient that CPUs compute at the speed of the convolution itself."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

# Bytes of both operands of one block of the weight gradient: they should stay in a core's cache (README, the train step).
BLOCK_BYTES = 1_200_000


class Conv3x3(nnx.Conv):
    """B x H x W x inputs -> B x H x W x features: stride 1, zeros beyond the borders, no bias."""

    def __init__(self, inputs: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(inputs, features, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array) -> Array:  # type: ignore[override]
        return convolve(*promote_dtype((x_BxHxWxC, self.kernel[...]), dtype=self.dtype))


@jax.custom_vjp
def convolve(x_BxHxWxC: Array, kernel_3x3xCxD: Array) -> Array:
    """Cross-correlation with zeros beyond the borders, B x H x W x D."""
    return _convolve(x_BxHxWxC, kernel_3x3xCxD)


def _convolve(x_BxHxWxC: Array, kernel_3x3xCxD: Array) -> Array:
    return jax.lax.conv_general_dilated(x_BxHxWxC, kernel_3x3xCxD, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _backward(saved: tuple[Array, Array], g_BxHxWxD: Array) -> tuple[Array, Array]:
    x_BxHxWxC, kernel_3x3xCxD = saved
    return input_gradient(kernel_3x3xCxD, g_BxHxWxD), weight_gradient(x_BxHxWxC, g_BxHxWxD)


convolve.defvjp(lambda x_BxHxWxC, kernel_3x3xCxD: (_convolve(x_BxHxWxC, kernel_3x3xCxD), (x_BxHxWxC, kernel_3x3xCxD)), _backward)


def input_gradient(kernel_3x3xCxD: Array, g_BxHxWxD: Array) -> Array:
    """The gradient of `convolve` by its input, B x H x W x C, of one by its output."""
    x_BxHxWxC = jax.ShapeDtypeStruct((*g_BxHxWxD.shape[:3], kernel_3x3xCxD.shape[2]), g_BxHxWxD.dtype)
    return jax.linear_transpose(lambda x_BxHxWxC: _convolve(x_BxHxWxC, kernel_3x3xCxD), x_BxHxWxC)(g_BxHxWxD)[0]


def weight_gradient(x_BxHxWxC: Array, g_BxHxWxD: Array) -> Array:
    """The gradient of `convolve` by its kernel, 3 x 3 x C x D, of one by its output.

    On a CPU by blocks. XLA's own, which lays out patches of whole batches there, ran at a half down to a twentieth of the speed
    of the convolution. Where examples or rows may be split over several devices it is XLA's: that one it knows how to split.
    """
    if jax.device_count() > 1:
        return whole(x_BxHxWxC, g_BxHxWxD)
    return jax.lax.platform_dependent(x_BxHxWxC, g_BxHxWxD, cpu=by_blocks, default=whole)


def whole(x_BxHxWxC: Array, g_BxHxWxD: Array) -> Array:
    """`weight_gradient` as XLA has it: a convolution of the whole batch."""
    kernel = jax.ShapeDtypeStruct((3, 3, x_BxHxWxC.shape[-1], g_BxHxWxD.shape[-1]), x_BxHxWxC.dtype)
    return jax.linear_transpose(partial(_convolve, x_BxHxWxC), kernel)(g_BxHxWxD)[0]


def by_blocks(x_BxHxWxC: Array, g_BxHxWxD: Array) -> Array:
    """`weight_gradient` as a sum over blocks of rows, or of whole images where several fit, of three matrix products each.

    Of a block, `g` shifted by −1, 0 and 1 columns is laid side by side once; a shift by rows is another part of the same array.
    Accumulates in float32.
    """
    batch, height, width, inputs = x_BxHxWxC.shape
    features = g_BxHxWxD.shape[-1]
    points = BLOCK_BYTES // (x_BxHxWxC.dtype.itemsize * (inputs + 3 * features))
    rows = _divisor(height, points // width)
    images = _divisor(batch, points // (height * width)) if rows == height else 1
    padded_BxHxWxD = jnp.pad(g_BxHxWxD, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def add(sums: list[Array], index: Array) -> tuple[list[Array], None]:
        start = (index // (height // rows) * images, index % (height // rows) * rows, 0, 0)
        x_NxC = jax.lax.dynamic_slice(x_BxHxWxC, start, (images, rows, width, inputs)).reshape(-1, inputs)
        g_BxHxWxD = jax.lax.dynamic_slice(padded_BxHxWxD, start, (images, rows + 2, width + 2, features))
        shifted_BxHxWx3D = jnp.concatenate([g_BxHxWxD[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)
        by_row = [shifted_BxHxWx3D[:, 2 - i : 2 - i + rows].reshape(-1, 3 * features) for i in range(3)]
        products = [jnp.matmul(x_NxC.T, g_Nx3D, preferred_element_type=jnp.float32) for g_Nx3D in by_row]
        return [total + product for total, product in zip(sums, products, strict=True)], None

    zeros = [jnp.zeros((inputs, 3 * features), jnp.float32)] * 3
    sums, _ = jax.lax.scan(add, zeros, jnp.arange(batch // images * (height // rows)))
    gradient_3xCx3xD = jnp.stack(sums).reshape(3, inputs, 3, features)
    return gradient_3xCx3xD.swapaxes(1, 2).astype(x_BxHxWxC.dtype)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of a number up to a limit, at least 1."""
    return next(divisor for divisor in range(max(min(number, limit), 1), 0, -1) if number % divisor == 0)
