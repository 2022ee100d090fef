"""Functions on the sphere, given on its grid of latitudes and longitudes (niso/geometry/sphere.py), at other points; jax, float32.

Between the grid's points they are bilinear in colatitude and longitude. Columns go round: the last one's neighbour is the first.
There is no point at a pole; beyond the first and last row comes that row again, half a turn on, which is where a meridian leads.
So functions are continuous along circles through a pole; in the pole itself, longitude 0 counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from niso.geometry import moebius, sphere


def points(height: int, width: int) -> np.ndarray:
    """The grid's points row by row, N x 3, float32."""
    theta_Hx1, phi_W = sphere.colatitude(height)[:, None], sphere.longitude(width)
    z_HxW = np.broadcast_to(np.cos(theta_Hx1), (height, width))
    point_HxWx3 = np.stack([np.sin(theta_Hx1) * np.cos(phi_W), np.sin(theta_Hx1) * np.sin(phi_W), z_HxW], axis=-1)
    return point_HxWx3.reshape(-1, 3).astype(np.float32)


def pull_back(signal_BxHxWxC: Array, matrix_Bx4x4: Array, height: int, width: int) -> Array:
    """The functions x ↦ f(Λ⁻¹ x), on a grid of height x width points, B x height x width x C, float32.

    Λ are Möbius maps (niso/geometry/moebius.py): what f has at a point s comes to Λ s.
    """
    point_1xNx3 = points(height, width)[None]
    point_BxNx3 = jnp.broadcast_to(point_1xNx3, (signal_BxHxWxC.shape[0], *point_1xNx3.shape[1:]))
    found_BxNxC = sample(signal_BxHxWxC, moebius.apply(moebius.inverse(matrix_Bx4x4), point_BxNx3))
    return found_BxNxC.reshape(-1, height, width, found_BxNxC.shape[-1])


def sample(signal_BxHxWxC: Array, point_BxNx3: Array) -> Array:
    """The functions at unit vectors, B x N x C, float32. Their numbers may be of any type: only those that are read are converted.

    Raises:
      ValueError: the grid has an odd number of columns, so that no meridian goes on beyond a pole.
    """
    if signal_BxHxWxC.shape[2] % 2:
        raise ValueError(f"a grid of {signal_BxHxWxC.shape[2]} columns: beyond the poles it needs an even number")
    return jax.vmap(_sample)(signal_BxHxWxC, point_BxNx3)


def _sample(signal_HxWxC: Array, point_Nx3: Array) -> Array:
    height, width, channels = signal_HxWxC.shape
    x_N, y_N, z_N = point_Nx3.astype(jnp.float32).T
    row_N = jnp.arctan2(jnp.hypot(x_N, y_N), z_N) * (height / np.pi) - 0.5
    column_N = jnp.arctan2(y_N, x_N) * (width / (2 * np.pi))
    top_N, left_N = jnp.floor(row_N), jnp.floor(column_N)
    down_Nx1, right_Nx1 = (row_N - top_N)[:, None], (column_N - left_N)[:, None]
    cell = functools.partial(_value, signal_HxWxC.reshape(-1, channels), height, width)
    top_N, left_N = top_N.astype(jnp.int32), left_N.astype(jnp.int32)
    above_NxC = (1 - right_Nx1) * cell(top_N, left_N) + right_Nx1 * cell(top_N, left_N + 1)
    below_NxC = (1 - right_Nx1) * cell(top_N + 1, left_N) + right_Nx1 * cell(top_N + 1, left_N + 1)
    return (1 - down_Nx1) * above_NxC + down_Nx1 * below_NxC


def _value(signal_MxC: Array, height: int, width: int, row_N: Array, column_N: Array) -> Array:
    """The grid's values at rows −1 .. height and any columns, N x C, float32."""
    inside_N = jnp.clip(row_N, 0, height - 1)
    turned_N = jnp.where(inside_N == row_N, column_N, column_N + width // 2)
    return signal_MxC[inside_N * width + turned_N % width].astype(jnp.float32)
