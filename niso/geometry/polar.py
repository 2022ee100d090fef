"""The orthogonal polar factor (Procrustes projection) of a batch of matrices, and its derivative.

Q = polar(X) = U Vᵀ of the thin SVD X = U S Vᵀ is the matrix with orthonormal columns nearest to X, and κ of eq. 8.

Derivative. Q moves by dQ = U [(UᵀdX V − VᵀdXᵀU) ∘ 1/(s_i + s_j)] Vᵀ + (I − UUᵀ) dX V S⁻¹ Vᵀ, the solution of the Sylvester
equation that one gets by differentiating QᵀX = XᵀQ (Higham, Functions of Matrices, 2008, §8). It has sums of singular
values where the derivative of the SVD itself has differences, so repeated singular values do no harm. What remains singular,
pairs of vanishing singular values, is damped relative to the largest: 1/t becomes t/(t² + δ²) with t = (s_i + s_j)/s_max, so
that polar(cX) = polar(X) and gradients scale by 1/c at any scale c.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def polar_factor(x_BxRxK: Array, *, special: bool = False, ridge: float = 0.0, damping: float = 1e-7) -> Array:
    """Nearest matrices with orthonormal columns (eq. 8's κ), float32.

    Args:
      x_BxRxK: any number of leading axes, R >= K.
      special: for R = K, project onto SO(K) instead of O(K): where the determinant is −1 the singular vector of the
        smallest singular value is flipped.
      ridge: ε of X + ε‖X‖_F I (square X only): directions without signal fall back to the identity. 0: the plain mathematics.
      damping: δ of the derivative (above), relative to the largest singular value.

    Raises:
      ValueError: more columns than rows, or `special`/`ridge` for a matrix that is not square.
    """
    rows, columns = x_BxRxK.shape[-2:]
    if rows < columns:
        raise ValueError(f"polar_factor needs at least as many rows as columns, got {rows} x {columns}")
    if rows != columns and (special or ridge):
        raise ValueError(f"special and ridge are for square matrices, got {rows} x {columns}")
    x_BxRxK = x_BxRxK.astype(jnp.float32)
    if ridge:
        norm_B = jnp.sqrt(jnp.sum(x_BxRxK**2, axis=(-2, -1), keepdims=True) + jnp.finfo(jnp.float32).tiny)
        x_BxRxK = x_BxRxK + ridge * norm_B * jnp.eye(rows, dtype=jnp.float32)
    return _polar(x_BxRxK, special, damping)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _polar(x_BxRxK: Array, special: bool, damping: float) -> Array:
    return _forward(x_BxRxK, special, damping)[0]


def _forward(x_BxRxK: Array, special: bool, damping: float) -> tuple[Array, tuple[Array, Array, Array]]:
    u_BxRxK, s_BxK, vt_BxKxK = _thin_svd(x_BxRxK)
    if special:
        # The determinant comes from the SVD's own factors: two independent LAPACK calls in one program can deadlock on CPU.
        sign_B = jnp.linalg.slogdet(_matmul(u_BxRxK, vt_BxKxK))[0]
        u_BxRxK = u_BxRxK.at[..., -1].multiply(sign_B[..., None])
        s_BxK = s_BxK.at[..., -1].multiply(sign_B)
    return _matmul(u_BxRxK, vt_BxKxK), (u_BxRxK, s_BxK, vt_BxKxK)


def _backward(special: bool, damping: float, factors: tuple[Array, Array, Array], g_BxRxK: Array) -> tuple[Array]:
    u_BxRxK, s_BxK, vt_BxKxK = factors
    largest_B = jnp.max(jnp.abs(s_BxK), axis=-1, keepdims=True)
    scale_B = jnp.where(largest_B > 0, largest_B, 1.0)
    t_BxK = s_BxK / scale_B
    gv_BxRxK = _matmul(g_BxRxK, _transpose(vt_BxKxK))
    w_BxKxK = _matmul(_transpose(u_BxRxK), gv_BxRxK)
    inner_BxKxK = (w_BxKxK - _transpose(w_BxKxK)) * _damped_inverse(t_BxK[..., :, None] + t_BxK[..., None, :], damping)
    left_BxRxK = _matmul(u_BxRxK, inner_BxKxK)
    if u_BxRxK.shape[-2] != u_BxRxK.shape[-1]:
        outside_BxRxK = gv_BxRxK - _matmul(u_BxRxK, w_BxKxK)
        left_BxRxK = left_BxRxK + outside_BxRxK * _damped_inverse(t_BxK, damping)[..., None, :]
    return (_matmul(left_BxRxK, vt_BxKxK) / scale_B[..., None],)


_polar.defvjp(_forward, _backward)


def _damped_inverse(t: Array, damping: float) -> Array:
    """1/t for |t| well above `damping`, 0 at 0; t is relative to the largest singular value."""
    return t / (t**2 + damping**2)


def _thin_svd(x_BxRxK: Array) -> tuple[Array, Array, Array]:
    def svd(x_BxRxK: Array) -> tuple[Array, Array, Array]:
        u_BxRxK, s_BxK, vt_BxKxK = jnp.linalg.svd(x_BxRxK, full_matrices=False)
        return u_BxRxK, s_BxK, vt_BxKxK

    def one_by_one(x_BxRxK: Array) -> tuple[Array, Array, Array]:
        batch = x_BxRxK.shape[:-2]
        u_PxRxK, s_PxK, vt_PxKxK = jax.lax.map(svd, x_BxRxK.reshape(-1, *x_BxRxK.shape[-2:]))
        return u_PxRxK.reshape(x_BxRxK.shape), s_PxK.reshape(*batch, -1), vt_PxKxK.reshape(*batch, *vt_PxKxK.shape[1:])

    if x_BxRxK.ndim == 2 or x_BxRxK.size == 0:
        return svd(x_BxRxK)
    # jaxlib's CPU kernels can deadlock on batches, with several devices or large matrices (jax issues 39292, 38056); one
    # matrix at a time they do not.
    return jax.lax.platform_dependent(x_BxRxK, cpu=one_by_one, default=svd)


def _matmul(a: Array, b: Array) -> Array:
    # Full float32: TF32 or bf16 passes would leave Q orthogonal to 1e-3 only.
    return jnp.matmul(a, b, precision="highest")


def _transpose(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)
