"""Homographies: exponentials against SciPy in float64, warps against a slow twin, and the conventions that data depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from niso.geometry import homography

warp, exponential = jax.jit(homography.warp), jax.jit(homography.exponential)  # operation by operation they compile for minutes
UNITS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def matrix64(coefficient: np.ndarray) -> np.ndarray:
    """Σ c_i B_i of 8 numbers, written from the published order."""
    x = np.zeros((3, 3))
    for value, (i, j) in zip(np.asarray(coefficient, np.float64), UNITS, strict=True):
        x[i, j] += value
        if i == j:
            x -= value / 3 * np.eye(3)
    return x


def exponential64(coefficient: np.ndarray) -> np.ndarray:
    return np.stack([scipy.linalg.expm(matrix64(one)) for one in coefficient])


def sample64(image: np.ndarray, row: float, column: float) -> np.ndarray:
    """The pixels (C) around a place in pixels, weighted; those that are not there count as zero."""
    total = np.zeros(image.shape[2])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def warp64(images: np.ndarray, homographies: np.ndarray) -> np.ndarray:
    """Pixel by pixel, with an inverse and a division: what `warp` must return."""
    images, result = np.asarray(images, np.float64), np.zeros(images.shape)
    height, width = images.shape[1:3]
    for b, h in enumerate(np.asarray(homographies, np.float64)):
        inverse = np.linalg.inv(h)
        for r, y in enumerate(np.linspace(-1, 1, height)):
            for c, x in enumerate(np.linspace(-1, 1, width)):
                first, second, third = inverse @ (y, x, 1)
                if third > 0:
                    row, column = (first / third + 1) / 2 * (height - 1), (second / third + 1) / 2 * (width - 1)
                    result[b, r, c] = sample64(images[b], row, column)
    return result


def draws(batch: int, seed: int = 0, factor: float = 1.0) -> jax.Array:
    return factor * homography.random_coefficients(jax.random.key(seed), batch)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def blobs(size: int) -> np.ndarray:
    """A smooth image, 1 x size x size x 1, of at most 1, that vanishes towards the border; features of about a fifth of it."""
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    total = sum(
        a * np.exp(-((y - p) ** 2 + (x - q) ** 2) / 0.04) for a, p, q in [(1, -0.2, 0.1), (0.7, 0.25, 0.3), (0.5, 0.1, -0.3)]
    )
    return total[None, ..., None].astype(np.float32)


@jax.jit
def with_gradients(image: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The warped image, and the derivatives of its sum."""
    found, pull = jax.vjp(homography.warp, image, h)
    return found, *pull(jnp.ones_like(found))


def translation(down: float, right: float) -> jax.Array:
    """The homography 1 x 3 x 3 that moves points by so much along coordinates 1 and 2, as an exponential."""
    return exponential(jnp.array([[0, 0, down, 0, 0, right, 0, 0]]))


def test_basis_is_the_published_one() -> None:
    assert homography.BASIS_8x3x3.dtype == np.float32
    np.testing.assert_allclose(homography.BASIS_8x3x3, [matrix64(one) for one in np.eye(8)], atol=1e-7)
    np.testing.assert_array_equal(np.trace(homography.BASIS_8x3x3, axis1=1, axis2=2), 0)
    assert homography.SCALES_8 == (0.15, 0.35, 0.17, 0.35, 0.15, 0.17, 0.15, 0.15)


# Twice is a triplet's T²; 4 reaches row sums of 6. Rounding is 6e-8; they come out at 2e-7 to 3e-7.
@pytest.mark.parametrize("factor", [0.01, 1, 2, 4])
def test_exponential_is_scipys(factor: float) -> None:
    coefficient = draws(500, factor=factor)
    found, expected = np.asarray(exponential(coefficient)), exponential64(np.asarray(coefficient))
    assert found.dtype == np.float32 and found.shape == (500, 3, 3)
    assert np.max(np.abs(found - expected).max((1, 2)) / np.abs(expected).max((1, 2))) < 1e-6


def test_determinant_is_one() -> None:
    determinant = np.linalg.det(np.asarray(exponential(draws(500)), np.float64))
    np.testing.assert_allclose(determinant, 1, atol=1e-6)


def test_exponentials_of_commuting_elements_add() -> None:
    c = draws(200)
    product = np.asarray(exponential(0.3 * c), np.float64) @ np.asarray(exponential(0.7 * c), np.float64)
    np.testing.assert_allclose(product, exponential(c), atol=3e-6)
    inverse = np.linalg.inv(np.asarray(exponential(c), np.float64))
    np.testing.assert_allclose(inverse, exponential(-c), atol=3e-6)
    np.testing.assert_array_equal(exponential(jnp.zeros((2, 8))), np.broadcast_to(np.eye(3), (2, 3, 3)))


def test_powers() -> None:
    c = draws(200)
    h = exponential(c)
    for exponent in (0, 1, 2, 3):
        expected = np.linalg.matrix_power(np.asarray(h, np.float64), exponent)
        np.testing.assert_allclose(homography.power(h, exponent), expected, rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(exponential(exponent * c), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(homography.power(h, 1), h)
    with pytest.raises(ValueError, match="negative coefficients"):
        homography.power(h, -1)


@pytest.mark.parametrize(("law", "factor"), [("train", 1.0), ("test", 1 / math.sqrt(2))])
def test_laws(law: str, factor: float) -> None:
    """Standard deviations to 4 of their standard errors, 1/√(2n)."""
    n, key = 20_000, jax.random.key(3)
    found = np.asarray(homography.random_coefficients(key, n, law))
    assert found.shape == (n, 8) and found.dtype == np.float32
    deviation = factor * np.array(homography.SCALES_8)
    np.testing.assert_allclose(found.std(axis=0), deviation, rtol=4 / math.sqrt(2 * n))
    assert np.all(np.abs(found.mean(axis=0)) < 4 * deviation / math.sqrt(n))
    assert np.abs(np.corrcoef(found.T) - np.eye(8)).max() < 5 / math.sqrt(n)
    np.testing.assert_array_equal(homography.random_coefficients(key, n, law), found)
    assert not np.array_equal(homography.random_coefficients(jax.random.key(4), n, law), found)


def test_no_such_law() -> None:
    with pytest.raises(ValueError, match=r"'trian'.*train, test"):
        homography.random_coefficients(jax.random.key(0), 2, "trian")


@pytest.mark.parametrize("shape", [(40, 40), (7, 12), (2, 3), (13, 144)])
@pytest.mark.parametrize("multiple", [1.0, 3.0, 1e-15])
def test_the_identity_changes_nothing(shape: tuple[int, int], multiple: float) -> None:
    image = images(3, *shape, 2)
    h = jnp.full((3, 1, 1), multiple) * jnp.eye(3)
    np.testing.assert_array_equal(warp(image, h), image)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_an_image_without_coordinates(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 x 2"):
        warp(jnp.zeros((1, *shape, 1)), jnp.eye(3)[None])


@pytest.mark.parametrize(("down", "right"), [(3, 0), (0, 2), (-1, 4), (-4, -9), (8, 0)])
def test_translations_by_whole_pixels_shift(down: int, right: int) -> None:
    """Content moves down by positive numbers of coordinate 1, to the right by those of coordinate 2; zeros move in."""
    height, width = 9, 14
    image, expected = images(1, height, width, 2), np.zeros((1, height, width, 2), np.float32)
    to_rows, from_rows = (slice(max(s * down, 0), height + min(s * down, 0)) for s in (1, -1))
    to_columns, from_columns = (slice(max(s * right, 0), width + min(s * right, 0)) for s in (1, -1))
    expected[:, to_rows, to_columns] = image[:, from_rows, from_columns]
    found = warp(image, translation(2 * down / (height - 1), 2 * right / (width - 1)))
    np.testing.assert_allclose(found, expected, atol=5e-6)  # 14 pixels times rounding


# Differences between neighbours of noise are up to 1 per pixel, and a place in pixels is known to rounding times H/2: 1e-6 for 40.
@pytest.mark.parametrize(("height", "width", "factor"), [(40, 40, 1), (40, 40, 2), (11, 24, 1), (2, 5, 1)])
def test_warp_is_its_twin(height: int, width: int, factor: float) -> None:
    image, h = images(6, height, width, 2), exponential(draws(6, seed=1, factor=factor))
    found = warp(image, h)
    assert found.dtype == jnp.float32 and found.shape == image.shape
    np.testing.assert_allclose(found, warp64(image, np.asarray(h)), atol=1e-5)


def test_warps_compose() -> None:
    """By A, then by B, is by B A. One interpolation errs by pixel²/8 times second derivatives of 50 along each axis: 0.002."""
    size = 160  # pixels of 2/159
    a, b = exponential(draws(4, seed=2, factor=0.5)), exponential(draws(4, seed=3, factor=0.5))
    image = np.repeat(blobs(size), 4, axis=0)
    twice = warp(warp(image, a), b)
    product = jnp.einsum("bij,bjk->bik", b, a, precision="highest")
    assert np.abs(twice - warp(image, product)).max() < 0.005
    wrong = jnp.einsum("bij,bjk->bik", a, b, precision="highest")
    assert np.abs(twice - warp(image, wrong)).max() > 0.05  # the test sees the order
    again = warp(warp(image, a), a)
    assert np.abs(again - warp(image, homography.power(a, 2))).max() < 0.005


def test_behind_the_horizon_is_zero() -> None:
    """Third component 1 − 2y of the preimage: zero at the horizon y = 0.5, where it meets infinity, negative beyond."""
    h = np.linalg.inv(np.array([[[1, 0, 0], [0, 1, 0], [-2, 0, 1.0]]])).astype(np.float32)
    image = np.ones((1, 41, 41, 1), np.float32)
    found, *gradients = with_gradients(image, h)
    y = np.linspace(-1, 1, 41)
    assert np.all(np.asarray(found)[0, y >= 0.5] == 0)
    np.testing.assert_allclose(found, warp64(image, h), atol=1e-5)
    assert np.asarray(found).max() == 1 and all(np.isfinite(one).all() for one in gradients)
    beyond = np.diag([1.0, 1.0, -1.0])[None].astype(np.float32)
    np.testing.assert_array_equal(warp(image, beyond), 0)  # without a horizon: the image, turned by half


@pytest.mark.parametrize("name", ["zero", "rank_1", "rank_2", "huge", "tiny", "strong"])
def test_whatever_is_finite_stays_finite(name: str) -> None:
    one = np.asarray(exponential(draws(1))[0])
    h = {
        "zero": np.zeros((3, 3)), "rank_1": np.ones((3, 3)), "rank_2": np.diag([1.0, 1, 0]),
        "huge": 1e30 * one, "tiny": 1e-30 * one, "strong": np.asarray(exponential(draws(1, factor=8))[0]),
    }[name][None].astype(np.float32)  # fmt: skip
    image = images(1, 9, 8, 2)
    found, in_image, in_h = with_gradients(image, h)
    assert np.isfinite(found).all() and np.isfinite(in_image).all() and np.isfinite(in_h).all()
    if name in ("zero", "rank_1"):
        np.testing.assert_array_equal(found, 0)
    if name in ("huge", "tiny"):
        np.testing.assert_allclose(found, warp(image, one[None]), atol=1e-5)


def test_nan_shows() -> None:
    h = jnp.eye(3)[None].at[0, 0, 1].set(jnp.nan)
    assert np.isnan(warp(images(1, 5, 5, 1), h)).any()


def test_images_of_other_types() -> None:
    h = exponential(draws(2))
    bytes_BxHxWxC = (255 * images(2, 8, 8, 1)).astype(np.uint8)
    found = warp(jnp.asarray(bytes_BxHxWxC), h)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, warp(bytes_BxHxWxC.astype(np.float32), h))
    assert warp(jnp.ones((2, 8, 8, 1), jnp.bfloat16), h.astype(jnp.bfloat16)).dtype == jnp.float32
    assert exponential(draws(2).astype(jnp.bfloat16)).dtype == jnp.float32


def test_jit_vmap_and_derivatives() -> None:
    image, c = images(3, 2, 10, 12, 1), jnp.stack([draws(2, seed) for seed in range(3)])

    def warped(image: jax.Array, c: jax.Array) -> jax.Array:
        return warp(image, exponential(c))

    together = jax.jit(jax.vmap(warped))(image, c)
    np.testing.assert_allclose(together, np.stack([warped(i, k) for i, k in zip(image, c, strict=True)]), atol=1e-5)
    gradients = jax.jit(jax.grad(lambda i, k: jnp.sum(jax.vmap(warped)(i, k) ** 2), argnums=(0, 1)))
    for point in (c, jnp.zeros_like(c)):  # at the identity every pixel is on a kink of the interpolant
        assert all(np.isfinite(one).all() for one in gradients(image, point))


def test_derivative_in_the_coefficients_against_the_twin() -> None:
    """Differences of the float64 twin; steps of 1e-7, so that no pixel of these crosses a kink."""
    image, c, cotangent = blobs(16), np.asarray(draws(1, seed=5)), images(1, 16, 16, 1, seed=1)
    found = jax.grad(lambda c: jnp.vdot(warp(image, exponential(c)), cotangent))(c)

    def value64(c: np.ndarray) -> float:
        return float(np.vdot(warp64(image, exponential64(c)), cotangent))

    expected = [[(value64(c + step) - value64(c - step)) / 2e-7 for step in 1e-7 * np.eye(8)]]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
