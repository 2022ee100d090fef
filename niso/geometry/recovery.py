"""How well a learned operator is the true one: commutation with the symmetry, eigenspaces, blocks, kernel.

NumPy float64, on the host. A learned Ω is known up to what its training cannot see: the scale of its eigenvalues, and their
order where the symmetry does not fix it (shifts of a torus fix pairs of waves ±(a, b), not which pairs share an eigenvalue).
"""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from niso.geometry import sphere
from niso.geometry.laplacian import Eigenbasis, eigenspaces, spherical
from niso.geometry.spectrum import HALF

LISTED = 8  # eigenspaces that are reported one by one


def starts(eigenvalue_K: np.ndarray, gap: float = HALF) -> list[int]:
    """Where clusters of ascending eigenvalues begin, the first at 0: after every gap larger than `gap`."""
    return [0, *(np.flatnonzero(np.diff(eigenvalue_K) > gap) + 1).tolist()]


def shifts(edge: int) -> Iterator[np.ndarray]:
    """All cyclic shifts of an edge x edge grid but the identity, as matrices N x N, one by one."""
    points_ExE = np.arange(edge**2).reshape(edge, edge)
    moved = [np.roll(points_ExE, (i, j), (0, 1)).reshape(-1) for i in range(edge) for j in range(edge)]
    return (np.eye(edge**2)[moved_N] for moved_N in moved[1:])


def rotations(edge: int, count: int) -> Iterator[np.ndarray]:
    """`count` random rotations, always the same, of band-limited functions on an edge x edge Driscoll-Healy grid, N x N."""
    harmonics = spherical(edge)
    rotation_Bx3x3 = sphere.random_rotation(jax.random.key(0), count)
    turn_BxLxL = np.asarray(sphere.rotation_operator(rotation_Bx3x3, edge // 2), np.float64)
    analysis_LxN = harmonics.basis_NxK.T * harmonics.mass_N
    return (harmonics.basis_NxK @ turn_LxL @ analysis_LxN for turn_LxL in turn_BxLxL)


def orthonormal_coordinates(basis_NxK: np.ndarray, mass_N: np.ndarray) -> np.ndarray:
    """M^{1/2} Φ: mass-orthonormal functions as orthonormal columns, N x K."""
    return np.sqrt(mass_N)[:, None] * basis_NxK


def commutation(operator_NxN: np.ndarray, moves: Iterable[np.ndarray]) -> float:
    """Mean of ‖Ω S − S Ω‖_F / ‖Ω‖_F over the matrices S of the symmetry; 0 for an operator that commutes with all of them.

    In coordinates in which the S are orthogonal (M^{1/2} Ω M^{-1/2}, with the true masses) it lies between 0 and 2.
    """
    norm = np.linalg.norm(operator_NxN)
    return float(np.mean([np.linalg.norm(operator_NxN @ move_NxN - move_NxN @ operator_NxN) / norm for move_NxN in moves]))


def in_true_coordinates(learned: Eigenbasis, true: Eigenbasis) -> np.ndarray:
    """Learned eigenfunctions as orthonormal columns where the true ones are orthonormal, N x K: the nearest ones, because learned
    masses are not exactly the true ones."""
    left_NxK, _, right_KxK = np.linalg.svd(orthonormal_coordinates(learned.basis_NxK, true.mass_N), full_matrices=False)
    return left_NxK @ right_KxK


def rayleigh_quotients(learned_NxK: np.ndarray, true: Eigenbasis) -> np.ndarray:
    """The true operator's quadratic form on learned eigenfunctions (`in_true_coordinates`), K: where they belong in its spectrum.

    Infinite for a function that is mostly outside of the true operator's span (on the sphere: beyond its band limit).
    """
    energy_TxK = (orthonormal_coordinates(true.basis_NxK, true.mass_N).T @ learned_NxK) ** 2
    inside_K = energy_TxK.sum(axis=0)
    return np.where(inside_K > 0.5, (true.eigenvalue_K @ energy_TxK) / np.maximum(inside_K, 0.5), np.inf)


@dataclasses.dataclass(frozen=True)
class Eigenspace:
    """One true eigenspace in what was learned: the share of it, in [0, 1], that m learned eigenfunctions span.

    Attributes:
      eigenvalue, size: the true eigenvalue and its multiplicity m.
      energy: of the m learned eigenfunctions that have most of their own energy in it: the mean cos² of the principal angles.
      angle_M: these angles, degrees, ascending.
      energy_by_rayleigh: of the m whose Rayleigh quotients under the true operator are nearest to the eigenvalue.
      energy_by_order: of the m at the same places in the order of the learned eigenvalues.
    """

    eigenvalue: float
    size: int
    energy: float
    angle_M: np.ndarray
    energy_by_rayleigh: float
    energy_by_order: float


def recovered(learned_NxK: np.ndarray, true: Eigenbasis, count: int) -> list[Eigenspace]:
    """The `count` lowest true eigenspaces (fewer, if there are fewer within the first K functions) in a learned basis.

    Three ways to say which learned eigenfunctions stand for a true eigenspace, from the kindest to the strictest: a random
    basis has little energy in any of them.

    Args:
      learned_NxK: `in_true_coordinates`.
    """
    true_NxK = orthonormal_coordinates(true.basis_NxK, true.mass_N)
    overlap_TxK = true_NxK.T @ learned_NxK
    energy_TxK, rayleigh_K = overlap_TxK**2, rayleigh_quotients(learned_NxK, true)
    found: list[Eigenspace] = []
    for space in eigenspaces(true.eigenvalue_K)[:count]:
        size = space.stop - space.start
        if space.stop > learned_NxK.shape[1]:
            break
        eigenvalue, energy_K = float(true.eigenvalue_K[space].mean()), energy_TxK[space].sum(axis=0)
        most_M = np.argsort(-energy_K, kind="stable")[:size]
        nearest_M = np.argsort(np.abs(rayleigh_K - eigenvalue), kind="stable")[:size]
        cosine_M = np.clip(np.linalg.svd(overlap_TxK[space][:, most_M], compute_uv=False), 0.0, 1.0)
        shares = (float(energy_K[chosen].mean()) for chosen in (most_M, nearest_M, space))
        energy, by_rayleigh, by_order = shares
        found.append(Eigenspace(eigenvalue, size, energy, np.degrees(np.arccos(cosine_M)), by_rayleigh, by_order))
    return found


def kernel_correlation(learned_NxN: np.ndarray, true_NxN: np.ndarray) -> float:
    """Mean over grid points x of the correlation of the kernels Ω(x, ·) and Δ(x, ·), in [−1, 1]."""
    a_NxN = learned_NxN - learned_NxN.mean(axis=1, keepdims=True)
    b_NxN = true_NxN - true_NxN.mean(axis=1, keepdims=True)
    norm_N = np.linalg.norm(a_NxN, axis=1) * np.linalg.norm(b_NxN, axis=1)
    return float(np.mean((a_NxN * b_NxN).sum(axis=1) / np.maximum(norm_N, 1e-30)))


def figures_of_merit(learned: Eigenbasis, true: Eigenbasis, moves: Iterable[np.ndarray], lowest: int) -> dict[str, float]:
    """Everything above about one learned operator, for an evaluation; shares in percent, angles in degrees.

    commutation: with `moves`, in the coordinates of the true masses. energy, energy_worst, angle, angle_worst: of the `lowest`
    true eigenspaces, means and worst; energy_by_rayleigh, energy_by_order: means; energy_eigenspace_0, ...: of the lowest LISTED
    ones. clusters, largest_cluster: of learned eigenvalues.
    kernel_correlation: with the true operator. mass_correlation, if the true masses differ.
    """
    root_N = np.sqrt(true.mass_N)
    weigh = root_N[:, None] / root_N
    spaces = recovered(in_true_coordinates(learned, true), true, lowest)
    cluster_S = np.diff([*starts(learned.eigenvalue_K), len(learned.eigenvalue_K)])
    angle_A = np.concatenate([space.angle_M for space in spaces])
    merits = {
        "commutation": commutation(weigh * learned.matrix_NxN(), (weigh * move_NxN for move_NxN in moves)),
        "energy": 100 * float(np.mean([space.energy for space in spaces])),
        "energy_worst": 100 * min(space.energy for space in spaces),
        "energy_by_rayleigh": 100 * float(np.mean([space.energy_by_rayleigh for space in spaces])),
        "energy_by_order": 100 * float(np.mean([space.energy_by_order for space in spaces])),
        "angle": float(angle_A.mean()),
        "angle_worst": float(angle_A.max()),
        "clusters": float(len(cluster_S)),
        "largest_cluster": float(cluster_S.max()),
        "kernel_correlation": kernel_correlation(learned.matrix_NxN(), true.matrix_NxN()),
    }
    merits |= {f"energy_eigenspace_{index}": 100 * space.energy for index, space in enumerate(spaces[:LISTED])}
    if np.ptp(true.mass_N) > 0:
        merits["mass_correlation"] = kernel_correlation(learned.mass_N[None], true.mass_N[None])
    return merits
