"""The stream of frame pairs: which pairs, in which order, read from where, and what the user is told when it cannot be.

Every frame of the records made here is one flat colour that says which sequence and frame number it is, so a decoded
batch proves which frames were read.
"""

import collections
import dataclasses
import importlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from niso.data import datasets, pipeline, records, synthetic, transforms
from niso.data.pairs import Pairs
from niso.errors import UserError

SIZE = 8
TRAIN, TEST = (7, 2, 5, 1, 6, 3), (9, 1, 4)  # lengths of the sequences; one of each split is too short for any pair
SKIPS = (0, 2)
STEP = 20  # between neighbouring colours; JPEG moves a flat one by 2 at most


def jpeg(image_HxWxC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HxWxC).save(file, "JPEG", quality=95)
    return file.getvalue()


def flat(sequence: int, frame: int, size: int) -> bytes:
    return jpeg(np.full((size, size, 3), (STEP * sequence + 10, STEP * frame + 10, 128), np.uint8))


def write_records(root: pathlib.Path, splits: dict[str, tuple[int, ...]], size: int = SIZE, picture=flat) -> str:
    """A folder of records of sequences of these lengths, dealt to two shards per split."""
    root.mkdir()
    shards: dict[str, tuple[records.Shard, ...]] = {}
    for split, lengths in splits.items():
        sequences, files = [], []
        for part in range(2):
            name, count = f"{split}-{part:05d}-of-00002.array_record", 0
            with records.ShardWriter(root / name) as writer:
                for s in range(part, len(lengths), 2):
                    sequences.append((s, records.Sequence(f"s{s}", "toy", name, count, lengths[s], None)))
                    count += lengths[s]
                    for frame in range(lengths[s]):
                        example = {
                            "image_jpeg": picture(s, frame, size),
                            "camera_to_world_4x4": np.eye(4),
                            "intrinsics_3x3": np.eye(3),
                            "frame_number": np.int64(frame),
                        }
                        writer.write(records.encode(example, records.FRAME))
            files.append(records.describe_shard(root / name, count))
        records.write_index(root, split, [sequence for _, sequence in sorted(sequences, key=lambda pair: pair[0])])
        shards[split] = tuple(files)
    records.Manifest(records.FORMAT, "co3d", size, {}, shards, {}).write(root)
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "toy", {"train": TRAIN, "test": TEST})


def data(root: str, **changes) -> pipeline.Data:
    toy = pipeline.Data(
        dataset="co3d", records=root, twin="", size=SIZE, max_skip=3, test_skips=SKIPS, test_every=1,
        threads=2, prefetch=4, workers=0,
    )  # fmt: skip
    return dataclasses.replace(toy, **changes)


def shown(batch: pipeline.Batch) -> list[tuple[int, int, int]]:
    """(sequence, start, skip) of every row, from the colours alone; the row's skip must agree with them."""
    frames = batch["frames_BxTxHxWxC"].astype(float)
    if not len(frames):
        return []
    assert np.abs(frames - frames.mean(axis=(2, 3), keepdims=True)).max() <= 2
    code_BxTx2 = (frames.mean(axis=(2, 3))[..., :2] - 10) / STEP
    assert np.abs(code_BxTx2 - code_BxTx2.round()).max() < 0.2
    sequence_BxT, frame_BxT = np.moveaxis(code_BxTx2.round().astype(int), -1, 0)
    assert (sequence_BxT[:, 0] == sequence_BxT[:, 1]).all()
    skip_B = frame_BxT[:, 1] - frame_BxT[:, 0] - 1
    assert skip_B.tolist() == batch["skip_B"].tolist()
    return list(zip(sequence_BxT[:, 0].tolist(), frame_BxT[:, 0].tolist(), skip_B.tolist(), strict=True))


def by_hand(lengths, skips) -> set[tuple[int, int, int]]:
    return {(s, a, k) for s, n in enumerate(lengths) for k in skips for a in range(n) if a + k + 1 < n}


def train(root: str, *, batch=4, seed=0, start=0, steps=8, rows=slice(None), **changes) -> list[pipeline.Batch]:
    with pipeline.open_dataset(data(root, **changes)).train_batches(
        batch=batch, seed=seed, start=start, steps=steps, rows=rows
    ) as batches:
        return list(batches)


def equal(ours: list[pipeline.Batch], theirs: list[pipeline.Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(ours, theirs, strict=True)
    )


# Which pairs there are


@pytest.mark.parametrize("lengths", [TRAIN, (2,), (1, 0, 2), (3, 3, 50), (1, 1, 4, 1)])
@pytest.mark.parametrize("skips", [(0,), (0, 1, 2, 3), (0, 1, 3, 5, 7, 9), (5, 0)])
def test_pairs_are_numbered_one_to_one(lengths, skips):
    pairs = Pairs.of(lengths, skips)
    where_3xN = pairs.locate(np.arange(pairs.size))
    assert pairs.size == len(by_hand(lengths, skips))
    assert set(map(tuple, where_3xN.T.tolist())) == by_hand(lengths, skips)


def test_a_big_split_costs_no_memory():
    """9,053 videos of about 202 frames, ten skips: 18 million pairs, from arrays of the length of the videos."""
    lengths = np.random.default_rng(0).integers(180, 224, 9053)
    pairs = Pairs.of(lengths, range(10))
    assert pairs.size == sum(int((lengths - 1 - skip).sum()) for skip in range(10)) > 17_000_000
    assert sum(array.nbytes for array in vars(pairs).values()) < 200_000
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

    def counting(self, shard, numbers):
        reads.extend((shard, number) for number in numbers)
        return read(self, shard, numbers)

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
    pairs = Pairs.of(TEST, SKIPS)
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
    assert set(pipeline.open_dataset(data(root, test_skips=(0, 90))).figure_batch(4)["skip_B"]) == {0}


# What it costs


def noisy(sequence: int, frame: int, size: int) -> bytes:
    """A picture about as hard to compress as a photograph: 11 to 14 kB at 144 pixels."""
    rng = np.random.default_rng((sequence, frame))
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return jpeg(np.clip(np.asarray(smooth) + rng.normal(0, 6, (size, size, 1)), 0, 255).astype(np.uint8))


def test_bytes_per_pair(tmp_path):
    root = write_records(tmp_path / "photos", {"train": (20, 20), "test": (3,)}, size=144, picture=noisy)
    cost = pipeline.open_dataset(data(root, size=144)).bytes_per_pair()
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
    assert dataset.bytes_per_pair()["disk"] * 0.9 < read < 3 * dataset.bytes_per_pair()["disk"]


def kernel_bytes() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


# What the user is told


def message(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert "config.data.max_skip is -1" in told(max_skip=-1)
    assert "config.data.test_every is 0" in told(test_every=0)
    assert "test_skips" in told(test_skips=()) and "test_skips" in told(test_skips=(1, 1))
    assert "test split" in told(test_skips=(90,)) and "92 frames" in told(test_skips=(90,))


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


def test_every_dataset_has_a_twin_and_a_command():
    for name, row in datasets.DATASETS.items():
        assert datasets.find(name) is row and row.schema and row.splits[0] == "train"
        for module in (f"data_prep.{name}", f"data_prep.synthetic_{name}"):
            assert importlib.util.find_spec(module) is not None


# The built-in twin

PREPARATION = """
import pathlib, sys, time, types
def generate(folder, size, **options):
    pathlib.Path(folder, "half").touch()
    time.sleep(float(sys.argv[1]))
    pathlib.Path(folder, "whole").write_text(size)
def prepare(root, out, **options):
    assert pathlib.Path(root, "whole").is_file()
    pathlib.Path(out, "manifest.json").touch()
for name, entry in (("synthetic_co3d", generate), ("co3d", prepare)):
    module = sys.modules[f"data_prep.{name}"] = types.ModuleType(name)
    setattr(module, entry.__name__, entry)
    module.VERSION = 7
from niso.data import synthetic
print(synthetic.ensure_twin(types.SimpleNamespace(dataset="co3d", twin="small", size=32)))
"""


def start_twin(cache: pathlib.Path, seconds: float) -> subprocess.Popen:
    """Another process that makes the twin, taking that long to generate it."""
    command = [sys.executable, "-c", PREPARATION, str(seconds)]
    here = pathlib.Path(__file__).parents[1]
    env = os.environ | {"NISO_CACHE": str(cache)}
    return subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_make_one_twin(tmp_path):
    processes = [start_twin(tmp_path, 0.5) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in ends] == [str(tmp_path / f"co3d-small-v7-32px-v{records.FORMAT}")] * 2, ends
    assert sum(err.count("making") for _, err in ends) == 2, ends  # the source and the records, each by one of them


def test_a_killed_twin_is_made_again(tmp_path):
    killed = start_twin(tmp_path, 60)
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".*/half")) and time.monotonic() < end:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not [path for path in tmp_path.glob("[!.]*")]
    out, err = start_twin(tmp_path, 0).communicate(timeout=60)
    assert (pathlib.Path(out.strip()) / "manifest.json").is_file(), err
    assert not list(tmp_path.glob("*.unfinished"))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("NISO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert synthetic.cache_folder() == pathlib.Path("/home/x/.cache/niso")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert synthetic.cache_folder() == pathlib.Path("/xdg/niso")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NISO_CACHE", str(tmp_path / "file" / "below"))
    asked = types.SimpleNamespace(dataset="co3d", twin="tiny", size=32)
    assert "set NISO_CACHE" in message(lambda: synthetic.ensure_twin(asked))


def test_the_tiny_twin_streams(monkeypatch, tmp_path):
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    tiny = data("", twin="tiny", size=32)
    dataset = pipeline.open_dataset(tiny)
    train_lengths, test_lengths = (
        [sequence.length for sequence in records.read_index(synthetic.ensure_twin(tiny), split)] for split in ("train", "test")
    )
    assert (len(train_lengths), len(test_lengths)) == (4, 2) and min(train_lengths + test_lengths) >= 12
    assert dataset.train_size == len(by_hand(train_lengths, range(4)))
    assert dataset.test_size == len(by_hand(test_lengths, SKIPS))
    with dataset.train_batches(batch=4, seed=0, start=0, steps=2, rows=slice(None)) as batches:
        assert [batch["frames_BxTxHxWxC"].shape for batch in batches] == [(4, 2, 32, 32, 3)] * 2
    begin = time.monotonic()
    assert pipeline.open_dataset(tiny).test_size == dataset.test_size
    assert time.monotonic() - begin < 0.5
