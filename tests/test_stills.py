"""Still images, stacked or with labels: which, in which order, read from where, and what the user is told."""

import dataclasses
import pathlib
import re
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from niso.config import Experiment
from niso.data import datasets, pipeline, records, stills
from niso.errors import UserError
from tests import tiny
from tests.toy_records import TEST, TRAIN, equal, message
from tests.toy_records import write_records as write_video

SIZE, STACK = 4, 5
TRAINING, HELD_OUT = (13, 0, 11), (9, 3)  # images of each shard


def image(number: int) -> np.ndarray:
    """HxWx3, another one for every number, which its first pixel says."""
    image_HxWxC = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    image_HxWxC[0, 0] = number
    return image_HxWxC


def label(number: int) -> int:
    """Of digit `number`: what it shows alone does not tell."""
    return (number * 7 + number // 10) % 10


def digit(number: int) -> records.Example:
    """A record of 28 x 28 x 1, another one for every number, which its first pixel says, and its label."""
    image_HxWxC = np.random.default_rng(number).integers(0, 256, (28, 28, 1), np.uint8)
    image_HxWxC[0, 0] = number
    return {"image_HxWxC": image_HxWxC, "label": np.int64(label(number))}


def coloured(number: int) -> records.Example:
    """A record without a label."""
    return {"image_HxWxC": image(number)}


def write_records(
    root: pathlib.Path,
    splits: dict[str, tuple[int, ...]],
    size: int = SIZE,
    dataset: str = "images",
    record=coloured,
    schema: records.Schema | None = None,
) -> str:
    """A folder of records with that many images in each shard, numbered through the split."""
    root.mkdir()
    shards: dict[str, tuple[records.Shard, ...]] = {}
    for split, counts in splits.items():
        sequences, files, number = [], [], 0
        for part, count in enumerate(counts):
            name = f"{split}-{part:05d}-of-{len(counts):05d}.array_record"
            with records.ShardWriter(root / name) as writer:
                for _ in range(count):
                    writer.write(records.encode(record(number), schema or records.still(SIZE)))
                    number += 1
            files.append(records.describe_shard(root / name, count))
            if count:
                sequences.append(records.Sequence(f"part {part}", "images", name, 0, count, None))
        records.write_index(root, split, sequences)
        shards[split] = tuple(files)
    records.Manifest(records.FORMAT, dataset, size, {}, shards, {}).write(root)
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "toy", {"train": TRAINING, "test": HELD_OUT})


def data(root: str, **changes) -> stills.Stills:
    toy = stills.Stills(
        dataset="images", records=root, twin="", size=SIZE, stack=STACK, test_examples=7, test_copies=1, test_records="",
        in_memory=False, threads=2, prefetch=4, workers=0, unreadable="fatal",
    )  # fmt: skip
    return dataclasses.replace(toy, **changes)


def train(root: str, *, batch=3, seed=0, start=0, steps=8, rows=slice(None), **changes) -> list[pipeline.Batch]:
    with pipeline.open_dataset(data(root, **changes)).train_batches(
        batch=batch, seed=seed, start=start, steps=steps, rows=rows
    ) as batches:
        return list(batches)


def shown(batch: pipeline.Batch) -> list[list[int]]:
    """The numbers of the images of every example; all pixels must be theirs, in the documented channels."""
    rows = batch["images_BxHxWxC"]
    numbers = [row[0, 0, ::3].tolist() for row in rows]
    for row, of_row in zip(rows, numbers, strict=True):
        for s, number in enumerate(of_row):
            np.testing.assert_array_equal(row[..., 3 * s : 3 * s + 3], image(number))
    return numbers


def flat(batches: list[pipeline.Batch]) -> list[int]:
    return [number for batch in batches for row in shown(batch) for number in row]


# The training stream


def test_every_image_comes_once_per_epoch(root):
    count = sum(TRAINING)
    stream = flat(train(root, batch=1, steps=30))
    assert len(stream) == 30 * STACK
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert len(epochs) == 6 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6 and sorted(stream[:count]) != stream[:count]
    other = flat(train(root, batch=1, steps=30, seed=1))
    assert not {tuple(other[i : i + count]) for i in range(0, 2 * count, count)} & set(map(tuple, epochs))
    assert flat(train(root, batch=6, steps=5)) == stream  # the batch only cuts it
    assert pipeline.open_dataset(data(root)).train_size == count // STACK


def test_the_order_is_the_one_of_old_checkpoints(root):
    """The order of seed 0, written down. If it moves (another numpy?), runs begun before cannot be resumed: say so."""
    assert [shown(batch) for batch in train(root, batch=1, steps=2, stack=4)] == [[[1, 13, 4, 10]], [[9, 5, 18, 0]]]
    with pipeline.open_dataset(data(root, stack=4, test_examples=2)).test_batches(batch=1, rows=slice(None)) as batches:
        assert [shown(batch) for batch in batches] == [[[6, 11, 4, 10]], [[2, 8, 1, 7]]]


@pytest.mark.parametrize("changes", [{}, {"in_memory": True}, {"threads": 0, "prefetch": 0}])
def test_resuming_continues_the_unbroken_stream(root, changes):
    whole = train(root, steps=12)
    assert len(whole) == 12
    for start in (0, 5, 12):
        assert equal(train(root, start=start, steps=12, **changes), whole[start:])
    assert equal(train(root, start=5, steps=40, **changes)[:7], whole[5:])


def test_hosts_share_a_batch_and_read_only_their_rows(root, monkeypatch):
    whole = train(root, batch=5)
    reads: list[int] = []
    read = records.Reader.read
    monkeypatch.setattr(records.Reader, "read", lambda self, shard, n, schema=None: reads.extend(n) or read(self, shard, n, schema))
    for hosts in ([slice(0, 2), slice(2, 5)], [[4, 1], [0], range(2, 4)]):
        parts = [train(root, batch=5, rows=rows) for rows in hosts]
        order = np.concatenate([np.arange(5)[rows if isinstance(rows, slice) else list(rows)] for rows in hosts])
        joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
        assert equal(joined, [{key: value[order] for key, value in batch.items()} for batch in whole])
    assert len(reads) == 2 * 8 * 5 * STACK


def test_images_in_memory_are_the_same(root, monkeypatch):
    for seed in (0, 3):
        assert equal(train(root, seed=seed, in_memory=True), train(root, seed=seed))
    resident = pipeline.open_dataset(data(root, in_memory=True))
    singly = pipeline.open_dataset(data(root))
    with resident.test_batches(batch=3, rows=[2, 0]) as ours, singly.test_batches(batch=3, rows=[2, 0]) as theirs:
        assert equal(list(ours), list(theirs))
    assert equal([resident.figure_batch(4, train=True)], [singly.figure_batch(4, train=True)])
    assert resident.bytes_per_example() == singly.bytes_per_example()
    monkeypatch.setattr(records.Reader, "read", None)
    assert resident.figure_batch(2)["images_BxHxWxC"].shape == (2, SIZE, SIZE, 3 * STACK)


def test_worker_processes_give_the_same_stream(root):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for its own; main parses them
    assert equal(train(root, start=2, steps=5, workers=2), train(root, start=2, steps=5))


def test_shapes_are_those_promised(root):
    dataset = pipeline.open_dataset(data(root))
    with dataset.test_batches(batch=3, rows=slice(None)) as test:
        for batch in [*train(root, batch=3), *test, dataset.figure_batch(3)]:
            assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(3)
    assert dataset.bytes_per_example()["device"] == SIZE * SIZE * 3 * STACK + 4
    assert data(root).example == "stack of 5 images" and data(root, stack=1).example == "single image"


# Labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    root, schema = tmp_path_factory.mktemp("records") / "digits", datasets.find("mnist").schema(28)
    return write_records(root, {"train": TRAINING, "test": HELD_OUT}, 28, "mnist", digit, schema)


DIGITS = {"dataset": "mnist", "size": 28, "stack": 1}


def shown_digits(batch: pipeline.Batch) -> list[int]:
    """The numbers of the digits of every example; all pixels and the label must be theirs."""
    numbers = batch["images_BxHxWxC"][:, 0, 0, 0].tolist()
    for n, number in enumerate(numbers):
        np.testing.assert_array_equal(batch["images_BxHxWxC"][n], digit(number)["image_HxWxC"])
    assert batch["label_B"].tolist() == [label(number) for number in numbers] and batch["label_B"].dtype == np.int32
    return numbers


@pytest.mark.parametrize("changes", [{}, {"in_memory": True}])
def test_labels_stay_with_their_images(labelled, changes):
    changes = DIGITS | changes
    count = sum(TRAINING)
    whole = train(labelled, batch=5, steps=10, **changes)
    stream = [number for batch in whole for number in shown_digits(batch)]
    assert sorted(stream[:count]) == sorted(stream[count : 2 * count]) == list(range(count)) and stream[:count] != sorted(
        stream[:count]
    )
    rows = [train(labelled, batch=5, steps=10, start=3, rows=rows, **changes) for rows in (slice(0, 2), [4, 2, 3], [])]
    for ours, theirs, none, batch in zip(*rows, whole[3:], strict=True):
        order = [0, 1, 4, 2, 3]
        assert [*shown_digits(ours), *shown_digits(theirs), *shown_digits(none)] == [shown_digits(batch)[n] for n in order]
    dataset = pipeline.open_dataset(data(labelled, **changes))
    assert dataset.test_size == 7 and datasets.find("mnist").classes[3] == "3"
    with dataset.test_batches(batch=4, rows=slice(None)) as batches:
        tested = list(batches)
    numbers = [number for batch in tested for number in shown_digits(batch)]
    assert len(set(numbers[:7])) == 7 and numbers[7] == numbers[6] and max(numbers) < sum(HELD_OUT)
    for batch in [tested[0], dataset.figure_batch(4), dataset.figure_batch(4, train=True)]:
        assert len(shown_digits(batch)) == 4
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(4)
    assert dataset.bytes_per_example()["device"] == 28 * 28 + 4 * 4


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_copy_of_every_evaluated_image_comes_once(labelled, in_memory):
    """Numbers tell images apart, whichever the batches; training images are copy 0."""
    changes = DIGITS | {"in_memory": in_memory, "test_examples": 12, "test_copies": 3}
    found = []
    for batch in (4, 5):
        with pipeline.open_dataset(data(labelled, **changes)).test_batches(batch=batch, rows=slice(None)) as batches:
            tested = list(batches)
        assert all(shown_digits(one) == one["item_B"].tolist() for one in tested)
        counted = [[*zip(one["item_B"][one["weight_B"] > 0], one["copy_B"][one["weight_B"] > 0], strict=True)] for one in tested]
        found.append([pair for pairs in counted for pair in pairs])
    assert found[0] == found[1] and len(set(found[0])) == 12
    items = {item for item, _ in found[0]}
    assert len(items) == 4 and set(found[0]) == {(item, copy) for item in items for copy in range(3)}
    for one in train(labelled, batch=5, steps=3, **changes):
        assert shown_digits(one) == one["item_B"].tolist() and not one["copy_B"].any()


def test_copies_that_cannot_be(labelled):
    def told(**changes) -> str:
        return message(lambda: pipeline.open_dataset(data(labelled, **DIGITS | changes)))

    assert "each has as many: choose a multiple, and stack=1" in told(test_examples=7, test_copies=2)
    assert "copies are of single images" in told(test_examples=8, test_copies=2, stack=2)
    assert "test_examples is 26: there are at most 12 images x 2 copies = 24" in told(test_examples=26, test_copies=2)
    assert "config.data.test_copies is 0" in told(test_copies=0)


def test_a_stack_of_labelled_images_has_no_label(labelled, root):
    changes = DIGITS | {"stack": 2}
    dataset = pipeline.open_dataset(data(labelled, **changes))
    for batch in [*train(labelled, **changes), dataset.figure_batch(3)]:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(3)
        assert batch.keys() == {"images_BxHxWxC", "weight_B"}
        for row in batch["images_BxHxWxC"]:
            np.testing.assert_array_equal(row, np.concatenate([digit(n)["image_HxWxC"] for n in row[0, 0].tolist()], axis=-1))
    assert "label_B" not in data(root, stack=1).batch_shapes(3) and "label_B" not in train(root, stack=1)[0]


def test_digits_come_in_one_size(labelled, tmp_path):
    line = message(lambda: pipeline.open_dataset(data(labelled, **DIGITS | {"size": 40})))
    assert line == "config.data.size is 40, the pictures of mnist are 28 pixels wide: set --config.data.size=28"
    line = message(lambda: pipeline.open_dataset(data(str(tmp_path), **DIGITS)))
    assert f"`python -m data_prep.mnist --root MNIST --out {tmp_path}`, or run --config=configs/hmnist_encode.py:quick" in line


# The test split


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_the_test_examples_are_fixed_and_padded(root, batch):
    dataset = pipeline.open_dataset(data(root))
    assert dataset.test_size == 7
    with dataset.test_batches(batch=batch, rows=slice(None)) as batches:
        seen = list(batches)
    assert len(seen) == -(-7 // batch)
    weights = np.concatenate([one["weight_B"] for one in seen])
    assert weights.tolist() == [1] * 7 + [0] * (len(seen) * batch - 7)
    examples = [row for one in seen for row in shown(one)]
    assert examples[7:] == [examples[6]] * (len(examples) - 7)
    # The split's twelve images in one order, again and again; never twice in an example.
    stream = [number for row in examples[:7] for number in row]
    assert sorted(stream[:12]) == list(range(12)) and stream[12:24] == stream[:12] and stream[24:] == stream[:11]
    assert all(len(set(row)) == STACK for row in examples)
    assert stream[:12] != sorted(stream[:12])


def test_figures(root):
    dataset = pipeline.open_dataset(data(root))
    test, training = dataset.figure_batch(3), dataset.figure_batch(3, train=True)
    assert test["weight_B"].tolist() == [1, 1, 1] and len(shown(test)) == len(shown(training)) == 3
    assert equal([dataset.figure_batch(3)], [test]) and max(flat([training])) > 12
    assert len(shown(dataset.figure_batch(20))) == 20


# What the user is told


def test_error_lines(root, tmp_path):
    def told(**changes) -> str:
        return message(lambda: pipeline.open_dataset(data(root, **changes)))

    for missing in ("", str(tmp_path / "nowhere")):
        line = told(records=missing)
        assert "python -m data_prep.images --root IMAGES --out" in line and missing in line and ":quick" in line
    line = told(size=8)
    assert "4 pixels" in line and "data.size=4" in line and "--size 8" in line
    assert "config.data.stack is 0: it must be at least 1" in told(stack=0)
    assert "config.data.test_examples is 0" in told(test_examples=0)
    assert "config.data.threads is -1" in told(threads=-1)
    assert "workers=0" in told(in_memory=True, workers=2)
    assert "data.twin=tiny" in told(twin="tiny")
    assert "unknown twin 'huge'" in told(twin="huge", records="")
    line = told(stack=13)
    assert "the test split of" in line and "has 12 images" in line and "a stack of 13:" in line and "at most 12" in line
    assert "train split" in told(stack=25)
    video = write_video(tmp_path / "video", {"train": TRAIN, "test": TEST})
    assert f"{video} holds co3d, not images" in told(records=video, size=8)
    halved = write_records(tmp_path / "halved", {"train": (20,)})
    assert "no test split: prepare them again, from more images" in told(records=halved)


@pytest.mark.parametrize("in_memory", [False, True])
def test_damaged_records(tmp_path, in_memory):
    cut = pathlib.Path(write_records(tmp_path / "cut", {"train": (9,), "test": (9,)}))
    path = next(cut.glob("train-*"))
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is truncated or foreign" in message(lambda: train(str(cut), in_memory=in_memory))
    other = write_records(tmp_path / "other", {"train": (9,), "test": (9,)}, size=8)  # says 8, has 4
    line = message(lambda: train(other, size=8, in_memory=in_memory))
    assert "record" in line and "48 values do not fill the shape (8, 8, 3)" in line


def test_the_dataset_decides_on_the_keys(root):
    config = tiny.config().to_dict()
    section: dict = {field.name: getattr(data(root), field.name) for field in dataclasses.fields(stills.Stills)}

    def build(changes: dict) -> Experiment:
        return Experiment.from_config(ConfigDict(config | {"data": changes}))

    assert build(section).data == data(root)
    assert isinstance(build(config["data"]).data, pipeline.Data)
    for changes, words in (
        (section | {"views": 2}, "data.views: nothing reads this key"),
        (section | {"dataset": "co3d"}, "data.in_memory: nothing reads this key"),
        (section | {"dataset": "image"}, "unknown dataset 'image': --config.data.dataset is one of co3d, images"),
        (section | {"dataset": 3}, "data.dataset=3: expected str"),
        ({key: value for key, value in section.items() if key != "dataset"}, "data.dataset is missing"),
        ({key: value for key, value in section.items() if key != "stack"}, "data.stack is missing"),
        (section | {"in_memory": 1}, "data.in_memory=1: expected bool"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            build(changes)


# The built-in twin


def test_the_tiny_twin_streams(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    section = data("", twin="tiny", size=16, stack=86, in_memory=True)
    dataset = pipeline.open_dataset(section)
    assert (dataset.train_size, dataset.test_size) == (1600 // 86, 7)
    with dataset.train_batches(batch=2, seed=0, start=0, steps=2, rows=slice(None)) as batches:
        for batch in batches:
            assert batch["images_BxHxWxC"].shape == (2, 16, 16, 258) and batch["images_BxHxWxC"].std() > 30
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # only the first time needs it
    assert pipeline.open_dataset(section).train_size == dataset.train_size
    assert pipeline.open_dataset(dataclasses.replace(section, size=8)).test_size == 7


def test_a_twin_without_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = message(lambda: pipeline.open_dataset(data("", twin="tiny")))
    assert line == (
        "the built-in photographs need scikit-learn: pip install -e '.[samples]', or prepare a folder of images: "
        "python -m data_prep.images --root IMAGES --out RECORDS"
    )
