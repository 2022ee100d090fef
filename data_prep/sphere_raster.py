"""Functions on the vertices of a mesh on the sphere, at any of its points: exact barycentric interpolation; float64."""

import numpy as np
from scipy import spatial

_MOST_MOVES = 2_000
_INSIDE = -1e-12  # distance from an edge's plane: rounding


def grid(height: int) -> np.ndarray:
    """point_HxWx3, W = 2 H: colatitudes π(2i + 1)/2H from +z, longitudes 2πj/W from +x: that of niso.geometry.sphere."""
    theta_Hx1 = np.pi * (np.arange(height) + 0.5)[:, None] / height
    phi_W = 2 * np.pi * np.arange(2 * height) / (2 * height)
    z_HxW = np.broadcast_to(np.cos(theta_Hx1), (height, 2 * height))
    return np.stack([np.sin(theta_Hx1) * np.cos(phi_W), np.sin(theta_Hx1) * np.sin(phi_W), z_HxW], axis=-1)


def areas(height: int) -> np.ndarray:
    """weight_H: share of the sphere that a point of each row of the grid stands for; over all rows and columns they add to 1."""
    edge_E = np.cos(np.pi * np.arange(height + 1) / height)
    return (edge_E[:-1] - edge_E[1:]) / (4 * height)


def interpolate(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray, value_VxC: np.ndarray, point_Px3: np.ndarray) -> np.ndarray:
    """value_PxC: at each point the values of its face's corners, by the point's barycentric coordinates in the flat triangle
    after central projection."""
    corner_Px3, weight_Px3 = locate(sphere_Vx3, face_Fx3, point_Px3)
    value_PxC = np.zeros((len(point_Px3), value_VxC.shape[1]))
    for corner_P, weight_P in zip(corner_Px3.T, weight_Px3.T, strict=True):
        value_PxC += weight_P[:, None] * value_VxC[corner_P]
    return value_PxC


def locate(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray, point_Px3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(corner_Px3, weight_Px3): the vertices of the face that each point is in, and its barycentric coordinates there.

    A closed mesh with its faces counterclockwise seen from outside. From a face at the nearest vertex on across an edge that
    has the point on its other side, one of several at random (Devillers, Pion and Teillaud, Walking in a triangulation,
    2002); with a fixed seed. Where faces are turned over several may hold a point: the first one met is taken.
    """
    sphere_Vx3 = np.asarray(sphere_Vx3, np.float64)
    normal_Fx3x3 = _edge_normals(sphere_Vx3, face_Fx3)
    length_Fx3x1 = np.linalg.norm(normal_Fx3x3, axis=2, keepdims=True)
    unit_Fx3x3 = np.divide(normal_Fx3x3, length_Fx3x1, out=np.zeros_like(normal_Fx3x3), where=length_Fx3x1 > 0)
    face_P = _walk(unit_Fx3x3, _across(face_Fx3, len(sphere_Vx3)), _start(sphere_Vx3, face_Fx3, point_Px3), point_Px3)
    weight_Px3 = np.maximum(np.einsum("pej,pj->pe", normal_Fx3x3[face_P], point_Px3), 0)
    total_Px1 = weight_Px3.sum(axis=1, keepdims=True)
    weight_Px3 = np.divide(weight_Px3, total_Px1, out=np.full_like(weight_Px3, 1 / 3), where=total_Px1 > 0)
    return face_Fx3[face_P], weight_Px3


def _edge_normals(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray) -> np.ndarray:
    """normal_Fx3x3: of the plane through the origin and the edge across from each corner, on the corner's side."""
    corner_Fx3x3 = sphere_Vx3[face_Fx3]
    return np.cross(np.roll(corner_Fx3x3, -1, axis=1), np.roll(corner_Fx3x3, 1, axis=1))


def _across(face_Fx3: np.ndarray, vertices: int) -> np.ndarray:
    """other_Fx3: the face on the other side of the edge across from each corner."""
    tail_N, head_N = (np.roll(face_Fx3, shift, axis=1).ravel().astype(np.int64) for shift in (-1, 1))
    key_N, opposite_N = tail_N * vertices + head_N, head_N * vertices + tail_N
    order_N = np.argsort(key_N)
    return (order_N[np.searchsorted(key_N, opposite_N, sorter=order_N)] // 3).reshape(-1, 3)


def _start(sphere_Vx3: np.ndarray, face_Fx3: np.ndarray, point_Px3: np.ndarray) -> np.ndarray:
    """face_P: one of those around the vertex that is nearest to each point."""
    of_V = np.zeros(len(sphere_Vx3), np.int64)
    of_V[face_Fx3.ravel()] = np.arange(face_Fx3.size) // 3
    return of_V[spatial.cKDTree(sphere_Vx3).query(point_Px3)[1]]


def _walk(unit_Fx3x3: np.ndarray, other_Fx3: np.ndarray, face_P: np.ndarray, point_Px3: np.ndarray) -> np.ndarray:
    """face_P: where the walks end."""
    rng, face_P, on_the_way_A = np.random.default_rng(0), face_P.copy(), np.arange(len(point_Px3))
    for _ in range(_MOST_MOVES):
        here_A = face_P[on_the_way_A]
        side_Ax3 = np.einsum("aej,aj->ae", unit_Fx3x3[here_A], point_Px3[on_the_way_A])
        leave_A = side_Ax3.min(axis=1) < _INSIDE
        if not leave_A.any():
            return face_P
        on_the_way_A, here_A, side_Ax3 = on_the_way_A[leave_A], here_A[leave_A], side_Ax3[leave_A]
        # The farthest edge, but by chance another one.
        edge_A = np.argmin(np.minimum(side_Ax3, 0) * rng.uniform(0.01, 1, side_Ax3.shape), axis=1)
        face_P[on_the_way_A] = other_Fx3[here_A, edge_A]
    for p in on_the_way_A:  # turned-over faces can hold a walk for ever: the face that the point is least outside of
        face_P[p] = np.argmax((unit_Fx3x3 @ point_Px3[p]).min(axis=1))
    return face_P
