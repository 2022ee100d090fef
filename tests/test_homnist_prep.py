"""data_prep.homnist: the published file and the set made from MNIST as records, what is refused, and a dataset tested on them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from configs import hmnist_pred
from data_prep import homnist, homnist_mat
from niso import evaluate, rng
from niso.config import Experiment
from niso.data import pipeline, records, stills
from niso.geometry import homography
from niso.step import Program
from niso.tasks import views
from tests.conftest import mesh_of
from tests.prep_runs import check_a_killed_run, contents
from tests.test_stills import digit, label, write_records
from tests.toy_records import message

COUNT, COPIES = 24, 4  # images, and how many of them are of one digit
STILL = records.still(28, channels=1, labelled=True)


def published() -> dict[str, np.ndarray]:
    """The keys of the published file, in its layout; the labels repeat after no shard's length."""
    random = np.random.default_rng(0)
    return {
        "img_data": random.random((COUNT, 40, 40)),
        "labels": np.repeat(np.arange(6) * 7 % 10, COPIES)[:, None].astype(np.float64),
        "hom_matrices": random.random((COUNT, 3, 3)),
    }


def write_mat(path: pathlib.Path, **changes: np.ndarray) -> pathlib.Path:
    scipy.io.savemat(path, published() | changes)
    return path


def stored(out: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(image_NxHxW, label_N)"""
    reader = records.Reader(out, "test", records.still(40, channels=1, labelled=True))
    found = [one for s in reader.sequences for one in reader.read(s.shard, range(s.start, s.start + s.length))]
    return np.stack([one["image_HxWxC"][..., 0] for one in found]), np.stack([one["label"] for one in found])


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> pathlib.Path:
    """Records of MNIST, a few digits, in which no shard begins with a whole number of tens."""
    root = tmp_path_factory.mktemp("mnist") / "records"
    return pathlib.Path(write_records(root, {"train": (9,), "test": (2, 4)}, 28, "mnist", digit, STILL))


@pytest.fixture(scope="module")
def regenerated(mnist, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("regenerated") / "out"
    homnist.prepare(out, mnist=mnist, copies=COPIES, shards=3, progress=False)
    return out


# ---- the published file ----------------------------------------------------------------------------------------------


def test_images_and_labels_of_the_published_file(tmp_path, capsys):
    path, out = write_mat(tmp_path / "file.mat"), tmp_path / "out"
    assert homnist.main(["--mat", str(path), "--out", str(out), "--shards", "3"]) == 0
    assert capsys.readouterr().out == f"test: {COUNT} images\n"
    manifest = records.Manifest.read(out)
    assert (manifest.dataset, manifest.size, list(manifest.splits)) == ("homnist", 40, ["test"])
    image_NxHxW, label_N = stored(out)
    assert image_NxHxW.dtype == np.uint8 and np.abs(image_NxHxW - 255 * published()["img_data"]).max() <= 0.5
    assert label_N.tolist() == published()["labels"][:, 0].tolist()
    homnist.prepare(out, mat=path, shards=3)
    assert "nothing to do" in capsys.readouterr().out
    write_mat(path, labels=np.ones(COUNT))
    assert f"{path} has other images than then" in message(lambda: homnist.prepare(out, mat=path, shards=3))


@pytest.mark.parametrize("labels", [(COUNT, 1), (1, COUNT), (COUNT,)])
@pytest.mark.parametrize(
    "shape", [(COUNT, 40, 40), (COUNT, 1600), (COUNT, 40, 40, 1), (COUNT, 1, 40, 40), (1, COUNT, 40, 40), (COUNT, 1600, 1)]
)
def test_layouts(tmp_path, shape, labels):
    ours = published()
    path = write_mat(tmp_path / "file.mat", img_data=ours["img_data"].reshape(shape), labels=ours["labels"].reshape(labels))
    image_NxHxW, label_N, _ = homnist_mat.read(path)
    np.testing.assert_array_equal(image_NxHxW, ours["img_data"])
    assert label_N.tolist() == ours["labels"].ravel().tolist() and image_NxHxW.base is not None  # not a copy of 4.1 GB


def test_types(tmp_path):
    ours = published()
    grey_NxHxW = np.rint(255 * ours["img_data"]).astype(np.uint8)
    for changes in (
        {"img_data": np.float32(grey_NxHxW / 255)},
        {"img_data": grey_NxHxW},
        {"img_data": grey_NxHxW / 255, "labels": ours["labels"].astype(np.uint8)},
        {"img_data": np.clip(grey_NxHxW / 255 * 1.0001 - 5e-5, -5e-5, 1.0001)},  # what interpolation can overshoot by
    ):
        image_NxHxW, label_N, _ = homnist_mat.read(write_mat(tmp_path / "file.mat", **changes))
        np.testing.assert_array_equal(homnist.grey(image_NxHxW), grey_NxHxW)
        assert label_N.dtype == np.int64
    one = write_mat(tmp_path / "one.mat", img_data=ours["img_data"][:1], labels=np.array([[3]]))
    assert homnist_mat.read(one)[0].shape == (1, 40, 40)


def changed(place: tuple[int, ...], value: float) -> np.ndarray:
    images = published()["img_data"]
    images[place] = value
    return images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_data": changed((20, 3, 3), 1.5)}, "image 20 of FILE has a pixel of 1.5: floats must be in [0, 1]"),
        ({"img_data": changed((7, 0, 39), np.nan)}, "image 7 of FILE has a pixel of nan"),
        ({"img_data": 2 * published()["img_data"] - 1}, "has a pixel of -"),
        ({"img_data": published()["img_data"][:, 1:]}, "img_data of FILE is 24 x 39 x 40, not N x 40 x 40 or N x 1600"),
        ({"img_data": np.moveaxis(published()["img_data"], 0, -1)}, "is 40 x 40 x 24, not N x 40 x 40"),
        ({"img_data": np.zeros((COUNT, 40, 40), np.int16)}, "img_data of FILE is of type int16, neither floats nor uint8"),
        ({"img_data": "digits"}, "img_data of FILE is of type <U6"),
        ({"img_data": published()["img_data"][1:]}, "FILE has 23 images and 24 labels"),
        ({"labels": np.zeros((0, 1)), "img_data": np.zeros((0, 40, 40))}, "FILE has 0 images and 0 labels"),
        ({"labels": np.eye(COUNT)[:, :10]}, "labels of FILE are 24 x 10 of type float64, not one number per image"),
        ({"labels": np.arange(COUNT) % 11}, "label 10 of FILE is 10, not 0 to 9"),
        ({"labels": np.full(COUNT, 0.5)}, "label 0 of FILE is 0.5, not 0 to 9"),
    ],
)
def test_a_file_of_something_else(tmp_path, changes, words):
    path, out = write_mat(tmp_path / "file.mat", **changes), tmp_path / "out"
    line = message(lambda: homnist.prepare(out, mat=path, progress=False))
    assert words.replace("FILE", str(path)) in line and "--mnist RECORDS_OF_MNIST" in line and not out.exists()


def test_digits_that_lie_on_their_side_are_refused(tmp_path):
    ones_NxHxW = np.zeros((120, 40, 40))
    ones_NxHxW[:, 8:32, 18:22] = 1.0
    labels = np.ones(120)
    assert len(homnist_mat.read(write_mat(tmp_path / "file.mat", img_data=ones_NxHxW, labels=labels))[0]) == 120
    for lying in (ones_NxHxW.swapaxes(1, 2), ones_NxHxW.reshape(120, 1600, order="F")):  # the second: as MATLAB reshapes
        path = write_mat(tmp_path / "file.mat", img_data=lying, labels=labels)
        assert f"the ones of {path} lie on their side: exchange" in message(lambda path=path: homnist_mat.read(path))


def test_no_such_file_or_another_format(tmp_path):
    path, whole = tmp_path / "file.mat", write_mat(tmp_path / "whole.mat").read_bytes()

    def told(content: bytes) -> str:
        path.write_bytes(content)
        return message(lambda: homnist.prepare(tmp_path / "out", mat=path, progress=False))

    assert f"no file {path}: set --mat to " in message(lambda: homnist.prepare(tmp_path / "out", mat=path))
    for content in (b"", whole[:50], whole[:200], whole[: len(whole) // 2], b"hello world " * 100):
        assert f"{path} is truncated, damaged or no file of MATLAB's" in told(content)
    scipy.io.savemat(path, {"img_data": published()["img_data"]})
    assert f"{path} has no labels: it is truncated, or no homNIST set" in told(path.read_bytes())
    hdf = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)
    assert f"{path} is of MATLAB's version 7.3 (HDF5), which is not read: convert it" in told(hdf)


# ---- the set made from MNIST -----------------------------------------------------------------------------------------


def classify(**changes: object) -> Experiment:
    """A tiny hmnist_pred."""
    config = hmnist_pred.get_config("quick")
    tiny = {"task.widths": (4, 8), "task.blocks": 1, "task.latent_channels": 8, "task.rank": 8, "task.warm_start": (), "batch": 8}
    config.update_from_flattened_dict(tiny | changes)
    return Experiment.from_config(config)


def test_regenerated_records_are_what_the_task_draws(mnist, regenerated):
    image_NxHxW, label_N = stored(regenerated)
    assert len(label_N) == COUNT and label_N.tolist() == np.repeat([label(number) for number in range(6)], COPIES).tolist()
    item_B, copy_B = np.array([0, 0, 1, 2, 5, 5], np.int32), np.array([0, 3, 1, 2, 0, 3], np.int32)
    batch = {
        "images_BxHxWxC": np.stack([digit(item)["image_HxWxC"] for item in item_B]),
        "item_B": item_B, "copy_B": copy_B, "label_B": np.zeros(6, np.int32), "weight_B": np.ones(6, np.float32),
    }  # fmt: skip
    held_out = classify().task.draw_held_out({name: jnp.asarray(value) for name, value in batch.items()}, jax.random.key(7))
    grey_BxHxW = 127.5 * (np.asarray(held_out["observation_BxHxWxC"])[..., 0] + 1)
    assert np.abs(image_NxHxW[COPIES * item_B + copy_B] - grey_BxHxW).max() <= 0.5 + 1e-3
    assert grey_BxHxW.std() > 30


def test_each_homography_is_a_function_of_digit_copy_and_seed():
    item_B, copy_B = np.array([0, 7, 7, 9_999], np.int32), np.array([0, 0, 31, 2], np.int32)
    for seed in (0, 3):
        coefficient_Bx8 = homography.held_out_coefficients(item_B, copy_B, seed)
        np.testing.assert_array_equal(views.held_out_coefficients({"item_B": item_B, "copy_B": copy_B}, seed), coefficient_Bx8)
        for item, copy, coefficient_8 in zip(item_B, copy_B, coefficient_Bx8, strict=True):
            key = jax.random.fold_in(rng.stream(seed, "homnist", int(item)), int(copy))
            np.testing.assert_array_equal(homography.random_coefficients(key, 1, "test")[0], coefficient_8)


def test_another_seed_is_another_set(mnist, regenerated, tmp_path):
    homnist.prepare(tmp_path / "out", mnist=mnist, copies=COPIES, seed=1, progress=False)
    image_NxHxW, label_N = stored(tmp_path / "out")
    first_NxHxW, first_N = stored(regenerated)
    assert (label_N == first_N).all() and all((a != b).any() for a, b in zip(image_NxHxW, first_NxHxW, strict=True))
    assert records.Manifest.read(tmp_path / "out").options["seed"] == 1
    told = message(lambda: homnist.prepare(regenerated, mnist=mnist, copies=COPIES, seed=1, shards=3))
    assert "was begun with other options (seed 0 then, 1 now)" in told


def test_a_killed_run_continues_and_ends_with_the_same_bytes(mnist, regenerated, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as in conftest.py: a last bit can round to another grey level
    out = tmp_path / "out"

    def again() -> None:
        homnist.prepare(out, mnist=mnist, copies=COPIES, shards=3, progress=False)

    arguments = f"{str(out)!r}, mnist={str(mnist)!r}, copies={COPIES}, shards=3"
    check_a_killed_run("homnist", arguments, out, again, contents(regenerated))


def test_mistakes_on_the_command_line(mnist, tmp_path, capsys):
    mat, out, elsewhere = write_mat(tmp_path / "file.mat"), tmp_path / "out", tmp_path / "elsewhere"
    coloured = write_records(tmp_path / "coloured", {"train": (3,), "test": (3,)})
    no_test = write_records(tmp_path / "no_test", {"train": (3,)}, 28, "mnist", digit, STILL)
    for arguments, words in (
        ((), "neither is set: set --mat, to the published file, or --mnist,"),
        (("--mat", mat, "--mnist", mnist), "both are set: set --mat"),
        (("--mat", mat, "--copies", 32), f"--copies and --seed are for --mnist: the homographies in {mat} are what they are"),
        (("--mat", mat, "--shards", 0), "--shards is 0, it must be between 1 and"),
        (("--mnist", mnist, "--copies", 0), "--copies is 0, it must be at least 1"),
        (("--mnist", mnist, "--seed", -1), "--seed is -1, it must be between 0 and"),
        (("--mnist", elsewhere), f"no records of MNIST in {elsewhere}: make them with `python -m data_prep.mnist --root MNIST"),
        (("--mnist", coloured), f"{coloured} holds images, 4 pixels wide (test, train), not MNIST's test split"),
        (("--mnist", no_test), f"{no_test} holds mnist, 28 pixels wide (train), not MNIST's test split"),
    ):
        assert homnist.main([*map(str, arguments), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not out.exists()


# ---- a dataset that is tested on them --------------------------------------------------------------------------------


def section(mnist: pathlib.Path, test_records: object, **changes: object) -> stills.Stills:
    toy = stills.Stills(
        dataset="mnist", records=str(mnist), twin="", size=28, stack=1, test_examples=COUNT, test_copies=1,
        test_records=str(test_records), in_memory=False, threads=2, prefetch=2, workers=0, unreadable="fatal",
    )  # fmt: skip
    return dataclasses.replace(toy, **changes)


@pytest.mark.parametrize("in_memory", [False, True])
def test_training_batches_are_of_mnist_and_test_batches_of_the_records(mnist, regenerated, in_memory):
    data = section(mnist, regenerated, in_memory=in_memory)
    dataset = pipeline.open_dataset(data)
    assert (dataset.train_size, dataset.test_size) == (9, COUNT)
    with dataset.train_batches(batch=9, seed=0, start=0, steps=1, rows=slice(None)) as batches:
        (batch,) = batches
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == data.batch_shapes(9)
    np.testing.assert_array_equal(batch["images_BxHxWxC"][..., 0, 0, 0], batch["item_B"])
    with dataset.test_batches(batch=COUNT, rows=slice(None)) as batches:
        (batch,) = batches
    image_NxHxW, label_N = stored(regenerated)
    assert sorted(batch["item_B"]) == list(range(COUNT)) and not batch["copy_B"].any()
    np.testing.assert_array_equal(batch["images_BxHxWxC"][..., 0], image_NxHxW[batch["item_B"]])
    np.testing.assert_array_equal(batch["label_B"], label_N[batch["item_B"]])
    assert dataset.figure_batch(2)["images_BxHxWxC"].shape == (2, 40, 40, 1)
    assert dataset.figure_batch(2, train=True)["images_BxHxWxC"].shape == (2, 28, 28, 1)
    assert pipeline.open_dataset(section(mnist, "", test_examples=6)).figure_batch(2)["images_BxHxWxC"].shape == (2, 28, 28, 1)


@pytest.mark.slow
def test_accuracy_is_the_same_on_records_and_on_what_is_drawn(mnist, regenerated):
    """Of a classifier that knows nothing; a grey level is rounded, which may move its loss a little."""
    of_records = {"data.twin": "", "data.records": str(mnist), "data.test_records": str(regenerated), "data.test_copies": 1}
    e = classify(**of_records, **{"data.test_examples": COUNT})
    drawn = dataclasses.replace(e.data, test_records="", test_copies=COPIES)
    program = Program(e, mesh_of(1), e.data.batch_shapes(e.batch))
    state, found = program.init({}), []
    for data in (e.data, drawn):
        with pipeline.open_dataset(data).test_batches(batch=e.batch, rows=slice(None)) as batches:
            found += evaluate.evaluate(program, state, batches)
    assert found[0]["accuracy"] == pytest.approx(found[1]["accuracy"], abs=100 / COUNT + 0.01) and 0 <= found[0]["accuracy"] <= 100
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)


def test_error_lines(mnist, regenerated, tmp_path):
    def told(test_records: object = regenerated, **changes: object) -> str:
        return message(lambda: pipeline.open_dataset(section(mnist, test_records, **changes)))

    nothing = "--config.data.test_records= to nothing"
    elsewhere = tmp_path / "elsewhere"
    line = told(elsewhere)
    assert f"no records in {elsewhere}: make them with `python -m data_prep.homnist --mat FILE --out {elsewhere}`" in line
    assert nothing in line
    assert f"{mnist} holds mnist, not homnist: set --config.data.test_records to another folder" in told(mnist)
    line = told(test_copies=2)
    assert "data.test_copies=2" in line and "set --config.data.test_copies=1" in line and nothing in line
    line = told(stack=2)
    assert "single digits, not for data.dataset=mnist and data.stack=2" in line and nothing in line
    assert "not for data.dataset=images and data.stack=1" in told(dataset="images", size=4)
    assert f"test_examples is {COUNT + 1}: there are at most {COUNT} images" in told(test_examples=COUNT + 1)
    line = told(dataset="homnist", records=str(regenerated))
    assert "data.dataset=homnist has no images to train on" in line and "--config.data.test_records" in line
