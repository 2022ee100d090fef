"""Möbius maps of the unit sphere: its conformal maps that keep orientation, as Lorentz matrices; jax, float32.

A point s of the sphere is the light-like vector (1, s). The matrices Λ, 4 x 4, that keep x₀² − x₁² − x₂² − x₃² and have Λ₀₀ > 0
and determinant 1 take such vectors to each other, and every Möbius map is one of them: s goes to the direction of the last three
components of Λ (1, s). The identity is the identity matrix, the inverse η Λᵀ η with η = diag(1, −1, −1, −1), and first A, then B
is B A. There is no pole, as there is with stereographic projection and 2 x 2 complex matrices.

Every Λ is one pure Lorentz boost, then one rotation. A boost is what Baden, Crane and Kazhdan (Möbius registration, SGP 2018)
call a centred inversion, s ↦ (1 − |c|²)(s + c)/|s + c|² + c with |c| < 1: it moves the sphere towards c/|c|. Lengths there are
multiplied by (1 − |c|)/(1 + |c|), and by the inverse of it at −c/|c|, where float32 thus knows a place to 1e-7/(1 − |c|)²: 1e-5
for |c| = 0.9. Products of many matrices drift off the group by rounding: the points' lengths do not, but their places do.
"""

import jax
import jax.numpy as jnp
from jax import Array

from niso.geometry import sphere

_METRIC_4 = (1.0, -1.0, -1.0, -1.0)


def centred_inversion(c_Bx3: Array) -> Array:
    """The boosts s ↦ (1 − |c|²)(s + c)/|s + c|² + c, B x 4 x 4, float32: 0 is the identity, −c the inverse. |c| < 1 is not checked.

    With |s| = 1 the fraction's denominator is 1 + |c|² + 2 c·s and its numerator, c added, (1 − |c|²) s + 2 (1 + c·s) c: both are
    linear in (1, s).
    """
    c_Bx3 = c_Bx3.astype(jnp.float32)
    square_B = jnp.sum(c_Bx3 * c_Bx3, axis=-1)
    scale_B = 2 / (1 - square_B)
    first_Bx4 = jnp.concatenate([(scale_B - 1)[:, None], scale_B[:, None] * c_Bx3], axis=-1)
    outer_Bx3x3 = scale_B[:, None, None] * (c_Bx3[:, :, None] * c_Bx3[:, None, :])  # symmetric to the last bit
    return _blocks(first_Bx4, jnp.eye(3, dtype=jnp.float32) + outer_Bx3x3)


def rotation(rotation_Bx3x3: Array) -> Array:
    """The rotations s ↦ R s, B x 4 x 4, float32."""
    rotation_Bx3x3 = rotation_Bx3x3.astype(jnp.float32)
    first_Bx4 = jnp.broadcast_to(jnp.eye(1, 4, dtype=jnp.float32), (rotation_Bx3x3.shape[0], 4))
    return _blocks(first_Bx4, rotation_Bx3x3)


def compose(second_Bx4x4: Array, first_Bx4x4: Array) -> Array:
    """First `first`, then `second`: the product of their matrices, B x 4 x 4, in float32 on every backend."""
    return jnp.einsum("bij,bjk->bik", second_Bx4x4, first_Bx4x4, precision="highest")


def inverse(matrix_Bx4x4: Array) -> Array:
    """The inverse maps, η Λᵀ η, B x 4 x 4: signs only, exact."""
    metric_4 = jnp.asarray(_METRIC_4, matrix_Bx4x4.dtype)
    return metric_4[:, None] * jnp.swapaxes(matrix_Bx4x4, -1, -2) * metric_4


def apply(matrix_Bx4x4: Array, point_BxNx3: Array) -> Array:
    """The points moved, B x N x 3, float32, of length 1 to rounding; to pull functions back, f ∘ Λ⁻¹, move the grid by the inverse.

    The direction of the last three components, not their quotient by the first, which would leave the sphere by the rounding of
    a large Λ. Points that are no unit vectors mean nothing; zeros, as padding, give finite points and derivatives too.
    """
    matrix_Bx4x4, point_BxNx3 = matrix_Bx4x4.astype(jnp.float32), point_BxNx3.astype(jnp.float32)
    column_Bx1x3x4 = matrix_Bx4x4[:, None, 1:]  # three products written out: as a matrix product four times slower on a CPU
    moved_BxNx3 = column_Bx1x3x4[..., 0] + sum(column_Bx1x3x4[..., 1 + axis] * point_BxNx3[..., axis, None] for axis in range(3))
    square_BxNx1 = jnp.sum(moved_BxNx3 * moved_BxNx3, axis=-1, keepdims=True)
    return moved_BxNx3 * jax.lax.rsqrt(jnp.where(square_BxNx1 > 0, square_BxNx1, 1.0))


def random(key: Array, batch: int, shift: float) -> Array:
    """Random maps, B x 4 x 4, float32, a function of the key: a centred inversion by c, uniform in the ball |c| <= `shift`, then a
    rotation, uniform on SO(3).

    The published augmentation bounds |c| and then rotates; that c is uniform in the ball is niso's choice: no direction and no
    part of the ball is preferred, and the mean of |c| is 3/4 `shift`. The law does not change if a rotation is put before or
    after it, nor if every map is replaced by its inverse. `shift` 0: rotations alone.

    Raises:
      ValueError: `shift` is not in [0, 1).
    """
    if not 0 <= shift < 1:
        raise ValueError(
            f"a shift of {shift} for random Möbius maps: |c| is the length of a point inside the sphere, take 0 <= shift < 1"
        )
    shift_key, turn_key = jax.random.split(key)
    # The first three coordinates of a uniform point on the sphere in 5 dimensions are uniform in the ball (Archimedes).
    normal_Bx5 = jax.random.normal(shift_key, (batch, 5), jnp.float32)
    c_Bx3 = shift * normal_Bx5[:, :3] / jnp.linalg.norm(normal_Bx5, axis=-1, keepdims=True)
    return compose(rotation(sphere.random_rotation(turn_key, batch)), centred_inversion(c_Bx3))


def _blocks(first_Bx4: Array, spatial_Bx3x3: Array) -> Array:
    """The matrices with this first row and column and this rest."""
    rest_Bx3x4 = jnp.concatenate([first_Bx4[:, 1:, None], spatial_Bx3x3], axis=-1)
    return jnp.concatenate([first_Bx4[:, None], rest_Bx3x4], axis=1)
