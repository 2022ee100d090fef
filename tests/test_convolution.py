"""The 3 x 3 convolution against XLA's own derivatives and against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.test_util import check_grads

from niso import cost
from niso.models import convolution

# Several images to a block; rows of one image; height and width unequal; a prime height, a row at a time; one image, one point.
SHAPES = ((6, 8, 8, 3, 5), (2, 96, 64, 16, 24), (3, 12, 24, 7, 4), (2, 31, 40, 64, 192), (1, 1, 1, 2, 3))


def operands(batch: int, height: int, width: int, inputs: int, features: int) -> tuple[Array, Array]:
    """(x, gradient of a loss by the output), white noise."""
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (batch, height, width, inputs)), jax.random.normal(keys[1], (batch, height, width, features))


def written_out(x_BxHxWxC: np.ndarray, g_BxHxWxD: np.ndarray) -> np.ndarray:
    """The gradient by the kernel in float64, a product for each of its nine places."""
    x_BxHxWxC, g_BxHxWxD = x_BxHxWxC.astype(np.float64), g_BxHxWxD.astype(np.float64)
    height, width = x_BxHxWxC.shape[1:3]
    padded_BxHxWxC = np.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.array(
        [
            [np.einsum("bhwc,bhwd->cd", padded_BxHxWxC[:, i : i + height, j : j + width], g_BxHxWxD) for j in range(3)]
            for i in range(3)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradient_by_blocks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "BLOCK_BYTES", 60_000)  # several blocks of small arrays
    x_BxHxWxC, g_BxHxWxD = operands(*shape)
    wanted_3x3xCxD = written_out(np.asarray(x_BxHxWxC), np.asarray(g_BxHxWxD))
    largest = np.abs(wanted_3x3xCxD).max()
    rounding = (
        2.0**-24 * np.sqrt(np.prod(shape[:3])) * largest
    )  # as many additions, each of which may round by 2^-24 of the sum so far
    for found in (convolution.by_blocks, convolution.weight_gradient):  # with several devices the second is XLA's
        np.testing.assert_allclose(found(x_BxHxWxC, g_BxHxWxD), wanted_3x3xCxD, atol=rounding, rtol=0)
    rounded = convolution.by_blocks(x_BxHxWxC.astype(jnp.bfloat16), g_BxHxWxD.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        rounded.astype(np.float32), wanted_3x3xCxD, atol=3 * 2.0**-9 * largest, rtol=0
    )  # two operands and the result


@pytest.mark.parametrize("devices", [1, 8])
def test_convolution_and_its_derivatives(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x_BxHxWxC, _ = operands(2, 6, 5, 3, 4)
    kernel_3x3xCxD = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    check_grads(convolution.convolve, (x_BxHxWxC, kernel_3x3xCxD), order=1, modes=["rev"])
    plain = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    ours = convolution.Conv3x3(3, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(ours(x_BxHxWxC), plain(x_BxHxWxC))


def test_one_cpu_device_takes_blocks_and_several_take_what_can_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BxHxWxC, g_BxHxWxD = operands(2, 16, 16, 4, 8)

    def program(devices: int) -> tuple[str, float]:
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        traced = jax.jit(lambda *arrays: convolution.weight_gradient(*arrays)).trace(x_BxHxWxC, g_BxHxWxD)
        return traced.lower(lowering_platforms=("cpu",)).as_text(), cost.operations(traced).total

    (blocks, counted), (whole, wanted) = program(1), program(2)
    assert "convolution" not in blocks and blocks.count("dot_general") == 3
    assert whole.count("stablehlo.convolution") == 1
    assert counted == wanted == 2 * 9 * 2 * 16 * 16 * 4 * 8
