"""The stream of frame pairs: which pairs, in which order, read from where, and at what cost."""

import collections
import pathlib
import threading

import numpy as np
import pytest
from absl import flags

from niso.data import pipeline, records
from niso.data.windows import Windows
from niso.errors import UserError
from tests.toy_records import SKIPS, TEST, TRAIN, by_hand, data, equal, noisy, shown, train, write_records


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "toy", {"train": TRAIN, "test": TEST})


# Which pairs there are


@pytest.mark.parametrize("lengths", [TRAIN, (2,), (1, 0, 2), (3, 3, 50), (1, 1, 4, 1)])
@pytest.mark.parametrize("skips", [(0,), (0, 1, 2, 3), (0, 1, 3, 5, 7, 9), (5, 0)])
def test_pairs_are_numbered_one_to_one(lengths, skips):
    pairs = Windows.of(lengths, skips, 2)
    where_3xN = pairs.locate(np.arange(pairs.size))
    assert pairs.size == len(by_hand(lengths, skips))
    assert set(map(tuple, where_3xN.T.tolist())) == by_hand(lengths, skips)


def test_a_big_split_costs_no_memory():
    """9,053 videos of about 202 frames, ten skips: 18 million pairs, from arrays of the length of the videos."""
    lengths = np.random.default_rng(0).integers(180, 224, 9053)
    pairs = Windows.of(lengths, range(10), 2)
    assert pairs.size == sum(int((lengths - 1 - skip).sum()) for skip in range(10)) > 17_000_000
    assert sum(array.nbytes for array in vars(pairs).values() if isinstance(array, np.ndarray)) < 200_000
    sequence, start, skip = pairs.locate(np.array([0, pairs.size - 1]))
    assert (sequence.tolist(), start.tolist(), skip.tolist()) == ([0, 9052], [0, int(lengths[-1]) - 11], [0, 9])
    sequence, start, skip = pairs.locate(np.random.default_rng(1).integers(0, pairs.size, 100_000))
    assert (start >= 0).all() and (start + skip + 1 < lengths[sequence]).all()
    # Uniform over pairs: chi-square of the ten skips' counts, nine degrees of freedom, 0.1 % point 27.9.
    expected = np.array([(lengths - 1 - k).sum() for k in range(10)]) / pairs.size * 100_000
    assert (((np.bincount(skip, minlength=10) - expected) ** 2) / expected).sum() < 27.9


# The training stream


def test_every_pair_comes_once_per_epoch(root):
    pairs = by_hand(TRAIN, range(4))
    batches = train(root, batch=1, steps=3 * len(pairs))
    epochs = [shown(batch)[0] for batch in batches]
    epochs = [epochs[i : i + len(pairs)] for i in range(0, len(epochs), len(pairs))]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(pairs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_seeds_differ(root):
    pairs = len(by_hand(TRAIN, range(4)))
    streams = [[shown(batch)[0] for batch in train(root, batch=1, seed=seed, steps=2 * pairs)] for seed in (0, 1)]
    # Neither another seed's epoch nor, as with grain's own seeding, its next one.
    epochs = {tuple(stream[i : i + pairs]) for stream in streams for i in (0, pairs)}
    assert len(epochs) == 4


def test_the_order_is_the_one_of_old_checkpoints(root):
    """The order of seed 0, written down. If it moves (another grain?), runs begun before cannot be resumed: say so."""
    assert [shown(batch) for batch in train(root, steps=2)] == [
        [(1, 0, 0), (4, 1, 1), (0, 1, 3), (0, 1, 1)],
        [(2, 1, 0), (5, 0, 1), (2, 1, 1), (0, 0, 0)],
    ]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_resuming_continues_the_unbroken_stream(root, threads):
    whole = train(root, steps=12, threads=2)
    assert len(whole) == 12
    for start in (0, 1, 7, 11, 12):
        assert equal(train(root, start=start, steps=12, threads=threads), whole[start:])
    # A stream that ends elsewhere is the same stream, in other epochs too.
    assert equal(train(root, steps=40, threads=threads)[:12], whole)
    assert equal(train(root, start=10, steps=40, threads=threads)[:2], whole[10:])


def test_hosts_share_a_batch(root):
    whole = train(root, batch=5)
    for hosts in ([slice(0, 2), slice(2, 5)], [[0, 1], [2, 3, 4]], [[4, 1], [0], range(2, 4)]):
        parts = [train(root, batch=5, rows=rows) for rows in hosts]
        order = np.concatenate([np.arange(5)[rows if isinstance(rows, slice) else list(rows)] for rows in hosts])
        joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
        assert equal(joined, [{key: value[order] for key, value in batch.items()} for batch in whole])


def test_a_batch_may_be_larger_than_the_split(tmp_path):
    small = write_records(tmp_path / "small", {"train": (2, 1), "test": (2,)})
    (batch,) = train(small, batch=7, steps=1)
    assert shown(batch) == [(0, 0, 0)] * 7
    assert batch["weight_B"].tolist() == [1] * 7


def test_shapes_are_those_promised(root):
    dataset = pipeline.open_dataset(data(root, test_skips=(0,)))
    with dataset.test_batches(batch=3, rows=slice(None)) as test:
        for batch in [*train(root, batch=3), *test, dataset.figure_batch(3)]:
            assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dataset.batch_shapes(3)


def test_only_the_frames_drawn_are_read(root, monkeypatch):
    reads = []
    read = records.Reader.read

    def counting(self, shard, numbers, schema):
        reads.extend((shard, number) for number in numbers)
        return read(self, shard, numbers, schema)

    monkeypatch.setattr(records.Reader, "read", counting)
    dataset = pipeline.open_dataset(data(root))
    assert not reads
    with dataset.train_batches(batch=6, seed=0, start=2, steps=3, rows=[1, 4]) as batches:
        (batch,) = batches
    place = {sequence.name: sequence for sequence in records.read_index(root, "train")}
    drawn = [(place[f"s{s}"], frame) for s, a, k in shown(batch) for frame in (a, a + k + 1)]
    assert len(drawn) == 4
    assert sorted(reads) == sorted((sequence.shard, sequence.start + frame) for sequence, frame in drawn)


@pytest.mark.parametrize("workers", [2])
def test_worker_processes_give_the_same_stream(root, tmp_path, workers):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for its own; main parses them
    assert equal(train(root, start=2, steps=7, workers=workers), train(root, start=2, steps=7))
    damaged = write_records(tmp_path / "damaged", {"train": (3,), "test": (3,)}, picture=lambda *_: b"no picture")
    with pytest.raises(UserError, match=r"record \d of .*train-00000.* is damaged"):
        train(damaged, batch=1, steps=1, workers=1)


def test_closing_ends_the_threads(root):
    before = set(threading.enumerate())
    batches = pipeline.open_dataset(data(root)).train_batches(batch=2, seed=0, start=0, steps=10**9, rows=slice(None))
    next(batches)
    ours = set(threading.enumerate()) - before
    assert ours
    batches.close()
    batches.close()
    for thread in ours:
        thread.join(timeout=10)
        assert not thread.is_alive()


# The test split


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 4, 5, 100])
@pytest.mark.parametrize("hosts", [1, 3])
def test_the_test_split_is_covered_once(root, every, batch, hosts):
    pairs = Windows.of(TEST, SKIPS, 2)
    expected = [tuple(where) for where in pairs.locate(np.arange(0, pairs.size, every)).T.tolist()]
    dataset = pipeline.open_dataset(data(root, test_every=every))
    assert dataset.test_size == len(expected)
    rows = np.array_split(np.arange(batch), hosts)
    seen: dict[int, tuple[int, int, int]] = {}
    steps = set()
    for mine in rows:
        with dataset.test_batches(batch=batch, rows=mine.tolist()) as batches:
            for step, one in enumerate(batches):
                steps.add(step)
                for row, where, weight in zip(mine, shown(one), one["weight_B"], strict=True):
                    assert where in expected and weight in (0, 1)
                    if weight:
                        seen[step * batch + int(row)] = where
    assert [seen[position] for position in sorted(seen)] == expected
    assert sorted(seen) == list(range(len(expected)))
    assert len(steps) == -(-len(expected) // batch)


def test_figures_show_fixed_pairs_of_all_skips_and_sequences(root):
    dataset = pipeline.open_dataset(data(root))
    figures = dataset.figure_batch(6)
    assert set(shown(figures)) <= by_hand(TEST, SKIPS)
    assert len(set(shown(figures))) == 6
    assert figures["skip_B"].tolist() == [0, 2, 0, 2, 0, 2]
    assert {sequence for sequence, *_ in shown(figures)} == {0, 2}
    assert figures["weight_B"].tolist() == [1] * 6
    assert equal([dataset.figure_batch(6)], [figures])
    assert len(shown(dataset.figure_batch(50))) == 50
    assert set(shown(dataset.figure_batch(6, train=True))) <= by_hand(TRAIN, range(4))
    assert set(pipeline.open_dataset(data(root, test_skips=(0, 90))).figure_batch(4)["skip_B"]) == {0}


# What it costs


def test_bytes_per_example(tmp_path):
    root = write_records(tmp_path / "photos", {"train": (20, 20), "test": (3,)}, size=144, picture=noisy)
    cost = pipeline.open_dataset(data(root, size=144)).bytes_per_example()
    assert 2 * 10_000 < cost["disk"] < 2 * 16_000
    assert cost["device"] == 2 * 144 * 144 * 3 + 8
    assert cost["reference"] == 12.6e6
    assert cost["reference"] > 50 * cost["device"] > 50 * cost["disk"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="the kernel's own count of bytes read")
def test_the_kernel_agrees_on_the_bytes_read(tmp_path):
    """Bytes asked of the kernel per pair: array_record's 32 kB buffer may double the records' own bytes, not more."""
    root = write_records(tmp_path / "photos", {"train": (20, 20), "test": (3,)}, size=144, picture=noisy)
    dataset = pipeline.open_dataset(data(root, size=144, threads=0, prefetch=0))
    with dataset.train_batches(batch=10, seed=0, start=0, steps=11, rows=slice(None)) as batches:
        next(batches)  # opens the files
        before = kernel_bytes()
        assert len(list(batches)) == 10
    read = (kernel_bytes() - before) / 100
    assert dataset.bytes_per_example()["disk"] * 0.9 < read < 3 * dataset.bytes_per_example()["disk"]


def kernel_bytes() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])
