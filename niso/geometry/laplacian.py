"""Reference Laplacians of the torus and the sphere, through their exact eigenfunctions; NumPy, float64.

What the learned operator Ω = Φ Λ Φᵀ M (niso.geometry.spectrum) is compared with. Eigenvalues are closed forms, not those of
a solver: a wave and its eigenvalue belong together exactly, also within eigenspaces.
"""

import dataclasses
import itertools

import numpy as np

from niso.geometry import sphere

# The 3 x 3 stencils of -Laplace, in units of the grid's spacing: the nearest neighbours, or all eight of them.
STENCILS = {
    "five": np.array([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]),
    "nine": np.array([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]) / 3,
}


@dataclasses.dataclass(frozen=True)
class Eigenbasis:
    """An operator on N grid points: eigenfunctions Φ with ΦᵀMΦ = I, eigenvalues Λ (ascending) and masses M; float64.

    Eigenvalues that are equal in theory are the same number.
    """

    basis_NxK: np.ndarray
    eigenvalue_K: np.ndarray
    mass_N: np.ndarray

    def matrix_NxN(self) -> np.ndarray:  # noqa: N802  (shape suffix)
        """The operator itself, Φ Λ Φᵀ M."""
        return (self.basis_NxK * self.eigenvalue_K) @ (self.mass_N[:, None] * self.basis_NxK).T


def toric(height: int, width: int, stencil: str = "five") -> Eigenbasis:
    """Returns the eigenbasis of the periodic Laplacian of a grid, all N = height * width functions; every mass is 1.

    The eigenfunctions are products of a real wave (cos or sin) along each side. With a = 2 - 2 cos(2 pi p / height) and b
    likewise of the width, p and q the wave numbers, the eigenvalues are
      "five" (default; the five-point stencil [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]):     a + b
      "nine" (the nine-point stencil [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]] / 3):      a + b - a b / 3
    Within an eigenspace p rises first, cos comes before sin.
    """
    _weights(stencil)
    (down_HxH, a_H), (across_WxW, b_W) = _waves(height), _waves(width)
    a_Hx1, b_1xW = a_H[:, None], b_W[None, :]
    eigenvalue_HxW = a_Hx1 + b_1xW if stencil == "five" else a_Hx1 + b_1xW - a_Hx1 * b_1xW / 3
    eigenvalue_N, order_N = _sorted(eigenvalue_HxW.reshape(-1))
    return Eigenbasis(np.kron(down_HxH, across_WxW)[:, order_N], eigenvalue_N, np.ones(height * width))


def toric_stencil(height: int, width: int, stencil: str = "five") -> np.ndarray:
    """Returns the matrix (N, N) of the stencil on the periodic grid, points row by row.

    Neighbours that coincide (a side of 1 or 2) add up.
    """
    weight_3x3 = _weights(stencil)
    shifts = [[np.roll(np.eye(side), step, axis=1) for step in (-1, 0, 1)] for side in (height, width)]
    return sum(
        (weight_3x3[i, j] * np.kron(shifts[0][i], shifts[1][j]) for i in range(3) for j in range(3)),
        np.zeros((height * width, height * width)),
    )


def spherical(size: int) -> Eigenbasis:
    """Returns the real spherical harmonics of degree l < size / 2 on the size x size Driscoll-Healy grid, eigenvalues l (l + 1).

    (l, m) is function l² + l + m; an even size has K = (size / 2)². The masses are the quadrature weights: they add up to 4 pi
    and integrate products of two of these functions exactly, hence ΦᵀMΦ = I (niso.geometry.sphere).
    """
    bandwidth = sphere.full_bandwidth(size, size)
    theta_N, phi_N = np.repeat(sphere.colatitude(size), size), np.tile(sphere.longitude(size), size)
    degree_K, _ = sphere.degree_order(bandwidth)
    basis_NxK = sphere.harmonics(bandwidth, theta_N, phi_N)
    return Eigenbasis(basis_NxK, (degree_K * (degree_K + 1)).astype(np.float64), sphere.area(size, size))


def eigenspaces(eigenvalue_K: np.ndarray, tolerance: float = 1e-6) -> list[slice]:
    """Returns the runs of equal eigenvalues, in order: neighbours differ by at most `tolerance` times the largest |eigenvalue|."""
    eigenvalue_K = np.asarray(eigenvalue_K, np.float64)
    limit = tolerance * np.abs(eigenvalue_K).max(initial=0.0)
    edges = [0, *(np.flatnonzero(np.abs(np.diff(eigenvalue_K)) > limit) + 1).tolist(), len(eigenvalue_K)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def _weights(stencil: str) -> np.ndarray:
    if stencil not in STENCILS:
        raise ValueError(f"no stencil {stencil!r}: choose one of {', '.join(STENCILS)}")
    return STENCILS[stencil]


def _waves(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The orthonormal real waves of a ring (side, side), 1 cos sin cos sin ..., and 2 - 2 cos(2 pi p / side) of each.

    Angles are whole multiples of 2 pi / side, reduced to one turn: no error grows with the wave number.
    """
    place_S = np.arange(side)
    number_S = (place_S + 1) // 2
    turn_SxS = np.outer(place_S, number_S) % side / side
    is_sine_S = (place_S % 2 == 0) & (place_S > 0)
    wave_SxS = np.where(is_sine_S, np.sin(2 * np.pi * turn_SxS), np.cos(2 * np.pi * turn_SxS))
    return wave_SxS / np.linalg.norm(wave_SxS, axis=0), 2 - 2 * np.cos(2 * np.pi * number_S / side)


def _sorted(eigenvalue_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues and their order, stable among those that differ only by rounding, which become equal."""
    order_N = np.argsort(eigenvalue_N, kind="stable")
    sorted_N = eigenvalue_N[order_N]
    for space in eigenspaces(sorted_N, 1e-12):  # 1e-12: rounding is 1e-15, two distinct ones are further apart
        order_N[space] = np.sort(order_N[space])
        sorted_N[space] = sorted_N[space].mean()
    return sorted_N, order_N
