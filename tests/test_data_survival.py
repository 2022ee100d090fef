"""What goes wrong with data in the middle of a run: records that cannot be read, readers that do not come back."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable

import numpy as np
import pytest
from absl import flags

from niso import journal, sequences
from niso.data import pipeline, reading, records, watchdog
from niso.data.windows import Windows
from niso.errors import UserError
from tests import runs, test_stills, toy_records
from tests.test_telemetry import read_as_tensorboard, scalars
from tests.toy_records import SKIPS, TEST, TRAIN, by_hand, data, equal, flat, flip, message, pose, shown, train, write_records

MAX_SKIP = 3
# The middle of one video, its last frame but one, and all of a short one: sequence, frame.
BAD = ((0, 3), (0, 5), (5, 0), (5, 1), (5, 2))
BAD_TEST = ((0, 4), (2, 0))
# Of which record the first reader of a window is told: shard, record.
FIRST_BAD = {("train-00000", "3"), ("train-00000", "5"), ("train-00001", "3"), ("train-00001", "4")}
WAYS = [{"threads": 0, "prefetch": 0}, {"threads": 3}, {"workers": 2}]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "clean", {"train": TRAIN, "test": TEST})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> str:
    root = write_records(tmp_path_factory.mktemp("records") / "damaged", {"train": TRAIN, "test": TEST})
    for split, bad in (("train", BAD), ("test", BAD_TEST)):
        for sequence, frame in bad:
            flip(root, split, flat(sequence, frame, toy_records.SIZE))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for its own, to start worker processes; main parses them
    return root


def readable(where: tuple[int, int, int], bad=BAD) -> bool:
    sequence, start, skip = where
    return not {(sequence, start), (sequence, start + skip + 1)} & set(bad)


def instead(where: tuple[int, int, int]) -> tuple[int, int, int]:
    """The next readable window of the training split, in the order of their numbers."""
    windows = Windows.of(TRAIN, range(MAX_SKIP + 1), 2)
    in_order = list(map(tuple, windows.locate(np.arange(windows.size)).T.tolist()))
    at = in_order.index(where)
    return next(one for one in in_order[at:] + in_order[:at] if readable(one))


def skipped(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("niso: skipped: ")]


# A record that cannot be read


@pytest.mark.parametrize("way", WAYS[:2])  # of worker processes: test_pipeline
def test_it_is_fatal_unless_told_otherwise(damaged, way):
    line = message(lambda: train(damaged, **way))
    assert re.search(r"/train-0000[01]-of-00002.array_record: record \d+ is damaged", line)


@pytest.mark.parametrize("way", WAYS)
def test_the_next_readable_example_takes_its_place(clean, damaged, way, capfd):
    """Whoever reads: the same batches, the same count, and every bad record named once by each process."""
    drawn = [where for batch in train(clean, steps=40) for where in shown(batch)]
    dataset = pipeline.open_dataset(data(damaged, unreadable="skip", **way))
    assert dataset.replaced == 0
    with dataset.train_batches(batch=4, seed=0, start=0, steps=40, rows=slice(None)) as batches:
        ours = [where for batch in batches for where in shown(batch)]
    assert ours == [instead(where) for where in drawn] != drawn
    assert dataset.replaced == sum(not readable(where) for where in drawn) > len(BAD)
    assert pipeline.open_dataset(data(damaged)).replaced is None
    lines, named = skipped(capfd.readouterr().err), set()
    for line in lines:
        found = re.match(r"niso: skipped: \S+/(train-0000\d)-of-00002.array_record: record (\d+) is damaged .*; frames (.*)$", line)
        assert found and re.fullmatch(
            r"\d, \d of sequence s\d \(records \d+, \d+ of train-\S+\) stand in for frames \d, \d of sequence s\d \(.*\)", found[3]
        ), line
        named.add((found[1], found[2]))
    assert named == FIRST_BAD and len(lines) <= len(FIRST_BAD) * way.get("workers", 1)


def test_resuming_and_sharing_change_nothing(damaged, capfd):
    whole = train(damaged, batch=5, steps=20, unreadable="skip")
    for start in (3, 11):
        assert equal(train(damaged, batch=5, start=start, steps=20, unreadable="skip", threads=1), whole[start:])
    rows = ([4, 1], [0], range(2, 4))
    parts = [train(damaged, batch=5, steps=20, rows=some, unreadable="skip") for some in rows]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert equal(joined, [{key: value[[4, 1, 0, 2, 3]] for key, value in batch.items()} for batch in whole])


@pytest.mark.parametrize("way,hosts", [(WAYS[0], 1), (WAYS[1], 3), (WAYS[2], 1)])
def test_what_can_be_read_is_evaluated_exactly(damaged, way, hosts, capfd):
    dataset = pipeline.open_dataset(data(damaged, unreadable="skip", **way))
    counted, left_out = [], 0
    for rows in np.array_split(np.arange(4), hosts):
        with dataset.test_batches(batch=4, rows=rows.tolist()) as batches:
            for batch in batches:
                assert np.isin(batch["weight_B"], (0, 1)).all() and readable(*shown(batch)[:1], BAD_TEST)
                counted += [where for where, weight in zip(shown(batch), batch["weight_B"], strict=True) if weight]
            left_out += batches.replaced
    assert sorted(counted) == sorted(where for where in by_hand(TEST, SKIPS) if readable(where, BAD_TEST))
    assert left_out == dataset.test_size - len(counted) > 0
    assert dataset.replaced == 0  # of training examples


def test_figures_and_costs_do_without(damaged, capfd):
    dataset = pipeline.open_dataset(data(damaged, unreadable="skip"))
    for train_, bad in ((False, BAD_TEST), (True, BAD)):
        batch = dataset.figure_batch(12, train=train_)
        assert all(readable(where, bad) for where in shown(batch)) and batch["weight_B"].all() and len(shown(batch)) == 12
    assert dataset.bytes_per_example()["disk"] > 0
    assert "is damaged" in message(pipeline.open_dataset(data(damaged)).bytes_per_example)


def test_windows_know_their_numbers():
    for views in (2, 3):
        windows = Windows.of((12, 3, 7, 4), (5, 0, 2), views)
        number_N = np.arange(windows.size)
        np.testing.assert_array_equal(windows.number(windows.locate(number_N)), number_N)


@pytest.mark.parametrize(
    "views,broken",
    [
        (2, {"picture": lambda s, t, size: flat(s, t, size)[: -40 if (s, t) == (0, 2) else None]}),
        (2, {"picture": lambda s, t, size: flat(s, t, 4 if (s, t) == (0, 2) else size)}),
        (3, {"pose": lambda s, t: pose(s, t) * (np.nan if (s, t) == (0, 2) else 1)}),
    ],
)
def test_whatever_is_wrong_with_it(tmp_path, views, broken, capfd):
    """A picture cut short before it was stored, one of another size, a pose that is not finite."""
    root = write_records(tmp_path / "toy", {"train": (9, 6), "test": TEST}, **broken)
    options = {"views": views, "poses": views > 2, "max_skip": 0, "steps": 30}
    assert "record 2 of" in message(lambda: train(root, **options))
    batches = train(root, unreadable="skip", **options)
    starts = {start for batch in batches for sequence, start, _ in shown(batch) if sequence == 0}
    assert starts == set(range(10 - views)) - set(range(3 - views, 3))
    assert all(np.isfinite(batch["relative_BxPx4x4"]).all() for batch in batches if views > 2)
    (line,) = skipped(capfd.readouterr().err)
    assert "record 2 of" in line and "stand in for frames" in line


def test_too_many_in_a_row_are_fatal_and_so_is_a_missing_shard(tmp_path, monkeypatch, capfd):
    nothing = write_records(tmp_path / "a", {"train": (9,), "test": (3,)}, picture=lambda *_: b"no picture")
    line = message(lambda: train(nothing, unreadable="skip", max_skip=0))
    assert "is damaged" in line and "the 7 that follow" in line and "too many to be skipped" in line
    few = {"picture": lambda s, t, size: b"" if 1 < t < 9 else flat(s, t, size)}
    some = write_records(tmp_path / "b", {"train": (12,), "test": (2,)}, **few)
    options = {"unreadable": "skip", "max_skip": 0, "steps": 20}
    assert len(train(some, **options)) == 20
    monkeypatch.setattr(reading, "IN_A_ROW", 5)
    assert "the 4 that follow frames" in message(lambda: train(some, **options))
    gone = write_records(tmp_path / "c", {"train": (3,), "test": (3,)})
    (shard, _) = sorted(pathlib.Path(gone).glob("train-*"))
    shard.unlink()
    assert f"{shard} is missing" in message(lambda: train(gone, unreadable="skip"))


def test_only_two_words_are_known(clean):
    line = message(lambda: pipeline.open_dataset(data(clean, unreadable="ignore")))
    assert line == "config.data.unreadable is 'ignore': it must be fatal or skip"


class Model:
    """Encodes nothing and knows no motion."""

    def encode(self, frames_TxHxWxC: np.ndarray) -> np.ndarray:
        return frames_TxHxWxC

    def relative_poses(self, frames_TxHxWxC: np.ndarray, strides: tuple[int, ...]) -> dict[int, np.ndarray]:
        return {stride: np.tile(np.eye(4), (len(frames_TxHxWxC[::stride]) - 1, 1, 1)) for stride in strides}


def test_whole_videos_are_left_out(damaged, capfd):
    """Of the trajectories, and of the motions behind a baseline."""
    dataset = pipeline.open_dataset(data(damaged, unreadable="skip"))
    found = sequences.estimate(Model(), dataset, (1, 2), 9, {1: None, 2: None})  # type: ignore[arg-type]
    assert [[one.name for one in part.sequences] for part in found.values()] == [["toy/s1"], ["toy/s1"]]
    assert [line.rpartition("; ")[2] for line in skipped(capfd.readouterr().err)] == [
        f"sequence {name} is left out" for name in ("s0", "s2")
    ]
    assert [len(pose_Tx4x4) for pose_Tx4x4 in dataset.poses("train")] == [n for s, n in enumerate(TRAIN) if s not in (0, 5)]
    with pytest.raises(UserError, match="is damaged"):
        sequences.estimate(Model(), pipeline.open_dataset(data(damaged)), (1,), 9, {1: None})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_goes_on_and_says_what_it_skipped(tmp_path):
    """In TensorBoard and on the terminal; metrics.jsonl has what a rerun reproduces, over the test pairs that can be read."""
    records_, bad = tmp_path / "records", {(0, 4), (3, 0)}
    shutil.copytree(runs.tiny_records(), records_)
    for split, sequence, frame in (*(("train", *where) for where in bad), ("test", 1, 2)):
        flip(str(records_), split, toy_records.noisy(sequence, frame, 8))
    counts = tmp_path / "counts"
    ended = runs.run(tmp_path / "run", hooks=[f"counts={counts}"], data__records=records_, data__unreadable="skip")
    assert ended.code == 0, ended.err
    assert {re.search(r"/([^/]+): record", line)[1] for line in skipped(ended.err)} == {
        "train-00000-of-00002.array_record", "train-00001-of-00002.array_record", "test-00001-of-00002.array_record",
    }  # fmt: skip
    options = {"batch": runs.BATCH, "steps": runs.STEPS, "max_skip": 2}
    drawn, whole = train(str(records_), unreadable="skip", **options), train(runs.tiny_records(), **options)
    different = [
        (ours["frames_BxTxHxWxC"][b] != theirs["frames_BxTxHxWxC"][b]).any()
        for ours, theirs in zip(drawn, whole, strict=True) for b in range(runs.BATCH)
    ]  # fmt: skip
    found = scalars(read_as_tensorboard(tmp_path / "run"), "data/skipped")
    assert [step for step, _ in found] == [4, 8, 12, 16] and found[-1][1] == sum(different) > 0
    assert f"data/skipped {sum(different)} | " in ended.out and "skipped" not in (tmp_path / "run/metrics.jsonl").read_text()
    lost = sum(not readable(where, {(1, 2)}) for where in by_hand((6, 5, 4), (0, 2)))
    assert f"evaluation at step 16: {lost} of {runs.TEST_PAIRS} test examples cannot be read and are left out" in ended.out
    read = [count for name, count in map(json.loads, counts.read_text().splitlines()) if name == "equivariance_error"]
    assert set(read) == {runs.TEST_PAIRS - lost}


def test_every_skipped_example_counts_once_over_all_processes(monkeypatch):
    """Whether they divide the rows of a batch between them or read the same ones, as along mesh.space."""
    split = (((1, 2), [(2, 2)], 3), ((1, 2), [(1, 2), (2, 2), (2, 2)], 3), ((3, 4), [(3, 4)], 3), ((5, 4), [], 5))
    for mine, others, total in split:
        everyone = lambda row, others=others: np.array([row, *others])  # noqa: E731
        monkeypatch.setattr(journal.multihost_utils, "process_allgather", everyone)
        assert journal.Journal._everywhere(None, *mine, 4) == total  # type: ignore[arg-type]


# ... of still images

BAD_IMAGES, BAD_HELD_OUT = (4, 12, 13, 23), (1, 8)  # 23 is the last one: the first comes after it
COUNT = sum(test_stills.TRAINING)
BUFFERED = [{}, {"in_memory": True}]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return spoilt(tmp_path_factory, test_stills.coloured)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    return spoilt(tmp_path_factory, test_stills.digit, 28, "mnist", schema=test_stills.datasets.find("mnist").schema(28))


def spoilt(tmp_path_factory, record: Callable, *arguments, **options) -> str:
    splits = {"train": test_stills.TRAINING, "test": test_stills.HELD_OUT}
    root = test_stills.write_records(tmp_path_factory.mktemp("records") / "spoilt", splits, *arguments, record=record, **options)
    for split, bad in (("train", BAD_IMAGES), ("test", BAD_HELD_OUT)):
        for number in bad:
            flip(root, split, record(number)["image_HxWxC"].tobytes())
    return root


def next_image(number: int, count: int = COUNT, bad=BAD_IMAGES) -> int:
    return next(n % count for n in range(number, number + count) if n % count not in bad)


@pytest.mark.parametrize("way", BUFFERED)
def test_stacks_of_images(images, way, tmp_path, capfd):
    clean = test_stills.write_records(tmp_path / "clean", {"train": test_stills.TRAINING, "test": test_stills.HELD_OUT})
    drawn = test_stills.flat(test_stills.train(clean, steps=6))
    assert test_stills.flat(test_stills.train(images, steps=6, unreadable="skip", **way)) == [next_image(n) for n in drawn] != drawn
    dataset = pipeline.open_dataset(test_stills.data(images, unreadable="skip", **way))
    with dataset.test_batches(batch=3, rows=slice(None)) as batches:
        weight_N = np.concatenate([batch["weight_B"] for batch in batches])
    item_ExS = dataset._evaluated
    assert weight_N[:7].tolist() == [float(not set(row) & set(BAD_HELD_OUT)) for row in item_ExS.tolist()]
    assert batches.replaced == 7 - weight_N.sum() > 0 and not weight_N[7:].any()
    assert all(re.search(r"image \d+ \(record \d+ of \S+\) stand in for image \d+", x) for x in skipped(capfd.readouterr().err))
    for changes in ({}, {"in_memory": True}):
        assert "is damaged" in message(lambda changes=changes: test_stills.train(images, steps=6, **changes))


@pytest.mark.parametrize("way", BUFFERED)
def test_labels_and_numbers_are_those_of_the_image_that_is_there(digits, way, capfd):
    options = test_stills.DIGITS | way | {"unreadable": "skip", "test_examples": 24, "test_copies": 2}
    epoch = test_stills.train(digits, steps=COUNT, batch=1, **options)
    numbers = [number for batch in epoch for number in test_stills.shown_digits(batch)]
    assert sorted(numbers) == sorted(next_image(number) for number in range(COUNT))
    dataset = pipeline.open_dataset(test_stills.data(digits, **options))
    counted = []
    with dataset.test_batches(batch=5, rows=slice(None)) as batches:
        for batch in batches:
            assert test_stills.shown_digits(batch) == batch["item_B"].tolist()
            pairs = zip(batch["item_B"].tolist(), batch["copy_B"].tolist(), batch["weight_B"], strict=True)
            counted += [(item, copy) for item, copy, weight in pairs if weight]
    assert sorted(counted) == [(item, copy) for item in range(12) if item not in BAD_HELD_OUT for copy in range(2)]
    assert batches.replaced == 2 * len(BAD_HELD_OUT)


# A reader that does not come back


class Stuck(records.Reader):
    """Takes its time over the fourth record of the first shard, once in every process."""

    seconds = 3.0

    def read(self, shard, numbers, schema=None):
        if shard.endswith("00000-of-00002.array_record") and 3 in numbers and not vars(self).setdefault("slept", False):
            self.slept = True
            time.sleep(self.seconds)
        return super().read(shard, numbers, schema)


@pytest.mark.parametrize("way", WAYS[1:])
def test_what_takes_long_is_named_while_it_does(clean, way, monkeypatch, capfd):
    """Again and again, at doubling intervals: the step that has no data, the reader, and the record that it reads."""
    monkeypatch.setattr(watchdog, "LIMIT", 0.5)
    assert flags.FLAGS.is_parsed() or not flags.FLAGS.mark_as_parsed()
    dataset = pipeline.open_dataset(data(clean, **way))
    stuck = dataclasses.replace(dataset._train, reader=Stuck(clean, "train", dataset._train.reader.schema))
    dataset = pipeline.PairDataset(dataset.data, train=stuck, test=dataset._test)
    whole = train(clean, batch=2, steps=14)
    first = next(n for n, batch in enumerate(whole) for s, a, k in shown(batch) if s == 0 and 3 in (a, a + k + 1))
    with dataset.train_batches(batch=2, seed=0, start=first, steps=first + 2, rows=slice(None)) as batches:
        assert equal(list(batches), whole[first : first + 2])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("niso: ")]
    record = r"frames (3, \d|\d, 3) of sequence s0 \(records (3, \d|\d, 3) of train-00000-of-00002.array_record\) for (\d) s"
    mine = [line for line in lines if line.startswith(f"niso: no data yet for step {first + 1} after ")]
    assert mine and all(f"s, in process {os.getpid()} on " in line for line in mine)
    if "workers" in way:
        workers = [re.fullmatch(rf"niso: worker process (\d+) on \S+ has been reading {record}", line) for line in lines]
        told = [int(found[4]) for found in workers if found]
        readers = {found[1] for found in workers if found}
        # Not those that have not started, nor those that have read all of theirs.
        waited_for = set(re.findall(r"worker process (\d+)", mine[-1].partition("it waits for ")[2]))
        assert readers and readers <= waited_for
        assert readers <= set(re.findall(r"worker process (\d+)", mine[-1]))
    else:
        told = [int(found[3]) for line in mine if (found := re.search(record, line))]
    # After 0.5, 1 and 2 s, in each process.
    assert 2 <= len(told) <= 3 * way.get("workers", 1) and max(told) >= 2


def test_nothing_is_said_when_all_is_well(clean, capfd):
    train(clean)
    assert capfd.readouterr().err == ""


# What items are called


def test_every_item_of_a_batch_has_its_name(clean, images):
    """Of any batch of a stream, without reading anything."""
    dataset = pipeline.open_dataset(data(clean))
    for n, batch in enumerate(train(clean, seed=3, steps=30)):
        assert [name.partition(" (")[0] for name in dataset.name_batch(batch=4, seed=3, n=n)] == [
            f"frames {a}, {a + k + 1} of sequence s{s}" for s, a, k in shown(batch)
        ]
    index = {one.name: one for one in records.read_index(clean, "train")}
    _, a, b, name, record, other, shard = re.fullmatch(
        r"(frames) (\d), (\d) of sequence (s\d) \(records (\d+), (\d+) of (.*)\)", dataset.name_batch(batch=4, seed=3, n=29)[0]
    ).groups()  # type: ignore[union-attr]
    assert (shard, int(record) - int(a), int(other) - int(b)) == (index[name].shard, index[name].start, index[name].start)
    gallery = pipeline.open_dataset(test_stills.data(images))
    names = gallery.name_batch(batch=3, seed=0, n=2)
    assert len(names) == 3 * test_stills.STACK
    for name in names:
        number, record, part = map(int, re.fullmatch(r"image (\d+) \(record (\d+) of train-(\d+)-of-00003\S*\)", name).groups())  # type: ignore[union-attr]
        assert number == record + (13 if part == 2 else 0)
    clean_order = pipeline.open_dataset(test_stills.data(images))._addresses(3, 0, 3)[2]["item_BxS"].ravel().tolist()
    assert [int(name.split()[1]) for name in names] == clean_order
