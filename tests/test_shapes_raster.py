"""data_prep.sphere_raster: which face a point is in, on meshes of every size of faces, and what the grid is."""

import numpy as np
import pytest

from data_prep import conformal, sphere_raster, surface
from niso.geometry import latlong, sphere


def scattered(count: int) -> np.ndarray:
    point = np.random.default_rng(0).normal(size=(count, 3))
    return point / np.linalg.norm(point, axis=1, keepdims=True)


def uneven() -> tuple[np.ndarray, np.ndarray]:
    """Vertices crowded around a point: areas of faces differ by a factor of some thousands."""
    vertex, face = surface.icosphere(4)
    vertex = conformal.centred_inversion(vertex, np.array([0.5, -0.5, 0.3]))
    area = surface.face_areas(vertex, face)
    assert area.max() > 2000 * area.min() and np.linalg.det(vertex[face]).min() > 0
    return vertex, face


@pytest.mark.parametrize("mesh", [surface.icosphere(3), uneven()], ids=["even", "uneven"])
def test_points_are_in_their_faces(mesh) -> None:
    vertex, face = mesh
    point = scattered(2000)
    corner, weight = sphere_raster.locate(vertex, face, point)
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-12)
    assert weight.min() >= 0
    flat = np.einsum("pe,pej->pj", weight, vertex[corner])
    # Where the weights are those of the face that the point is in, they lead to the point but for its length.
    np.testing.assert_allclose(flat / np.linalg.norm(flat, axis=1, keepdims=True), point, atol=1e-9)
    inside = np.linalg.solve(np.moveaxis(vertex[face], 1, 2)[None], point[:50, None, :, None])[..., 0].min(axis=-1)
    assert (corner[:50] == face[inside.argmax(axis=1)]).all()


def test_values_at_vertices_and_edges() -> None:
    vertex, face = uneven()
    value = np.random.default_rng(1).normal(size=(len(vertex), 2))
    np.testing.assert_allclose(sphere_raster.interpolate(vertex, face, value, vertex), value, atol=1e-6)
    middle = vertex[face[:, 0]] + vertex[face[:, 1]]
    expected = (value[face[:, 0]] + value[face[:, 1]]) / 2
    found = sphere_raster.interpolate(vertex, face, value, middle / np.linalg.norm(middle, axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(sphere_raster.interpolate(vertex, face, np.ones((len(vertex), 1)), scattered(500)), 1, atol=1e-12)


def test_faces_that_are_turned_over_or_of_no_area_end() -> None:
    vertex, face = surface.icosphere(2)
    vertex = vertex.copy()
    vertex[0] = -vertex[0]  # the faces around it span the sphere
    vertex[7] = vertex[int(face[(face == 7).any(axis=1)][0][face[(face == 7).any(axis=1)][0] != 7][0])]
    corner, weight = sphere_raster.locate(vertex, face, scattered(500))
    assert np.isfinite(weight).all() and corner.shape == (500, 3)


def test_the_grid_is_the_one_on_devices() -> None:
    np.testing.assert_allclose(sphere_raster.grid(6).reshape(-1, 3), latlong.points(6, 12), atol=1e-7)
    weight = sphere_raster.areas(96)
    assert abs(weight.sum() * 192 - 1) < 1e-12
    # Of the mean of z² over the sphere, 1/3: the midpoint rule's error, of the order of the square of the grid's step.
    assert abs(192 * weight @ np.cos(sphere.colatitude(96)) ** 2 - 1 / 3) < (np.pi / 96) ** 2
