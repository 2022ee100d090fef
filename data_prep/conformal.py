"""Conformal maps of closed genus-0 meshes to the unit sphere, and what a data set stores of a mesh; float64 inside.

The map: conformalised mean-curvature flow (Kazhdan, Solomon and Ben-Chen, Can mean-curvature flow be modified to be
non-singular?, SGP 2012), whose limit is a round sphere and a conformal image of the surface.  It is unique up to Möbius maps;
of these the one is taken that puts the surface's mass into the sphere's centre (Baden, Crane and Kazhdan, Möbius registration,
SGP 2018), which leaves rotations.

Limbs.  One of length l and radius r shrinks by exp(−l/r) on the sphere, so the tips of thin ones are points before long.  Faces
smaller than what float32 tells apart are counted as lost, not as flipped or distorted.

Distortion is a matter of the mesh: faces must be small against the radius of the limb that they are on, in its direction too.
Measured: a mean ratio of 1.09 for a four-legged animal of 8,500 vertices, 1.24 with 1,400; 1.75 for a bent rod of radius 0.3 and
length 4.4 whose 2,562 vertices are stretched along it, 1.22 with 10,242.  For that rod a flow on the same faces split in four
reaches 1.47 and intrinsic Delaunay cotangents ruin the map; elsewhere these change the ratio by 8 % at most, up as often as down,
and another step nothing.  So the remedy for a rejected mesh is a finer one.
"""

import dataclasses
import time

import numpy as np
from scipy import sparse

from data_prep import surface
from niso.errors import UserError

MOST_FLIPPED, MOST_DISTORTED = 0.005, 1.5

_STEP, _MOST_STEPS, _STILL = 0.1, 80, 1e-4  # of the flow, for a surface of area 1
_CENTRED, _MOST_MOVES, _FARTHEST = 1e-12, 50, 0.8  # of the centring: |μ|, Newton's steps, |c| of one
_FITS = 0.01  # of the sphere's radius: 0.3 pixels of 96 x 192
_LOST = 1e-5  # longest edge on the sphere: 100 roundings of float32, 1/3,000 of a pixel of 96 x 192
_MOST_RINGS, _RELAXATIONS = 8, 30  # of untangling
_WORST = 100.0  # a face's ratio counts as at most this, or one face of no area would decide the mean


@dataclasses.dataclass(frozen=True)
class Conformal:
    """A mesh on the sphere.

    Attributes:
        sphere_Vx3: The vertices on the unit sphere, float32, in the order of the input.
        face_Fx3: The faces in the order of the input, int32, counterclockwise seen from outside.
        hks_VxT: The heat-kernel signature of the mesh with area 1 at `surface.TIMES_T`, float32.
        flipped: Share of the faces that are turned over on the sphere.
        distortion: Mean quasi-conformal ratio over the mesh's area without the lost faces; at least 1, which is conformal.
        lost: Share of the mesh's area whose faces are too small on the sphere for float32.
        iterations: Steps of the flow; 0 for a map that was given.
        seconds: What all of it took.
    """

    sphere_Vx3: np.ndarray
    face_Fx3: np.ndarray
    hks_VxT: np.ndarray
    flipped: float
    distortion: float
    lost: float
    iterations: int
    seconds: float


def process(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray, sphere_Vx3: np.ndarray | None = None) -> Conformal:
    """The mesh on the sphere with its heat-kernel signature: the same bits for the same input, but for `seconds`.

    The sphere's rotation is the flow's, near the mesh's own. Position and size of the mesh do not matter. A map to the sphere
    that is known already, `sphere_Vx3`, is taken instead of the flow's, and centred too.

    Raises:
        UserError: the mesh is no closed surface of genus 0 (`surface.checked`), has too few vertices, the flow broke down, or
            sphere_Vx3 is not one point around the origin for every vertex.
    """
    began = time.perf_counter()
    vertex_Vx3, face_Fx3 = surface.checked(vertex_Vx3, face_Fx3)
    stiffness_VxV, mass_V = surface.stiffness(vertex_Vx3, face_Fx3), surface.vertex_areas(vertex_Vx3, face_Fx3)
    hks_VxT = surface.heat_kernel_signature(*surface.eigenpairs(stiffness_VxV, mass_V))
    sphere_Vx3, iterations = flow(vertex_Vx3, face_Fx3) if sphere_Vx3 is None else (_known(sphere_Vx3, vertex_Vx3), 0)
    stored_Vx3 = centred(sphere_Vx3, mass_V).astype(np.float32)
    if iterations and (mended_Vx3 := untangled(stored_Vx3, face_Fx3)) is not stored_Vx3:
        stored_Vx3 = centred(_unit(mended_Vx3.astype(np.float64)), mass_V).astype(np.float32)
    flipped, distortion, lost = quality(vertex_Vx3, face_Fx3, stored_Vx3)
    seconds = time.perf_counter() - began
    return Conformal(stored_Vx3, face_Fx3, hks_VxT.astype(np.float32), flipped, distortion, lost, iterations, seconds)


def accepted(result: Conformal) -> bool:
    """Whether the map is good enough to be a datum: mean quasi-conformal ratio below 1.5, no face flipped; in a map that was given,
    which is left as it is, since maps may have been given with it, less than 0.5 % of the faces."""
    unflipped = result.flipped == 0 if result.iterations else result.flipped < MOST_FLIPPED
    return unflipped and result.distortion < MOST_DISTORTED


def flow(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> tuple[np.ndarray, int]:
    """(sphere_Vx3, steps): where conformalised mean-curvature flow takes the checked mesh, on the unit sphere.

    A step solves (M + 0.1 S) X' = M X with the vertex areas M of X and the stiffness S of the input, whose cotangents stay what
    they were: that is what keeps the flow from pinching necks. It then centres X' and gives it area 1. It ends when the mean
    motion, by the input's areas, is below 1e-4, or after 80 steps: coarse meshes go on drifting along the sphere's own Möbius
    maps, which changes nothing.

    Raises:
        UserError: a step is not finite.
    """
    weight_V = surface.vertex_areas(vertex_Vx3, face_Fx3)
    step_VxV = _STEP * surface.stiffness(vertex_Vx3, face_Fx3)
    x_Vx3, mass_V = vertex_Vx3, weight_V
    for step in range(1, _MOST_STEPS + 1):
        before_Vx3 = x_Vx3
        # S is semidefinite, so vertices whose area has vanished are harmless: they go where their neighbours pull them.
        factors = surface.factorised((sparse.diags_array(mass_V) + step_VxV).tocsc())
        x_Vx3, mass_V = _centred_unit_area(factors.solve(mass_V[:, None] * before_Vx3), face_Fx3)
        if not np.isfinite(x_Vx3).all():
            raise UserError(f"the flow to the sphere broke down after {step} steps: remesh the surface with rounder faces")
        motion = weight_V @ np.linalg.norm(x_Vx3 - before_Vx3, axis=1) / weight_V.sum()
        if motion < _STILL:
            break
    return _unit(x_Vx3), step


def centred(sphere_Vx3: np.ndarray, mass_V: np.ndarray) -> np.ndarray:
    """The points moved by the Möbius map (without rotation) that makes their mean, weighted by mass, zero; float64.

    Newton's method: for small c a centred inversion moves the mean μ by J c, J = 2 (I − Σ a s sᵀ). Steps are halved
    until |μ| falls.

    Raises:
        UserError: half of the mass or more is in one point, so that nothing centres it.
    """
    weight_V = mass_V / mass_V.sum()
    mean_3 = weight_V @ sphere_Vx3
    for _ in range(_MOST_MOVES):
        if np.linalg.norm(mean_3) < _CENTRED:
            break
        jacobian_3x3 = 2 * (np.eye(3) - (weight_V[:, None] * sphere_Vx3).T @ sphere_Vx3)
        c_3 = -np.linalg.lstsq(jacobian_3x3, mean_3)[0]
        c_3 *= min(1.0, _FARTHEST / np.linalg.norm(c_3))
        while np.linalg.norm(c_3) > _CENTRED:
            tried_Vx3 = _unit(centred_inversion(sphere_Vx3, c_3))
            if np.linalg.norm(weight_V @ tried_Vx3) < np.linalg.norm(mean_3):
                break
            c_3 /= 2
        else:
            break  # rounding
        sphere_Vx3, mean_3 = tried_Vx3, weight_V @ tried_Vx3
    if not np.linalg.norm(mean_3) < 1e-8:
        raise UserError(f"the mass on the sphere cannot be centred (|mean| {np.linalg.norm(mean_3):.2g}): remesh the surface")
    return sphere_Vx3


def untangled(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """The points, float32, those around flipped faces moved until none is flipped; where that does not succeed, as they were.

    They go to the mean of their neighbours, as in Tutte's embedding, which has no flipped face inside a convex outline; each round
    takes one ring of vertices more. What the flow flips are slivers, a few in ten thousand faces. Lost faces may lie as they do.
    """
    if not _flipped(sphere_Vx3, face_Fx3).any():
        return sphere_Vx3
    edge_Nx2 = np.concatenate([face_Fx3[:, [i, (i + 1) % 3]] for i in range(3)])  # in a closed surface each once in each direction
    neighbour_VxV = sparse.csr_array((np.ones(len(edge_Nx2)), edge_Nx2.T), shape=(len(sphere_Vx3), len(sphere_Vx3)))
    moved_Vx3 = sphere_Vx3
    for rings in range(_MOST_RINGS):
        flipped_F = _flipped(moved_Vx3, face_Fx3)
        near_V = np.zeros(len(sphere_Vx3))
        near_V[face_Fx3[flipped_F]] = 1
        for _ in range(rings):
            near_V += neighbour_VxV @ near_V
        near_M, free_Vx3 = np.flatnonzero(near_V), moved_Vx3.astype(np.float64)
        neighbour_MxV = neighbour_VxV[near_M]
        for _ in range(_RELAXATIONS):
            free_Vx3[near_M] = _unit(neighbour_MxV @ free_Vx3)
        moved_Vx3 = free_Vx3.astype(np.float32)
        if not _flipped(moved_Vx3, face_Fx3).any():
            return moved_Vx3
    return sphere_Vx3


def centred_inversion(sphere_Vx3: np.ndarray, c_3: np.ndarray) -> np.ndarray:
    """(1 − |c|²)(s + c)/|s + c|² + c for points s of the unit sphere, |c| < 1 (niso.geometry.moebius, in float64)."""
    shifted_Vx3 = sphere_Vx3 + c_3
    return (1 - c_3 @ c_3) * shifted_Vx3 / np.sum(shifted_Vx3**2, axis=1, keepdims=True) + c_3


def moebius_map(sphere_Vx3: np.ndarray, moved_Vx3: np.ndarray) -> tuple[np.ndarray, float]:
    """(Λ, off): the Möbius map, 4 x 4, float64, that takes points of the unit sphere to others (niso/geometry/moebius.py), and how
    far from these the points then are on average.

    Λ (1, s) is a multiple of (1, t) for each point s and its image t: linear equations, which Λ solves best but for a factor; that
    its determinant 1 and Λ₀₀ > 0 fix.

    Raises:
        UserError: there are not as many images as points, the map turns the sphere inside out, or it is 0.01 off or more.
    """
    image_Vx3 = _known(moved_Vx3, sphere_Vx3)
    lifted_Vx4 = np.concatenate([np.ones((len(sphere_Vx3), 1)), sphere_Vx3.astype(np.float64)], axis=1)
    # t (Λ s)₀ − (Λ s)₁₂₃ = 0; among the unknowns, row by row, the first four are (Λ)₀.
    outer_Vx3x4 = image_Vx3[:, :, None] * lifted_Vx4[:, None]
    inner_Vx3x12 = (np.eye(3)[None, :, :, None] * lifted_Vx4[:, None, None]).reshape(-1, 3, 12)
    equation_Nx16 = np.concatenate([outer_Vx3x4, -inner_Vx3x12], axis=2).reshape(-1, 16)
    matrix_4x4 = np.linalg.eigh(equation_Nx16.T @ equation_Nx16)[1][:, 0].reshape(4, 4)
    determinant = np.linalg.det(matrix_4x4)
    matrix_4x4 *= np.sign(matrix_4x4[0, 0]) / max(abs(determinant), 1e-100) ** 0.25
    off = float(np.linalg.norm(_unit((lifted_Vx4 @ matrix_4x4.T)[:, 1:]) - image_Vx3, axis=1).mean())
    if not off < _FITS:
        raise UserError(
            f"no Möbius map of the sphere comes near it ({off:.2g} off on average): are its vertices in the same order?"
        )
    if determinant <= 0:
        raise UserError("it is a mirror image of the mesh's map to the sphere: turn it over")
    return matrix_4x4, off


def quality(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray, sphere_Vx3: np.ndarray) -> tuple[float, float, float]:
    """(flipped, distortion, lost) of a map to the sphere, as in `Conformal`; without any face left the distortion is infinite."""
    sphere_Vx3 = sphere_Vx3.astype(np.float64)
    kept_F, flipped_F = _kept(sphere_Vx3, face_Fx3), _flipped(sphere_Vx3, face_Fx3)
    area_F = surface.face_areas(vertex_Vx3, face_Fx3)
    ratio_F = np.minimum(quasi_conformal_ratio(vertex_Vx3, face_Fx3, sphere_Vx3), _WORST)
    kept = area_F[kept_F].sum()
    distortion = area_F[kept_F] @ ratio_F[kept_F] / kept if kept else np.inf
    return float(flipped_F.mean()), float(distortion), float(area_F[~kept_F].sum() / area_F.sum())


def quasi_conformal_ratio(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray, image_Vx3: np.ndarray) -> np.ndarray:
    """ratio_F >= 1: largest over smallest singular value of the linear map from each triangle to its image.

    Their squares' sum over their product, q = ratio + 1/ratio, is the map's Dirichlet energy (Pinkall and Polthier 1993), half of
    the sum of a corner's cotangent times the image's opposite edge squared, over the image's area.
    """
    corner_Fx3x3 = image_Vx3[face_Fx3]
    across_Fx3x3 = np.roll(corner_Fx3x3, -1, axis=1) - np.roll(corner_Fx3x3, 1, axis=1)
    energy_F = np.sum(surface.cotangents(vertex_Vx3, face_Fx3) * np.sum(across_Fx3x3**2, axis=2), axis=1) / 2
    q_F = np.clip(energy_F / np.maximum(surface.face_areas(image_Vx3, face_Fx3), 1e-100), 2, 1e100)
    return (q_F + np.sqrt(q_F**2 - 4)) / 2


def _kept(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """kept_F: whether a face is not lost, that is large enough on the sphere for float32."""
    corner_Fx3x3 = sphere_Vx3.astype(np.float64)[face_Fx3]
    return np.linalg.norm(corner_Fx3x3 - np.roll(corner_Fx3x3, 1, axis=1), axis=2).max(axis=1) > _LOST


def _flipped(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """flipped_F: whether a face that is not lost is turned over."""
    return _kept(sphere_Vx3, face_Fx3) & (np.linalg.det(sphere_Vx3.astype(np.float64)[face_Fx3]) <= 0)


def _centred_unit_area(x_Vx3: np.ndarray, face_Fx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The surface with its centre of mass in the origin and area 1, and its vertices' areas."""
    mass_V = surface.vertex_areas(x_Vx3, face_Fx3)
    area = mass_V.sum()
    return (x_Vx3 - mass_V @ x_Vx3 / area) / np.sqrt(area), mass_V / area


def _known(sphere_Vx3: np.ndarray, vertex_Vx3: np.ndarray) -> np.ndarray:
    """The points of a given map, on the unit sphere; UserError unless they are on one, within 1 %, and as many as vertices."""
    if sphere_Vx3.shape != vertex_Vx3.shape:
        raise UserError(f"the mesh has {len(vertex_Vx3)} vertices, its map to the sphere {len(sphere_Vx3)}: they must correspond")
    length_V = np.linalg.norm(sphere_Vx3, axis=1)
    if not np.ptp(length_V) < 0.01 * length_V.mean():  # nor where one is not a number
        raise UserError(
            f"its map to the sphere has points {length_V.min():.3g} to {length_V.max():.3g} from the origin: not one sphere"
        )
    return _unit(np.asarray(sphere_Vx3, np.float64))


def _unit(x_Vx3: np.ndarray) -> np.ndarray:
    return x_Vx3 / np.linalg.norm(x_Vx3, axis=1, keepdims=True)
