"""niso.geometry.latlong: functions on the sphere's grid at other points, under rotations and Möbius maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso.geometry import latlong, moebius

H, W, C = 12, 24, 3


def signal(height: int = H, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, 2 * height, C)).astype(np.float32)


def turn(axis: str, angle: float, batch: int = 2) -> jax.Array:
    c, s = np.cos(angle), np.sin(angle)
    matrix = {"z": [[c, -s, 0], [s, c, 0], [0, 0, 1]], "x": [[1, 0, 0], [0, c, -s], [0, s, c]]}[axis]
    return moebius.rotation(jnp.broadcast_to(jnp.array(matrix, jnp.float32), (batch, 3, 3)))


def smooth(point: np.ndarray) -> np.ndarray:
    """A polynomial of degree 2 on the sphere, in three channels."""
    x, y, z = np.moveaxis(point, -1, 0)
    return np.stack([x + y * z, z * z - x, 1 + x * y], axis=-1)


@pytest.mark.parametrize("angle", [0.0, 2 * np.pi, -4 * np.pi])
def test_a_full_turn_is_the_identity(angle: float) -> None:
    """To float32's knowledge of a place, 1e-6 of a turn: 1e-5 columns, and neighbours here differ by 4."""
    np.testing.assert_allclose(latlong.pull_back(signal(), turn("z", angle), H, W), signal(), atol=1e-4)


@pytest.mark.parametrize("steps", [1, -1, 5, 12, 23])
def test_a_turn_by_grid_steps_moves_the_columns(steps: int) -> None:
    """And by no more than rounding, also across the seam: what was at longitude φ is then at φ + angle."""
    moved = latlong.pull_back(signal(), turn("z", 2 * np.pi * steps / W), H, W)
    np.testing.assert_allclose(moved, np.roll(signal(), steps, axis=2), atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_turn_moves_the_columns_of_a_coarser_grid_too(factor: int) -> None:
    fine = signal(factor * H)
    still = latlong.pull_back(fine, turn("z", 0.0), H, W)
    np.testing.assert_allclose(latlong.pull_back(fine, turn("z", 2 * np.pi / W), H, W), np.roll(still, 1, axis=2), atol=1e-4)
    if factor == 3:  # every third point of the finer grid is one of the coarser
        np.testing.assert_allclose(still, fine[:, 1::3, ::3], atol=1e-4)


def test_half_a_turn_about_a_horizontal_axis_turns_the_grid_over() -> None:
    """Over both poles: rows in reverse, longitude −φ."""
    moved = latlong.pull_back(signal(), turn("x", np.pi), H, W)
    np.testing.assert_allclose(moved, np.roll(signal()[:, ::-1, ::-1], 1, axis=2), atol=1e-4)


def test_values_go_on_across_poles_and_seam() -> None:
    """Along circles through a pole, and across the seam, no jump: between neighbours at most the slope times the distance."""
    one = signal(batch=1)
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False) + np.pi / 20_000  # at a pole itself the meridian counts
    for circle in (
        np.stack([np.sin(angle), 0 * angle, np.cos(angle)], axis=1),
        np.stack([np.sin(angle) * np.cos(1.0), np.sin(angle) * np.sin(1.0), np.cos(angle)], axis=1),
        np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1),
    ):
        found = np.asarray(latlong.sample(one, circle[None].astype(np.float32)))[0]
        # Neighbouring numbers differ by at most 8 or so; rows and columns are 2π/24 apart.
        assert np.abs(np.diff(found, axis=0)).max() < 3 * np.ptp(one) * W / 20_000
    beside = np.array([[1e-4, 0, 1], [-1e-4, 0, 1]], np.float32)  # a pole's value on a meridian: the mean of its two ends
    expected = (one[0, 0, 0] + one[0, 0, W // 2]) / 2
    np.testing.assert_allclose(latlong.sample(one, beside[None])[0], np.stack([expected] * 2), atol=1e-2)


def test_smooth_functions_move_as_they_should() -> None:
    """f(Λ⁻¹ x) of a polynomial, under maps that stretch lengths up to 4 times: the error is half the square of the grid's step."""
    height = 96
    fine = np.broadcast_to(smooth(latlong.points(height, 2 * height)).reshape(1, height, 2 * height, C), (3, height, 2 * height, C))
    matrix = moebius.random(jax.random.key(0), 3, 0.6)
    found = latlong.pull_back(jnp.asarray(fine, jnp.float32), matrix, H, W)
    grid = np.broadcast_to(latlong.points(H, W), (3, H * W, 3))
    expected = smooth(np.asarray(moebius.apply(moebius.inverse(matrix), grid))).reshape(3, H, W, C)
    step = np.pi / height
    np.testing.assert_allclose(found, expected, atol=2 * step**2)


def test_whole_numbers_and_odd_grids() -> None:
    level = np.random.default_rng(0).integers(0, 65536, (1, H, W, C), np.uint16)
    np.testing.assert_array_equal(
        latlong.sample(level, latlong.points(H, W)[None]), latlong.sample(level.astype(np.float32), latlong.points(H, W)[None])
    )
    with pytest.raises(ValueError, match="an even number"):
        latlong.sample(np.zeros((1, 3, 5, 1)), np.zeros((1, 1, 3)))
