"""The polar factor against NumPy float64, its targets, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso.geometry.polar import polar_factor


def matrices(kind: str, size: int, batch: int = 3, seed: int = 0) -> np.ndarray:
    """Float32 test matrices: batch x size x size."""
    random = np.random.default_rng(seed)
    white = random.normal(size=(batch, size, size))
    u, _, vt = np.linalg.svd(white)
    values = {
        "white": np.linalg.svd(white)[1][0],
        "power": np.logspace(0, -4, size),
        "repeated": np.repeat([2.0, 1.0], [size // 2, size - size // 2]),
        "deficient": np.where(np.arange(size) < size // 2, 1.0, 0.0),
        "zero": np.zeros(size),
    }[kind]
    return np.asarray((u * values) @ vt, np.float32)


def twin(x: np.ndarray, special: bool = False) -> np.ndarray:
    """The polar factor in float64."""
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    if special:
        u[..., -1] *= np.linalg.det(u @ vt)[..., None]
    return u @ vt


@pytest.mark.parametrize("size", [2, 3, 8, 33, 70])
@pytest.mark.parametrize("kind", ["white", "power", "repeated", "deficient", "zero"])
@pytest.mark.parametrize("special", [False, True])
def test_orthogonal_and_optimal(kind: str, size: int, special: bool) -> None:
    x = matrices(kind, size)
    q = np.asarray(polar_factor(x, special=special), np.float64)
    assert np.abs(q.swapaxes(-1, -2) @ q - np.eye(size)).max() <= 5e-6
    if special:
        np.testing.assert_allclose(np.linalg.det(q), 1.0, atol=1e-4)  # det of a float32 orthogonal matrix of 70 rows
    # tr(QᵀX) is the objective: its gap to the float64 optimum, relative to the norm (1e-6: float32's rounding of tr).
    best, found = (np.einsum("bij,bij->b", y, x.astype(np.float64)) for y in (twin(x, special), q))
    assert np.all(np.abs(found - best) <= 1e-6 * np.maximum(np.linalg.norm(x, ord="nuc", axis=(-2, -1)), 1e-30))
    # Where the factor is unique; it is not for deficient matrices, nor in SO(k) where the smallest singular value repeats.
    if kind == "white" or (kind == "repeated" and not special):
        assert np.abs(q - twin(x, special)).max() <= 1e-3


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_and_no_batch(batch: int) -> None:
    assert polar_factor(jnp.zeros((batch, 4, 4))).shape == (batch, 4, 4)
    x = matrices("white", 5)
    np.testing.assert_allclose(polar_factor(x[0]), polar_factor(x)[0], atol=1e-6)


@pytest.mark.parametrize("special,shape", [(False, (6, 6)), (True, (6, 6)), (False, (9, 4))])
def test_gradient_against_float64_finite_differences(special: bool, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    x, direction, cotangent = (random.normal(size=shape) for _ in range(3))
    if special and np.linalg.det(x) > 0:
        x[0] *= -1.0  # the flipped case is the interesting one
    gradient = jax.grad(lambda y: jnp.vdot(polar_factor(y, special=special), cotangent))(jnp.asarray(x, jnp.float32))
    step = 1e-6
    numeric = np.vdot(twin(x + step * direction, special) - twin(x - step * direction, special), cotangent) / (2 * step)
    np.testing.assert_allclose(np.vdot(gradient, direction), numeric, rtol=1e-3)


@pytest.mark.parametrize("kind", ["zero", "repeated", "deficient"])
@pytest.mark.parametrize("special", [False, True])
def test_gradient_finite_at_degenerate_matrices(kind: str, special: bool) -> None:
    x = jnp.asarray(matrices(kind, 8))
    cotangent = np.random.default_rng(2).normal(size=x.shape)
    gradient = jax.grad(lambda y: jnp.vdot(polar_factor(y, special=special), cotangent))(x)
    assert np.all(np.isfinite(gradient))


def test_gradient_at_repeated_values_is_exact() -> None:
    # At X = Q the derivative is dQ = Q skew(QᵀdX): in closed form, where the derivative of an SVD would divide by zero.
    q = jnp.asarray(twin(matrices("white", 6, 1)[0]), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=(6, 6)), jnp.float32)
    gradient = jax.grad(lambda y: jnp.vdot(polar_factor(y), cotangent))(q)
    inner = q.T @ cotangent
    np.testing.assert_allclose(gradient, q @ (inner - inner.T) / 2, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("kind", ["white", "power", "deficient"])
def test_scale(kind: str, scale: float) -> None:
    x = jnp.asarray(matrices(kind, 8))
    cotangent = np.random.default_rng(4).normal(size=x.shape)
    gradient = jax.grad(lambda y: jnp.vdot(polar_factor(y), cotangent))
    if kind != "deficient":
        np.testing.assert_allclose(polar_factor(scale * x), polar_factor(x), atol=2e-3 if kind == "power" else 1e-5)
    size = [float(jnp.linalg.norm(g)) for g in (gradient(x), gradient(scale * x) * scale)]
    # Singular values that vanish are rounding noise, other noise at another scale: only the size is compared there.
    assert size[1] == pytest.approx(size[0], rel=1e-2) if kind != "deficient" else 0.01 < size[1] / size[0] < 100


def test_ridge_falls_back_to_the_identity_where_there_is_no_signal() -> None:
    x = np.zeros((1, 6, 6), np.float32)
    np.testing.assert_allclose(polar_factor(x + 1e-30 * np.eye(6, dtype=np.float32), ridge=1e-4)[0], np.eye(6), atol=1e-6)
    deficient = np.zeros((1, 6, 6), np.float32)
    deficient[0, :2, :2] = [[0, -3], [3, 0]]
    q = np.asarray(polar_factor(deficient, ridge=1e-4)[0])
    np.testing.assert_allclose(q[2:, 2:], np.eye(4), atol=1e-5)
    np.testing.assert_allclose(q[:2, :2], [[0, -1], [1, 0]], atol=1e-3)  # O(ridge)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="rows"):
        polar_factor(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="square"):
        polar_factor(jnp.zeros((3, 2)), special=True)
