"""Small folders of meshes for the tests of data_prep.shapes."""

import pathlib
import zlib

import numpy as np

from data_prep import surface

SIZE = 8
CLASSES = ("bowl", "egg", "stone")
POSES = 4
EVERYTHING = {"size": SIZE, "train": 2, "test": 1, "shards": 3, "progress": False}


def pebble(category: str, pose: int, subdivisions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid with a few dents; of 162 vertices."""
    rng = np.random.default_rng((zlib.crc32(category.encode()), pose))
    vertex, face = surface.icosphere(subdivisions)
    place = rng.normal(size=(5, 3))
    place /= np.linalg.norm(place, axis=1, keepdims=True)
    axes = 1 + np.arange(3) * 0.1 * (1 + CLASSES.index(category))
    return vertex * axes * (1 + np.exp(4 * (vertex @ place.T - 1)) @ rng.uniform(-0.2, 0.2, 5))[:, None], face


def write_off(path: pathlib.Path, vertex: np.ndarray, face: np.ndarray) -> None:
    """Whole precision, in text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["OFF", f"{len(vertex)} {len(face)} 0", *(" ".join(map(repr, v)) for v in vertex.tolist())]
    lines += [f"{len(f)} {' '.join(map(str, f))}" for f in face.tolist()]
    path.write_text("\n".join(lines) + "\n")


def write_npz(path: pathlib.Path, vertex: np.ndarray, face: np.ndarray) -> None:
    """As the twin's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, vertex_Vx3=vertex, face_Fx3=face)


def write_tree(root: pathlib.Path) -> pathlib.Path:
    """POSES meshes of each class."""
    for category in CLASSES:
        for pose in range(POSES):
            write_npz(root / category / f"{category}{pose}.npz", *pebble(category, pose))
    return root
