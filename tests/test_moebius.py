"""Möbius maps of the sphere: group laws, angles, cross-ratios and the law of the random ones, against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from niso.geometry import moebius, sphere

ETA = np.diag([1.0, -1, -1, -1])
SHIFT = 0.7

apply, random = jax.jit(moebius.apply), jax.jit(moebius.random, static_argnums=(1, 2))


def maps(batch: int, seed: int = 0, shift: float = SHIFT) -> jax.Array:
    return random(jax.random.key(seed), batch, shift)


def points(batch: int, count: int, seed: int = 0) -> np.ndarray:
    """Uniform on the sphere, B x N x 3, float32."""
    normal = np.random.default_rng(seed).normal(size=(batch, count, 3))
    return (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)


def centres(matrix: jax.Array) -> np.ndarray:
    """c, B x 3, of rotations after centred inversions, whose first row is the inversion's."""
    row = np.asarray(matrix, np.float64)[:, 0]
    return row[:, 1:] / (1 + row[:, :1])


def inversion64(c: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The published formula; c of shape (3,), s of (N, 3)."""
    return (1 - c @ c) * (s + c) / np.sum((s + c) ** 2, axis=-1, keepdims=True) + c


def stereographic(s: np.ndarray) -> np.ndarray:
    """Complex numbers; from the south pole, seen from outside, so that maps which keep orientation are fractions of z."""
    s = np.asarray(s, np.float64)
    return (s[..., 0] + 1j * s[..., 1]) / (1 + s[..., 2])


# float32 knows a place to 1e-7/(1 − |c|)²; at 0 the map is the identity.
@pytest.mark.parametrize("length", [0.0, 0.1, 0.5, 0.9])
def test_centred_inversions_are_the_published_ones(length: float) -> None:
    c, s = length * points(5, 1, seed=1)[:, 0], points(5, 2000)
    s[:, 0] = np.where(length, -c / max(length, 1e-9), s[:, 0])  # the worst place
    found = apply(moebius.centred_inversion(jnp.asarray(c)), s)
    expected = np.stack([inversion64(one.astype(np.float64), s64.astype(np.float64)) for one, s64 in zip(c, s, strict=True)])
    assert found.dtype == jnp.float32 and found.shape == s.shape
    assert np.abs(found - expected).max() < 3e-7 / (1 - length) ** 2


def test_rotations_rotate() -> None:
    r, s = sphere.random_rotation(jax.random.key(1), 4), points(4, 50)
    expected = np.einsum("bij,bnj->bni", np.asarray(r, np.float64), s)
    np.testing.assert_allclose(apply(moebius.rotation(r), s), expected, atol=1e-6)


def test_matrices_are_lorentz() -> None:
    matrix = np.asarray(maps(500), np.float64)
    assert matrix.shape == (500, 4, 4) and matrix[:, 0, 0].min() >= 1
    kept = np.swapaxes(matrix, 1, 2) @ ETA @ matrix
    size = matrix[:, 0, 0].max() ** 2  # of the products: up to (1 + 0.49)²/(1 − 0.49)² = 8.5
    # Entries are off by up to four roundings, products of two by eight, and sums of four of these, partly cancelling, by sixteen.
    np.testing.assert_allclose(kept, np.broadcast_to(ETA, kept.shape), atol=16 * 2**-24 * size)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=1e-5)


def test_group_laws() -> None:
    a, b, c, s = maps(200, 1), maps(200, 2), maps(200, 3), points(200, 20)
    compose, inverse = moebius.compose, moebius.inverse
    scale = 3**3  # Λ₀₀ up to 2.9 each
    np.testing.assert_allclose(compose(compose(a, b), c), compose(a, compose(b, c)), atol=1e-6 * scale)
    for product in (compose(a, inverse(a)), compose(inverse(a), a)):
        np.testing.assert_allclose(product, np.broadcast_to(np.eye(4), product.shape), atol=1e-6 * 9)
    np.testing.assert_array_equal(inverse(inverse(a)), a)
    np.testing.assert_allclose(inverse(compose(a, b)), compose(inverse(b), inverse(a)), atol=1e-6 * 9)
    np.testing.assert_allclose(apply(compose(b, a), s), apply(b, apply(a, s)), atol=5e-5)
    assert np.abs(apply(compose(a, b), s) - apply(b, apply(a, s))).max() > 0.1  # the test sees the order
    np.testing.assert_allclose(apply(inverse(a), apply(a, s)), s, atol=5e-5)
    np.testing.assert_allclose(apply(jnp.broadcast_to(jnp.eye(4), (200, 4, 4)), s), s, atol=1e-7)


def test_a_centred_inversion_is_undone_by_the_opposite() -> None:
    c = 0.6 * jnp.asarray(points(50, 1)[:, 0])
    np.testing.assert_array_equal(moebius.centred_inversion(-c), moebius.inverse(moebius.centred_inversion(c)))


def test_points_stay_on_the_sphere() -> None:
    s, many = points(1, 2000), maps(1, shift=0.9)
    for seed in range(20):
        many = moebius.compose(maps(1, seed, shift=0.9), many)
    for matrix in (maps(1, shift=0.99), many):
        np.testing.assert_allclose(np.linalg.norm(np.asarray(apply(matrix, s), np.float64), axis=-1), 1, atol=3e-7)


def test_conformal_and_orientation_kept() -> None:
    """The derivative is a multiple of a rotation on tangents, by (1 − |c|²)/|s + c|²."""
    matrix, s = maps(100, seed=4), points(100, 1, seed=2)
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda s, m: moebius.apply(m[None], s[None, None])[0, 0])))
    jacobian = np.asarray(derivative(s[:, 0], matrix), np.float64)
    moved, c = np.asarray(apply(matrix, s), np.float64)[:, 0], centres(matrix)
    for one, s_, to, c_ in zip(jacobian, s[:, 0].astype(np.float64), moved, c, strict=True):
        first = np.cross(s_, np.eye(3)[np.abs(s_).argmin()])
        first /= np.linalg.norm(first)
        tangent = np.stack([first, np.cross(s_, first)], axis=1)  # counterclockwise seen from outside
        pushed = one @ tangent
        factor = (1 - c_ @ c_) / np.sum((s_ + c_) ** 2)
        np.testing.assert_allclose(pushed.T @ pushed, factor**2 * np.eye(2), atol=3e-5 * factor**2)
        np.testing.assert_allclose(np.cross(pushed[:, 0], pushed[:, 1]), factor**2 * to, atol=3e-5 * factor**2)


def test_cross_ratios_are_kept() -> None:
    """Complex: their modulus would not see a mirror image. Points at least 0.1 apart, or rounding divides by little."""
    s = points(300, 4, seed=5)
    apart = np.linalg.norm(s[:, :, None] - s[:, None], axis=-1) + np.eye(4)
    s = s[apart.min(axis=(1, 2)) > 0.1]

    def ratio(s: np.ndarray) -> np.ndarray:
        a, b, c, d = np.moveaxis(stereographic(s), 1, 0)
        return (a - c) * (b - d) / ((a - d) * (b - c))

    np.testing.assert_allclose(ratio(np.asarray(apply(maps(len(s), 6), s))), ratio(s), rtol=3e-4)


def test_the_law_of_random_maps() -> None:
    n = 20_000
    matrix = maps(n, seed=7)
    c = centres(matrix)
    length = np.linalg.norm(c, axis=1)
    assert length.max() <= SHIFT * (1 + 1e-5)
    assert scipy.stats.kstest((length / SHIFT) ** 3, "uniform").pvalue > 0.01  # uniform in the ball
    assert abs(length.mean() - 0.75 * SHIFT) < 4 * length.std() / np.sqrt(n)
    assert scipy.stats.kstest(c[:, 2] / length, "uniform", (-1, 2)).pvalue > 0.01  # and in direction
    turn = np.asarray(matrix @ moebius.centred_inversion(jnp.asarray(-c, jnp.float32)))[:, 1:, 1:]
    assert np.abs(turn.mean(axis=0)).max() < 4 / np.sqrt(3 * n) and np.abs(np.linalg.det(turn) - 1).max() < 1e-4
    assert np.abs(np.mean(turn[:, 2:] * c[:, None], axis=0)).max() < 4 * SHIFT / np.sqrt(n)  # independent of c
    back = centres(moebius.inverse(matrix))  # the inverses' law is the same
    assert scipy.stats.kstest(back[:, 0], c[:, 0]).pvalue > 0.01


def test_a_function_of_the_key() -> None:
    np.testing.assert_array_equal(maps(5, seed=8), maps(5, seed=8))
    assert not np.allclose(maps(5, seed=8), maps(5, seed=9))
    np.testing.assert_allclose(maps(5, seed=8), moebius.random(jax.random.key(8), 5, SHIFT), atol=1e-6)


def test_no_shift_is_a_rotation() -> None:
    matrix = np.asarray(maps(10, shift=0.0))
    np.testing.assert_array_equal(matrix[:, 0], np.broadcast_to(np.eye(1, 4), (10, 4)))


@pytest.mark.parametrize("shift", [-0.1, 1.0, float("nan")])
def test_no_such_shift(shift: float) -> None:
    with pytest.raises(ValueError, match="0 <= shift < 1"):
        moebius.random(jax.random.key(0), 2, shift)


def test_everything_is_finite() -> None:
    """Also the derivatives, at padding, at the place that is torn apart most, and without a shift."""
    c = jnp.array([[0.0, 0, 0], [0, 0, 0.999], [0, 0.5, 0]])
    s = np.concatenate([points(3, 5), np.zeros((3, 1, 3), np.float32), np.float32([[[0, 0, -1]]] * 3)], axis=1)

    @jax.jit
    def with_gradients(c: jax.Array, s: jax.Array) -> tuple[jax.Array, ...]:
        found, pull = jax.vjp(lambda c, s: moebius.apply(moebius.centred_inversion(c), s), c, s)
        return found, *pull(jnp.ones_like(found))

    assert all(np.isfinite(one).all() for one in with_gradients(c, s))
    assert np.isfinite(jax.jit(jax.grad(lambda shift: moebius.centred_inversion(shift * c).sum()))(0.0))


def test_other_types_and_vmap() -> None:
    matrix, s = maps(4), points(4, 10)
    assert apply(matrix.astype(jnp.bfloat16), jnp.asarray(s, jnp.bfloat16)).dtype == jnp.float32
    assert moebius.centred_inversion(jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.float32
    mapped = jax.jit(jax.vmap(lambda m, s: moebius.apply(m[None], s[None])[0]))(matrix, s)
    np.testing.assert_allclose(mapped, apply(matrix, s), atol=1e-6)
