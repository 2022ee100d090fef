"""The sphere: the Driscoll-Healy grid, real spherical harmonics, and what a rotation does to both; jax, float32.

Grid. H colatitudes θ_j = π(2j+1)/(2H) times W longitudes φ_k = 2πk/W: Driscoll and Healy's (Computing Fourier Transforms and
Convolutions on the 2-Sphere, 1994), shifted by half a cell, so that no point sits on a pole and every weight is positive. The
point is (sin θ cos φ, sin θ sin φ, cos θ): row 0 is near +z, column 0 above +x. H = W = 2 × bandwidth is the usual case.

Harmonics. Real, orthonormal over the area, without the Condon-Shortley sign: Y_lm = √2 P̄_l^m(cos θ) cos mφ for m > 0,
P̄_l^0(cos θ) for m = 0, √2 P̄_l^|m|(cos θ) sin |m|φ for m < 0, and P̄ > 0 near θ = 0: Y_1,1, Y_1,-1, Y_1,0 are √(3/4π) times x, y, z.
Degrees l = 0 .. bandwidth − 1 stand in one axis L, at l² + l + m.

Transforms are separable: a matrix product over longitude, then one over latitude per order. For them and for rotations L is laid
out as degrees D × orders M (−l_max .. l_max), where order m < 0 pairs with −m by a flip; half of that rectangle is unused, and the
constants are zero there. Constants are computed once, in NumPy float64.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def colatitude(height: int) -> np.ndarray:
    """θ_H, radians in (0, π), ascending: the grid's angles from +z."""
    return math.pi * (np.arange(height) + 0.5) / height


def longitude(width: int) -> np.ndarray:
    """φ_W, radians in [0, 2π), ascending: the grid's angles about z from +x."""
    return 2 * math.pi * np.arange(width) / width


def quadrature(height: int) -> np.ndarray:
    """Weights of the colatitudes, float64: positive, with Σ_j weight_j g(cos θ_j) = ∫ g(cos θ) sin θ dθ for polynomials g of
    degree < height, so for the products of two harmonics of degree < height/2. Their sum is 2.

    Fejér's first rule (1933). For even heights Driscoll and Healy's weights, 4/H sin θ Σ_p sin((2p+1)θ)/(2p+1), are the same.
    """
    k_K = np.arange(1, height // 2 + 1)
    terms_HxK = np.cos(2 * k_K * colatitude(height)[:, None]) / (4 * k_K**2 - 1)
    return 2 / height * (1 - 2 * np.sum(terms_HxK, axis=1))


def area(height: int, width: int) -> np.ndarray:
    """mass_N, float64: the area that each of the N = height × width grid points (row by row) stands for; their sum is 4π."""
    return np.repeat(quadrature(height) * 2 * math.pi / width, width)


def full_bandwidth(height: int, width: int) -> int:
    """The number of degrees that the grid resolves exactly: n/2 for n × n or n × 2n, n even."""
    return (min(height, width) + 1) // 2


def degree_order(bandwidth: int) -> tuple[np.ndarray, np.ndarray]:
    """(l_L, m_L): degree and order of each of the L = bandwidth² harmonics."""
    l_L = np.repeat(np.arange(bandwidth), 2 * np.arange(bandwidth) + 1)
    return l_L, np.arange(bandwidth**2) - l_L**2 - l_L


def harmonics(bandwidth: int, theta_P: np.ndarray, phi_P: np.ndarray) -> np.ndarray:
    """Y_lm, P x L, float64, at any points: colatitudes and longitudes in radians. Dense: for constants and tests."""
    l_L, m_L = degree_order(bandwidth)
    legendre_LxP = _legendre(bandwidth, np.asarray(theta_P, np.float64))[l_L, np.abs(m_L)]
    return (legendre_LxP * _waves(m_L, np.asarray(phi_P, np.float64))).T


def analyse(f_BxHxWxC: Array, bandwidth: int | None = None) -> Array:
    """The coefficients ∫ f Y_lm of functions on the grid, B x L x C, accumulated in float32.

    Exact for what `synthesise` makes of as many degrees; `bandwidth` None: all that the grid resolves (`full_bandwidth`).

    Raises:
      ValueError: more degrees than the grid resolves.
    """
    height, width = f_BxHxWxC.shape[1:3]
    bandwidth = full_bandwidth(height, width) if bandwidth is None else bandwidth
    wave_MxW, weighted_DxMxH, _ = _tables(height, width, bandwidth)
    along_BxMxHxC = jnp.einsum("mw,bhwc->bmhc", wave_MxW, f_BxHxWxC.astype(jnp.float32), precision="highest")
    coefficient_BxDxMxC = jnp.einsum("dmh,bmhc->bdmc", weighted_DxMxH, along_BxMxHxC, precision="highest")
    return _listed(coefficient_BxDxMxC)


def synthesise(coefficient_BxLxC: Array, height: int, width: int) -> Array:
    """The functions Σ c_lm Y_lm on the grid, B x H x W x C, float32.

    Raises:
      ValueError: L is not a square, or it has more degrees than the grid resolves.
    """
    wave_MxW, _, legendre_DxMxH = _tables(height, width, _bandwidth(coefficient_BxLxC))
    coefficient_BxDxMxC = _laid_out(coefficient_BxLxC.astype(jnp.float32))
    along_BxMxHxC = jnp.einsum("dmh,bdmc->bmhc", legendre_DxMxH, coefficient_BxDxMxC, precision="highest")
    return jnp.einsum("mw,bmhc->bhwc", wave_MxW, along_BxMxHxC, precision="highest")


def band_limit(f_BxHxWxC: Array, bandwidth: int) -> Array:
    """f without its degrees >= bandwidth, B x H x W x C: the orthogonal projection under `area`."""
    return synthesise(analyse(f_BxHxWxC, bandwidth), *f_BxHxWxC.shape[1:3])


def random_rotation(key: Array, batch: int) -> Array:
    """Rotations uniform on SO(3) (Haar measure), B x 3 x 3, float32: those of uniform unit quaternions."""
    w, x, y, z = jax.random.normal(key, (4, batch), jnp.float32)
    scale = 2 / (w * w + x * x + y * y + z * z)  # divided once, not by a rounded norm twice: half the error
    rows = (
        (1 - scale * (y * y + z * z), scale * (x * y - w * z), scale * (x * z + w * y)),
        (scale * (x * y + w * z), 1 - scale * (x * x + z * z), scale * (y * z - w * x)),
        (scale * (x * z - w * y), scale * (y * z + w * x), 1 - scale * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def rotate(f_BxHxWxC: Array, rotation_Bx3x3: Array) -> Array:
    """The functions x ↦ f(R⁻¹ x) on the grid of f, B x H x W x C, of the band-limited part of f: the degrees above
    `full_bandwidth` are lost. Exact for the others, to rounding; nothing is interpolated."""
    return synthesise(rotate_coefficients(analyse(f_BxHxWxC), rotation_Bx3x3), *f_BxHxWxC.shape[1:3])


def rotation_operator(rotation_Bx3x3: Array, bandwidth: int) -> Array:
    """D(R), B x L x L: orthogonal, one block of 2l + 1 per degree, with D(R) c the coefficients of x ↦ f(R⁻¹ x), and
    D(R S) = D(R) D(S). To rotate functions, `rotate_coefficients` does without the matrix."""
    identity_LxL = jnp.eye(bandwidth**2, dtype=jnp.float32)
    return rotate_coefficients(jnp.broadcast_to(identity_LxL, (rotation_Bx3x3.shape[0], *identity_LxL.shape)), rotation_Bx3x3)


def rotate_coefficients(coefficient_BxLxC: Array, rotation_Bx3x3: Array) -> Array:
    """D(R) c, the coefficients of x ↦ f(R⁻¹ x), B x L x C.

    R = R_z(α) R_y(β) R_z(γ), and R_y(β) = Q R_z(β) Q⁻¹ with the quarter turn Q about x: three turns about z, which only mix the
    orders m and −m, and the constant D(Q) twice (Pinchon and Hoggan, J. Phys. A 40, 2007). No recursion over degrees, and no
    trigonometry but of multiples of three angles. The derivative with respect to R is not defined where R fixes the z axis.
    """
    alpha_B, beta_B, gamma_B = _euler(rotation_Bx3x3.astype(jnp.float32))
    quarter_DxMxM = _quarter_turn(_bandwidth(coefficient_BxLxC))
    c_BxDxMxC = _about_z(_laid_out(coefficient_BxLxC.astype(jnp.float32)), gamma_B)
    c_BxDxMxC = jnp.einsum("dnm,bdnc->bdmc", quarter_DxMxM, c_BxDxMxC, precision="highest")
    c_BxDxMxC = _about_z(c_BxDxMxC, beta_B)
    c_BxDxMxC = jnp.einsum("dmn,bdnc->bdmc", quarter_DxMxM, c_BxDxMxC, precision="highest")
    return _listed(_about_z(c_BxDxMxC, alpha_B))


def _euler(rotation_Bx3x3: Array) -> tuple[Array, Array, Array]:
    """(α, β, γ), radians, of R = R_z(α) R_y(β) R_z(γ).

    γ is read off R_z(−α) R, whose middle row is (sin γ, cos γ, 0) whatever β is: where R keeps or turns over the z axis, α is
    arbitrary (rounding, or zero) and γ makes up for it, so the product is R to rounding everywhere.
    """
    r = rotation_Bx3x3
    sine_beta = jnp.hypot(r[:, 0, 2], r[:, 1, 2])
    alpha = jnp.arctan2(r[:, 1, 2], r[:, 0, 2])
    middle_Bx3 = jnp.cos(alpha)[:, None] * r[:, 1] - jnp.sin(alpha)[:, None] * r[:, 0]
    return alpha, jnp.arctan2(sine_beta, r[:, 2, 2]), jnp.arctan2(middle_Bx3[:, 0], middle_Bx3[:, 1])


def _about_z(coefficient_BxDxMxC: Array, angle_B: Array) -> Array:
    """The coefficients of f(φ − angle): c_m cos(m angle) − c_−m sin(m angle), m of either sign."""
    top = coefficient_BxDxMxC.shape[1] - 1
    turn_BxMx1 = (angle_B[:, None] * jnp.arange(-top, top + 1, dtype=jnp.float32))[:, :, None]
    cosine_Bx1xMx1, sine_Bx1xMx1 = jnp.cos(turn_BxMx1)[:, None], jnp.sin(turn_BxMx1)[:, None]
    return cosine_Bx1xMx1 * coefficient_BxDxMxC - sine_Bx1xMx1 * jnp.flip(coefficient_BxDxMxC, axis=2)


def _bandwidth(coefficient_BxLxC: Array) -> int:
    length = coefficient_BxLxC.shape[1]
    if math.isqrt(length) ** 2 != length:
        raise ValueError(f"{length} coefficients are not the bandwidth² harmonics of whole degrees: give B x L x C with L a square")
    return math.isqrt(length)


def _laid_out(coefficient_BxLxC: Array) -> Array:
    """B x L x C as B x D x M x C. Unused places repeat a coefficient of their degree: what reads them has zeros there."""
    return coefficient_BxLxC[:, _places(_bandwidth(coefficient_BxLxC))[0]]


def _places(bandwidth: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in L the entries of D x M are, and whether they are there (|m| <= l; otherwise the place of ±l instead)."""
    l_Dx1, m_M = np.arange(bandwidth)[:, None], np.arange(1 - bandwidth, bandwidth)
    return l_Dx1**2 + l_Dx1 + np.clip(m_M, -l_Dx1, l_Dx1), np.abs(m_M) <= l_Dx1


def _listed(coefficient_BxDxMxC: Array) -> Array:
    """B x D x M x C as B x L x C."""
    bandwidth = coefficient_BxDxMxC.shape[1]
    l_L, m_L = degree_order(bandwidth)
    return coefficient_BxDxMxC[:, l_L, m_L + bandwidth - 1]


def _waves(m_M: np.ndarray, phi_W: np.ndarray) -> np.ndarray:
    """√2 cos mφ, 1, √2 sin |m|φ for m > 0, = 0, < 0, M x W."""
    angle_MxW = np.abs(m_M)[:, None] * phi_W
    wave_MxW = np.where(m_M[:, None] < 0, np.sin(angle_MxW), np.cos(angle_MxW))
    return np.where(m_M[:, None] == 0, 1.0, math.sqrt(2)) * wave_MxW


def _legendre(bandwidth: int, theta_P: np.ndarray) -> np.ndarray:
    """P̄_l^m(cos θ), degree x order (0 .. bandwidth − 1) x P, zero for l < m; 2π ∫ (P̄_l^m)² sin θ dθ = 1.

    Upwards in l from P̄_m^m, the stable direction, on normalised values, which neither overflow nor cancel (Holmes and Featherstone,
    J. Geodesy 76, 2002, eq. 11-13). Near the poles sin^m θ underflows to the zero that it is to double precision.
    """
    value_DxMxP = np.zeros((bandwidth, bandwidth, theta_P.size))
    sine_P, cosine_P = np.sin(theta_P), np.cos(theta_P)
    value_DxMxP[0, 0] = math.sqrt(1 / (4 * math.pi))
    for l in range(1, bandwidth):  # noqa: E741 (the field's letter)
        m_Mx1 = np.arange(l)[:, None]
        first_Mx1 = np.sqrt((4 * l**2 - 1) / (l**2 - m_Mx1**2))
        second_Mx1 = np.sqrt(((l - 1) ** 2 - m_Mx1**2) / (4 * (l - 1) ** 2 - 1))  # zero at m = l − 1: no degree l − 2 there
        below = value_DxMxP[max(l - 2, 0), :l]
        value_DxMxP[l, :l] = first_Mx1 * (cosine_P * value_DxMxP[l - 1, :l] - second_Mx1 * below)
        value_DxMxP[l, l] = math.sqrt((2 * l + 1) / (2 * l)) * sine_P * value_DxMxP[l - 1, l - 1]
    return value_DxMxP


@functools.lru_cache(maxsize=32)
def _tables(height: int, width: int, bandwidth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(waves M x W, Legendre functions D x M x H times the area of a point, and without it), float32."""
    if not 1 <= bandwidth <= full_bandwidth(height, width):
        raise ValueError(
            f"a {height} x {width} grid resolves bandwidths 1 to {full_bandwidth(height, width)}, not {bandwidth}: "
            f"take fewer degrees, or at least {2 * bandwidth} x {2 * bandwidth} points"
        )
    m_M = np.arange(1 - bandwidth, bandwidth)
    legendre_DxMxH = _legendre(bandwidth, colatitude(height))[:, np.abs(m_M)]
    weighted_DxMxH = legendre_DxMxH * quadrature(height) * (2 * math.pi / width)
    wave_MxW = _waves(m_M, longitude(width))
    return wave_MxW.astype(np.float32), weighted_DxMxH.astype(np.float32), legendre_DxMxH.astype(np.float32)


@functools.lru_cache(maxsize=32)
def _quarter_turn(bandwidth: int) -> np.ndarray:
    """D(Q) of the turn Q about x that takes z to y, D x M x M, float32, zero outside the blocks of 2l + 1.

    ∫ Y_lm(x) Y_lm'(Q⁻¹x) by quadrature in float64, exact; row by row of the grid, or the dense harmonics would fill the memory.
    """
    n = 2 * bandwidth
    place_DxM, used_DxM = _places(bandwidth)
    phi_P, total_DxMxM = longitude(n), np.zeros((bandwidth, n - 1, n - 1))
    for theta, weight in zip(colatitude(n), quadrature(n) * 2 * math.pi / n, strict=True):
        x_P, y_P, z = math.sin(theta) * np.cos(phi_P), math.sin(theta) * np.sin(phi_P), math.cos(theta)
        here_PxL = harmonics(bandwidth, np.full(n, theta), phi_P)
        before_PxL = harmonics(bandwidth, np.arctan2(np.hypot(x_P, z), y_P), np.arctan2(-z, x_P))  # at Q⁻¹x = (x, −z, y)
        here_DxMxP, before_DxMxP = (value_PxL.T[place_DxM] for value_PxL in (here_PxL, before_PxL))
        total_DxMxM += weight * here_DxMxP @ before_DxMxP.transpose(0, 2, 1)
    return np.where(used_DxM[:, :, None] & used_DxM[:, None, :], total_DxMxM, 0.0).astype(np.float32)
