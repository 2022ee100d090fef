"""Rotations from six numbers: orthonormal and differentiable wherever a network may land; angles exact where they are small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso.geometry import se3, trajectory

RANDOM = np.random.default_rng(0)
ONE, OTHER = RANDOM.normal(size=(2, 3)).astype(np.float32)
PERPENDICULAR = np.cross(ONE, OTHER).astype(np.float32)
DEGENERATE = {
    "zeros": np.zeros(6), "first_zero": [0, 0, 0, *OTHER], "second_zero": [*ONE, 0, 0, 0], "equal": [*ONE, *ONE],
    "opposite": [*ONE, *-ONE], "parallel": [*ONE, *(3.7 * ONE)], "x_axis": [0, 0, 0, 2, 0, 0],
    "tiny_both": [*(1e-20 * ONE), *(1e-20 * OTHER)],
    "subnormal": [1e-40, 0, 0, 0, 1e-40, 0], "tiny_first": [*(1e-9 * ONE), *OTHER], "tiny_second": [*ONE, *(1e-9 * OTHER)],
    "huge": [*(1e37 * ONE), *(1e37 * OTHER)], "small": [*(1e-11 * ONE), *(1e-11 * OTHER)],
    **{f"nearly_parallel_{e}": [*ONE, *(ONE + e * PERPENDICULAR)] for e in (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-6, 1e-7)},
}  # fmt: skip


def gram_schmidt64(six: np.ndarray) -> np.ndarray:
    first, second = six[..., :3].astype(np.float64), six[..., 3:].astype(np.float64)
    first = first / np.linalg.norm(first, axis=-1, keepdims=True)
    second = second - (second * first).sum(-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def off_rotation(r: np.ndarray) -> float:
    r = np.asarray(r, np.float64)
    return max(np.abs(np.swapaxes(r, -1, -2) @ r - np.eye(3)).max(), np.abs(np.linalg.det(r) - 1).max())


def test_rotations_are_gram_schmidts() -> None:
    six = RANDOM.normal(size=(5, 40, 6)).astype(np.float32)
    found = np.asarray(se3.rotation_from_vectors(jnp.asarray(six)))
    assert found.shape == (5, 40, 3, 3) and found.dtype == np.float32 and off_rotation(found) < 2e-6
    np.testing.assert_allclose(found, gram_schmidt64(six), atol=2e-5)  # rounding over the smallest angle among 200
    for scale in (1e-3, 1e6):
        np.testing.assert_allclose(se3.rotation_from_vectors(jnp.asarray(scale * six)), found, atol=2e-5)
    identity = se3.rotation_from_vectors(jnp.array([1.0, 0, 0, 0, 1, 0]))
    np.testing.assert_array_equal(identity, np.eye(3))


def test_gradient_against_finite_differences() -> None:
    six, cotangent = RANDOM.normal(size=6), RANDOM.normal(size=(3, 3))
    gradient = jax.grad(lambda x: jnp.vdot(se3.rotation_from_vectors(x), cotangent.astype(np.float32)))(six.astype(np.float32))
    steps = 1e-6 * np.eye(6)
    expected = [np.vdot(gram_schmidt64(six + h) - gram_schmidt64(six - h), cotangent) / 2e-6 for h in steps]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_numbers_are_rotations_with_a_finite_gradient(name: str) -> None:
    six = jnp.asarray(DEGENERATE[name], jnp.float32)
    cotangent = jnp.asarray(RANDOM.normal(size=(3, 3)), jnp.float32)
    rotation, pull = jax.vjp(se3.rotation_from_vectors, six)
    (gradient,) = pull(cotangent)
    assert off_rotation(rotation) < 2e-6
    assert np.isfinite(gradient).all() and np.isfinite(np.sum(np.square(gradient)))  # in float32: the optimiser squares it
    if name in ("zeros", "subnormal"):
        np.testing.assert_array_equal(rotation, np.eye(3))
        np.testing.assert_array_equal(gradient, 0)


def test_nearly_parallel_vectors_still_decide() -> None:
    """Down to an angle of 3e-4 the rotation is the one that float64 finds from the same numbers, to rounding over the angle."""
    for angle in (1e-2, 1e-3, 3e-4):
        six = np.asarray(DEGENERATE[f"nearly_parallel_{angle}"], np.float32)
        np.testing.assert_allclose(se3.rotation_from_vectors(jnp.asarray(six)), gram_schmidt64(six), atol=5e-7 / angle)


def test_what_is_not_finite_shows() -> None:
    for n in range(6):
        assert np.isnan(se3.rotation_from_vectors(jnp.ones(6).at[n].set(jnp.nan))).any()


def test_poses() -> None:
    nine = RANDOM.normal(size=(2, 4, 9)).astype(np.float32)
    rotation, translation = se3.pose_from_numbers(jnp.asarray(nine))
    np.testing.assert_array_equal(rotation, se3.rotation_from_vectors(jnp.asarray(nine[..., :6])))
    np.testing.assert_array_equal(translation, nine[..., 6:])
    matrix = np.asarray(se3.pose_matrix(rotation, translation))
    assert matrix.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(matrix[..., :3, :3], rotation)
    np.testing.assert_array_equal(matrix[..., :3, 3], translation)
    np.testing.assert_array_equal(matrix[..., 3, :], np.broadcast_to([0, 0, 0, 1], (2, 4, 4)))


def turn(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_angles_between_rotations() -> None:
    for degrees in (0.0, 1e-4, 1e-2, 1.0, 90.0, 179.9, 180.0):
        found = se3.rotation_distance(jnp.asarray(turn(20), jnp.float32), jnp.asarray(turn(20 + degrees), jnp.float32))
        assert float(found) == pytest.approx(degrees, rel=1e-4, abs=1e-5)  # 20 degrees in float32 are known to 3e-6
    six = RANDOM.normal(size=(2, 50, 6))
    a, b = gram_schmidt64(six)
    expected = trajectory.rotation_angle(np.swapaxes(a, 1, 2) @ b)
    np.testing.assert_allclose(se3.rotation_distance(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), expected, atol=1e-3)


def test_angles_between_vectors() -> None:
    x, y = jnp.array([1.0, 0, 0]), jnp.array([0, 2.0, 0])
    for a, b, degrees in ((x, 3 * x, 0), (x, y, 90), (x, -y, 90), (x, -5 * x, 180), (2 * x, 2 * x + y, 45)):
        assert float(se3.direction_distance(a, b)) == pytest.approx(degrees, abs=1e-4)
    assert float(se3.direction_distance(1e-10 * x, -1e10 * x)) == pytest.approx(180)
    for a, b in ((0 * x, x), (x, 0 * x), (0 * x, 0 * x)):
        assert float(se3.direction_distance(a, b)) == 90
