"""Rotations and rigid motions from a network's numbers, and the angles between them; jax, float32, any leading axes.

A rotation is two 3-vectors made orthonormal by Gram-Schmidt (Zhou et al., On the Continuity of Rotation Representations
in Neural Networks, CVPR 2019): unlike angles and quaternions it has no jumps that a network would have to learn.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Below this share of the largest of the numbers a vector (or what is left of the second one) has no direction. float32 still
# knows it to 1e-3 there; the derivative is at most 1e4 over the largest number.
DEGENERATE = 1e-4
ZERO = 1e-12  # numbers that are all smaller count as zero: their derivative, up to 1e16, can still be squared in float32


def rotation_from_vectors(six: Array) -> Array:
    """The rotation (..., 3, 3) whose first two columns are the vectors six[:3], six[3:] (..., 6) made orthonormal.

    (1, 0, 0, 0, 1, 0) is the identity. A rotation to rounding for any finite numbers, with a finite derivative: a vector without
    a direction (zero, or the second one parallel to the first, both relative to the largest number) is replaced by a
    coordinate axis and gets no gradient. NaN stays NaN.
    """
    # Its scale does not change the rotation, so it is a constant of the derivative; without it squares would underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(six), axis=-1, keepdims=True))
    six = jnp.where(largest < ZERO, 0.0, six) / jnp.where(largest < ZERO, 1.0, largest)
    x_axis = jnp.zeros_like(six[..., :3]).at[..., 0].set(1.0)
    first = _unit(six[..., :3], x_axis)
    away = jax.nn.one_hot(jnp.argmin(jnp.abs(first), axis=-1), 3, dtype=six.dtype)  # the axis least parallel to the first
    second = _unit(_reject(six[..., 3:], first), _reject(away, first))
    second = _unit(_reject(second, first), x_axis)  # nearly parallel vectors cancel: once more, or they are not orthogonal
    return jnp.stack([first, second, jnp.cross(first, second)], axis=-1)


def pose_from_numbers(nine: Array) -> tuple[Array, Array]:
    """(rotation (..., 3, 3), translation (..., 3)) from (..., 9): six numbers for `rotation_from_vectors`, three as they are."""
    return rotation_from_vectors(nine[..., :6]), nine[..., 6:]


def pose_matrix(rotation: Array, translation: Array) -> Array:
    """The rigid motion (..., 4, 4) [R | t; 0 | 1] of (..., 3, 3) and (..., 3)."""
    upper = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    lower = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], upper.dtype), (*upper.shape[:-2], 1, 4))
    return jnp.concatenate([upper, lower], axis=-2)


def rotation_distance(a: Array, b: Array) -> Array:
    """The angle (...) of aᵀ b for rotations (..., 3, 3), degrees in [0, 180].

    By atan2: arccos of the trace would lose everything below 0.02 degrees in float32. A measure, not a loss: its derivative is
    not defined at 0.
    """
    r = jnp.einsum("...ji,...jk->...ik", a, b, precision="highest")
    twice_sine = jnp.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], axis=-1)
    return jnp.degrees(jnp.arctan2(jnp.linalg.norm(twice_sine, axis=-1), jnp.trace(r, axis1=-2, axis2=-1) - 1.0))


def direction_distance(a: Array, b: Array) -> Array:
    """The angle (...) between vectors (..., 3), degrees in [0, 180]; 90, a guess's mean, where one of them is zero."""
    a, b = (v / jnp.maximum(jnp.max(jnp.abs(v), axis=-1, keepdims=True), ZERO) for v in (a, b))
    angle = jnp.degrees(jnp.arctan2(jnp.linalg.norm(jnp.cross(a, b), axis=-1), jnp.sum(a * b, axis=-1)))
    return jnp.where(jnp.any(a != 0, axis=-1) & jnp.any(b != 0, axis=-1), angle, 90.0)


def _reject(vector: Array, unit: Array) -> Array:
    """What is left of the vector perpendicular to a unit vector."""
    return vector - jnp.sum(vector * unit, axis=-1, keepdims=True) * unit


def _unit(vector: Array, instead: Array) -> Array:
    """The vector at unit length; `instead` at unit length where it is degenerate."""
    degenerate = jnp.max(jnp.abs(vector), axis=-1, keepdims=True) < DEGENERATE
    chosen = jnp.where(degenerate, instead, vector)  # chosen before the root, whose derivative at zero is not finite
    return chosen / jnp.linalg.norm(chosen, axis=-1, keepdims=True)
