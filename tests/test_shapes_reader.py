"""Surfaces to host batches: which, in which order, in which units, and what the user is told."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from absl import flags

from data_prep import conformal, shapes, sphere_raster, synthetic_shapes
from niso.data import pipeline, records, surfaces
from niso.errors import RecordError
from niso.geometry import latlong
from tests.prep_runs import contents
from tests.shape_trees import CLASSES, SIZE, pebble, write_tree
from tests.toy_records import equal, flip, message


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """Six training meshes and three for the test."""
    tree = write_tree(tmp_path_factory.mktemp("meshes"))
    out = tmp_path_factory.mktemp("records")
    shapes.prepare(tree, out, size=SIZE, train=2, test=1, shards=2, progress=False)
    return str(out)


def data(root: str, **changes) -> surfaces.Surfaces:
    toy = surfaces.Surfaces(
        dataset="shapes",
        records=root,
        twin="",
        size=SIZE,
        test_copies=1,
        in_memory=False,
        stored_maps=0,
        threads=2,
        prefetch=4,
        workers=0,
        unreadable="fatal",
    )
    return dataclasses.replace(toy, **changes)


def train(root: str, *, batch=4, seed=0, start=0, steps=6, rows=slice(None), **changes) -> list[pipeline.Batch]:
    dataset = pipeline.open_dataset(data(root, **changes))
    with dataset.train_batches(batch=batch, seed=seed, start=start, steps=steps, rows=rows) as batches:
        return list(batches)


def held_out(root: str, batch: int = 4, **changes) -> list[pipeline.Batch]:
    with pipeline.open_dataset(data(root, **changes)).test_batches(batch=batch, rows=slice(None)) as batches:
        return list(batches)


def signature(category: str, name: str, point_Px3: np.ndarray) -> np.ndarray:
    """From the mesh itself, at points of its sphere."""
    result = conformal.process(*pebble(category, int(name[-1])))
    return sphere_raster.interpolate(result.sphere_Vx3, result.face_Fx3, result.hks_VxT, point_Px3.astype(np.float64))


def test_signals_are_standardised_over_the_training_meshes(root):
    """From the mesh to -1 .. 1: what the documented formula makes of a batch is the clipped signature."""
    manifest, point = records.Manifest.read(root), latlong.points(SIZE, 2 * SIZE)
    mean, std = (np.array(manifest.facts[name])[:8] for name in ("mean", "std"))
    sequences = {split: records.read_index(root, split) for split in ("train", "test")}
    for split, batch in (("train", train(root, steps=1)[0]), ("test", held_out(root)[0])):
        found = np.clip(
            batch["low_BxC"][:, None, None] + batch["step_BxC"][:, None, None] * batch["signal_BxHxWxC"].astype(np.float32), -1, 1
        )
        assert np.ptp(found[..., 0]) > 0.5 and found.dtype == np.float32
        for n, item in enumerate(batch["item_B"][:2]):
            one = sequences[split][item]
            assert CLASSES[batch["label_B"][n]] == one.category
            expected = np.clip((signature(one.category, one.name, point)[:, :8] - mean) / (2.5 * std), -1, 1)
            np.testing.assert_allclose(found[n].reshape(-1, 16)[:, :8], expected, atol=1e-3)


def test_channels_of_rounding_are_not_blown_up():
    scale = surfaces.Scale.of([8.0, 1.0, 1.0], [0.5, 1e-9, 0.0])
    np.testing.assert_allclose(scale.width_C, 2.5 * np.array([0.5, 1e-6, 1e-6]))


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_mesh_comes_once_per_epoch_whoever_reads_it(root, in_memory):
    whole = train(root, in_memory=in_memory)
    stream = np.concatenate([batch["item_B"] for batch in whole])
    epochs = stream.reshape(-1, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert equal(train(root, in_memory=not in_memory), whole)
    assert equal(train(root, in_memory=in_memory, start=3), whole[3:])
    assert not equal(train(root, in_memory=in_memory, seed=1), whole)
    for rows in (slice(1, 3), [3, 0]):
        for part, batch in zip(train(root, rows=rows, in_memory=in_memory), whole, strict=True):
            assert equal([part], [{name: value[rows] for name, value in batch.items()}])
    assert not any(batch["copy_B"].any() for batch in whole)


def test_worker_processes_give_the_same_stream(root):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    assert equal(train(root, workers=1, steps=3), train(root, steps=3))
    meshes = pipeline.open_dataset(data(root))._train
    one, sent = (of.fetch(np.array([[1]]), np.ones(1))[0] for of in (meshes, pickle.loads(pickle.dumps(meshes))))
    assert equal([sent], [one])


def test_a_mesh_that_cannot_be_read_is_named_or_replaced_by_the_next(root, tmp_path, capfd):
    copy = shutil.copytree(root, tmp_path / "records")
    reader = records.Reader(copy, "train", records.surface(SIZE))
    first = reader.sequences[0]
    (example,) = reader.read(first.shard, [first.start])
    flip(str(copy), "train", example["signal_HxWxC"].tobytes())
    with pytest.raises(RecordError, match=rf"{first.shard}: record {first.start} is damaged"):
        train(str(copy))
    skipped, whole = train(str(copy), unreadable="skip"), train(root)
    items = np.concatenate([batch["item_B"] for batch in whole])
    assert np.array_equal(np.concatenate([batch["item_B"] for batch in skipped]), np.where(items == 0, 1, items))
    assert "; surface 1 (record" in capfd.readouterr().err


@pytest.mark.parametrize("batch", [2, 5])
def test_every_copy_of_every_test_mesh_comes_once(root, batch):
    dataset = pipeline.open_dataset(data(root, test_copies=3))
    assert (dataset.train_size, dataset.test_size, dataset.classes) == (6, 9, CLASSES)
    found = held_out(root, batch, test_copies=3)
    pairs = [pair for one in found for pair in zip(one["item_B"], one["copy_B"], strict=True)]
    weights = np.concatenate([one["weight_B"] for one in found])
    assert weights.sum() == 9 and set(pairs[:9]) == {(item, copy) for item in range(3) for copy in range(3)}
    assert all(pair == pairs[8] for pair in pairs[9:])
    for one in found:
        for n, item in enumerate(one["item_B"]):
            assert one["label_B"][n] == item  # one mesh of each class, in order


def test_figures_show_no_copy_twice(root):
    for train, size in ((False, 3), (True, 6)):
        found = pipeline.open_dataset(data(root)).figure_batch(8, train=train)
        shown = list(zip(found["item_B"], found["copy_B"], strict=True))
        assert len(set(shown)) == 8 and found["copy_B"].tolist() == [n // size for n in range(8)]


def test_shapes_are_those_promised(root):
    dataset = pipeline.open_dataset(data(root))
    for batch in [train(root)[0], held_out(root)[0], dataset.figure_batch(4), dataset.figure_batch(4, train=True)]:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(4)
    device = SIZE * 2 * SIZE * 16 * 2 + 2 * 16 * 4 + 4 * 4
    assert dataset.bytes_per_example()["device"] == device < dataset.bytes_per_example()["disk"] + 100


def test_error_lines(root, tmp_path):
    def told(**changes) -> str:
        return message(lambda: pipeline.open_dataset(data(root, **changes)))

    assert "the records" in (line := told(size=9)) and "are 8 pixels wide, data.size is 9" in line
    assert "config.data.test_copies is 0" in told(test_copies=0)
    assert "data.in_memory=True and data.workers=1" in told(in_memory=True, workers=1)
    line = told(records=str(tmp_path / "nowhere"))
    assert "python -m data_prep.shapes --root MESHES --out" in line and "twin=small" in line
    for name, content in contents(pathlib.Path(root)).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"facts": {}}))
    assert "lacks the signature's mean and deviation: run `python -m data_prep.shapes" in told(records=str(tmp_path))


def test_manifests_without_facts_are_what_they_were(tmp_path):
    manifest = records.Manifest(records.FORMAT, "images", 4, {}, {}, {})
    manifest.write(tmp_path)
    assert "facts" not in json.loads((tmp_path / "manifest.json").read_text())
    assert records.Manifest.read(tmp_path) == manifest
    known = dataclasses.replace(manifest, facts={"classes": ["a"]})
    known.write(tmp_path)
    assert records.Manifest.read(tmp_path) == known


def test_the_tiny_twin_streams(monkeypatch, tmp_path):
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    section = data("", twin="tiny", size=4, in_memory=True)
    dataset = pipeline.open_dataset(section)
    assert (dataset.train_size, dataset.test_size, len(dataset.classes)) == (16, 8, 8)  # so every mesh was accepted
    assert dataset.classes == tuple(sorted(synthetic_shapes.BODIES))
    with dataset.train_batches(batch=16, seed=0, start=0, steps=1, rows=slice(None)) as batches:
        (batch,) = batches
    assert sorted(batch["label_B"]) == [label for label in range(8) for _ in range(2)]
    assert np.ptp(batch["signal_BxHxWxC"]) > 60_000
