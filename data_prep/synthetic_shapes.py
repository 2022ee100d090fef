"""Procedural closed meshes of genus 0: a twin of the data set of conformal shapes, with nothing to download.

A class is a body with limbs: where these sit, how long and how thick they are. A pose of it has limbs a little elsewhere and of
other lengths, a surface of its own in detail, is bent about two axes, and turned. A body is r(s) s over the directions s of the
sphere, with a bump for every limb; its vertices are then spread along the surface, since those of an even sphere would lie far
apart on the limbs, and the map to the sphere be poor there.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep import surface

# Part of the twin's folder: raise it when the same twin gives other meshes.
VERSION = 1
_ROUNDS = 60  # of spreading the vertices
# Twin -> subdivisions of the sphere, poses of every class.
_MESHES = {"tiny": (2, 3), "small": (3, 14), "full": (4, 20)}
# Twin -> options of data_prep.shapes: the published 10 + 4 meshes of every class, or fewer.
PREPARATION: dict[str, dict[str, Any]] = {
    "tiny": {"train": 2, "test": 1},
    "small": {"train": 10, "test": 4},
    "full": {"train": 10, "test": 4},
}


@dataclasses.dataclass(frozen=True)
class Body:
    """Limbs: directions, lengths in radii of the trunk and sharpnesses (a limb's width is 1/√sharpness radians); and the
    trunk's half axes."""

    limb_Lx3: tuple[tuple[float, float, float], ...]
    length_L: tuple[float, ...]
    sharpness: float = 8.0
    axes: tuple[float, float, float] = (1.0, 1.0, 1.0)


_TETRAHEDRON = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
_AXES = ((1.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, -1.0))
_STAR = ((1.0, 0.0, 0.0), (-0.5, 0.866, 0.0), (-0.5, -0.866, 0.0))
BODIES = {
    "boomerang": Body(((1.0, 0.0, 0.0), (-0.2, 1.0, 0.0)), (1.3, 1.3)),
    "caltrop": Body(_TETRAHEDRON, (1.2,) * 4),
    "disc": Body((), (), axes=(1.0, 1.0, 0.45)),
    "dumbbell": Body(_AXES[4:], (1.3, 1.3), sharpness=5.0),
    "jack": Body(_AXES, (0.8,) * 6, sharpness=9.0),
    "pear": Body(_AXES[4:5], (1.5,), sharpness=5.0),
    "quadruped": Body(
        ((1, 0.5, -0.7), (1, -0.5, -0.7), (-1, 0.5, -0.7), (-1, -0.5, -0.7), (1.3, 0, 0.8)), (0.9,) * 4 + (0.6,), 12.0
    ),
    "tripod": Body(_STAR, (1.2,) * 3),
}


def generate(folder: pathlib.Path, twin: str, workers: int = 1, progress: bool = True) -> None:
    """Writes folder/<class>/<pose>.npz, the meshes of that twin: functions of (class, pose), in seconds."""
    subdivisions, poses = _MESHES[twin]
    for category in BODIES:
        of_class = pathlib.Path(folder, category)
        of_class.mkdir(parents=True, exist_ok=True)
        for pose in range(poses):
            vertex_Vx3, face_Fx3 = mesh(category, pose, subdivisions)
            np.savez(of_class / f"{category}-{pose:02d}.npz", vertex_Vx3=vertex_Vx3, face_Fx3=face_Fx3)


def mesh(category: str, pose: int, subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    """(vertex_Vx3, face_Fx3) of a pose of a class; of 10 · 4ⁿ + 2 vertices."""
    rng = np.random.default_rng((sorted(BODIES).index(category), pose))
    radius = _varied(BODIES[category], rng)
    sphere_Vx3, face_Fx3 = surface.icosphere(subdivisions)
    vertex_Vx3 = sphere_Vx3 * radius(sphere_Vx3)[:, None]
    # Every edge has a direction in one face, and the other one in another: so this lists the neighbours of every vertex.
    of_N, other_N = face_Fx3.ravel(), np.roll(face_Fx3, 1, axis=1).ravel()
    for _ in range(_ROUNDS):
        around_Vx3 = np.stack([np.bincount(of_N, column_V[other_N]) for column_V in vertex_Vx3.T], axis=1)
        middle_Vx3 = (vertex_Vx3 + around_Vx3 / np.bincount(of_N)[:, None]) / 2
        direction_Vx3 = middle_Vx3 / np.linalg.norm(middle_Vx3, axis=1, keepdims=True)
        vertex_Vx3 = direction_Vx3 * radius(direction_Vx3)[:, None]
    for _ in range(2):
        along_3, about_3, _ = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        vertex_Vx3 = _bent(vertex_Vx3, along_3, about_3, rng.uniform(-0.6, 0.6))
    turn_3x3 = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return vertex_Vx3 @ (turn_3x3 * np.sign(np.linalg.det(turn_3x3))), face_Fx3


def _varied(body: Body, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """radius(direction_Vx3) -> radius_V of one pose of a body."""
    limb_Lx3 = np.array(body.limb_Lx3, np.float64).reshape(-1, 3)
    limb_Lx3 = limb_Lx3 / np.linalg.norm(limb_Lx3, axis=1, keepdims=True) + rng.normal(0, 0.08, limb_Lx3.shape)
    length_L = np.array(body.length_L) * rng.uniform(0.88, 1.12, len(limb_Lx3))
    detail_Dx3 = rng.normal(size=(12, 3))
    detail_Dx3 /= np.linalg.norm(detail_Dx3, axis=1, keepdims=True)
    height_D, axes_3 = rng.uniform(-0.06, 0.06, len(detail_Dx3)), np.array(body.axes)
    limb_Lx3 /= np.linalg.norm(limb_Lx3, axis=1, keepdims=True)

    def radius(direction_Vx3: np.ndarray) -> np.ndarray:
        trunk_V = 1 / np.linalg.norm(direction_Vx3 / axes_3, axis=1)
        limbs_V = np.exp(body.sharpness * (direction_Vx3 @ limb_Lx3.T - 1)) @ length_L
        return trunk_V * (1 + np.exp(6 * (direction_Vx3 @ detail_Dx3.T - 1)) @ height_D) + limbs_V

    return radius


def _bent(vertex_Vx3: np.ndarray, along_3: np.ndarray, about_3: np.ndarray, angle: float) -> np.ndarray:
    """Turned about one axis by an angle that grows with the place along another, from −angle to angle radians."""
    angle_Vx1 = angle * np.tanh(vertex_Vx3 @ along_3)[:, None]
    side_Vx3 = np.cross(about_3, vertex_Vx3)
    kept_Vx3 = (vertex_Vx3 @ about_3)[:, None] * about_3
    return kept_Vx3 + np.cos(angle_Vx1) * (vertex_Vx3 - kept_Vx3) + np.sin(angle_Vx1) * side_Vx3
