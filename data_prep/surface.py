"""Closed triangle meshes of genus 0 and their Laplacian: checks, areas, stiffness, eigenpairs, heat-kernel signature; float64.

A mesh is vertex_Vx3 (coordinates) and face_Fx3 (whole numbers, counterclockwise seen from outside).  Its Laplacian is the
pair of the cotangent stiffness matrix and the vertices' areas (Pinkall and Polthier, Computing discrete minimal surfaces, 1993;
Meyer et al., Discrete differential-geometry operators, 2003): stiffness φ = λ mass φ, λ >= 0.
"""

import itertools

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph, linalg

from niso.errors import UserError

EIGENPAIRS = 128
TIMES_T = np.logspace(-2, 0, 16)  # of the heat-kernel signature, for a surface of area 1
TIMES_T.flags.writeable = False

_SLIVER = 1e-10  # of the mean area of a face: its cotangents would be rounding
_SHIFT = -1e-2  # the smallest eigenvalue is 0, the next of the order of 4π or, with thin limbs, 1


def icosphere(subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    """(vertex_Vx3, face_Fx3) of a unit sphere: an icosahedron whose 20 faces are split in four so many times.

    V = 10 · 4ⁿ + 2: 642 for 3, 2,562 for 4, 10,242 for 5. The first vertices are those with fewer subdivisions.
    """
    golden = (1 + np.sqrt(5)) / 2
    corners = [np.roll((0, one, other), turn) for one in (1, -1) for other in (golden, -golden) for turn in range(3)]
    vertex_Vx3 = np.array(corners, np.float64) / np.sqrt(1 + golden**2)
    near_VxV = vertex_Vx3 @ vertex_Vx3.T > 0.4  # neighbours: 1/√5; the next: −1/√5
    triples = [t for t in itertools.combinations(range(12), 3) if all(near_VxV[pair] for pair in itertools.combinations(t, 2))]
    face_Fx3 = np.array(triples, np.int32)
    inward_F = np.linalg.det(vertex_Vx3[face_Fx3]) < 0
    face_Fx3[inward_F] = face_Fx3[inward_F, ::-1]
    for _ in range(subdivisions):
        edge_Nx2 = np.sort(np.stack([face_Fx3, np.roll(face_Fx3, -1, axis=1)], axis=-1).reshape(-1, 2), axis=1)
        edge_Ex2, of_N = np.unique(edge_Nx2, axis=0, return_inverse=True)
        middle_Ex3 = vertex_Vx3[edge_Ex2].sum(axis=1)
        middle_Fx3 = (len(vertex_Vx3) + of_N).reshape(-1, 3).astype(np.int32)
        vertex_Vx3 = np.concatenate([vertex_Vx3, middle_Ex3 / np.linalg.norm(middle_Ex3, axis=1, keepdims=True)])
        outer = [np.stack([face_Fx3[:, i], middle_Fx3[:, i], middle_Fx3[:, i - 1]], axis=1) for i in range(3)]
        face_Fx3 = np.concatenate([*outer, middle_Fx3])
    return vertex_Vx3, face_Fx3


def checked(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh with area 1 (vertex_Vx3 float64) and its faces counterclockwise seen from outside (face_Fx3 int32).

    Raises:
        UserError: it is not one closed surface of genus 0 with consistent faces, or a face or a vertex has no area.
    """
    vertex_Vx3 = np.asarray(vertex_Vx3, np.float64)
    face_Fx3 = np.asarray(face_Fx3)
    _check_arrays(vertex_Vx3, face_Fx3)
    face_Fx3 = face_Fx3.astype(np.int32)
    _check_topology(len(vertex_Vx3), face_Fx3)
    area_F = face_areas(vertex_Vx3, face_Fx3)
    thin_K = np.flatnonzero(~(area_F > _SLIVER * area_F.mean()))
    if thin_K.size:
        raise UserError(f"face {thin_K[0]} is degenerate: its area is {area_F[thin_K[0]]:.2g}; collapse or remesh such faces")
    vertex_Vx3 = (vertex_Vx3 - vertex_Vx3.mean(axis=0)) / np.sqrt(area_F.sum())
    volume = np.linalg.det(vertex_Vx3[face_Fx3]).sum()  # six times, signed
    return vertex_Vx3, face_Fx3 if volume > 0 else np.ascontiguousarray(face_Fx3[:, ::-1])


def face_areas(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """area_F of the flat triangles, in squares of the coordinates' unit."""
    a_Fx3, b_Fx3, c_Fx3 = np.moveaxis(vertex_Vx3[face_Fx3], 1, 0)
    return np.linalg.norm(np.cross(b_Fx3 - a_Fx3, c_Fx3 - a_Fx3), axis=1) / 2


def vertex_areas(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """mass_V: a third of the areas of the faces around each vertex (the lumped mass matrix's diagonal)."""
    area_F = face_areas(vertex_Vx3, face_Fx3)
    return np.bincount(face_Fx3.ravel(), np.repeat(area_F / 3, 3), minlength=len(vertex_Vx3))


def cotangents(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """cotangent_Fx3 of the angles at the faces' corners."""
    corner_Fx3x3 = vertex_Vx3[face_Fx3]
    to_next_Fx3x3, to_last_Fx3x3 = (np.roll(corner_Fx3x3, shift, axis=1) - corner_Fx3x3 for shift in (-1, 1))
    twice_F = 2 * face_areas(vertex_Vx3, face_Fx3)
    return np.sum(to_next_Fx3x3 * to_last_Fx3x3, axis=2) / twice_F[:, None]


def stiffness(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> sparse.csc_array:
    """stiffness_VxV: fᵀ S f is the integral of |∇f|² of the piecewise linear f; symmetric, positive semidefinite, S 1 = 0.

    Its entries do not depend on the mesh's scale.
    """
    half_N = cotangents(vertex_Vx3, face_Fx3).ravel() / 2
    i_N, j_N = np.roll(face_Fx3, -1, axis=1).ravel(), np.roll(face_Fx3, 1, axis=1).ravel()  # the edge across from each corner
    row_M, column_M = np.concatenate([i_N, j_N, i_N, j_N]), np.concatenate([j_N, i_N, i_N, j_N])
    value_M = np.concatenate([-half_N, -half_N, half_N, half_N])
    size = len(vertex_Vx3)
    return sparse.coo_array((value_M, (row_M, column_M)), shape=(size, size)).tocsc()


def factorised(matrix_VxV: sparse.csc_array) -> linalg.SuperLU:
    """The factors of a symmetric positive definite matrix: no pivots, an order made for symmetric ones."""
    options = {"SymmetricMode": True}
    return linalg.splu(matrix_VxV, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)


def eigenpairs(stiffness_VxV: sparse.csc_array, mass_V: np.ndarray, count: int = EIGENPAIRS) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalue_K ascending, basis_VxK) of the K smallest: basisᵀ diag(mass) basis is the identity.

    By shift and invert (ARPACK), as the symmetric problem of M^-1/2 S M^-1/2. The start is fixed: the same bits for the same mesh.

    Raises:
        UserError: the mesh has too few vertices for so many.
    """
    size = len(mass_V)
    if size <= count + 1:
        raise UserError(f"a mesh of {size} vertices has no {count} eigenpairs that could be told: give one of {count + 2} or more")
    root_V = np.sqrt(mass_V)
    scale_VxV = sparse.diags_array(1 / root_V)
    matrix_VxV = (scale_VxV @ stiffness_VxV @ scale_VxV).tocsc()
    factors = factorised((matrix_VxV - _SHIFT * sparse.eye_array(size)).tocsc())
    inverse = linalg.LinearOperator((size, size), matvec=factors.solve, dtype=np.float64)
    start_V = np.random.default_rng(0).standard_normal(size)
    eigenvalue_K, basis_VxK = linalg.eigsh(matrix_VxV, count, sigma=_SHIFT, OPinv=inverse, v0=start_V)
    order_K = np.argsort(eigenvalue_K)
    return np.maximum(eigenvalue_K[order_K], 0), basis_VxK[:, order_K] / root_V[:, None]


def heat_kernel_signature(eigenvalue_K: np.ndarray, basis_VxK: np.ndarray, time_T: np.ndarray = TIMES_T) -> np.ndarray:
    """hks_VxT = Σ_k φ_k² exp(−λ_k t): the heat that is still at a point after a time t (Sun, Ovsjanikov and Guibas, A concise
    and provably informative multi-scale signature, 2009). Its area-weighted mean over a surface of area 1 is Σ_k exp(−λ_k t)."""
    return basis_VxK**2 @ np.exp(-np.outer(eigenvalue_K, time_T))


def _check_arrays(vertex_Vx3: np.ndarray, face_Fx3: np.ndarray) -> None:
    if vertex_Vx3.ndim != 2 or vertex_Vx3.shape[1] != 3 or not np.isfinite(vertex_Vx3).all():
        raise UserError(f"vertices of shape {vertex_Vx3.shape}: give V x 3 finite coordinates")
    if face_Fx3.ndim != 2 or face_Fx3.shape[1] != 3 or face_Fx3.dtype.kind not in "iu" or not face_Fx3.size:
        raise UserError(
            f"faces of shape {face_Fx3.shape} and type {face_Fx3.dtype}: give F x 3 whole numbers; split larger polygons"
        )
    if face_Fx3.min() < 0 or face_Fx3.max() >= len(vertex_Vx3):
        wrong = face_Fx3.min() if face_Fx3.min() < 0 else face_Fx3.max()
        raise UserError(f"a face has vertex {wrong} of a mesh of {len(vertex_Vx3)} vertices: number them from 0")


def _check_topology(vertices: int, face_Fx3: np.ndarray) -> None:
    """UserError unless it is one closed, consistently oriented surface of genus 0 that uses every vertex."""
    next_Fx3 = np.roll(face_Fx3, -1, axis=1)
    repeated_K = np.flatnonzero((face_Fx3 == next_Fx3).any(axis=1))
    if repeated_K.size:
        raise UserError(f"face {repeated_K[0]} is degenerate: it has a vertex twice; remove such faces")
    unused_K = np.setdiff1d(np.arange(vertices), face_Fx3)
    if unused_K.size:
        raise UserError(f"vertex {unused_K[0]} is in no face ({unused_K.size} such vertices): remove them")
    tail_N, head_N = face_Fx3.ravel().astype(np.int64), next_Fx3.ravel().astype(np.int64)
    low_N, high_N = np.minimum(tail_N, head_N), np.maximum(tail_N, head_N)
    edge_E, first_E, of_N, count_E = np.unique(
        low_N * vertices + high_N, return_index=True, return_inverse=True, return_counts=True
    )
    for bad_K, what in (
        (np.flatnonzero(count_E == 1), "is in one face: the mesh is open; merge duplicate vertices or fill its holes"),
        (np.flatnonzero(count_E > 2), "is in more than two faces: the mesh is no surface; remove inner or doubled faces"),
        (np.flatnonzero(np.bincount(of_N, np.sign(head_N - tail_N)) != 0), "runs the same way in both of its faces: flip one"),
    ):
        if bad_K.size:
            edge = f"{low_N[first_E[bad_K[0]]]}-{high_N[first_E[bad_K[0]]]}"
            raise UserError(f"edge {edge} {what} ({bad_K.size} such edges)")
    # Corners of a vertex, joined across edges: one fan of faces per vertex.
    corner_N = np.arange(face_Fx3.size)
    pair_Ex2 = np.argsort(of_N, kind="stable").reshape(-1, 2)
    one_E, other_E = pair_Ex2.T
    follows_N = corner_N // 3 * 3 + (corner_N + 1) % 3  # the corner at the head of the edge from this corner
    row_M, column_M = np.concatenate([one_E, follows_N[one_E]]), np.concatenate([follows_N[other_E], other_E])
    fans, fan_N = _components(row_M, column_M, face_Fx3.size)
    if fans != vertices:
        first = np.argmax(np.bincount(np.unique(np.stack([tail_N, fan_N], axis=1), axis=0)[:, 0]))
        raise UserError(f"vertex {first} joins pieces that touch in it alone: the mesh is no surface; split such vertices")
    pieces, _ = _components(tail_N, head_N, vertices)
    if pieces != 1:
        raise UserError(f"the mesh has {pieces} pieces that do not touch: give them one by one, or keep the largest")
    genus = (2 - (vertices - len(edge_E) + len(face_Fx3))) // 2
    if genus:
        raise UserError(f"the mesh has genus {genus} ({genus} handles): only genus 0 maps to the sphere; fill or cut the handles")


def _components(row_M: np.ndarray, column_M: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    return csgraph.connected_components(
        sparse.coo_array((np.ones(len(row_M)), (row_M, column_M)), shape=(size, size)), directed=False
    )
