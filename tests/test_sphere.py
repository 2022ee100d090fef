"""The sphere's transform and rotations against dense float64 harmonics, and the properties that define them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso.geometry import sphere

# height, width, bandwidth: square, wide, the narrowest grid that still resolves its degrees, odd sizes, fewer degrees
GRIDS = [(16, 16, 8), (12, 24, 6), (16, 15, 8), (9, 9, 5), (16, 16, 5), (2, 2, 1)]


def grid_points(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    theta, phi = np.meshgrid(sphere.colatitude(height), sphere.longitude(width), indexing="ij")
    return theta.ravel(), phi.ravel()


def dense(height: int, width: int, bandwidth: int) -> np.ndarray:
    """The N x L harmonics of the grid, float64."""
    return sphere.harmonics(bandwidth, *grid_points(height, width))


def coefficients(batch: int, bandwidth: int, channels: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, bandwidth**2, channels)).astype(np.float32)


def about(axis: str, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array({"y": [[c, 0, s], [0, 1, 0], [-s, 0, c]], "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}[axis])


def rotated64(c: np.ndarray, rotation: np.ndarray, height: int, width: int) -> np.ndarray:
    """Σ c Y(R⁻¹x) on the grid by dense harmonics, float64: what `rotate` must return."""
    bandwidth = math.isqrt(c.shape[1])
    theta, phi = grid_points(height, width)
    x = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    images = []
    for one, r in zip(np.asarray(c, np.float64), np.asarray(rotation, np.float64), strict=True):
        before = np.linalg.inv(r) @ x
        value = sphere.harmonics(bandwidth, np.arctan2(np.hypot(before[0], before[1]), before[2]), np.arctan2(before[1], before[0]))
        images.append((value @ one).reshape(height, width, -1))
    return np.stack(images)


def relative(found: jax.Array, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖, the whole batch."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


# What float32 leaves: eps = 6e-8 in tables and sums, times the root of the number of steps.
ROUNDING = 2e-6
# The angles, at most π, have eps = 1.2e-7, and order m multiplies them by m < 16.
TURN_ROUNDING = 1e-5


@pytest.mark.parametrize("height", [1, 2, 7, 16, 64])
def test_quadrature_integrates_polynomials(height: int) -> None:
    weight, z = sphere.quadrature(height), np.cos(sphere.colatitude(height))
    assert np.all(weight > 0)
    for degree in range(height):
        exact = (1 + (-1) ** degree) / (degree + 1)
        assert abs(weight @ z**degree - exact) < 1e-14


@pytest.mark.parametrize("height", [2, 16, 64])
def test_quadrature_is_driscoll_and_healys(height: int) -> None:
    theta, odd = sphere.colatitude(height), 2 * np.arange(height // 2) + 1
    published = 4 / height * np.sin(theta) * np.sum(np.sin(odd * theta[:, None]) / odd, axis=1)
    np.testing.assert_allclose(sphere.quadrature(height), published, atol=1e-15)


@pytest.mark.parametrize("height,width,bandwidth", [*GRIDS, (64, 64, 32)])
def test_harmonics_are_orthonormal_on_the_grid(height: int, width: int, bandwidth: int) -> None:
    mass, y = sphere.area(height, width), dense(height, width, bandwidth)
    assert mass.shape == (height * width,) and np.all(mass > 0)
    assert abs(mass.sum() - 4 * math.pi) < 1e-12
    np.testing.assert_allclose(y.T @ (mass[:, None] * y), np.eye(bandwidth**2), atol=1e-12)  # float64 sums of 4096 terms


def test_harmonics_in_closed_form() -> None:
    random = np.random.default_rng(1)
    theta, phi = np.arccos(random.uniform(-1, 1, 50)), random.uniform(-4, 9, 50)
    x, y, z = np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)
    found = sphere.harmonics(3, theta, phi)
    first = math.sqrt(3 / (4 * math.pi))
    second = math.sqrt(15 / (4 * math.pi))
    axial, planar = second / math.sqrt(12) * (3 * z * z - 1), second / 2 * (x * x - y * y)
    columns = [0 * z + first / math.sqrt(3), first * y, first * z, first * x]
    columns += [second * x * y, second * y * z, axial, second * x * z, planar]
    np.testing.assert_allclose(found, np.stack(columns, axis=1), atol=1e-14)
    degree, order = sphere.degree_order(3)
    assert degree.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2] and order.tolist() == [0, -1, 0, 1, -2, -1, 0, 1, 2]


def test_harmonics_stay_accurate_at_high_degrees() -> None:
    # Unsöld: the squares of a degree sum to (2l + 1)/4π at every point, poles included.
    theta = np.array([0.0, 1e-9, 1e-3, 0.5, 1.5, math.pi])
    y, degree = sphere.harmonics(128, theta, 3 * theta), np.arange(128)
    total = np.add.reduceat(y**2, degree**2, axis=1)
    np.testing.assert_allclose(total, np.broadcast_to((2 * degree + 1) / (4 * math.pi), total.shape), rtol=1e-12)


@pytest.mark.parametrize("height,width,bandwidth", GRIDS)
def test_transform_is_the_dense_one(height: int, width: int, bandwidth: int) -> None:
    f = np.random.default_rng(2).normal(size=(2, height, width, 3)).astype(np.float32)  # not band-limited
    y, mass = dense(height, width, bandwidth), sphere.area(height, width)
    expected = np.einsum("nl,n,bnc->blc", y, mass, f.reshape(2, -1, 3).astype(np.float64))
    found = sphere.analyse(f, bandwidth)
    assert found.dtype == jnp.float32 and found.shape == (2, bandwidth**2, 3)
    assert relative(found, expected) < ROUNDING
    image = sphere.synthesise(jnp.asarray(expected, jnp.float32), height, width)
    assert image.dtype == jnp.float32
    assert relative(image, np.einsum("nl,blc->bnc", y, expected).reshape(2, height, width, 3)) < ROUNDING


@pytest.mark.parametrize("height,width,bandwidth", [*GRIDS, (64, 64, 32)])
def test_synthesis_and_analysis_are_inverse(height: int, width: int, bandwidth: int) -> None:
    c = coefficients(2, bandwidth)
    f = sphere.synthesise(c, height, width)
    assert relative(sphere.analyse(f, bandwidth), c) < ROUNDING
    assert relative(sphere.synthesise(sphere.analyse(f), height, width), np.asarray(f, np.float64)) < ROUNDING


def test_band_limit_is_a_projection() -> None:
    c = coefficients(2, 8)
    f = sphere.synthesise(c, 16, 16)
    low = np.where(sphere.degree_order(8)[0][:, None] < 3, c, 0.0).astype(np.float32)
    limited = sphere.band_limit(f, 3)
    assert relative(limited, np.asarray(sphere.synthesise(low, 16, 16), np.float64)) < ROUNDING
    assert relative(sphere.band_limit(limited, 3), np.asarray(limited, np.float64)) < ROUNDING


def test_bfloat16_functions_are_accumulated_in_float32() -> None:
    f = jax.random.normal(jax.random.key(0), (1, 8, 8, 2), jnp.bfloat16)
    np.testing.assert_array_equal(sphere.analyse(f), sphere.analyse(f.astype(jnp.float32)))


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="a 16 x 14 grid resolves bandwidths 1 to 7, not 8"):
        sphere.analyse(jnp.zeros((1, 16, 14, 1)), 8)
    with pytest.raises(ValueError, match="a 8 x 16 grid resolves bandwidths 1 to 4, not 5"):
        sphere.synthesise(jnp.zeros((1, 25, 1)), 8, 16)
    with pytest.raises(ValueError, match="24 coefficients"):
        sphere.synthesise(jnp.zeros((1, 24, 1)), 16, 16)


@pytest.mark.parametrize("height,width", [(32, 32), (12, 24), (2, 2)])
def test_rotation_is_evaluation_at_the_inverse(height: int, width: int) -> None:
    c = coefficients(6, sphere.full_bandwidth(height, width))
    rotation = sphere.random_rotation(jax.random.key(1), 6)
    found = sphere.rotate(sphere.synthesise(c, height, width), rotation)
    assert relative(found, rotated64(c, np.asarray(rotation), height, width)) < TURN_ROUNDING


@pytest.mark.parametrize("gamma", [0.0, 1.1, -2.9])
@pytest.mark.parametrize("beta", [0.0, 1e-9, 1e-7, 1e-4, math.pi - 1e-4, math.pi - 1e-7, math.pi])
def test_rotations_that_fix_or_turn_over_the_z_axis(beta: float, gamma: float) -> None:
    c = coefficients(1, 16)
    rotation = (about("z", 0.7) @ about("y", beta) @ about("z", gamma))[None].astype(np.float32)
    found = sphere.rotate(sphere.synthesise(c, 32, 32), jnp.asarray(rotation))
    assert relative(found, rotated64(c, rotation, 32, 32)) < TURN_ROUNDING


def test_right_angles_of_exact_zeros() -> None:
    """The 24 rotations of the cube: every sign of zero that arctan2 can meet."""
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    cube = [np.eye(3)[list(p)] * s for p in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0)) for s in signs]
    rotation = np.stack([r for r in cube if np.linalg.det(r) > 0]).astype(np.float32)
    assert rotation.shape == (24, 3, 3) and np.any(np.signbit(rotation) & (rotation == 0))
    c = coefficients(24, 8)
    found = sphere.rotate(sphere.synthesise(c, 16, 16), jnp.asarray(rotation))
    assert relative(found, rotated64(c, rotation, 16, 16)) < TURN_ROUNDING


def test_identity_and_turns_about_z_along_the_grid() -> None:
    f = sphere.synthesise(coefficients(3, 12, 1), 24, 48)
    step = 2 * math.pi / 48
    rotation = np.stack([np.eye(3), about("z", 5 * step), about("z", -17 * step)]).astype(np.float32)
    found = sphere.rotate(f, jnp.asarray(rotation))
    for one, before, shift in zip(found, f, (0, 5, -17), strict=True):
        assert relative(one, np.roll(np.asarray(before, np.float64), shift, axis=1)) < TURN_ROUNDING
    assert relative(found[0], np.asarray(f[0], np.float64)) < ROUNDING


def test_rotation_operator_is_an_orthogonal_representation_in_blocks() -> None:
    first, second = sphere.random_rotation(jax.random.key(2), 4), sphere.random_rotation(jax.random.key(3), 4)
    d, e, product = (np.asarray(sphere.rotation_operator(r, 8), np.float64) for r in (first, second, first @ second))
    degree = sphere.degree_order(8)[0]
    assert np.all(d[:, degree[:, None] != degree] == 0)
    np.testing.assert_allclose(d @ d.transpose(0, 2, 1), np.broadcast_to(np.eye(64), d.shape), atol=2e-6)
    np.testing.assert_allclose(d @ e, product, atol=TURN_ROUNDING)
    np.testing.assert_allclose(np.linalg.det(d), 1.0, atol=1e-5)
    yzx = np.array([1, 2, 0])  # degree 1 is the vector itself, in the order y, z, x
    np.testing.assert_allclose(d[:, 1:4, 1:4], np.asarray(first)[:, yzx[:, None], yzx], atol=2e-6)
    c = coefficients(4, 8)
    assert relative(sphere.rotate_coefficients(c, first), d @ c) < ROUNDING


def test_rotation_preserves_what_a_rotation_preserves() -> None:
    f, rotation = sphere.synthesise(coefficients(3, 8), 16, 16), sphere.random_rotation(jax.random.key(4), 3)
    mass, turned = sphere.area(16, 16).reshape(16, 16), sphere.rotate(f, rotation)
    for power in (1, 2):
        before, after = (np.einsum("hw,bhwc->bc", mass, np.asarray(g, np.float64) ** power) for g in (f, turned))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)  # sums of 256 float32 numbers of size 1
    back = sphere.rotate(turned, jnp.swapaxes(rotation, 1, 2))
    assert relative(back, np.asarray(f, np.float64)) < TURN_ROUNDING


def test_random_rotations_are_rotations_and_uniform() -> None:
    count = 20_000
    r = np.asarray(sphere.random_rotation(jax.random.key(5), count), np.float64)
    # A few roundings of 1.2e-7 per entry, the largest of 180,000.
    np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(3), r.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(r), 1.0, atol=1e-6)
    # An entry has mean 0, E r² = 1/3, E r⁴ = 1/5; the trace is 1 + 2 cos ω with mean 0 and variance 1. Five standard errors.
    assert np.abs(r.mean(axis=0)).max() < 5 * math.sqrt(1 / 3 / count)
    assert np.abs((r**2).mean(axis=0) - 1 / 3).max() < 5 * math.sqrt((1 / 5 - 1 / 9) / count)
    trace = np.trace(r, axis1=1, axis2=2)
    assert abs(trace.mean()) < 5 / math.sqrt(count) and abs(trace.var() - 1) < 5 * math.sqrt(2 / count)
    again = sphere.random_rotation(jax.random.key(5), count)
    np.testing.assert_array_equal(again, r.astype(np.float32))


def test_under_jit_and_vmap() -> None:
    f, rotation = sphere.synthesise(coefficients(3, 8), 16, 16), sphere.random_rotation(jax.random.key(6), 3)
    expected = np.asarray(sphere.rotate(f, rotation), np.float64)
    assert relative(jax.jit(sphere.rotate)(f, rotation), expected) < ROUNDING
    one_by_one = jax.vmap(lambda g, r: sphere.rotate(g[None], r[None])[0])(f, rotation)
    assert relative(one_by_one, expected) < ROUNDING


@pytest.mark.parametrize("angles", [(0.4, 1.3, -2.0), (0.0, 0.0, 0.0)], ids=["general", "identity"])
def test_gradient_is_the_inverse_rotation(angles: tuple[float, float, float]) -> None:
    """Under the area's inner product the adjoint of a rotation is its inverse, also where Euler's angles are not unique."""
    f, g = (np.asarray(sphere.synthesise(coefficients(1, 8, seed=seed), 16, 16)) for seed in (1, 2))
    mass = sphere.area(16, 16).reshape(1, 16, 16, 1).astype(np.float32)
    rotation = (about("z", angles[0]) @ about("y", angles[1]) @ about("z", angles[2]))[None].astype(np.float32)
    gradient = jax.grad(lambda h: jnp.sum(mass * g * sphere.rotate(h, jnp.asarray(rotation))))(f)
    expected = mass * np.asarray(sphere.rotate(g, jnp.asarray(rotation.transpose(0, 2, 1))), np.float64)
    assert np.all(np.isfinite(gradient))
    assert relative(gradient, expected) < TURN_ROUNDING
