"""Homographies of the image plane: sl(3) coefficients, their exponentials, and warped images; jax, float32.

Coordinates. Pixel (r, c) of an H x W image is the point (2r/(H−1) − 1, 2c/(W−1) − 1): coordinate 1 runs along the rows, coordinate
2 along the columns, both in [−1, 1] with the centres of the border pixels at ±1. A homography is a 3 x 3 matrix on (coordinate 1,
coordinate 2, 1), the same for every size of image; those made here have determinant 1.

Direction. The warped image at p is the image at H⁻¹p: content moves the way H moves points, and warping by A, then by B is
warping by B A. It is how homNIST (MacDonald, Ramasinghe and Lucey, Enabling Equivariance for Arbitrary Lie Groups, CVPR 2022) was
made, whose coefficient law is the one of Neural Isometries' Homography MNIST with a smaller deviation: "test" and "train" here.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from niso import rng

# E11 − I/3, E12, E13, E21, E22 − I/3, E23, E31, E32: stretches, shears and turns, and in the third column translations, in the
# third row perspective.
_UNITS_8x3x3 = np.eye(9)[:8].reshape(8, 3, 3)
BASIS_8x3x3 = (_UNITS_8x3x3 - np.trace(_UNITS_8x3x3, axis1=1, axis2=2)[:, None, None] * np.eye(3) / 3).astype(np.float32)
BASIS_8x3x3.flags.writeable = False

SCALES_8 = (0.15, 0.35, 0.17, 0.35, 0.15, 0.17, 0.15, 0.15)
LAWS = {"train": 1.0, "test": math.sqrt(0.5)}  # times SCALES_8: the coefficients' standard deviations

# exp(X) = exp(X/2⁴)^(2⁴), and the inner one by 8 terms: truncated at 5e-9 for matrices X with row sums up to 8. Of 20,000 draws
# of "train" the largest is 1.8, and 3.9 with the coefficients doubled.
_SQUARINGS, _TERMS = 4, 8


def random_coefficients(key: Array, batch: int, law: str = "train") -> Array:
    """Coefficients on `BASIS_8x3x3`, B x 8, float32: independent, normal, mean 0, standard deviation `SCALES_8` times `LAWS[law]`.

    "train" is the law of the published training code, "test" that of the homNIST test set, s/√2.

    Raises:
      ValueError: there is no such law.
    """
    if law not in LAWS:
        raise ValueError(f"no law of homographies is called {law!r}: take one of {', '.join(LAWS)}")
    scale_8 = np.asarray(SCALES_8, np.float32) * np.float32(LAWS[law])
    return jax.random.normal(key, (batch, len(SCALES_8)), jnp.float32) * jnp.asarray(scale_8)


def held_out_coefficients(item_B: Array, copy_B: Array, seed: int) -> Array:
    """Coefficients of the regenerated homNIST test set, B x 8: each a function of (image, copy, seed) and of nothing else."""
    return jax.vmap(lambda key: random_coefficients(key, 1, "test")[0])(rng.held_out(seed, "homnist", item_B, copy_B))


@functools.partial(jax.jit, static_argnames=("copies", "seed"))
def held_out_copies(image_HxWxC: ArrayLike, item: ArrayLike, *, copies: int, seed: int) -> Array:
    """Copies 0 .. copies − 1 of one image of the regenerated test set, copies x H x W x C, float32: it must be padded already."""
    coefficient_Bx8 = held_out_coefficients(jnp.full(copies, item, jnp.int32), jnp.arange(copies, dtype=jnp.int32), seed)
    image_BxHxWxC = jnp.broadcast_to(jnp.asarray(image_HxWxC), (copies, *jnp.shape(image_HxWxC)))
    return warp(image_BxHxWxC, exponential(coefficient_Bx8))


def exponential(coefficient_Bx8: Array) -> Array:
    """exp(Σ c_i B_i), B x 3 x 3, float32, determinant 1: coefficients 0 are the identity, −c the inverse, n c the n-th power.

    The relative error is below 1e-6 while the row sums |Σ c_i B_i| stay below 8, and grows with them beyond. A fixed number of
    terms and squarings: the same instructions for every example, with `vmap` and with any gradient, where the library's expm
    computes every one of its branches and solves a system. What is squared is exp − I (D becomes 2D + D²), whose rounding is
    relative to D and so does not double with each squaring: six times closer than squaring the exponential itself.
    """
    coefficient_Bx8 = coefficient_Bx8.astype(jnp.float32)
    x_Bx3x3 = jnp.einsum("bn,nij->bij", coefficient_Bx8, BASIS_8x3x3, precision="highest") / 2**_SQUARINGS
    identity_3x3 = jnp.eye(3, dtype=jnp.float32)
    series_Bx3x3 = identity_3x3 + x_Bx3x3 / _TERMS
    for term in range(_TERMS - 1, 1, -1):  # Horner: I + X/2 (I + X/3 (I + ...))
        series_Bx3x3 = identity_3x3 + _product(x_Bx3x3, series_Bx3x3) / term
    excess_Bx3x3 = _product(x_Bx3x3, series_Bx3x3)
    for _ in range(_SQUARINGS):
        excess_Bx3x3 = 2 * excess_Bx3x3 + _product(excess_Bx3x3, excess_Bx3x3)
    return identity_3x3 + excess_Bx3x3


def power(homography_Bx3x3: Array, exponent: int) -> Array:
    """H^exponent, B x 3 x 3, exponent >= 0. T²ψ of a triplet is the image warped by `power(H, 2)` once: warping the warped image
    would interpolate twice, and would have lost what left the image on the way.

    Raises:
      ValueError: the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"power {exponent} of a homography: take the exponential of the negative coefficients for its inverse")
    result_Bx3x3 = jnp.broadcast_to(jnp.eye(3, dtype=homography_Bx3x3.dtype), homography_Bx3x3.shape)
    for _ in range(exponent):
        result_Bx3x3 = _product(homography_Bx3x3, result_Bx3x3)
    return result_Bx3x3


def warp(image_BxHxWxC: Array, homography_Bx3x3: Array) -> Array:
    """The image at H⁻¹p for every pixel p, B x H x W x C, float32, bilinear; the image goes on as zeros outside.

    The identity, or any positive multiple of it, gives the image back bit for bit; only H up to a positive factor matters. A
    point whose preimage has a third component <= 0 lies behind the horizon and is zero, as is everything if H is singular.
    Finite, with a finite derivative in both arguments, for whatever is finite; a NaN in H shows.

    Outside, the border pixels fade to zero over one pixel, so that nothing jumps where rounding decides. Published code cuts off
    at the border pixels' centres instead, and has no horizon. Padded digits, whose border is zero, cannot tell the first; and in
    20,000 draws of "train", of "test" and of squares of "train", nothing behind the horizon came to lie in the image either.

    One gather of four neighbours: on a CPU at least as fast as products with H and W weights per pixel, nine times faster in the
    derivative, and its memory does not grow with H + W.

    Raises:
      ValueError: the image is less than two pixels high or wide: it has no coordinates.
    """
    batch, height, width, channels = image_BxHxWxC.shape
    if min(height, width) < 2:
        raise ValueError(f"a {height} x {width} image has no coordinates from −1 to 1: give at least 2 x 2 pixels")
    row_BxHxW, column_BxHxW = _preimage(homography_Bx3x3.astype(jnp.float32), height, width)
    top_BxHxW, left_BxHxW = jnp.floor(row_BxHxW), jnp.floor(column_BxHxW)
    down_BxHxW, right_BxHxW = row_BxHxW - top_BxHxW, column_BxHxW - left_BxHxW
    up_BxHxW, back_BxHxW = 1 - down_BxHxW, 1 - right_BxHxW
    weights = [up_BxHxW * back_BxHxW, up_BxHxW * right_BxHxW, down_BxHxW * back_BxHxW, down_BxHxW * right_BxHxW]
    # A frame of zeros, so that the neighbours are always there: floor(row) is −1 .. H − 1, or by rounding H.
    framed_BxHxWxC = jnp.pad(image_BxHxWxC.astype(jnp.float32), ((0, 0), (1, 2), (1, 2), (0, 0)))
    stride = width + 3
    corner_BxHxW = (top_BxHxW.astype(jnp.int32) + 1) * stride + left_BxHxW.astype(jnp.int32) + 1
    place_BxPx1 = (corner_BxHxW[..., None] + np.array([0, 1, stride, stride + 1], np.int32)).reshape(batch, -1, 1)
    value_BxPxC = jnp.take_along_axis(framed_BxHxWxC.reshape(batch, -1, channels), place_BxPx1, axis=1, mode="clip")
    value_BxHxWx4xC = value_BxPxC.reshape(batch, height, width, 4, channels)
    return jnp.sum(jnp.stack(weights, axis=-1)[..., None] * value_BxHxWx4xC, axis=3)


def _product(a_Bx3x3: Array, b_Bx3x3: Array) -> Array:
    """The matrix products a b, in float32 on every backend (a GPU's default would keep 10 bits)."""
    return jnp.einsum("bij,bjk->bik", a_Bx3x3, b_Bx3x3, precision="highest")


def _adjugate(h_Bx3x3: Array) -> Array:
    """H⁻¹ up to a positive factor, of the order of 1: the adjugate with the sign of the determinant; zero where H is singular.

    Nothing is divided by a determinant, so that no H makes a NaN and multiples of the identity stay that. H's size is a constant
    of the derivative: what is made of the result does not depend on it.
    """
    largest_Bx1x1 = jax.lax.stop_gradient(jnp.max(jnp.abs(h_Bx3x3), axis=(1, 2), keepdims=True))
    h_Bx3x3 = h_Bx3x3 / jnp.where(largest_Bx1x1 == 0, 1.0, largest_Bx1x1)
    first, second, third = h_Bx3x3[:, 0], h_Bx3x3[:, 1], h_Bx3x3[:, 2]
    adjugate_Bx3x3 = jnp.stack([jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)], axis=-1)
    determinant_B = jnp.sum(first * adjugate_Bx3x3[:, :, 0], axis=-1)
    return jnp.sign(determinant_B)[:, None, None] * adjugate_Bx3x3


def _preimage(h_Bx3x3: Array, height: int, width: int) -> tuple[Array, Array]:
    """Row and column, B x H x W, in pixels, of H⁻¹p for every pixel p; −1 where that is a pixel or more outside the image.

    As displacements, which are exactly zero where H does nothing. Points that are far outside, at infinity or behind the horizon
    are told by products, and replaced before the division, or its derivative would not be finite.
    """
    y_Hx1 = (2 * np.arange(height) / (height - 1) - 1).astype(np.float32)[:, None]
    x_W = (2 * np.arange(width) / (width - 1) - 1).astype(np.float32)
    inverse_3x3xBx1x1 = jnp.transpose(_adjugate(h_Bx3x3), (1, 2, 0))[..., None, None]
    a_BxHxW, b_BxHxW, depth_BxHxW = (row[0] * y_Hx1 + row[1] * x_W + row[2] for row in inverse_3x3xBx1x1)
    beyond_row_BxHxW = jnp.abs(a_BxHxW) >= (1 + 2 / (height - 1)) * depth_BxHxW  # never true of NaN, which so stays
    beyond_BxHxW = beyond_row_BxHxW | (jnp.abs(b_BxHxW) >= (1 + 2 / (width - 1)) * depth_BxHxW)
    depth_BxHxW = jnp.where(beyond_BxHxW, 1.0, depth_BxHxW)
    down_BxHxW = (a_BxHxW - y_Hx1 * depth_BxHxW) / depth_BxHxW
    right_BxHxW = (b_BxHxW - x_W * depth_BxHxW) / depth_BxHxW
    row_BxHxW = np.arange(height, dtype=np.float32)[:, None] + (height - 1) / 2 * down_BxHxW
    column_BxHxW = np.arange(width, dtype=np.float32) + (width - 1) / 2 * right_BxHxW
    return jnp.where(beyond_BxHxW, -1.0, row_BxHxW), jnp.where(beyond_BxHxW, -1.0, column_BxHxW)
