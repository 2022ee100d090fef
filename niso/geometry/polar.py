"""The orthogonal polar factor (Procrustes projection) of a batch of matrices, and its derivative.

Q = polar(X) = U Vᵀ of the thin SVD X = U S Vᵀ is the matrix with orthonormal columns nearest to X, and κ of eq. 8.

Derivative. Differentiating X = Q H, H = QᵀX symmetric, gives dQ = Q Y + (I − QQᵀ) dX H⁻¹ with the skew Y of the Lyapunov
equation H Y + Y H = QᵀdX − dXᵀQ (Higham, Functions of Matrices, 2008, §8). The Jacobian is symmetric, because Q is the gradient
of the sum of X's singular values: the same formula applied to a cotangent is the reverse mode, applied to a tangent the forward
mode. In the singular vectors the equation divides by s_i + s_j where the derivative of an SVD has differences, so
repeated singular values do no harm. What remains singular, pairs of vanishing singular values, is damped relative to the
largest, so that polar(cX) = polar(X) and gradients scale by 1/c at any scale c.

Methods. `svd`: LAPACK's or the vendor's; 1/t becomes t/(t² + δ²) with t = (s_i + s_j)/s_max. `matmul`: matrix products alone
(geometry.matmul_polar), and Cholesky factors for `special` and for tall matrices; pairs below δ are left out smoothly.
`auto`: by the device that runs it: `svd` on CPU, at every size (README, the isometric solve), `matmul` on GPU and TPU,
where SVDs run matrix by matrix or gather the batch onto every device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from niso.geometry import matmul_polar
from niso.geometry.matmul_polar import matmul, one_by_one, transpose

METHODS = ("auto", "svd", "matmul")


def polar_factor(
    x_BxRxK: Array, *, method: str = "auto", special: bool = False, ridge: float = 0.0, damping: float = 1e-7
) -> Array:
    """Nearest matrices with orthonormal columns (eq. 8's κ), float32 whatever the dtype of X.

    Where X is rank-deficient the directions without signal are completed to an orthonormal set, which is not unique: with a
    `ridge` they fall back to the identity, without it they are whatever rounding (or a fixed noise of its size) makes of them.

    Args:
      x_BxRxK: any number of leading axes, R >= K.
      method: one of METHODS (above). For matrices at least twice as tall as wide `matmul` needs a condition number below 1e3.
      special: for R = K, project onto SO(K) instead of O(K): where the determinant is −1 the singular vector of the
        smallest singular value is flipped.
      ridge: ε of X + ε‖X‖_F I (square X only): directions without signal fall back to the identity. 0: the plain mathematics.
      damping: δ of the derivative (above), relative to the largest singular value.

    Raises:
      ValueError: an unknown method, more columns than rows, or `special`/`ridge` for a matrix that is not square.
    """
    rows, columns = x_BxRxK.shape[-2:]
    if method not in METHODS:
        raise ValueError(f"polar_factor has no method {method!r}: choose one of {', '.join(METHODS)}")
    if rows < columns:
        raise ValueError(f"polar_factor needs at least as many rows as columns, got {rows} x {columns}")
    if rows != columns and (special or ridge):
        raise ValueError(f"special and ridge are for square matrices, got {rows} x {columns}")
    x_BxRxK = x_BxRxK.astype(jnp.float32)
    if ridge:
        x_BxRxK = x_BxRxK + ridge * _frobenius(x_BxRxK) * jnp.eye(rows, dtype=jnp.float32)
    if method != "auto":
        return _polar(x_BxRxK, method, special, damping)
    if x_BxRxK.size == 0:
        return _polar(x_BxRxK, "svd", special, damping)
    # Chosen where the program is compiled for, not where it is traced: a pod's program may be compiled on a laptop.
    chosen = {name: partial(_polar, method=name, special=special, damping=damping) for name in METHODS[1:]}
    return jax.lax.platform_dependent(x_BxRxK, cpu=chosen["svd"], default=chosen["matmul"])


def _frobenius(x_BxRxK: Array) -> Array:
    """‖X‖_F, B x 1 x 1, without overflow or underflow of its squares; 1 for X = 0, and no gradient there."""
    largest_Bx1x1 = jnp.max(jnp.abs(x_BxRxK), axis=(-2, -1), keepdims=True, initial=0.0)
    some_Bx1x1 = largest_Bx1x1 > 0
    # Both branches of a `where` are differentiated: the one that is not taken must not divide by zero either.
    scale_Bx1x1 = jax.lax.stop_gradient(jnp.where(some_Bx1x1, largest_Bx1x1, 1.0))
    squares_Bx1x1 = jnp.sum((x_BxRxK / scale_Bx1x1) ** 2, axis=(-2, -1), keepdims=True)
    return jnp.where(some_Bx1x1, scale_Bx1x1 * jnp.sqrt(jnp.where(some_Bx1x1, squares_Bx1x1, 1.0)), 1.0)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _polar(x_BxRxK: Array, method: str, special: bool, damping: float) -> Array:
    return _forward(x_BxRxK, method, special, damping)[0]


def _forward(x_BxRxK: Array, method: str, special: bool, damping: float) -> tuple[Array, tuple[Array, ...]]:
    return _forward_svd(x_BxRxK, special) if method == "svd" else _forward_matmul(x_BxRxK, special)


def _backward(method: str, special: bool, damping: float, factors: tuple[Array, ...], g_BxRxK: Array) -> tuple[Array]:
    return ((_backward_svd if method == "svd" else _backward_matmul)(damping, factors, g_BxRxK),)


_polar.defvjp(_forward, _backward)


def _forward_svd(x_BxRxK: Array, special: bool) -> tuple[Array, tuple[Array, ...]]:
    u_BxRxK, s_BxK, vt_BxKxK = _thin_svd(x_BxRxK)
    if special:
        # The determinant comes from the SVD's own factors: two independent LAPACK calls in one program can deadlock on CPU.
        sign_B = one_by_one(lambda q_BxRxK: jnp.linalg.slogdet(q_BxRxK)[0])(matmul(u_BxRxK, vt_BxKxK))
        u_BxRxK = u_BxRxK.at[..., -1].multiply(sign_B[..., None])
        s_BxK = s_BxK.at[..., -1].multiply(sign_B)
    return matmul(u_BxRxK, vt_BxKxK), (u_BxRxK, s_BxK, vt_BxKxK)


def _backward_svd(damping: float, factors: tuple[Array, ...], g_BxRxK: Array) -> Array:
    u_BxRxK, s_BxK, vt_BxKxK = factors
    largest_B = jnp.max(jnp.abs(s_BxK), axis=-1, keepdims=True)
    scale_B = jnp.where(largest_B > 0, largest_B, 1.0)
    t_BxK = s_BxK / scale_B
    gv_BxRxK = matmul(g_BxRxK, transpose(vt_BxKxK))
    w_BxKxK = matmul(transpose(u_BxRxK), gv_BxRxK)
    inner_BxKxK = (w_BxKxK - transpose(w_BxKxK)) * _damped_inverse(t_BxK[..., :, None] + t_BxK[..., None, :], damping)
    left_BxRxK = matmul(u_BxRxK, inner_BxKxK)
    if u_BxRxK.shape[-2] != u_BxRxK.shape[-1]:
        outside_BxRxK = gv_BxRxK - matmul(u_BxRxK, w_BxKxK)
        left_BxRxK = left_BxRxK + outside_BxRxK * _damped_inverse(t_BxK, damping)[..., None, :]
    return matmul(left_BxRxK, vt_BxKxK) / scale_B[..., None]


def _damped_inverse(t: Array, damping: float) -> Array:
    """1/t for |t| well above `damping`, 0 at 0; t is relative to the largest singular value."""
    return t / (t**2 + damping**2)


def _thin_svd(x_BxRxK: Array) -> tuple[Array, Array, Array]:
    def svd(x_BxRxK: Array) -> tuple[Array, Array, Array]:
        u_BxRxK, s_BxK, vt_BxKxK = jnp.linalg.svd(x_BxRxK, full_matrices=False)
        return u_BxRxK, s_BxK, vt_BxKxK

    # With one device, where SVDs were not seen to deadlock, not even independent ones, the batch shares the cores: up to twice
    # as fast. (Traced for another platform the choice does not matter: it is one for CPUs.)
    return (svd if jax.local_device_count() == 1 else one_by_one(svd))(x_BxRxK)


def _forward_matmul(x_BxRxK: Array, special: bool) -> tuple[Array, tuple[Array, ...]]:
    q_BxRxK, h_BxKxK, norm_Bx1x1 = matmul_polar.decompose(x_BxRxK)
    if not special:
        return q_BxRxK, (q_BxRxK, h_BxKxK, norm_Bx1x1)
    sign_Bx1x1 = one_by_one(lambda q_BxRxK: jnp.linalg.slogdet(q_BxRxK)[0])(q_BxRxK)[..., None, None]
    # H of a matrix that keeps its orientation is not needed; the choice also chains the two LAPACK calls (see _forward_svd).
    eye_KxK = jnp.eye(h_BxKxK.shape[-1], dtype=jnp.float32)
    v_BxKx1 = matmul_polar.smallest_direction(jnp.where(sign_Bx1x1 < 0, h_BxKxK, eye_KxK))
    v_BxKx1 = jnp.where(sign_Bx1x1 < 0, v_BxKx1, 0.0)
    flipped_BxRxK = q_BxRxK - 2.0 * matmul(matmul(q_BxRxK, v_BxKx1), transpose(v_BxKx1))
    return flipped_BxRxK, (flipped_BxRxK, h_BxKxK, norm_Bx1x1, v_BxKx1)


def _backward_matmul(damping: float, factors: tuple[Array, ...], g_BxRxK: Array) -> Array:
    q_BxRxK, h_BxKxK, norm_Bx1x1, *flip = factors
    w_BxKxK = matmul(transpose(q_BxRxK), g_BxRxK)
    tall = q_BxRxK.shape[-2] != q_BxRxK.shape[-1]
    lowest = max(damping, matmul_polar.GRAM_DAMPING) if tall else damping
    a_BxKxK = w_BxKxK - transpose(w_BxKxK)
    y_BxKxK = _flipped_lyapunov(h_BxKxK, a_BxKxK, flip[0], lowest) if flip else matmul_polar.lyapunov(h_BxKxK, a_BxKxK, lowest)
    x_BxRxK = matmul(q_BxRxK, y_BxKxK)
    if tall:
        outside_BxRxK = g_BxRxK - matmul(q_BxRxK, w_BxKxK)
        # H⁻¹ itself, K x K: a solve with the rows as right-hand sides would gather them where they are sharded.
        eye_BxKxK = jnp.broadcast_to(jnp.eye(h_BxKxK.shape[-1], dtype=jnp.float32), h_BxKxK.shape)
        x_BxRxK = x_BxRxK + matmul(outside_BxRxK, matmul_polar.positive_solve(h_BxKxK, eye_BxKxK, max(damping, matmul_polar.SHIFT)))
    return x_BxRxK / norm_Bx1x1


def _flipped_lyapunov(h_BxKxK: Array, a_BxKxK: Array, v_BxKx1: Array, lowest: float) -> Array:
    """Y of H' Y + Y H' = A, where H' is H with the eigenvalue s of v turned to −s; v = 0 where nothing is flipped.

    Apart from v it is the equation of H; along v, (H − s I) y = A v, positive semidefinite because s is H's smallest.
    """
    eye_KxK = jnp.eye(h_BxKxK.shape[-1], dtype=jnp.float32)
    keep_BxKxK = eye_KxK - matmul(v_BxKx1, transpose(v_BxKx1))
    inside_BxKxK = matmul(keep_BxKxK, matmul(a_BxKxK, keep_BxKxK))
    y_BxKxK = matmul_polar.lyapunov(h_BxKxK, inside_BxKxK, lowest)
    smallest_Bx1x1 = matmul(transpose(v_BxKx1), matmul(h_BxKxK, v_BxKx1))
    shifted_BxKxK = matmul(keep_BxKxK, matmul(h_BxKxK - smallest_Bx1x1 * eye_KxK, keep_BxKxK)) + eye_KxK - keep_BxKxK
    along_BxKx1 = matmul_polar.positive_solve(
        shifted_BxKxK, matmul(keep_BxKxK, matmul(a_BxKxK, v_BxKx1)), max(lowest, matmul_polar.SHIFT)
    )
    outer_BxKxK = matmul(along_BxKx1, transpose(v_BxKx1))
    return y_BxKxK + outer_BxKxK - transpose(outer_BxKxK)
