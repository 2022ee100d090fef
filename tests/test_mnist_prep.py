"""data_prep.mnist: what is stored of idx files, which files are refused, and runs that are broken off or repeated."""

import dataclasses
import gzip
import pathlib
import struct
import sys

import numpy as np
import pytest

from data_prep import mnist, samples, synthetic_mnist
from niso.data import pipeline, records, stills
from tests.prep_runs import check_a_killed_run, contents
from tests.toy_records import message

_REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"
TRAIN, TEST = 31, 13


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """The format by hand: two zeros, the type, the number of axes, their lengths, the values."""
    return bytes([0, 0, kind, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape) + array.tobytes()


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise for images, and labels that repeat after no shard's length."""
    count = {"train": TRAIN, "test": TEST}[split]
    image_NxHxW = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    return image_NxHxW, (np.arange(count) * 7 % 10).astype(np.uint8)


def write_files(root: pathlib.Path, packed: bool = False) -> pathlib.Path:
    root.mkdir()
    for split, names in mnist.FILES.items():
        for name, array in zip(names, digits(split), strict=True):
            path, content = root / name, idx(array)
            path.with_name(f"{name}.gz").write_bytes(gzip.compress(content)) if packed else path.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return write_files(tmp_path_factory.mktemp("mnist") / "plain")


EVERYTHING = {"verify": False, "shards": 3, "progress": False}


@pytest.fixture(scope="module")
def unbroken(root, tmp_path_factory) -> dict[str, bytes]:
    """What an unbroken run leaves behind."""
    out = tmp_path_factory.mktemp("out") / "records"
    mnist.prepare(root, out, **EVERYTHING)
    return contents(out)


def stored(out: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = records.Reader(out, split, records.still(28, channels=1, labelled=True))
    found = [one for s in reader.sequences for one in reader.read(s.shard, range(s.start, s.start + s.length))]
    return np.stack([one["image_HxWxC"] for one in found]), np.stack([one["label"] for one in found])


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_digits_and_labels_are_stored_as_they_are(tmp_path, packed, unbroken):
    source, out = write_files(tmp_path / "files", packed), tmp_path / "out"
    manifest = mnist.prepare(source, out, **EVERYTHING)
    assert manifest == records.Manifest.read(out) and (manifest.dataset, manifest.size, manifest.left_out) == ("mnist", 28, {})
    for split in mnist.FILES:
        image_NxHxW, label_N = digits(split)
        image_NxHxWxC, stored_N = stored(out, split)
        np.testing.assert_array_equal(image_NxHxWxC, image_NxHxW[..., None])
        np.testing.assert_array_equal(stored_N, label_N)
        assert stored_N.dtype == np.int64
    assert contents(out) == unbroken  # packed or not


def test_the_files_of_mnist(tmp_path):
    if not _REAL.is_dir():
        pytest.skip(f"no MNIST at {_REAL}")
    splits, _ = mnist.read(_REAL)
    assert {split: image_NxHxW.shape for split, (image_NxHxW, _) in splits.items()} == {
        "train": (60_000, 28, 28),
        "test": (10_000, 28, 28),
    }
    # The number of each digit, as published; and the first ones.
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(splits["train"][1]).tolist() == published and splits["train"][1][:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(splits["test"][1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    mnist.prepare(_REAL, tmp_path / "out", progress=False)
    section = stills.Stills(
        dataset="mnist", records=str(tmp_path / "out"), twin="", size=28, stack=1, test_examples=10_000, test_copies=1,
        test_records="", in_memory=False, threads=2, prefetch=2, workers=0, unreadable="fatal",
    )  # fmt: skip
    dataset = pipeline.open_dataset(section)
    assert (dataset.train_size, dataset.test_size) == (60_000, 10_000)
    with dataset.test_batches(batch=10_000, rows=slice(None)) as batches:
        (batch,) = batches
    order_N = np.random.RandomState(0).permutation(10_000)
    np.testing.assert_array_equal(batch["images_BxHxWxC"][..., 0], splits["test"][0][order_N])
    np.testing.assert_array_equal(batch["label_B"], splits["test"][1][order_N])


# ---- what is refused -------------------------------------------------------------------------------------------------


def _main(root: pathlib.Path, out: pathlib.Path, *more: str) -> int:
    return mnist.main(["--root", str(root), "--out", str(out), *more])


def test_other_datasets_in_files_of_the_same_names_are_refused(root, tmp_path, capsys):
    assert _main(root, tmp_path / "out") == 2  # nothing on the command line turns this off
    error = capsys.readouterr().err
    assert f"{root / 'train-images-idx3-ubyte'} is damaged, or another dataset's: the SHA-256 of its content is " in error
    assert "ba891046e6505d7a" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_changed_digit_is_refused(tmp_path):
    if not _REAL.is_dir():
        pytest.skip(f"no MNIST at {_REAL}")
    for names in mnist.FILES.values():
        for name in names:
            (tmp_path / f"{name}.gz").symlink_to(_REAL / f"{name}.gz")
    content = bytearray(gzip.decompress((_REAL / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    content[-1] ^= 1
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)  # beside the right one: what is unpacked counts
    line = message(lambda: mnist.prepare(tmp_path, tmp_path / "out", progress=False))
    assert f"{tmp_path / 't10k-labels-idx1-ubyte'} is damaged" in line


def test_missing_files_are_named_and_where_they_are_to_be_had(root, tmp_path, capsys):
    assert _main(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "LeCun" in error and "torchvision" in error and "--root" in error
    assert all(name in error for names in mnist.FILES.values() for name in names)
    partly = write_files(tmp_path / "partly", packed=True)
    (partly / "t10k-labels-idx1-ubyte.gz").unlink()
    line = message(lambda: mnist.prepare(partly, tmp_path / "out", **EVERYTHING))
    assert line.startswith(f"no t10k-labels-idx1-ubyte in {partly}, with or without .gz; ")


IMAGES, LABELS = (array[:4] for array in digits("train"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images-idx3", idx(IMAGES, kind=9), "no idx file of bytes on 3 axes: it begins with the number 2307, not 2051"),
        ("images-idx3", idx(LABELS) + bytes(8), "it begins with the number 2049, not 2051"),
        ("labels-idx1", idx(IMAGES), "it begins with the number 2051, not 2049"),
        ("images-idx3", idx(IMAGES)[:-1], "is truncated: it has 3151 bytes, 3152 by its head"),
        ("images-idx3", idx(IMAGES)[:9], "is truncated: it has 9 bytes, the head of an idx file alone 16"),
        ("labels-idx1", b"", "is truncated: it has 0 bytes"),
        ("labels-idx1", idx(LABELS) + b"\0", "is too long: it has 13 bytes, 12 by its head"),
        ("images-idx3", idx(IMAGES[:, 1:]), "are 27 x 28 pixels, not 28 x 28"),
        ("labels-idx1", idx(LABELS[:3]), "-images-idx3-ubyte has 31 images,"),
        ("labels-idx1", idx(np.arange(31, dtype=np.uint8) % 11), "label 10 is 10, not 0 to 9"),
        ("images-idx3", gzip.compress(idx(IMAGES))[:-9], "is truncated or damaged (Compressed file ended"),
        ("images-idx3", gzip.compress(idx(IMAGES))[:-8] + bytes(8), "is truncated or damaged (CRC check failed"),
    ],
)
def test_damaged_files(tmp_path, name, content, words):
    source = write_files(tmp_path / "files")
    (source / f"train-{name}-ubyte").write_bytes(content)
    line = message(lambda: mnist.prepare(source, tmp_path / "out", **EVERYTHING))
    assert words in line and f"train-{name}-ubyte" in line


def test_no_digits_at_all(tmp_path):
    source = write_files(tmp_path / "files")
    for name, array in zip(mnist.FILES["test"], digits("test"), strict=True):
        (source / name).write_bytes(idx(array[:0]))
    assert "has 0 images" in message(lambda: mnist.prepare(source, tmp_path / "out", **EVERYTHING))


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_and_ends_with_the_same_bytes(root, unbroken, tmp_path):
    out = tmp_path / "out"
    arguments = f"{str(root)!r}, {str(out)!r}, verify=False, shards=3"
    check_a_killed_run("mnist", arguments, out, lambda: mnist.prepare(root, out, **EVERYTHING), unbroken)


def test_several_workers_write_the_same_bytes(root, unbroken, tmp_path):
    mnist.prepare(root, tmp_path / "out", **EVERYTHING | {"workers": 2})
    assert contents(tmp_path / "out") == unbroken


def test_a_finished_folder_says_so_and_refuses_other_digits(root, unbroken, tmp_path, capsys):
    out, other = tmp_path / "out", write_files(tmp_path / "other")
    for name, content in unbroken.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    mnist.prepare(root, out, **EVERYTHING | {"progress": True})
    assert capsys.readouterr().out.strip() == f"{out}: nothing to do, the records are complete"
    (other / mnist.FILES["test"][1]).write_bytes(idx((digits("test")[1] + 1) % 10))
    line = message(lambda: mnist.prepare(other, out, **EVERYTHING))
    assert f"{other} has other digits than then" in line and "another --out" in line
    assert "shards 3 then, 2 now" in message(lambda: mnist.prepare(root, out, **EVERYTHING | {"shards": 2}))
    assert "--size is 40, it must be 28" in message(lambda: mnist.prepare(root, out, **EVERYTHING, size=40))


# ---- the built-in digits ---------------------------------------------------------------------------------------------


def test_the_twin_is_scikit_learns_digits_in_mnists_files(tmp_path):
    pytest.importorskip("sklearn")
    synthetic_mnist.generate(tmp_path, "tiny")
    splits, _ = mnist.read(tmp_path, verify=False)
    small_NxHxW, label_N = samples.digits()
    image_NxHxW = np.concatenate([image_NxHxW for image_NxHxW, _ in splits.values()])
    np.testing.assert_array_equal(np.concatenate([label_N for _, label_N in splits.values()]), label_N)
    assert [len(label_N) for _, label_N in splits.values()] == [1437, 360]
    assert all(np.bincount(label_N).min() > 0.9 * len(label_N) / 10 for _, label_N in splits.values())
    # Means over the 2.5 x 2.5 pixels of each of the 8 x 8; bicubic interpolation moves them.
    inner_NxHxW = image_NxHxW[:, 4:-4, 4:-4].repeat(2, 1).repeat(2, 2).reshape(-1, 8, 5, 8, 5).mean((2, 4))
    difference_NxHxW = inner_NxHxW - small_NxHxW * (255 / 16)
    assert np.abs(difference_NxHxW).mean() < 20 and abs(difference_NxHxW.mean()) < 1
    assert np.corrcoef(inner_NxHxW.ravel(), small_NxHxW.ravel())[0, 1] > 0.97
    assert image_NxHxW[:, [0, 1, -2, -1]].max() <= 2  # MNIST's margin, with the smooth edge of the strokes in it


def test_the_twin_streams_and_every_twin_is_the_same(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    section = stills.Stills(
        dataset="mnist",
        records="",
        twin="tiny",
        size=28,
        stack=1,
        test_examples=360,
        test_copies=1,
        test_records="",
        in_memory=True,
        threads=2,
        prefetch=2,
        workers=0,
        unreadable="fatal",
    )
    dataset = pipeline.open_dataset(section)
    assert (dataset.train_size, dataset.test_size) == (1437, 360)
    with dataset.train_batches(batch=1437, seed=0, start=0, steps=1, rows=slice(None)) as batches:
        (batch,) = batches
    _, label_N = samples.digits()
    assert np.bincount(batch["label_B"]).tolist() == np.bincount(label_N[:-360]).tolist()
    assert set(synthetic_mnist.PREPARATION) == {"tiny", "small", "full"}
    assert "size=28" in message(lambda: pipeline.open_dataset(dataclasses.replace(section, size=40)))


def test_the_twin_without_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert message(lambda: synthetic_mnist.generate(tmp_path, "tiny")) == (
        "the built-in digits need scikit-learn: pip install -e '.[samples]', or prepare MNIST: "
        "python -m data_prep.mnist --root MNIST --out RECORDS"
    )
