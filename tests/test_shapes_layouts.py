"""data_prep.shapes on the layout of the published data set, and on the built-in twin."""

import pathlib

import numpy as np
import pytest

from data_prep import conformal, shapes, surface, synthetic_shapes
from niso.data import records
from niso.geometry import moebius
from tests.prep_runs import contents
from tests.shape_trees import POSES, SIZE, pebble, write_npz
from tests.toy_records import message

PUBLISHED = {"bowl": "bowl", "egg": "egg", "lamp": "stone"}  # class -> what its meshes are


def known_map(vertex: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Not centred, in single precision, and not quite of length 1."""
    vertex, face = surface.checked(vertex, face)
    sphere, _ = conformal.flow(vertex, face)
    return (1.0001 * conformal.centred_inversion(sphere, np.array([0.2, 0.1, -0.2]))).astype(np.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("published")
    for category, what in PUBLISHED.items():
        for n in range(POSES):
            vertex, face = pebble(what, n)
            sphere = known_map(vertex, face)
            write_npz(root / "base" / category / f"T{n}.npz", vertex, face)
            write_npz(root / "base_sphere" / category / f"T{n}.npz", sphere, face)
            for k in range(2):  # folders within folders: nothing reads them
                moved = conformal.centred_inversion(sphere, np.array([0.1 * k, 0.3, 0]))
                write_npz(root / "mobius_sphere" / category / f"T{n}" / f"{k}.npz", moved, face)
                write_npz(root / "mobius" / category / f"T{n}" / f"{k}.npz", vertex, face)
    return root


def test_the_published_layout(published, tmp_path):
    manifest = shapes.prepare(published, tmp_path, size=SIZE, layout="cshrec11", train=2, test=1, progress=False)
    assert manifest.facts["classes"] == ["bowl", "egg"] and manifest.left_out == {}  # lamps are left out, as published
    reader = records.Reader(tmp_path, "train", records.surface(SIZE))
    for one in reader.sequences:
        (record,) = reader.read(one.shard, [one.start])
        vertex, face = pebble(one.category, int(one.name[-1]))
        unit, _ = surface.checked(vertex, face)
        mass, found = surface.vertex_areas(unit, face), record["sphere_Vx3"].reshape(-1, 3)
        assert np.abs(mass @ found.astype(np.float64)).max() < 1e-6
        # The map that was given, but for the map that centres it: which is its only Möbius map without rotation that does.
        given = known_map(vertex, face).astype(np.float64)
        expected = conformal.centred(given / np.linalg.norm(given, axis=1, keepdims=True), mass)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_array_equal(record["hks_VxC"], conformal.process(vertex, face).hks_VxT.ravel())
        assert record["distortion"] < 1.2 and record["flipped"] == 0
    kept = shapes.prepare(published, tmp_path / "all", size=SIZE, layout="cshrec11", train=2, test=1, exclude=[], progress=False)
    assert kept.facts["classes"] == ["bowl", "egg", "lamp"]


def test_maps_that_do_not_fit(published, tmp_path):
    for folder in ("base", "base_sphere"):
        for n in range(2):
            write_npz(tmp_path / folder / "egg" / f"{n}.npz", *pebble("egg", n))
    vertex, face = pebble("egg", 0)
    write_npz(tmp_path / "base" / "egg" / "lonely.npz", vertex, face)
    line = message(lambda: shapes.find(tmp_path, "cshrec11", None))
    assert "lonely.npz has no map" in line and "base_sphere/egg" in line
    for sphere, words in ((known_map(vertex, face)[:-1], "162 vertices, its map to the sphere 161"), (vertex, "not one sphere")):
        assert words in message(lambda sphere=sphere: conformal.process(vertex, face, sphere))
    # A map of the sphere's inside out has every face turned over.
    mirrored = conformal.process(vertex, face, -known_map(vertex, face))
    assert mirrored.flipped == 1 and not conformal.accepted(mirrored)


def test_the_published_moebius_maps_are_those_of_devices(published):
    """So training makes what the folders that are not read hold."""
    with np.load(published / "base_sphere" / "egg" / "T0.npz") as one, np.load(published / "mobius_sphere/egg/T0/1.npz") as other:
        sphere, moved = one["vertex_Vx3"] / np.linalg.norm(one["vertex_Vx3"], axis=1, keepdims=True), other["vertex_Vx3"]
    c = np.array([[0.1, 0.3, 0]], np.float32)
    np.testing.assert_allclose(moebius.apply(moebius.centred_inversion(c), sphere[None])[0], moved, atol=1e-3)


# ---- the twin --------------------------------------------------------------------------------------------------------


def test_the_twin_is_the_same_every_time(tmp_path):
    for part in ("one", "other"):
        synthetic_shapes.generate(tmp_path / part, "tiny")
    found = contents(tmp_path / "one")
    assert found == contents(tmp_path / "other") and len(set(found.values())) == len(found) == 3 * len(synthetic_shapes.BODIES)
    assert len(synthetic_shapes.BODIES) >= 6 and synthetic_shapes.PREPARATION["small"] == {"train": 10, "test": 4}


def test_poses_of_one_class_are_more_alike_than_classes(tmp_path):
    """By what the network sees: the signature's distribution over the surface, on meshes that have enough vertices."""
    found = {}
    for category in synthetic_shapes.BODIES:
        for pose in range(3):
            vertex, face = surface.checked(*synthetic_shapes.mesh(category, pose, 3))
            mass = surface.vertex_areas(vertex, face)
            hks = surface.heat_kernel_signature(*surface.eigenpairs(surface.stiffness(vertex, face), mass))
            order = np.argsort(hks[:, :6], axis=0)
            cumulated = np.cumsum(mass[order], axis=0)
            found[category, pose] = np.stack(
                [np.interp(np.linspace(0.02, 0.98, 25), cumulated[:, t], hks[order[:, t], t]) for t in range(6)]
            )
    right = 0
    for key in found:
        others = {other: np.abs(np.log(found[key] / found[other])).mean() for other in found if other != key}
        right += min(others, key=others.__getitem__)[0] == key[0]
    assert right >= 0.75 * len(found), f"{right} of {len(found)} poses are nearest to one of their class"
