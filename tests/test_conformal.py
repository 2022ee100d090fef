"""Meshes on the sphere: the Laplacian against the round sphere's, the map against shapes whose image is known, and bad meshes."""

import dataclasses
import functools

import numpy as np
import pytest

from data_prep import conformal, surface
from niso.errors import UserError
from niso.geometry import moebius

Mesh = tuple[np.ndarray, np.ndarray]


@functools.cache
def icosphere(subdivisions: int) -> Mesh:
    return surface.icosphere(subdivisions)


def ellipsoid(*axes: float, subdivisions: int = 4) -> Mesh:
    vertex, face = icosphere(subdivisions)
    return vertex * axes, face


def blob(subdivisions: int, amplitude: float = 0.4) -> Mesh:
    """A sphere with a dozen bumps and dents of about this share of its radius."""
    vertex, face = icosphere(subdivisions)
    rng = np.random.default_rng(0)
    place = rng.normal(size=(12, 3))
    place /= np.linalg.norm(place, axis=1, keepdims=True)
    return vertex * (1 + amplitude * np.exp(8 * (vertex @ place.T - 1)) @ rng.uniform(-1, 1, 12))[:, None], face


def horseshoe() -> Mesh:
    """A rod of radius 0.5 along an arc of radius 1 and 250 degrees: far from convex, and from star-shaped."""
    vertex, face = icosphere(4)
    along, x, y = vertex[:, 2], 0.5 * vertex[:, 0], 0.5 * vertex[:, 1]
    angle = np.radians(125) * along
    return np.stack([(1 + x) * np.cos(angle), (1 + x) * np.sin(angle), y], axis=1), face


def torus() -> Mesh:
    i, j = (one.ravel() for one in np.meshgrid(np.arange(12), np.arange(8), indexing="ij"))
    u, v = 2 * np.pi * i / 12, 2 * np.pi * j / 8
    vertex = np.stack([(2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)], axis=1)
    a, b, c, d = (8 * ((i + p) % 12) + (j + q) % 8 for p, q in ((0, 0), (1, 0), (1, 1), (0, 1)))
    return vertex, np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])


def moved(vertex: np.ndarray, scale: float = 3.0) -> np.ndarray:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    return scale * vertex @ (turn * np.sign(np.linalg.det(turn))) + (5, -7, 11)


def rotated_onto(point: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The points under the rotation that takes them closest to the target."""
    u, _, vt = np.linalg.svd(point.T @ target)
    return point @ (u * (1, 1, np.linalg.det(u @ vt))) @ vt


def hks(vertex: np.ndarray, face: np.ndarray) -> np.ndarray:
    vertex, face = surface.checked(vertex, face)
    return surface.heat_kernel_signature(*surface.eigenpairs(surface.stiffness(vertex, face), surface.vertex_areas(vertex, face)))


@functools.cache
def of_the_sphere() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(eigenvalues, basis, masses) of 2,562 vertices of a sphere of area 1."""
    vertex, face = surface.checked(*icosphere(4))
    mass = surface.vertex_areas(vertex, face)
    return *surface.eigenpairs(surface.stiffness(vertex, face), mass), mass


def test_icosphere() -> None:
    for n in range(4):
        vertex, face = icosphere(n)
        assert len(vertex) == 10 * 4**n + 2 and len(face) == 20 * 4**n
        np.testing.assert_allclose(np.linalg.norm(vertex, axis=1), 1, atol=1e-15)
        assert np.linalg.det(vertex[face]).min() > 0  # counterclockwise from outside
        np.testing.assert_array_equal(icosphere(n + 1)[0][: len(vertex)], vertex)
    area = surface.face_areas(*icosphere(4))
    assert abs(area.sum() / (4 * np.pi) - 1) < 2e-3 and area.max() / area.min() < 1.4
    assert abs(surface.vertex_areas(*icosphere(4)).sum() - area.sum()) < 1e-12


def test_checked_mesh() -> None:
    vertex, face = blob(3)
    found, outward = surface.checked(moved(vertex), face)
    assert found.dtype == np.float64 and outward.dtype == np.int32
    assert abs(surface.face_areas(found, outward).sum() - 1) < 1e-12
    np.testing.assert_array_equal(outward, face)
    _, turned = surface.checked(vertex, face[:, ::-1].astype(np.uint64))  # inside out
    assert {tuple(np.roll(f, -f.argmin())) for f in turned} == {tuple(np.roll(f, -f.argmin())) for f in face}


def test_stiffness_is_the_dirichlet_energy() -> None:
    """Of linear functions on a face: |its gradient|² times the area, by least squares in the face's plane."""
    vertex, face = surface.checked(*blob(1))
    f = np.random.default_rng(0).normal(size=len(vertex))
    edges = vertex[face[:, 1:]] - vertex[face[:, :1]]
    gradient = np.einsum("fij,fj->fi", np.linalg.pinv(edges), f[face[:, 1:]] - f[face[:, :1]])
    expected = np.sum(surface.face_areas(vertex, face) * np.sum(gradient**2, axis=1))
    stiffness = surface.stiffness(vertex, face)
    assert abs(f @ stiffness @ f / expected - 1) < 1e-12
    assert abs(stiffness - stiffness.T).max() == 0 and np.abs(stiffness @ np.ones(len(vertex))).max() < 1e-12
    assert abs(stiffness - surface.stiffness(7 * vertex, face)).max() < 1e-12


def test_eigenvalues_of_the_sphere() -> None:
    """4π l(l + 1), 2l + 1 times, on area 1; the mesh errs by λ h², 0.1 % at degree 1 and 0.9 % at degree 4."""
    eigenvalue, _, _ = of_the_sphere()
    degree = np.repeat(np.arange(5), 2 * np.arange(5) + 1)
    assert eigenvalue.shape == (128,) and np.all(np.diff(eigenvalue) >= 0) and 0 <= eigenvalue[0] < 1e-6
    np.testing.assert_allclose(eigenvalue[1:25], 4 * np.pi * (degree * (degree + 1))[1:], rtol=0.01)


def test_eigenpairs() -> None:
    eigenvalue, basis, mass = of_the_sphere()
    np.testing.assert_allclose(basis.T @ (mass[:, None] * basis), np.eye(128), atol=1e-10)
    np.testing.assert_allclose(surface.stiffness(*icosphere(4)) @ basis, eigenvalue * mass[:, None] * basis, atol=1e-8)


def test_heat_kernel_signature_of_the_sphere() -> None:
    """Σ (2l + 1) exp(−4π l(l + 1) t), everywhere; at the shortest time 1 % of λ t = 4 for the waves that count is 1 %."""
    eigenvalue, basis, mass = of_the_sphere()
    found, degree = surface.heat_kernel_signature(eigenvalue, basis), np.arange(11)[:, None]
    expected = np.sum((2 * degree + 1) * np.exp(-4 * np.pi * degree * (degree + 1) * surface.TIMES_T), axis=0)
    assert found.shape == (2562, 16)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=0.01)
    np.testing.assert_allclose(mass @ found, np.exp(-np.outer(surface.TIMES_T, eigenvalue)).sum(axis=1), rtol=1e-9)


def test_heat_kernel_signature_does_not_see_position_size_and_numbers() -> None:
    vertex, face = blob(3)
    expected = hks(vertex, face)
    assert expected[:, 0].max() / expected[:, 0].min() > 1.1  # but it sees the bumps
    np.testing.assert_allclose(hks(moved(vertex), face), expected, rtol=1e-7)
    rng = np.random.default_rng(2)
    order = rng.permutation(len(vertex))
    np.testing.assert_allclose(hks(vertex[order], rng.permutation(np.argsort(order)[face])), expected[order], rtol=1e-7)


def test_a_sphere_maps_to_itself() -> None:
    vertex, face = icosphere(4)
    mesh, _ = surface.checked(moved(vertex), face)
    sphere, steps = conformal.flow(mesh, face)
    assert steps <= 3
    flipped, distortion, lost = conformal.quality(vertex, face, sphere)
    assert flipped == 0 and lost == 0 and 1 <= distortion < 1.01
    np.testing.assert_allclose(rotated_onto(sphere, vertex), vertex, atol=1e-3)


def test_process_an_ellipsoid() -> None:
    """By symmetry the map keeps the axes; the ratio, 1.03, is the faces' size: 1.015 with four times as many."""
    vertex, face = ellipsoid(1, 1, 2)
    result = conformal.process(vertex, face)
    assert conformal.accepted(result) and result.flipped == 0 and result.lost == 0 and 1 <= result.distortion < 1.1
    assert result.sphere_Vx3.dtype == np.float32 and result.hks_VxT.dtype == np.float32 and result.face_Fx3.dtype == np.int32
    assert 5 < result.iterations < 80 and result.seconds > 0 and result.hks_VxT.shape == (len(vertex), 16)
    np.testing.assert_allclose(np.linalg.norm(result.sphere_Vx3, axis=1), 1, atol=2e-7)
    np.testing.assert_array_equal(result.face_Fx3, face)
    assert result.sphere_Vx3[vertex[:, 2].argmax(), 2] > 0.999
    unit, _ = surface.checked(vertex, face)
    assert np.abs(surface.vertex_areas(unit, face) @ result.sphere_Vx3.astype(np.float64)).max() < 1e-7
    again = conformal.process(vertex, face)
    for field in dataclasses.fields(result):
        if field.name != "seconds":
            np.testing.assert_array_equal(getattr(again, field.name), getattr(result, field.name))


@pytest.mark.parametrize("mesh", [blob(4), horseshoe()], ids=["blob", "horseshoe"])
def test_shapes_that_are_accepted(mesh: Mesh) -> None:
    vertex, face = surface.checked(*mesh)
    sphere, steps = conformal.flow(vertex, face)
    flipped, distortion, lost = conformal.quality(vertex, face, conformal.centred(sphere, surface.vertex_areas(vertex, face)))
    assert flipped == 0 and lost == 0 and distortion < 1.25 and steps <= 80


def test_too_few_vertices_along_a_rod_are_rejected() -> None:
    """1.54; with half its length, 1.14."""
    ratios = []
    for length in (2, 1):
        vertex, face = surface.checked(*ellipsoid(0.3, 0.3, length))
        flipped, distortion, lost = conformal.quality(vertex, face, conformal.flow(vertex, face)[0])
        assert flipped == 0 and lost == 0
        ratios.append(distortion)
    assert ratios[0] > conformal.MOST_DISTORTED > 1.25 > ratios[1]


def test_the_map_does_not_depend_on_the_pose() -> None:
    """Up to a rotation, which centring leaves; and the flow ends within 1e-4 per step of its limit."""
    (vertex, face), maps = blob(3), []
    for mesh in (vertex, moved(vertex)):
        mesh, _ = surface.checked(mesh, face)
        maps.append(conformal.centred(conformal.flow(mesh, face)[0], surface.vertex_areas(mesh, face)))
    np.testing.assert_allclose(rotated_onto(maps[1], maps[0]), maps[0], atol=1e-6)


@pytest.mark.parametrize("c", [(0.3, 0, 0), (0.5, -0.4, 0.6), (0, 0, -0.99)])
def test_centring_undoes_moebius_maps(c: tuple[float, float, float]) -> None:
    vertex, face = icosphere(3)
    mass = surface.vertex_areas(vertex, face)
    away = conformal.centred_inversion(vertex, np.array(c))
    assert np.linalg.norm(mass @ away / mass.sum()) > 0.3
    back = conformal.centred(away, mass)
    assert np.linalg.norm(mass @ back / mass.sum()) < 1e-10
    np.testing.assert_allclose(rotated_onto(back, vertex), vertex, atol=1e-8)
    np.testing.assert_array_equal(conformal.centred(vertex, mass), vertex)


def test_centred_inversion_is_the_one_on_devices() -> None:
    vertex, c = icosphere(2)[0], np.array([0.3, -0.2, 0.4])
    found = moebius.apply(moebius.centred_inversion(c[None].astype(np.float32)), vertex[None].astype(np.float32))
    np.testing.assert_allclose(found[0], conformal.centred_inversion(vertex, c), atol=2e-6)


def test_mass_in_one_point_cannot_be_centred() -> None:
    vertex, _ = icosphere(2)
    with pytest.raises(UserError, match="cannot be centred"):
        conformal.centred(vertex, np.where(np.arange(len(vertex)) == 0, 1000.0, 1.0))


def test_quasi_conformal_ratio_is_that_of_singular_values() -> None:
    rng = np.random.default_rng(3)
    mesh, image = rng.normal(size=(2, 300, 3))
    face = np.arange(300).reshape(-1, 3)
    found = conformal.quasi_conformal_ratio(mesh, face, image)
    for ratio, f in zip(found, face, strict=True):
        jacobian = (image[f[1:]] - image[f[0]]).T @ np.linalg.pinv((mesh[f[1:]] - mesh[f[0]]).T)
        largest, smallest, _ = np.linalg.svd(jacobian)[1]
        assert abs(ratio / (largest / smallest) - 1) < 1e-6
    np.testing.assert_allclose(conformal.quasi_conformal_ratio(mesh, face, moved(mesh)), 1, atol=1e-5)


def test_quality_sees_flips_stretches_and_lost_faces() -> None:
    vertex, face = icosphere(3)
    assert conformal.quality(vertex, face, -vertex)[0] == 1  # a mirror image: every face
    swapped = vertex.copy()
    of, corner = np.argwhere(face == 0)[0]
    swapped[0] = vertex[np.delete(face[of], corner)].sum(axis=0) - vertex[0]  # to the other side of the edge across
    swapped[0] /= np.linalg.norm(swapped[0])
    flipped, distortion, _ = conformal.quality(vertex, face, swapped)
    assert 0 < flipped < 6 / len(face) and 1 < distortion < 1.5
    stretched = vertex * (1, 1, 3)
    assert conformal.quality(vertex, face, stretched / np.linalg.norm(stretched, axis=1, keepdims=True))[1] > 1.5
    shrunk = conformal.centred_inversion(vertex, np.array([0, 0, 1 - 1e-7]))  # all but a point is at +z
    flipped, _, lost = conformal.quality(vertex, face, shrunk)
    assert flipped == 0 and lost > 0.9
    pointlike = np.broadcast_to(vertex[:1], vertex.shape)
    assert conformal.quality(vertex, face, pointlike)[1:] == (np.inf, 1)


def test_flipped_faces_are_mended(monkeypatch) -> None:
    vertex, face = surface.icosphere(4)
    sphere = vertex.astype(np.float32)
    folded = sphere.copy()
    folded[1000] = sphere[face[np.any(face == 1000, axis=1)]].mean(axis=(0, 1)) + 2 * (sphere[face[0, 0]] - sphere[face[0, 1]])
    folded /= np.linalg.norm(folded, axis=1, keepdims=True)
    assert conformal.quality(vertex, face, folded)[0] > 0
    mended = conformal.untangled(folded, face)
    flipped, distortion, lost = conformal.quality(vertex, face, mended)
    assert flipped == lost == 0 and distortion < 1.02
    assert mended.dtype == np.float32 and np.abs(np.linalg.norm(mended, axis=1) - 1).max() < 1e-6
    moved = np.any(mended != folded, axis=1)
    assert 0 < moved.sum() < 100 and moved[1000]  # only what is around it
    assert np.array_equal(conformal.untangled(sphere, face), sphere)  # nothing to mend
    monkeypatch.setattr(conformal, "flow", lambda vertex, face: (folded.astype(np.float64), 1))
    whole = conformal.process(vertex, face)
    assert conformal.accepted(whole)
    assert np.abs(surface.vertex_areas(*surface.checked(vertex, face)) @ whole.sphere_Vx3.astype(np.float64)).max() < 1e-6
    hopeless = sphere * np.where(sphere[:, 2:] > 0, 1, np.float32([1, 1, -1]))  # the lower half folded onto the upper one
    assert np.array_equal(conformal.untangled(hopeless, face), hopeless)


def test_the_gate() -> None:
    def result(flipped: float, distortion: float, iterations: int = 1) -> conformal.Conformal:
        return conformal.Conformal(*(np.zeros((1, 3)),) * 3, flipped, distortion, 0.0, iterations, 0.0)

    assert conformal.accepted(result(0, 1.49)) and conformal.accepted(result(0.0049, 1.49, 0))
    assert not conformal.accepted(result(0.0001, 1.2)) and not conformal.accepted(result(0, 1.5))
    assert not conformal.accepted(result(0.005, 1.2, 0)) and not conformal.accepted(result(0, 1.5, 0))
    assert not conformal.accepted(result(0, np.inf)) and not conformal.accepted(result(0, np.nan))


def bad_meshes() -> dict[str, tuple[Mesh, str]]:
    """Name -> mesh, what its error says."""
    vertex, face = icosphere(2)
    flipped, twice, flat = face.copy(), face.copy(), vertex.copy()
    flipped[3], twice[5, 1] = face[3, ::-1], face[5, 0]
    flat[face[7, 2]] = flat[face[7, :2]].mean(axis=0)
    pair = np.concatenate([vertex, vertex + 3])
    two = np.concatenate([face, face + len(vertex)])
    kissing = two.copy()  # in two vertices: of genus 0 by Euler's formula, and in one piece
    for own in (0, 1):
        kissing[two == len(vertex) + own] = own
    kept, renumbered = np.unique(kissing, return_inverse=True)
    return {
        "torus": (torus(), "genus 1 "),
        "open": ((vertex, face[1:]), "is in one face: the mesh is open.*3 such edges"),
        "two spheres": ((pair, two), "2 pieces"),
        "flipped face": ((vertex, flipped), "same way in both of its faces.*3 such edges"),
        "doubled face": ((vertex, np.concatenate([face, face[:1]])), "more than two faces"),
        "a vertex twice": ((vertex, twice), "face 5 is degenerate: it has a vertex twice"),
        "no area": ((flat, face), "face 7 is degenerate: its area"),
        "unused vertex": ((np.concatenate([vertex, vertex[:1]]), face), f"vertex {len(vertex)} is in no face"),
        "touching": ((pair[kept], renumbered.reshape(-1, 3)), "touch in it alone"),
        "too high": ((vertex[:-1], face), f"vertex {len(vertex) - 1} of a mesh of {len(vertex) - 1}"),
        "negative": ((vertex, face - 1), "vertex -1"),
        "not finite": ((np.where(vertex > 0.99, np.nan, vertex), face), "finite"),
        "polygons": ((vertex, np.zeros((5, 4), int)), "larger polygons"),
        "numbers with a point": ((vertex, face.astype(float)), "whole numbers"),
        "too few": (icosphere(1), "42 vertices has no 128 eigenpairs"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_meshes())
def test_a_bad_mesh_is_one_line(name: str) -> None:
    (vertex, face), line = bad_meshes()[name]
    with pytest.raises(UserError, match=line) as caught:
        conformal.process(vertex, face)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
