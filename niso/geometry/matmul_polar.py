"""Polar decomposition by matrix products alone, for hardware whose SVD is slow or gathers its batch.

X = Q H with Q's columns orthonormal and H positive semidefinite. Singular values are driven to 1 by a fixed sequence of odd
quintic polynomials, each the best approximation of 1 on the interval where the one before has left them:

    X <- X (a I + b S + c S²),  S = XᵀX

(composite minimax polynomials for the matrix sign: Nakatsukasa and Freund, SIAM Review 58, 2016; quintics in half precision:
Amsel, Persson, Musco, Gower, The Polar Express, 2025). Iteration counts are fixed, so no step asks whether it has converged.

The optimal polynomials dip to almost 0 inside their interval and would leave singular values there to rounding. Each is
therefore made for an interval that ends at a twentieth of its upper end at the least (`CUSHION`), which costs at most one step,
and reaches 1 % beyond it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CUSHION = 0.05
MARGIN = 1.01
# Completion. X has no singular value in directions without signal, or only rounding; noise of half a unit in the last place is
# added, from a fixed key, and the polynomials reach far enough down to make orthonormal directions of it.
NOISE = 3e-8
LOWEST = 1e-12
# Gram matrices of tall matrices: reach of the polynomials in singular values, and the rounding of an entry, which keeps directions
# that rounding has made negative from blowing up.
GRAM_LOWEST = 1e-3
GRAM_SHIFT = 3e-7
SHIFT = 3e-6  # keeps the Cholesky factors of matrices that are semidefinite but for their rounding
GRAM_DAMPING = 1e-4  # least δ of the derivative: what is below had no accurate direction to begin with


@lru_cache
def schedule(lowest: float) -> np.ndarray:
    """Coefficients (a, b, c) of the quintics that take [lowest, 1] to within 1e-3 of 1, float64, steps x 3.

    One exact Newton-Schulz step, x <- x (3 − x²) / 2, brings what they leave to 4e-7.
    """
    steps, lower, upper = [], lowest, 1.0
    while 1.0 - lower > 1e-3 or upper - 1.0 > 1e-3:
        margin = MARGIN if lower < 0.7 else 1.0 + 1e-4  # nearly there: no room for a margin, no need of one
        a, b, c, error = _minimax(max(lower, CUSHION * upper), margin * upper)
        steps.append((a, b, c))
        lower, upper = min(a * lower + b * lower**3 + c * lower**5, 1.0 - error), 1.0 + error
    return np.array(steps)


def _minimax(lower: float, upper: float) -> tuple[float, float, float, float]:
    """(a, b, c, error) of the odd quintic nearest to 1 on [lower, upper], by Remez exchange: the error has its extremes, with
    alternating signs, at both ends and at the two zeros of the derivative between them."""
    inner = (lower + 0.3 * (upper - lower), lower + 0.75 * (upper - lower))
    while True:
        x = np.array([lower, *inner, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        moved = tuple(sorted(np.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)))
        if max(abs(new - old) for new, old in zip(moved, inner, strict=True)) < 1e-12:
            return a, b, c, abs(error)
        inner = moved


def decompose(x_BxRxK: Array) -> tuple[Array, Array, Array]:
    """(Q, B x R x K; H / norm, B x K x K; norm, B x 1 x 1) of X = Q H, float32, R >= K.

    Q is orthonormal to 2e-6 whatever X is. The norm is at least the largest singular value of X, at most K^¼ of it, and 1 for
    X = 0. A matrix at least twice as tall as wide is read twice only: the polynomials run on its K x K Gram matrix, whose sum
    over rows is all that a mesh has to exchange; it must have a condition number below 1e3.
    """
    rows, columns = x_BxRxK.shape[-2:]
    largest_Bx1x1 = jnp.max(jnp.abs(x_BxRxK), axis=(-2, -1), keepdims=True, initial=0.0)
    scale_Bx1x1 = jnp.where(largest_Bx1x1 > 0, largest_Bx1x1, 1.0)
    y_BxRxK = x_BxRxK / scale_Bx1x1  # its squares neither overflow nor vanish
    gram_BxKxK = _gram(y_BxRxK)
    norm_Bx1x1 = jnp.sqrt(jnp.linalg.norm(gram_BxKxK, axis=(-2, -1), keepdims=True))  # (Σ s⁴)^¼ >= the largest s
    norm_Bx1x1 = jnp.where(norm_Bx1x1 > 0, norm_Bx1x1, 1.0)
    y_BxRxK = y_BxRxK / norm_Bx1x1
    if rows >= 2 * columns:
        q_BxRxK = matmul(y_BxRxK, _inverse_root(gram_BxKxK / norm_Bx1x1**2, GRAM_LOWEST))
        q_BxRxK = matmul(q_BxRxK, _inverse_root(_gram(q_BxRxK) / MARGIN**2, 0.1) / MARGIN)  # takes away the rounding of the first
    else:
        noise_RxK = jax.random.normal(jax.random.key(0), (rows, columns)) / np.sqrt(rows)
        q_BxRxK = y_BxRxK + NOISE * noise_RxK
        for a, b, c in schedule(LOWEST):
            q_BxRxK = matmul(q_BxRxK, _polynomial(_gram(q_BxRxK), a, b, c))
        q_BxRxK = 1.5 * q_BxRxK - 0.5 * matmul(q_BxRxK, _gram(q_BxRxK))
    return q_BxRxK, symmetric(matmul(transpose(q_BxRxK), y_BxRxK)), scale_Bx1x1 * norm_Bx1x1


def lyapunov(h_BxKxK: Array, a_BxKxK: Array, lowest: float) -> Array:
    """The skew Y, B x K x K, of H Y + Y H = A for H positive semidefinite, no larger than 1, and A skew.

    The polynomials f that take H to the identity take [[H, A], [0, −H]] to [[F, D], [0, −F]], where D divides A, in the
    eigenvectors of H, by (s_i + s_j) / (f_i + f_j) (Higham, Functions of Matrices, 2008, §5.6; Roberts 1971). Y weighs D by
    f_i + f_j − 3/2 f_i f_j over f_i + f_j: A / (s_i + s_j) wherever one of the two is above `lowest`, and 0 instead of a
    division of nothing by nothing where neither is.
    """
    d_BxKxK = a_BxKxK
    steps = [*schedule(lowest), (1.5, -0.5, 0.0)]
    for a, b, c in steps:
        s_BxKxK = matmul(h_BxKxK, h_BxKxK)
        ds_BxKxK = 2.0 * symmetric(matmul(h_BxKxK, d_BxKxK))  # H D − D H: (H D)ᵀ = −D H
        p_BxKxK, dp_BxKxK = _polynomial(s_BxKxK, a, b, c), b * ds_BxKxK
        if c:
            dp_BxKxK = dp_BxKxK + 2.0 * c * symmetric(matmul(s_BxKxK, ds_BxKxK))
        d_BxKxK = _skew(matmul(d_BxKxK, p_BxKxK) + matmul(h_BxKxK, dp_BxKxK))
        h_BxKxK = symmetric(matmul(h_BxKxK, p_BxKxK))
    hd_BxKxK = matmul(h_BxKxK, d_BxKxK)
    return 2.0 * _skew(hd_BxKxK) - 1.5 * matmul(hd_BxKxK, h_BxKxK)


def smallest_direction(h_BxKxK: Array) -> Array:
    """A unit vector, B x K x 1, along which H, positive semidefinite and no larger than 1, is smallest.

    Power iteration on H⁻¹ by repeated squaring, 2^14 steps in 14 products: two smallest eigenvalues within a ten-thousandth of
    each other stay mixed, which costs no more of tr(QᵀX) than their difference. The inverse comes from Cholesky factors, which
    TPU compilers do not gather; its columns are rounded each in its own way, so a last solve cleans the vector.
    """
    eye_KxK = jnp.eye(h_BxKxK.shape[-1], dtype=jnp.float32)
    power_BxKxK = positive_solve(h_BxKxK, jnp.broadcast_to(eye_KxK, h_BxKxK.shape), SHIFT)
    for _ in range(14):
        power_BxKxK = power_BxKxK / jnp.linalg.norm(power_BxKxK, axis=(-2, -1), keepdims=True)
        power_BxKxK = symmetric(matmul(power_BxKxK, power_BxKxK))
    column_Bx1x1 = jnp.argmax(jnp.sum(power_BxKxK**2, axis=-2, keepdims=True), axis=-1, keepdims=True)
    v_BxKx1 = jnp.take_along_axis(power_BxKxK, column_Bx1x1, axis=-1)
    v_BxKx1 = positive_solve(h_BxKxK, v_BxKx1 / jnp.linalg.norm(v_BxKx1, axis=(-2, -1), keepdims=True), SHIFT)
    return v_BxKx1 / jnp.maximum(jnp.linalg.norm(v_BxKx1, axis=(-2, -1), keepdims=True), jnp.finfo(jnp.float32).tiny)


def positive_solve(h_BxKxK: Array, b_BxKxC: Array, shift: float) -> Array:
    """H⁻¹ b, B x K x C, for H positive semidefinite up to rounding and no larger than 1, by Cholesky factors of H + shift I.

    Three steps of refinement take most of the shift away again: a component along an eigenvalue t comes out as
    (1 − (shift / (t + shift))⁴) / t, which is 1/t above the shift and 4 / shift at 0. Where rounding has left H less than
    −shift, so that it has no factor, the result is 0.
    """

    def solve(h_BxKxK: Array, b_BxKxC: Array) -> Array:
        factor_BxKxK = jnp.linalg.cholesky(h_BxKxK + shift * jnp.eye(h_BxKxK.shape[-1], dtype=jnp.float32))
        x_BxKxC = jax.scipy.linalg.cho_solve((factor_BxKxK, True), b_BxKxC)
        for _ in range(3):
            x_BxKxC += jax.scipy.linalg.cho_solve((factor_BxKxK, True), b_BxKxC - matmul(h_BxKxK, x_BxKxC))
        return jnp.where(jnp.all(jnp.isfinite(x_BxKxC), axis=(-2, -1), keepdims=True), x_BxKxC, 0.0)

    return one_by_one(solve)(h_BxKxK, b_BxKxC)


def one_by_one(function: Callable) -> Callable:
    """`function` of batches of matrices, called for one matrix after the other where it runs on a CPU.

    jaxlib's LAPACK kernels can deadlock there on batches, with several devices or large matrices (jax issues 39292, 38056).
    """

    def mapped(*batches: Array) -> Any:
        leading = batches[0].shape[:-2]
        results = jax.lax.map(lambda each: function(*each), tuple(x.reshape(-1, *x.shape[-2:]) for x in batches))
        return jax.tree.map(lambda result: result.reshape(*leading, *result.shape[1:]), results)

    @jax.custom_batching.custom_vmap
    def run(*batches: Array) -> Any:
        if batches[0].ndim == 2 or batches[0].size == 0:
            return function(*batches)
        return jax.lax.platform_dependent(*batches, cpu=mapped, default=function)

    @run.def_vmap
    def _(size: int, mapped_over: list[bool], *batches: Array) -> tuple[Any, Any]:
        """A vmapped axis is one more axis of the batch: left to itself, vmap would make batches of the single calls."""
        whole = [x if over else jnp.broadcast_to(x, (size, *x.shape)) for x, over in zip(batches, mapped_over, strict=True)]
        results = run(*whole)
        return results, jax.tree.map(lambda _: True, results)

    return run


def matmul(a: Array, b: Array) -> Array:
    """a @ b in full float32: TF32 or bf16 passes would leave Q orthogonal to 1e-3 only."""
    return jnp.matmul(a, b, precision="highest")


def transpose(a: Array) -> Array:
    """The last two axes exchanged."""
    return jnp.swapaxes(a, -1, -2)


def symmetric(a: Array) -> Array:
    """(a + aᵀ) / 2."""
    return 0.5 * (a + transpose(a))


def _skew(a: Array) -> Array:
    return 0.5 * (a - transpose(a))


def _gram(x_BxRxK: Array) -> Array:
    return matmul(transpose(x_BxRxK), x_BxRxK)


def _polynomial(s_BxKxK: Array, a: float, b: float, c: float) -> Array:
    linear_BxKxK = a * jnp.eye(s_BxKxK.shape[-1], dtype=jnp.float32) + b * s_BxKxK
    return linear_BxKxK + c * matmul(s_BxKxK, s_BxKxK) if c else linear_BxKxK


def _inverse_root(gram_BxKxK: Array, lowest: float) -> Array:
    """G^{-1/2}, B x K x K, of G = XᵀX with the singular values of X in [lowest, 1]."""
    eye_KxK = jnp.eye(gram_BxKxK.shape[-1], dtype=jnp.float32)
    root_BxKxK, gram_BxKxK = jnp.broadcast_to(eye_KxK, gram_BxKxK.shape), gram_BxKxK + GRAM_SHIFT * eye_KxK
    for a, b, c in [*schedule(lowest), (1.5, -0.5, 0.0)]:
        p_BxKxK = _polynomial(gram_BxKxK, a, b, c)
        root_BxKxK = matmul(root_BxKxK, p_BxKxK)
        gram_BxKxK = symmetric(matmul(p_BxKxK, matmul(gram_BxKxK, p_BxKxK)))
    return root_BxKxK
