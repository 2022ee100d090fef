"""Windows of more than two frames, the poses that go with them, and whole sequences."""

import collections

import numpy as np
import pytest
from absl import flags

from niso.data import pipeline, transforms
from niso.data.windows import Windows
from tests.toy_records import SKIPS, STEP, TEST, by_hand, data, equal, pose, shown, train, write_records

TRAIN, VIEWS = (12, 3, 7, 4), 4  # one video is too short for any window, one has just one

Where = tuple[int, int, int]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "toy", {"train": TRAIN, "test": TEST})


def posed(root: str, **changes) -> list[pipeline.Batch]:
    return train(root, **{"views": VIEWS, "poses": True, "max_skip": 2} | changes)


def relative(where: Where, views: int) -> np.ndarray:
    """relative_Px4x4 of a window, from the poses that the records were written with, in float64."""
    sequence, start, skip = where
    pose_Tx4x4 = np.stack([pose(sequence, start + i * (skip + 1)) for i in range(views)])
    return np.linalg.solve(pose_Tx4x4[:-1], pose_Tx4x4[1:])


# Which windows there are


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("lengths", [TRAIN, (5,), (4, 0, 6), (3, 3, 50)])
@pytest.mark.parametrize("skips", [(0,), (0, 1, 2, 3), (5, 0)])
def test_windows_are_numbered_one_to_one(lengths, skips, views):
    windows = Windows.of(lengths, skips, views)
    where = list(map(tuple, windows.locate(np.arange(windows.size)).T.tolist()))
    assert len(where) == len(set(where)) and set(where) == by_hand(lengths, skips, views)
    for sequence, start, skip in where:
        assert list(windows.frames(start, skip)) == [start + i * (skip + 1) for i in range(views)]
        assert windows.frames(start, skip)[-1] < lengths[sequence]


@pytest.mark.parametrize("views", [2, 5])
def test_every_frame_of_a_video_is_in_some_window(views):
    """The marginal over all windows, each of which an epoch shows once: every start at every skip as often as any other, hence
    every frame of a long enough video, and all but those near its ends equally often."""
    lengths, skips = (201, 44, 5, 90, 4), range(10)
    windows = Windows.of(lengths, skips, views)
    shows: list[collections.Counter] = [collections.Counter() for _ in lengths]
    starts: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for sequence, start, skip in windows.locate(np.arange(windows.size)).T.tolist():
        shows[sequence].update(windows.frames(start, skip))
        starts[sequence, skip].append(start)
    for (sequence, skip), found in starts.items():
        assert found == list(range(lengths[sequence] - (views - 1) * (skip + 1)))
    for length, shown_ in zip(lengths, shows, strict=True):
        assert set(shown_) == (set(range(length)) if length >= views else set())
        edge = (views - 1) * 10
        assert {shown_[frame] for frame in range(edge, length - edge)} <= {views * len(skips)}


# The streams


def test_every_window_and_every_frame_comes_once_per_epoch(root):
    windows = by_hand(TRAIN, range(3), VIEWS)
    batches = posed(root, batch=1, steps=2 * len(windows))
    epochs = [shown(batch)[0] for batch in batches]
    epochs = [epochs[: len(windows)], epochs[len(windows) :]]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(windows)
    seen = {(s, a + i * (k + 1)) for s, a, k in epochs[0] for i in range(VIEWS)}
    assert seen == {(s, frame) for s, length in enumerate(TRAIN) if length >= VIEWS for frame in range(length)}


def test_relative_poses_are_those_of_the_annotation(root):
    """To float32's rounding, from cameras 1e5 away from the origin: in float32 throughout they would be off by 1e-2."""
    dataset = pipeline.open_dataset(data(root, views=3, poses=True))
    with dataset.test_batches(batch=4, rows=slice(None)) as test:
        for views, batches in ((VIEWS, posed(root, steps=20)), (3, [*test, dataset.figure_batch(5)])):
            for batch in batches:
                want_BxPx4x4 = np.stack([relative(where, views) for where in shown(batch)])
                np.testing.assert_allclose(batch["relative_BxPx4x4"], want_BxPx4x4, rtol=1e-6, atol=1e-6)
                assert np.abs(want_BxPx4x4[..., :3, 3]).max() < 20


def test_poses_change_nothing_else(root):
    for views in (2, VIEWS):
        plain, with_poses = (posed(root, views=views, poses=poses) for poses in (False, True))
        assert equal(plain, [{key: value for key, value in batch.items() if "relative" not in key} for batch in with_poses])


def test_resuming_and_hosts_share_one_stream(root):
    whole = posed(root, batch=5, steps=12, threads=0)
    assert equal(posed(root, batch=5, start=7, steps=12), whole[7:])
    for rows in (slice(0, 2), [4, 1]):
        mine = [{key: value[rows] for key, value in batch.items()} for batch in whole]
        assert equal(posed(root, batch=5, steps=12, rows=rows), mine)


def test_a_worker_process_reads_poses(root):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for its own; main parses them
    assert equal(posed(root, steps=3, workers=1), posed(root, steps=3))


@pytest.mark.parametrize("views,poses", [(2, False), (2, True), (5, False), (3, True)])
def test_shapes_are_those_promised(tmp_path, views, poses):
    toy = data(str(tmp_path / "toy"), test_skips=(0,), views=views, poses=poses)
    shapes = toy.batch_shapes(3)  # before there are records
    assert ("relative_BxPx4x4" in shapes) == poses
    root = write_records(tmp_path / "toy", {"train": (9, 6), "test": TEST})
    dataset = pipeline.open_dataset(toy)
    assert dataset.batch_shapes(3) == shapes
    with dataset.test_batches(batch=3, rows=slice(None)) as test:
        for batch in [*train(root, batch=3, views=views, poses=poses), *test, dataset.figure_batch(3)]:
            assert {key: (value.shape, value.dtype) for key, value in batch.items()} == shapes
    total = sum(np.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    assert dataset.bytes_per_example()["device"] == total / 3


def test_an_example_is_called_what_it_is(root):
    assert data(root).example == "pair of frames"
    assert data(root, views=5).example == "window of 5 frames"
    pair, window = (pipeline.open_dataset(data(root, views=views)).bytes_per_example()["disk"] for views in (2, 4))
    assert window == pytest.approx(2 * pair, rel=0.01)  # the pictures of other frames


# Whole sequences


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("poses", [False, True])
def test_a_sequence_is_read_whole_or_in_part(root, threads, poses):
    dataset = pipeline.open_dataset(data(root, threads=threads, poses=poses))
    for split, lengths in (("train", TRAIN), ("test", TEST)):
        assert [(one.name, one.length) for one in dataset.sequences(split)] == [(f"s{s}", n) for s, n in enumerate(lengths)]
        for s, n in enumerate(lengths):
            for frames in (None, slice(1, None, 2), [n - 1, 0, 0], np.arange(n)[::-1], [-1], []):
                chosen = list(range(n))[frames] if isinstance(frames, slice) else range(n) if frames is None else frames
                frames_TxHxWxC, pose_Tx4x4 = dataset.read_sequence(split, s, frames)
                assert frames_TxHxWxC.shape == (len(chosen), 8, 8, 3) and frames_TxHxWxC.dtype == np.uint8
                assert pose_Tx4x4.shape == (len(chosen), 4, 4) and pose_Tx4x4.dtype == np.float64
                for t, frame in enumerate(chosen):
                    assert np.array_equal(pose_Tx4x4[t], pose(s, frame % n))
                    colour_3 = frames_TxHxWxC[t].mean((0, 1))
                    assert np.abs(colour_3[:2] - (STEP * s + 10, STEP * (frame % n) + 10)).max() <= 2
            with pytest.raises(IndexError):
                dataset.read_sequence(split, s, [0, n])
        with pytest.raises(IndexError):
            dataset.read_sequence(split, len(lengths))


def test_poses_are_read_without_the_pictures(tmp_path, monkeypatch):
    root = write_records(tmp_path / "toy", {"train": TRAIN, "test": TEST}, picture=lambda *_: b"no picture")
    monkeypatch.setattr(transforms, "decode_jpeg", lambda *_: 1 / 0)
    dataset = pipeline.open_dataset(data(root, test_skips=SKIPS))
    for split, lengths in (("train", TRAIN), ("test", TEST)):
        found = dataset.poses(split)
        assert [len(pose_Tx4x4) for pose_Tx4x4 in found] == list(lengths)
        for s, pose_Tx4x4 in enumerate(found):
            assert pose_Tx4x4.dtype == np.float64
            assert np.array_equal(pose_Tx4x4, [pose(s, frame) for frame in range(lengths[s])])
    for at_most, chosen in ((1, [0]), (3, [0, 1, 3]), (4, range(4)), (9, range(4))):  # 3 of 4: not every second one
        assert [len(pose_Tx4x4) for pose_Tx4x4 in dataset.poses("train", at_most)] == [TRAIN[s] for s in chosen]
