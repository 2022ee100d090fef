"""data_prep.shapes: which meshes of a folder it takes, how they are dealt to splits, what it stores and reports of them, and runs
that are broken off or repeated."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_prep import conformal, mesh_files, shape_shard, shapes, sphere_raster, surface
from niso.data import records
from niso.errors import UserError
from tests.prep_runs import check_a_killed_run, contents
from tests.shape_trees import CLASSES, EVERYTHING, POSES, SIZE, pebble, write_npz, write_off, write_tree
from tests.toy_records import message


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    return write_tree(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("records")
    shapes.prepare(tree, out, **EVERYTHING)
    return out


def read(out: pathlib.Path, split: str) -> list[records.Example]:
    reader = records.Reader(out, split, records.surface(SIZE))
    return [reader.read(one.shard, [one.start])[0] for one in reader.sequences]


def named(example: records.Example) -> str:
    return f"{example['class'].decode()}/{example['name'].decode()}"


# ---- which meshes, and in which split --------------------------------------------------------------------------------


def test_every_class_has_as_many_meshes_in_a_split(prepared):
    found = {split: [named(one) for one in read(prepared, split)] for split in ("train", "test")}
    assert not set(found["train"]) & set(found["test"])
    for split, count in (("train", 2), ("test", 1)):
        assert [name.split("/")[0] for name in found[split]] == [category for category in CLASSES for _ in range(count)]
        assert {one["label"].item() for one in read(prepared, split)} == {0, 1, 2}
        assert all(CLASSES[one["label"].item()] == one["class"].decode() for one in read(prepared, split))
    assert records.Manifest.read(prepared).facts["classes"] == list(CLASSES)


def test_splits_depend_on_names_and_seed(tmp_path):
    meshes = {c: [shape_shard.Mesh(c, 0, f"m{n}", f"{c}/m{n}.ply", None) for n in range(20)] for c in ("a", "b")}
    split = shapes.choose(meshes, 10, 4, 0)
    assert [len(split[name]) for name in ("train", "test")] == [20, 8] and not set(split["train"]) & set(split["test"])
    other = {c: [shape_shard.Mesh(c, 0, one.name, f"{c}/{one.name}.off", None) for one in of] for c, of in meshes.items()}
    names = {name: [one.name for one in of] for name, of in split.items()}
    assert {name: [one.name for one in of] for name, of in shapes.choose(other, 10, 4, 0).items()} == names
    assert {name: [one.name for one in of] for name, of in shapes.choose(meshes, 10, 4, 1).items()} != names
    assert names["train"][:10] != names["train"][10:]  # each class its own draw
    assert shapes.choose({"a": meshes["a"]}, 10, 4, 0)["train"] == split["train"][:10]
    line = message(lambda: shapes.choose(meshes, 15, 6, 0))
    assert line == "class a has 20 meshes, 15 + 6 are asked for: choose a smaller --train or --test, or --exclude it"


def test_excluded_classes(tree):
    found = shapes.find(tree, "folder", ["egg"])
    assert [(category, of[0].label, len(of)) for category, of in found.items()] == [("bowl", 0, POSES), ("stone", 1, POSES)]
    assert "--exclude spoon: there is no such class" in message(lambda: shapes.find(tree, "folder", ["spoon"]))
    assert "every class" in message(lambda: shapes.find(tree, "folder", CLASSES))


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_a_record_is_the_mesh_on_the_sphere(prepared):
    for one in read(prepared, "train"):
        vertex, face = pebble(one["class"].decode(), int(one["name"].decode()[-1]))
        result = conformal.process(vertex, face)
        np.testing.assert_array_equal(one["sphere_Vx3"].reshape(-1, 3), result.sphere_Vx3)
        np.testing.assert_array_equal(one["face_Fx3"].reshape(-1, 3), result.face_Fx3)
        np.testing.assert_array_equal(one["hks_VxC"].reshape(-1, 16), result.hks_VxT)
        assert (one["flipped"], one["distortion"], one["lost"]) == (result.flipped, result.distortion, result.lost)
        signal = one["low_C"] + one["step_C"] * one["signal_HxWxC"].astype(np.float64)
        grid = sphere_raster.grid(SIZE).reshape(-1, 3)
        exact = sphere_raster.interpolate(result.sphere_Vx3, result.face_Fx3, result.hks_VxT, grid).reshape(SIZE, 2 * SIZE, 16)
        # Half a step, and float32's rounding of the lowest value and, 65,535 times, of the step.
        assert np.all(np.abs(signal - exact) <= 0.51 * one["step_C"] + 2e-7 * np.abs(exact))
        assert one["signal_HxWxC"].max() == 65535 and one["signal_HxWxC"].min() == 0


def test_the_statistics_are_those_of_training_meshes_over_the_sphere(prepared):
    facts, weight = records.Manifest.read(prepared).facts, sphere_raster.areas(SIZE)
    signals = np.stack([one["low_C"] + one["step_C"] * one["signal_HxWxC"].astype(np.float64) for one in read(prepared, "train")])
    mean = np.einsum("h,nhwc->c", weight, signals) / len(signals)
    std = np.sqrt(np.einsum("h,nhwc->c", weight, (signals - mean) ** 2) / len(signals))
    np.testing.assert_allclose(facts["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(facts["std"][:10], std[:10], rtol=1e-3)  # later ones are of the order of float32's rounding
    assert len(facts["std"]) == 16 and 0.01 < facts["std"][0] / facts["mean"][0] < 0.5


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_bad_meshes_are_left_out_and_named(tmp_path, capsys):
    root, out = tmp_path / "meshes", tmp_path / "out"
    vertex, face = pebble("egg", 0)
    bad = {
        "open": (vertex, face[1:]),
        "two": (np.concatenate([vertex, vertex + 9]), np.concatenate([face, face + len(vertex)])),
        "thin": (vertex * (0.5, 0.5, 1.6), face),
        "few": surface.icosphere(1),
    }
    for name, mesh in bad.items():
        write_npz(root / "egg" / f"{name}.npz", *mesh)
    (root / "egg" / "text.npz").write_text("not a mesh")
    write_npz(root / "egg" / "good.npz", vertex, face)
    write_npz(root / "egg" / "fine.npz", *pebble("egg", 1))
    seed = next(  # both splits have a good one
        seed
        for seed in range(100)
        if "fine" in [one.name for one in shapes.choose(shapes.find(root, "folder", None), 5, 2, seed)["test"]]
        and "good" in [one.name for one in shapes.choose(shapes.find(root, "folder", None), 5, 2, seed)["train"]]
    )
    manifest = shapes.prepare(root, out, size=SIZE, train=5, test=2, split_seed=seed)
    assert manifest.left_out == {
        "meshes that cannot be mapped": 3, "meshes whose map is not conformal": 1, "unreadable meshes": 1
    }  # fmt: skip
    assert [named(one) for split in ("train", "test") for one in read(out, split)] == ["egg/good", "egg/fine"]
    lines = capsys.readouterr().out.splitlines()
    for name, words in (
        ("open", "is in one face: the mesh is open"),
        ("two", "2 pieces that do not touch"),
        ("thin", "mean quasi-conformal ratio"),
        ("few", "has no 128 eigenpairs"),
        ("text", "no mesh can be read from it"),
    ):
        assert len([line for line in lines if line.startswith(f"left out: egg/{name}.npz (") and words in line]) == 1, (name, lines)
    assert "accepted: 2 of 7 meshes" in "\n".join(lines) and len(lines) < 20
    reports = {one["file"]: one for one in map(json.loads, (out / "report.jsonl").read_text().splitlines())}
    assert len(reports) == 7 and sum(one["accepted"] for one in reports.values()) == 2
    good, thin = reports["egg/good.npz"], reports["egg/thin.npz"]
    assert good["split"] == "train" and good["vertices"] == 162 and 1 <= good["distortion"] < 1.3
    assert thin["distortion"] > 1.5 and "finer" in thin["reason"] and not thin["accepted"]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tree, prepared, tmp_path):
    out = tmp_path / "out"
    arguments = f"{str(tree)!r}, {str(out)!r}, size={SIZE}, train=2, test=1, shards=3"
    check_a_killed_run("shapes", arguments, out, lambda: shapes.prepare(tree, out, **EVERYTHING), contents(prepared))
    assert len((out / "report.jsonl").read_text().splitlines()) == 9


def test_several_workers_write_the_same_bytes(tree, prepared, tmp_path, capsys):
    shapes.prepare(tree, tmp_path / "out", **EVERYTHING | {"workers": 2, "progress": True})
    assert contents(tmp_path / "out") == contents(prepared)
    told = capsys.readouterr()
    assert "6/6 shards" in told.err and "meshes/s" in told.err and "train: 6 meshes of 3 classes, 2 or more of each" in told.out


def test_facts_that_a_killed_run_did_not_write_are_added(tree, prepared, tmp_path):
    for name, content in contents(prepared).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"facts": {}}))
    shapes.prepare(tree, tmp_path, **EVERYTHING)
    assert contents(tmp_path) == contents(prepared)


def test_a_finished_folder_says_so_and_refuses_other_options(tree, prepared, capsys):
    def told(*more: str) -> str:
        base = {"--root": tree, "--out": prepared, "--size": SIZE, "--train": 2, "--test": 1, "--shards": 3, "--workers": 1}
        given = [str(part) for pair in base.items() for part in pair]
        ended = shapes.main([*given, *more])
        said = capsys.readouterr()
        assert ended == (0 if not more else 2)
        return said.out if not more else said.err

    assert told().strip() == f"{prepared}: nothing to do, the records are complete"
    for more, words in (
        (["--size", "9"], "size 8 then, 9 now"),
        (["--split_seed", "3"], "split_seed 0 then, 3 now"),
        (["--exclude", "egg"], "others are excluded"),
        (["--train", "0"], "--train is 0, it must be at least 1"),
        (["--layout", "shrec"], "--layout is shrec, it must be one of folder, cshrec11"),
        (["--layout", "cshrec11"], "set --root to the published data set"),
        (["--root", "/nowhere"], "no folder /nowhere: set --root to a folder of classes"),
    ):
        error = told(*more)
        assert words in error and error.count("\n") == 1


def test_no_useful_mesh_is_one_line(tmp_path, capsys):
    for n in range(2):
        write_npz(tmp_path / "meshes" / "a" / f"{n}.npz", *surface.icosphere(1))
    given = ["--root", str(tmp_path / "meshes"), "--out", str(tmp_path / "out"), "--train", "1", "--test", "1", "--workers", "1"]
    assert shapes.main(given) == 2
    assert "no usable mesh in split train" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_numpy_is_loaded_with_one_thread():
    """Here, and so in worker processes: eigenproblems of meshes take ten times as long otherwise."""
    script = "import data_prep.shapes, os; print(os.environ['OPENBLAS_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    order = "import sys; assert 'numpy' not in sys.modules; import data_prep; assert 'numpy' not in sys.modules; "
    ended = subprocess.run([sys.executable, "-c", order + script], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "1"


# ---- the files of meshes ---------------------------------------------------------------------------------------------


def test_files_are_found_by_class(tmp_path):
    for name in ("b/one.PLY", "b/two.off", "a/x.obj", ".hidden/y.off", "a/.hidden.off", "a/notes.txt", "top.off"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert mesh_files.find(tmp_path) == {"a": {"x": "a/x.obj"}, "b": {"one": "b/one.PLY", "two": "b/two.off"}}
    (tmp_path / "b" / "one.obj").touch()
    assert "b/one.PLY and b/one.obj" in message(lambda: mesh_files.find(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no mesh in" in message(lambda: mesh_files.find(tmp_path / "empty"))


def as_obj(vertex: np.ndarray, face: np.ndarray) -> str:
    """With normals and texture coordinates that differ from corner to corner, as modelling programs write them."""
    lines = [*(f"v {' '.join(map(repr, v))}" for v in vertex.tolist()), "vt 0 0", "vt 1 0", "vt 0 1", "vn 0 0 1"]
    lines += ["f " + " ".join(f"{v + 1}/{1 + (f + k) % 3}/1" for k, v in enumerate(of)) for f, of in enumerate(face.tolist())]
    return "\n".join(lines) + "\n"


def as_ply(vertex: np.ndarray, face: np.ndarray) -> bytes:
    """Binary, with a property that nobody asked for."""
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertex)}\nproperty double x\nproperty double y\n"
        f"property double z\nproperty float quality\nelement face {len(face)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.zeros(len(vertex), [("p", "<f8", 3), ("q", "<f4")])
    rows["p"] = vertex
    lists = np.zeros(len(face), [("n", "u1"), ("v", "<i4", 3)])
    lists["n"], lists["v"] = 3, face
    return header.encode() + rows.tobytes() + lists.tobytes()


@pytest.mark.parametrize("suffix", ["off", "obj", "ply", "npz"])
def test_files_of_every_kind_keep_their_vertices_in_order(tmp_path, suffix):
    if suffix != "npz":
        pytest.importorskip("trimesh")
    vertex, face = pebble("egg", 0, 1)
    path = tmp_path / f"mesh.{suffix}"
    if suffix == "off":
        write_off(path, vertex, face)
    elif suffix == "npz":
        write_npz(path, vertex, face)
    else:
        path.write_bytes(as_obj(vertex, face).encode() if suffix == "obj" else as_ply(vertex, face))
    found, faces = mesh_files.read(path)
    np.testing.assert_array_equal(found, vertex)
    np.testing.assert_array_equal(faces, face)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        left = mesh_files.read(path)
    except UserError as error:
        assert "no mesh can be read" in str(error)
    else:  # half of a text is a text: what is missing shows in the mesh
        with pytest.raises(UserError):
            conformal.process(*left)


def test_larger_polygons_are_split(tmp_path):
    pytest.importorskip("trimesh")
    cube = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    write_off(
        tmp_path / "cube.off", cube, np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    )
    vertex, face = mesh_files.read(tmp_path / "cube.off")
    surface.checked(vertex, face)
    np.testing.assert_array_equal(vertex, cube)
    assert face.shape == (12, 3)


def test_without_trimesh(tmp_path, monkeypatch, capsys):
    write_off(tmp_path / "meshes" / "a" / "one.off", *pebble("egg", 0))
    write_off(tmp_path / "meshes" / "a" / "two.off", *pebble("egg", 1))
    monkeypatch.setitem(sys.modules, "trimesh", None)
    given = ["--root", str(tmp_path / "meshes"), "--out", str(tmp_path / "out"), "--train", "1", "--test", "1", "--workers", "1"]
    assert shapes.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "need trimesh: pip install -e '.[prep]'" in error and not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_not_a_bad_mesh(tmp_path):
    write_npz(tmp_path / "meshes" / "a" / "one.npz", *pebble("egg", 0))
    write_npz(tmp_path / "meshes" / "a" / "two.npz", *pebble("egg", 1))
    find = mesh_files.find(tmp_path / "meshes")
    (tmp_path / "meshes" / "a" / "one.npz").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_files, "find", lambda root: find)
        line = message(lambda: shapes.prepare(tmp_path / "meshes", tmp_path / "out", size=SIZE, train=1, test=1, progress=False))
    assert "cannot read" in line and "No such file" in line
