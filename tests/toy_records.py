"""Small folders of records for the tests of the pipeline, and what a batch of them shows.

Every frame is one flat colour that says which sequence and frame number it is, so a decoded batch proves which frames
were read; and has a pose of its own, so a batch's poses prove it too.
"""

import dataclasses
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from niso.data import pipeline, records
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


def noisy(sequence: int, frame: int, size: int) -> bytes:
    """A picture about as hard to compress as a photograph: 11 to 14 kB at 144 pixels."""
    rng = np.random.default_rng((sequence, frame))
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return jpeg(np.clip(np.asarray(smooth) + rng.normal(0, 6, (size, size, 1)), 0, 255).astype(np.uint8))


def pose(sequence: int, frame: int) -> np.ndarray:
    """A rigid camera-to-world pose of its own for every frame, far from the world's origin as some videos are."""
    rng = np.random.default_rng((sequence, frame))
    pose_4x4 = np.eye(4)
    pose_4x4[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    pose_4x4[:3, 0] *= np.linalg.det(pose_4x4[:3, :3])
    pose_4x4[:3, 3] = 1e5 + rng.normal(size=3)
    return pose_4x4


def write_records(root: pathlib.Path, splits: dict[str, tuple[int, ...]], size: int = SIZE, picture=flat, pose=pose) -> str:
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
                            "camera_to_world_4x4": pose(s, frame),
                            "intrinsics_3x3": np.eye(3),
                            "frame_number": np.int64(frame),
                        }
                        writer.write(records.encode(example, records.FRAME))
            files.append(records.describe_shard(root / name, count))
        records.write_index(root, split, [sequence for _, sequence in sorted(sequences, key=lambda pair: pair[0])])
        shards[split] = tuple(files)
    records.Manifest(records.FORMAT, "co3d", size, {}, shards, {}).write(root)
    return str(root)


def data(root: str, **changes) -> pipeline.Data:
    toy = pipeline.Data(
        dataset="co3d", records=root, twin="", size=SIZE, views=2, poses=False, max_skip=3, test_skips=SKIPS, test_every=1,
        threads=2, prefetch=4, workers=0, unreadable="fatal",
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
    assert (sequence_BxT == sequence_BxT[:, :1]).all()
    assert (np.diff(frame_BxT) == batch["skip_B"][:, None] + 1).all()
    skip_B = batch["skip_B"]
    return list(zip(sequence_BxT[:, 0].tolist(), frame_BxT[:, 0].tolist(), skip_B.tolist(), strict=True))


def by_hand(lengths, skips, views=2) -> set[tuple[int, int, int]]:
    return {(s, a, k) for s, n in enumerate(lengths) for k in skips for a in range(n) if a + (views - 1) * (k + 1) < n}


def train(root: str, *, batch=4, seed=0, start=0, steps=8, rows=slice(None), **changes) -> list[pipeline.Batch]:
    with pipeline.open_dataset(data(root, **changes)).train_batches(
        batch=batch, seed=seed, start=start, steps=steps, rows=rows
    ) as batches:
        return list(batches)


def equal(ours: list[pipeline.Batch], theirs: list[pipeline.Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(ours, theirs, strict=True)
    )


def message(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(root: str, split: str, needle: bytes) -> None:
    """Flips one bit of the only record of the split that holds these bytes."""
    for path in sorted(pathlib.Path(root).glob(f"{split}-*")):
        whole = bytearray(path.read_bytes())
        at = whole.find(needle)
        if at >= 0:
            whole[at + len(needle) // 2] ^= 4
            path.write_bytes(whole)
            return
    raise AssertionError("no such record")
