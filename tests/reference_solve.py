"""The reference implementation's way to differentiate the Procrustes projection, kept as an oracle to measure against.

Back-propagation through U and V of the SVD, with 1 / (s_j² − s_i²) damped by an absolute 1e-8. niso never trains with it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def polar_factor(x_BxKxK: Array, *, special: bool = False, ridge: float = 0.0, damping: float = 1e-8) -> Array:
    """U Vᵀ, B x K x K, with the damped derivative; takes the options of niso's solve, of which `ridge` must be 0."""
    del damping  # an absolute 1e-8 whatever the task says: that is the point
    assert not ridge
    return _polar(x_BxKxK.astype(jnp.float32), special)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _polar(x_BxKxK: Array, special: bool) -> Array:
    return _forward(x_BxKxK, special)[0]


def _forward(x_BxKxK: Array, special: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    u_BxKxK, s_BxK, vt_BxKxK = jax.lax.map(lambda x_KxK: jnp.linalg.svd(x_KxK), x_BxKxK)
    if special:
        sign_B = jax.lax.map(lambda q_KxK: jnp.linalg.slogdet(q_KxK)[0], u_BxKxK @ vt_BxKxK)
        u_BxKxK, s_BxK = u_BxKxK.at[..., -1].multiply(sign_B[:, None]), s_BxK.at[..., -1].multiply(sign_B)
    return u_BxKxK @ vt_BxKxK, (u_BxKxK, s_BxK, vt_BxKxK)


def _backward(special: bool, factors: tuple[Array, Array, Array], g_BxKxK: Array) -> tuple[Array]:
    u_BxKxK, s_BxK, vt_BxKxK = factors
    w_BxKxK = jnp.swapaxes(u_BxKxK, 1, 2) @ g_BxKxK @ jnp.swapaxes(vt_BxKxK, 1, 2)
    gap_BxKxK = s_BxK[:, None, :] ** 2 - s_BxK[:, :, None] ** 2
    inner_BxKxK = gap_BxKxK / (gap_BxKxK**2 + 1e-8) * (w_BxKxK - jnp.swapaxes(w_BxKxK, 1, 2))
    return (u_BxKxK @ (inner_BxKxK * s_BxK[:, None, :] - s_BxK[:, :, None] * inner_BxKxK) @ vt_BxKxK,)


_polar.defvjp(_forward, _backward)
