"""What the user is told when the records cannot be read: one line, with the remedy, from any thread."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from niso.data import pipeline, transforms
from niso.errors import UserError
from tests.toy_records import TEST, TRAIN, data, flat, jpeg, message, pose, train, write_records


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "toy", {"train": TRAIN, "test": TEST})


def test_error_lines(root, tmp_path):
    def told(**changes) -> str:
        return message(lambda: pipeline.open_dataset(data(root, **changes)))

    for missing in ("", str(tmp_path / "nowhere")):
        line = told(records=missing)
        assert "python -m data_prep.co3d" in line and "--config=configs/pose_encode.py:quick" in line
        assert missing in line
    line = told(size=96)
    assert root in line and "8 pixels" in line and "size is 96" in line
    assert "--size 96" in line and "data.size=8" in line
    assert "unknown dataset 'coed'" in told(dataset="coed") and "co3d" in told(dataset="coed")
    line = told(twin="huge", records="")
    assert "unknown twin 'huge'" in line and "tiny, small, full" in line
    assert "data.twin=tiny" in told(twin="tiny")
    assert "config.data.views is 1: it must be at least 2" in told(views=1)
    assert "config.data.max_skip is -1" in told(max_skip=-1)
    assert "config.data.test_every is 0" in told(test_every=0)
    assert "test_skips" in told(test_skips=()) and "test_skips" in told(test_skips=(1, 1))
    assert "test split" in told(test_skips=(90,)) and "92 frames" in told(test_skips=(90,))
    assert "train split" in told(views=8) and "has no window of 8 frames: none of its 6 sequences has 8 frames" in told(views=8)
    line = told(views=4, test_skips=(2,))
    assert "test split" in line and "none of its 3 sequences has 10 frames" in line


def test_splits_without_pairs(tmp_path):
    train_only = write_records(tmp_path / "a", {"train": (3,)})
    assert "have no test split" in message(lambda: pipeline.open_dataset(data(train_only)))
    short = write_records(tmp_path / "b", {"train": (1, 1), "test": (2,)})
    line = message(lambda: pipeline.open_dataset(data(short)))
    assert "train split" in line and "none of its 2 sequences has 2 frames" in line


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_of_threads_are_the_users_own(tmp_path, threads):
    cut = write_records(tmp_path / "a", {"train": (3,), "test": (3,)}, picture=lambda *where: flat(*where)[:-40])
    assert "record" in message(lambda: train(cut, threads=threads)) and "train-00000" in message(lambda: train(cut))
    other = write_records(tmp_path / "b", {"train": (3,), "test": (3,)}, picture=lambda s, t, _: flat(s, t, 4))
    assert "4x4 pixels" in message(lambda: train(other, threads=threads))
    gone = write_records(tmp_path / "c", {"train": (3,), "test": (3,)})
    pathlib.Path(gone, "train-00000-of-00002.array_record").unlink()
    assert "train-00000" in message(lambda: train(gone, threads=threads))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_pose_that_is_not_finite_names_its_sequence(tmp_path, threads, broken):
    def one_broken(sequence: int, frame: int) -> np.ndarray:
        return np.full((4, 4), broken) if (sequence, frame) == (1, 3) else pose(sequence, frame)

    root = write_records(tmp_path / "toy", {"train": (5, 5, 5), "test": TEST}, pose=one_broken)
    dataset = pipeline.open_dataset(data(root, threads=threads))
    lines = [
        message(lambda: train(root, views=3, poses=True, threads=threads, steps=20)),
        message(lambda: dataset.read_sequence("train", 1)),
        message(lambda: dataset.poses("train")),
    ]
    for line in lines:
        assert "a camera pose of sequence s1 (in record 3 of " in line and "train-00001" in line and "is not finite" in line
    assert len(train(root, threads=threads, steps=20)) == 20  # pairs do not look at it
    assert dataset.read_sequence("train", 1, slice(3))[1].shape == (3, 4, 4)
    assert len(dataset.poses("test")) == len(TEST)


def test_defects_keep_their_type(root, monkeypatch):
    monkeypatch.setattr(transforms, "decode_jpeg", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(root)


def test_wrapped_errors_are_unwrapped(root, monkeypatch):
    def wrapped(*_):
        try:
            raise UserError("one line")
        except UserError as error:
            raise RuntimeError("three\nlines of\nframes") from error

    monkeypatch.setattr(transforms, "decode_jpeg", wrapped)
    assert message(lambda: train(root)) == "one line"


def test_decode_jpeg():
    image = transforms.decode_jpeg(flat(2, 3, 16), "here")
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - (50, 70, 128)).max() <= 2
    assert transforms.decode_jpeg(jpeg(np.zeros((4, 6), np.uint8)), "here").shape == (4, 6, 3)
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    for damaged in (b"", b"text", flat(2, 3, 16)[:300], png.getvalue()):
        assert "record 7 of x" in message(lambda damaged=damaged: transforms.decode_jpeg(damaged, "record 7 of x"))
