"""The polar factor against NumPy float64: its targets, its derivative, at every size and however degenerate the matrices."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso.geometry import matmul_polar
from niso.geometry.polar import METHODS, polar_factor
from tests import isometric_products, reference_solve
from tests.benchmarks import gradient as gradient_benchmark

EXPLICIT = METHODS[1:]
KINDS = ("white", "power", "repeated", "deficient", "rank one", "zero", "off the diagonal")


def matrices(kind: str, size: int, batch: int = 3, seed: int = 0) -> np.ndarray:
    """Float32 test matrices: batch x size x size."""
    random = np.random.default_rng(seed)
    white = random.normal(size=(batch, size, size))
    u, _, vt = np.linalg.svd(white)
    if kind == "off the diagonal":  # null spaces along the axes, nowhere near each other: the identity cannot complete them
        corner = np.zeros_like(white)
        corner[:, : size // 2, size - size // 2 :] = white[:, : size // 2, : size // 2]
        return corner.astype(np.float32)
    values = {
        "white": np.linalg.svd(white)[1][0],
        "power": np.logspace(0, -4, size),
        "repeated": np.repeat([2.0, 1.0], [size // 2, size - size // 2]),
        "deficient": np.where(np.arange(size) < size // 2, 1.0, 0.0),
        "rank one": np.where(np.arange(size) < 1, 1.0, 0.0),
        "zero": np.zeros(size),
    }[kind]
    return np.asarray((u * values) @ vt, np.float32)


def twin(x: np.ndarray, special: bool = False) -> np.ndarray:
    """The polar factor in float64."""
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    if special:
        u[..., -1] *= np.linalg.det(u @ vt)[..., None]
    return u @ vt


def twin_gradient(x: np.ndarray, cotangent: np.ndarray, special: bool = False) -> np.ndarray:
    """The undamped derivative in float64, applied to a cotangent."""
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    if special:
        sign = np.linalg.det(u @ vt)
        u[..., -1] *= sign[..., None]
        s[..., -1] *= sign
    right = cotangent.astype(np.float64) @ vt.swapaxes(-1, -2)
    w = u.swapaxes(-1, -2) @ right
    inner = (w - w.swapaxes(-1, -2)) / (s[..., :, None] + s[..., None, :] + np.eye(s.shape[-1]))
    return (u @ inner + (right - u @ w) / s[..., None, :]) @ vt


def gradient(x: np.ndarray, cotangent: np.ndarray, **options: object) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(lambda y: jnp.vdot(polar_factor(y, **options), cotangent)))(x))


def check_targets(x: np.ndarray, q: np.ndarray, special: bool) -> None:
    """NUMERICS.md: orthogonality 5e-6, determinant, objective gap 1e-6, distance 1e-3 where the factor is determined."""
    x, q = x.astype(np.float64), q.astype(np.float64)
    assert np.abs(q.swapaxes(-1, -2) @ q - np.eye(x.shape[-1])).max() <= 5e-6
    best, s = twin(x, special), np.linalg.svd(x)[1]
    if special:
        np.testing.assert_allclose(np.linalg.det(q), 1.0, atol=1e-4)  # of a float32 orthogonal matrix with 500 rows
    gap = np.einsum("bij,bij->b", best - q, x) / np.maximum(s.sum(-1), 1e-30)
    assert np.all(np.abs(gap) <= 1e-6)
    # In SO(k) the flipped direction is determined by how far the two smallest singular values are apart.
    flipped = special & (np.linalg.det(x) < 0)
    margin = np.where(flipped, s[..., -2] - s[..., -1], s[..., -1]) / np.maximum(s[..., 0], 1e-30)
    determined = margin > (1e-4 if special else 1e-5)
    assert np.abs(q - best)[determined].max(initial=0.0) <= 1e-3


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("size", [2, 3, 33])
def test_targets(size: int, method: str, special: bool) -> None:
    x = np.concatenate([matrices(kind, size) for kind in KINDS])
    q = jax.jit(lambda x: polar_factor(x, method=method, special=special))(x)
    for index, kind in enumerate(KINDS):
        part = slice(3 * index, 3 * index + 3)
        # SO(k) is not determined where the smallest singular value repeats; check_targets sees that by its margin.
        check_targets(x[part], np.asarray(q)[part], special), kind


def test_targets_of_the_batched_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process with one CPU device runs: here there are eight, which get one matrix at a time."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    x = np.concatenate([matrices(kind, 33, 1) for kind in KINDS])
    q = jax.jit(lambda x: polar_factor(x, method="svd"), device=jax.devices()[0])(x)
    check_targets(x, np.asarray(q), False)
    program = jax.jit(lambda x: polar_factor(x, method="svd")).trace(x).lower().as_text()
    assert "stablehlo.while" not in program  # not one by one


@pytest.mark.slow
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("size", [8, 70, 128, 257, 512])
def test_targets_of_large_matrices(size: int, method: str, special: bool) -> None:
    for kind in KINDS:
        x = matrices(kind, size, 2)
        check_targets(x, np.asarray(polar_factor(x, method=method, special=special)), special)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("method", EXPLICIT)
def test_targets_on_products_of_a_training_run(method: str, special: bool) -> None:
    """X = P_Λ ⊙ b aᵀ at steps 0, 100 and 1000 of pose_encode:small, and at initialisation of the paper's size, k = 128."""
    for name, x in isometric_products.read().items():
        q = np.asarray(jax.jit(lambda x: polar_factor(x, method=method, special=special))(x))
        check_targets(x, q, special), name


@pytest.mark.parametrize("method", EXPLICIT)
def test_gradient_on_products_of_a_training_run(method: str) -> None:
    tested = 0
    for x in isometric_products.read().values():
        chosen = x[np.linalg.cond(x.astype(np.float64)) <= 1e4]
        if len(chosen):
            cotangent = np.random.default_rng(5).normal(size=chosen.shape).astype(np.float32)
            exact, found = twin_gradient(chosen, cotangent), gradient(chosen, cotangent, method=method)
            assert np.all(np.linalg.norm(found - exact, axis=(1, 2)) <= 1e-3 * np.linalg.norm(exact, axis=(1, 2)))
            tested += len(chosen)
    assert tested >= 3


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_and_no_batch(method: str) -> None:
    for batch in (0, 1):
        empty = np.zeros((batch, 4, 4), np.float32)
        assert jax.jit(lambda x: polar_factor(x, method=method))(empty).shape == (batch, 4, 4)
        assert gradient(empty, empty, method=method).shape == (batch, 4, 4)
    x = matrices("white", 5)
    np.testing.assert_allclose(polar_factor(x[0], method=method), polar_factor(x, method=method)[0], atol=1e-6)
    nested = polar_factor(x.reshape(3, 1, 5, 5), method=method)
    np.testing.assert_allclose(nested[:, 0], polar_factor(x, method=method), atol=1e-6)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("size", [9, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 40, 128, 257, 512))])
def test_gradient_against_float64(size: int, method: str, special: bool) -> None:
    """1e-3 for condition numbers to 1e4; in SO(k), where a direction is flipped, s_max over the gap of the two smallest counts."""
    random = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(random.normal(size=(4, size, size)))
    for condition in (10.0, 1e3, 1e4):
        s = np.logspace(0, -np.log10(condition), size)
        if special:
            s[-1] = 0.0 if size == 2 else s[-2] / 3
            s[:-1] = np.maximum(s[:-1], 1 / condition)
            s[-1] = max(s[-1], 0.3 / condition)
        x = ((u * s) @ vt).astype(np.float32)
        cotangent = random.normal(size=x.shape).astype(np.float32)
        exact, found = twin_gradient(x, cotangent, special), gradient(x, cotangent, method=method, special=special)
        assert np.all(np.linalg.norm(found - exact, axis=(1, 2)) <= 1e-3 * np.linalg.norm(exact, axis=(1, 2))), condition
        assert not special or (np.linalg.slogdet(x.astype(np.float64))[0] < 0).any()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("size", [3, 33])
def test_gradient_against_autodiff_in_float64(size: int, special: bool) -> None:
    """jax's own derivative of its SVD, which repeated singular values alone would spoil: here there are none."""
    random = np.random.default_rng(9)
    u, _, vt = np.linalg.svd(random.normal(size=(size, size)))
    u[:, 0] *= -np.linalg.det(u @ vt)  # −1, so that SO(k) flips
    x = ((u * np.logspace(0, -3, size)) @ vt).astype(np.float32)
    cotangent = random.normal(size=x.shape).astype(np.float32)

    def objective(x_KxK: jax.Array) -> jax.Array:
        u_KxK, _, vt_KxK = jnp.linalg.svd(x_KxK, full_matrices=False)
        return jnp.vdot((u_KxK.at[:, -1].multiply(-1.0) if special else u_KxK) @ vt_KxK, cotangent.astype(np.float64))

    with jax.enable_x64(True):
        exact = np.asarray(jax.grad(objective)(x.astype(np.float64)))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(twin_gradient(x, cotangent, special), exact, rtol=1e-6, atol=1e-9 * np.abs(exact).max())
    for method in EXPLICIT:
        found = gradient(x, cotangent, method=method, special=special)
        assert np.linalg.norm(found - exact) <= 1e-3 * np.linalg.norm(exact), method


@pytest.mark.parametrize("method,special,shape", [("svd", False, (6, 6)), ("matmul", True, (6, 6)), ("matmul", False, (9, 4))])
def test_gradient_against_finite_differences(method: str, special: bool, shape: tuple[int, int]) -> None:
    """The twin's derivative is a formula too: this one is not."""
    random = np.random.default_rng(1)
    x, direction, cotangent = (random.normal(size=shape) for _ in range(3))
    if special and np.linalg.det(x) > 0:
        x[0] *= -1.0  # the flipped case is the interesting one
    step = 1e-6
    numeric = np.vdot(twin(x + step * direction, special) - twin(x - step * direction, special), cotangent) / (2 * step)
    found = gradient(x.astype(np.float32), cotangent.astype(np.float32), method=method, special=special)
    np.testing.assert_allclose(np.vdot(found, direction), numeric, rtol=1e-3)


@pytest.mark.parametrize("method,special,ridge", [(m, s, 0.0) for m in EXPLICIT for s in (False, True)] + [("svd", False, 1e-4)])
def test_gradient_finite_at_degenerate_matrices(method: str, special: bool, ridge: float) -> None:
    x = np.concatenate([matrices(kind, 8) for kind in KINDS])
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    found = gradient(x, cotangent, method=method, special=special, ridge=ridge)
    assert np.all(np.isfinite(found))
    # Where there is nothing, nothing is to be learnt: 1/t would make 1e7 of it.
    zero = found[3 * KINDS.index("zero") :][:3]
    assert special or ridge or np.abs(zero).max() <= 1e-3


@pytest.mark.parametrize("method", EXPLICIT)
def test_gradient_at_repeated_values_is_exact(method: str) -> None:
    # At X = Q the derivative is dQ = Q skew(QᵀdX): in closed form, where the derivative of an SVD would divide by zero.
    q = twin(matrices("white", 6, 1)[0]).astype(np.float32)
    cotangent = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    inner = q.T @ cotangent
    np.testing.assert_allclose(gradient(q, cotangent, method=method), q @ (inner - inner.T) / 2, atol=1e-5)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("special", [False, True])
def test_scale(method: str, special: bool) -> None:
    """polar(cX) = polar(X) and gradients scale by 1/c, for c from 1e-8 to 1e8."""
    x = np.concatenate([matrices("white", 8), matrices("repeated", 8) if not special else matrices("white", 8, seed=7)])
    power = matrices("power", 8)
    cotangent = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    solve = jax.jit(lambda x: polar_factor(x, method=method, special=special))
    differentiate = jax.jit(jax.grad(lambda x: jnp.vdot(polar_factor(x, method=method, special=special), cotangent)))
    q, slope = solve(x), np.asarray(differentiate(x))
    size = np.linalg.norm(slope, axis=(1, 2))
    for scale in (1e-8, 1e-3, 1e3, 1e8):
        scaled = np.float32(scale) * x
        np.testing.assert_allclose(solve(scaled), q, atol=2e-5)
        found = np.asarray(differentiate(scaled)) * scale
        assert np.all(np.linalg.norm(found - slope, axis=(1, 2)) <= 1e-3 * size)
        check_targets(scale * power, np.asarray(polar_factor(np.float32(scale) * power, method=method)), False)


@pytest.mark.parametrize("method", EXPLICIT)
def test_scale_of_degenerate_matrices(method: str) -> None:
    # Singular values that vanish are rounding noise, other noise at another scale: only the size is compared there.
    x = matrices("deficient", 8)
    cotangent = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    size = [np.linalg.norm(gradient(np.float32(c) * x, cotangent, method=method) * c) for c in (1.0, 1e-8, 1e8)]
    assert 0.01 < size[1] / size[0] < 100 and 0.01 < size[2] / size[0] < 100


@pytest.mark.parametrize("method", EXPLICIT)
def test_ridge_falls_back_to_the_identity_where_there_is_no_signal(method: str) -> None:
    x = np.zeros((1, 6, 6), np.float32)
    faint = x + np.float32(1e-30) * np.eye(6, dtype=np.float32)
    for nothing in (faint, x):
        np.testing.assert_allclose(polar_factor(nothing, ridge=1e-4, method=method)[0], np.eye(6), atol=1e-6)
    deficient = np.zeros((1, 6, 6), np.float32)
    deficient[0, :2, :2] = [[0, -3], [3, 0]]
    q = np.asarray(polar_factor(deficient, ridge=1e-4, method=method)[0])
    np.testing.assert_allclose(q[2:, 2:], np.eye(4), atol=2e-3)  # the completion's noise, 3e-8 of the signal, over the ridge
    np.testing.assert_allclose(q[:2, :2], [[0, -1], [1, 0]], atol=1e-3)  # O(ridge)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("shape", [(144, 16), (64, 16), (20, 16), (17, 16), (9, 1)])
def test_tall(method: str, shape: tuple[int, int]) -> None:
    """Orthonormal columns at any condition number that a Gram matrix can tell from rank deficiency, and the exact derivative."""
    random = np.random.default_rng(6)
    columns = shape[1]
    u, v = np.linalg.qr(random.normal(size=shape))[0], np.linalg.qr(random.normal(size=(columns, columns)))[0]
    cotangent = random.normal(size=shape).astype(np.float32)
    for condition in (2.0, 30.0, 1e3):
        x = ((u * np.logspace(0, -np.log10(condition), columns)) @ v).astype(np.float32)
        q = np.asarray(polar_factor(x, method=method), np.float64)
        assert np.abs(q.T @ q - np.eye(columns)).max() <= 5e-6
        assert np.abs(q - twin(x)).max() <= 1e-3
        exact = twin_gradient(x, cotangent)
        assert np.linalg.norm(gradient(x, cotangent, method=method) - exact) <= 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("special", [False, True])
def test_auto_is_the_svd_here(special: bool) -> None:
    x = matrices("white", 6)
    cotangent = np.ones_like(x)
    for found, expected in (
        (polar_factor(x, special=special), polar_factor(x, method="svd", special=special)),
        (gradient(x, cotangent, special=special), gradient(x, cotangent, method="svd", special=special)),
    ):
        np.testing.assert_array_equal(found, expected)
    one_by_one = jax.vmap(jax.grad(lambda y, c: jnp.vdot(polar_factor(y, special=special), c)))(x, cotangent)
    np.testing.assert_allclose(one_by_one, gradient(x, cotangent, special=special), atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("special,allowed", [(False, set()), (True, {"potrf", "getrf", "LuDecomposition", "lu_pivots"})])
def test_auto_is_matrix_products_on_accelerators(platform: str, special: bool, allowed: set[str]) -> None:
    """The program lowered for them, without one: no SVD, no host callback, no loop with a test, every product in full float32."""
    x = jnp.zeros((8, 16, 16), jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(lambda y: jnp.sum(polar_factor(y, special=special))))
    text = program.trace(x).lower(lowering_platforms=(platform,)).as_text()
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert all(any(name in call for name in allowed) for call in calls), calls
    assert "stablehlo.while" not in text and "eigh" not in text.lower() and "svd" not in re.sub(r"@\w+", "", text).lower()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    forward = 3 * len(matmul_polar.schedule(matmul_polar.LOWEST)) + 4
    backward = 7 * len(matmul_polar.schedule(1e-7)) + 10
    assert forward + backward - 2 <= len(products) <= forward + backward + 30 + 10 * special
    assert all("precision = [HIGHEST, HIGHEST]" in line and "xf32>" in line for line in products)


def test_schedule_reaches_one() -> None:
    for lowest in (1e-1, 1e-3, 1e-7, matmul_polar.LOWEST):
        x = np.logspace(np.log10(lowest), 0, 20_001)
        for a, b, c in matmul_polar.schedule(lowest):
            x = a * x + b * x**3 + c * x**5
            assert x.min() > 0 and x.max() < 2.5
        assert np.abs(x - 1).max() <= 1e-3
    # The dip that the cushion limits: no singular value above it ever falls below a fiftieth of 1.
    x = np.linspace(0.05, 1, 2001)
    for a, b, c in matmul_polar.schedule(matmul_polar.LOWEST):
        x = a * x + b * x**3 + c * x**5
        assert x.min() > 0.02


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="rows"):
        polar_factor(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="square"):
        polar_factor(jnp.zeros((3, 2)), special=True)
    with pytest.raises(ValueError, match="choose one of auto, svd, matmul"):
        polar_factor(jnp.zeros((2, 2)), method="qr")


def test_products_file_is_what_the_docstring_says() -> None:
    products = isometric_products.read()
    assert {name: x.shape for name, x in products.items()} == {
        "step_0": (4, 32, 32), "step_100": (4, 32, 32), "step_1000": (4, 32, 32), "paper_step_0": (2, 128, 128),
    }  # fmt: skip
    assert Path(isometric_products.FILE).stat().st_size < 400_000


def test_the_reference_derivative_is_another_one_on_real_products() -> None:
    """The oracle that tests/benchmarks/gradient.py trains with: exact where X is well conditioned, and on the products of a
    training run wrong by an amount that depends on their scale."""
    random = np.random.default_rng(8)

    def error(x: np.ndarray) -> float:
        cotangent = random.normal(size=x.shape).astype(np.float32)
        found = jax.jit(jax.grad(lambda y: jnp.vdot(reference_solve.polar_factor(y), cotangent)))(x)
        exact = twin_gradient(x, cotangent)
        return float((np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))).mean())

    assert error(matrices("white", 9)) < 1e-2
    x = isometric_products.read()["step_0"]
    x = x / np.linalg.norm(x, axis=(1, 2), keepdims=True)
    assert error(100 * x) > 0.05 and error(x) > 0.5


def test_spectral_dropout_keeps_a_lower_part_of_the_spectrum() -> None:
    keep_BxKx1 = np.asarray(gradient_benchmark.spectral_dropout(jax.random.key(0), 4000, 8))
    assert np.all(np.diff(keep_BxKx1[:, :, 0], axis=1) <= 0) and np.all(keep_BxKx1[:, 0] == 1)
    # METHOD.md: half of the examples, from an index that is uniform over 1..7, counted from 0.
    share = keep_BxKx1.mean(axis=(0, 2))
    np.testing.assert_allclose(share, 1 - 0.5 * np.arange(8) / 7, atol=0.04)
