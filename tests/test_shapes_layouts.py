"""data_prep.shapes on the layout of the published data set, and on the built-in twin."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from data_prep import conformal, shapes, surface, synthetic_shapes
from niso.data import pipeline, records
from niso.geometry import moebius
from niso.tasks import views
from tests.prep_runs import contents
from tests.shape_trees import POSES, SIZE, pebble, write_npz
from tests.test_shapes_reader import data
from tests.toy_records import message

MAPS = 11  # so that names do not sort as numbers do
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
            for k in range(MAPS):
                moved = conformal.centred_inversion(sphere / 1.0001, np.array([0.1 * k, 0.3, 0]))
                write_npz(root / "mobius_sphere" / category / f"T{n}" / f"{k}.npz", moved[:, [1, 2, 0]], face)  # ... and turned
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
        # The Möbius maps that come with it, in the order of their numbers: they take the stored points to those of their files.
        for k, stored_4x4 in enumerate(record["map_KxXxY"].reshape(MAPS, 4, 4)):
            with np.load(published / "mobius_sphere" / one.category / one.name / f"{k}.npz") as file:
                np.testing.assert_allclose(moebius.apply(stored_4x4[None], found[None])[0], file["vertex_Vx3"], atol=1e-4)
    assert manifest.facts["maps"] == MAPS
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


def test_moebius_maps_are_recognised():
    vertex, face = pebble("egg", 0)
    sphere = conformal.flow(*surface.checked(vertex, face))[0]
    for matrix_1x4x4 in moebius.random(jax.random.key(0), 3, 0.8)[:, None]:
        moved = np.asarray(moebius.apply(matrix_1x4x4, sphere[None])[0])
        found, off = conformal.moebius_map(sphere, moved)
        np.testing.assert_allclose(found, matrix_1x4x4[0], atol=1e-4)
        assert off < 1e-6
        noise = np.random.default_rng(0).normal(scale=1e-3, size=moved.shape)
        assert 1e-4 < conformal.moebius_map(sphere, moved + noise)[1] < 3e-3  # almost one
    for wrong in (moved[::-1], np.roll(sphere, 1, axis=0)):
        assert "vertices in the same order" in message(lambda wrong=wrong: conformal.moebius_map(sphere, wrong))
    assert "mirror image" in message(lambda: conformal.moebius_map(sphere, moved * [1, 1, -1]))
    assert "162 vertices, its map to the sphere 161" in message(lambda: conformal.moebius_map(sphere, moved[1:]))


def test_moebius_maps_that_do_not_fit(published, tmp_path, capsys):
    shutil.copytree(published, tmp_path / "copy")
    lonely, wrong = (tmp_path / "copy/mobius_sphere/egg" / mesh for mesh in ("T0", "T1"))
    shutil.copy(wrong / "1.npz", lonely / f"{MAPS}.npz")
    line = message(lambda: shapes.find(tmp_path / "copy", "cshrec11", None))
    assert f"has {MAPS} maps in mobius_sphere, others {MAPS + 1}" in line
    shutil.move(lonely / f"{MAPS}.npz", lonely / f"{MAPS + 1}.npz")
    assert f"not numbered 0 to {MAPS}" in message(lambda: shapes.find(tmp_path / "copy", "cshrec11", None))
    (lonely / f"{MAPS + 1}.npz").unlink()
    with np.load(wrong / "0.npz") as arrays:
        write_npz(wrong / "0.npz", arrays["vertex_Vx3"][::-1], arrays["face_Fx3"])
    options = {"size": SIZE, "layout": "cshrec11", "train": 3, "test": 1}
    manifest = shapes.prepare(tmp_path / "copy", tmp_path / "out", **options)
    assert manifest.left_out == {"meshes with a Möbius map that is none": 1}
    reports = [json.loads(line) for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    (reason,) = (report["reason"] for report in reports if not report["accepted"])
    assert reason.startswith("mobius_sphere/egg/T1/0.npz: no Möbius map") and "--without_maps" in reason
    assert all(report["maps_off"] < 1e-3 for report in reports if report["accepted"])
    assert "Möbius maps of each mesh found; the worst is" in capsys.readouterr().out
    (tmp_path / "copy/mobius_sphere").rename(tmp_path / "kept")
    (tmp_path / "copy/mobius_sphere/else/where").mkdir(parents=True)
    assert "has no mesh of those in" in message(lambda: shapes.find(tmp_path / "copy", "cshrec11", None))
    plain = shapes.prepare(tmp_path / "copy", tmp_path / "plain", **options, without_maps=True)
    assert plain.left_out == {} and plain.facts["maps"] == 0


@pytest.mark.parametrize("in_memory", [False, True])
def test_stored_maps_are_trained_and_tested_on(in_memory, published, tmp_path):
    options = {"size": SIZE, "layout": "cshrec11", "train": 2, "test": 1, "progress": False}
    shapes.prepare(published, tmp_path, **options)
    dataset = pipeline.open_dataset(data(str(tmp_path), stored_maps=5, test_copies=5, in_memory=in_memory))
    batch = dataset.figure_batch(10)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(10)
    trained = views.training("moebius", batch, jax.random.key(0), (SIZE, 2 * SIZE), 2)
    tested = views.held_out("moebius", batch, 0, (SIZE, 2 * SIZE), 2)
    for n in range(10):
        one = {name: values[n : n + 1] for name, values in batch.items()}
        all_KxHxWxC = views.mapped(one, batch["map_BxKxXxY"][n : n + 1], (SIZE, 2 * SIZE))[0]
        for view in (*trained[n], *tested[n]):
            assert np.abs(all_KxHxWxC - view).max(axis=(1, 2, 3)).min() < 1e-5
        np.testing.assert_allclose(tested[n, -1], all_KxHxWxC[batch["copy_B"][n]], atol=1e-5)
        assert not np.allclose(tested[n, 0], tested[n, 1], atol=1e-3)
    assert not np.allclose(trained, views.training("moebius", batch, jax.random.key(1), (SIZE, 2 * SIZE), 2), atol=0.01)

    def told(count: int, root: str) -> str:
        return message(lambda: pipeline.open_dataset(data(root, stored_maps=count, test_copies=6)))

    assert f"have {MAPS} Möbius maps of each mesh: set --config.data.stored_maps={MAPS}" in told(MAPS + 1, str(tmp_path))
    shapes.prepare(published / "base", tmp_path / "plain", size=SIZE, train=2, test=1, progress=False)
    assert "have 0 Möbius maps of each mesh: prepare those of a folder that has mobius_sphere" in told(1, str(tmp_path / "plain"))
    assert "data.test_copies=6 and data.stored_maps=5" in told(5, str(tmp_path))


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
