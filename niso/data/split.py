"""One split of a folder of records: batches of windows, and whole sequences, read and decoded."""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from niso.data import records, transforms
from niso.data.reading import Reading
from niso.data.stream import Batch
from niso.data.windows import Windows, frames_needed
from niso.errors import RecordError, UserError
from niso.geometry import camera

Read = tuple[str, records.Example]  # what errors call a record, and the record

PICTURE, POSE = "image_jpeg", "camera_to_world_4x4"


def describe(views: int) -> str:
    """What an example is."""
    return "pair of frames" if views == 2 else f"window of {views} frames"


@dataclasses.dataclass(frozen=True)
class Split:
    """The windows and sequences of one split and the means to read them; can be pickled for a worker process.

    Attributes:
        reader: Of the entries of a record that batches need.
        schema: All entries of a record.
        windows: The examples.
        size: Edge of the pictures in pixels.
        reading: What is done about windows that cannot be read.
    """

    reader: records.Reader
    schema: records.Schema
    windows: Windows
    size: int
    reading: Reading

    @classmethod
    def open(
        cls, root: pathlib.Path, name: str, schema: records.Schema, skips: Sequence[int], views: int, poses: bool, unreadable: str
    ) -> "Split":
        """The split `name` of the records in root; with `poses`, batches have them.

        Raises:
            UserError: there is no such split, or no window in it.
        """
        # Parsing the poses of pairs, which do not use them, would cost a tenth of the whole.
        reader = records.Reader(root, name, {key: schema[key] for key in ((PICTURE, POSE) if poses else (PICTURE,))})
        windows = Windows.of([sequence.length for sequence in reader.sequences], skips, views)
        if not windows.size:
            needed = f"none of its {len(reader.sequences)} sequences has {frames_needed(min(skips), views)} frames"
            raise UserError(f"the {name} split of {root} has no {describe(views)}: {needed}, prepare longer videos")
        return cls(reader, schema, windows, reader.manifest.size, Reading(unreadable))

    def fetch(self, item_Bx1: np.ndarray, weight_B: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The batch of the windows with these numbers, and replaced_B, whether another was taken in a window's place."""
        batch = self._empty(len(weight_B)) | {"weight_B": weight_B.astype(np.float32)}
        taken_B = np.empty(len(weight_B), np.int64)
        where = dict(zip(item_Bx1[:, 0].tolist(), self.windows.locate(item_Bx1[:, 0]).T.tolist(), strict=True))
        read = functools.partial(self._read_window, where)
        for b, item in enumerate(item_Bx1[:, 0].tolist()):
            taken_B[b], (batch["skip_B"][b], pictures, pose_Tx4x4) = self.reading.read(item, self.windows.size, read, self.name)
            for t, frame_HxWxC in enumerate(pictures):
                batch["frames_BxTxHxWxC"][b, t] = frame_HxWxC
            if pose_Tx4x4 is not None:  # g_i^-1 g_i+1, float64 until here
                batch["relative_BxPx4x4"][b] = camera.relative_pose(pose_Tx4x4[:-1], pose_Tx4x4[1:])
        return batch, taken_B != item_Bx1[:, 0]

    def stored_bytes(self, item: int) -> int:
        """Bytes of the records of the window with this number."""
        sequence, start, skip = self.windows.locate(np.array([item]))[:, 0].tolist()
        found = self.read(sequence, self.windows.frames(start, skip), self.schema)
        return sum(len(records.encode(example, self.schema)) for _, example in found)

    def name(self, item: int) -> str:
        """What the window with this number is called: its sequence, frames and records."""
        sequence, start, skip = self.windows.locate(np.array([item]))[:, 0].tolist()
        video, frames = self.reader.sequences[sequence], self.windows.frames(start, skip)
        frame, record = (", ".join(str(first + one) for one in frames) for first in (0, video.start))
        return f"frames {frame} of sequence {video.name} (records {record} of {video.shard})"

    def _empty(self, count: int) -> Batch:
        """Arrays for what is read of that many windows."""
        views, size = self.windows.views, self.size
        batch: Batch = {"frames_BxTxHxWxC": np.empty((count, views, size, size, 3), np.uint8), "skip_B": np.empty(count, np.int32)}
        return batch | ({"relative_BxPx4x4": np.empty((count, views - 1, 4, 4), np.float32)} if POSE in self.reader.schema else {})

    def _read_window(self, where: dict[int, list[int]], item: int) -> tuple[int, list[np.ndarray], np.ndarray | None]:
        """(skip, pictures, pose_Tx4x4 or None) of a window, whose (sequence, start, skip) may stand in `where`."""
        sequence, start, skip = where.get(item) or self.windows.locate(np.array([item]))[:, 0].tolist()
        found = self.read(sequence, self.windows.frames(start, skip))
        poses = self._poses(sequence, found) if POSE in self.reader.schema else None
        return skip, [self._picture(one) for one in found], poses

    def read(self, sequence: int, frames: Iterable[int], schema: records.Schema | None = None) -> list[Read]:
        """These frames of a sequence, in this order; with the entries of `schema` instead of the reader's own."""
        video = self.reader.sequences[sequence]
        numbers = [video.start + frame for frame in frames]
        shard = self.reader.root / video.shard
        examples = self.reader.read(video.shard, numbers, schema)
        return [(f"record {number} of {shard}", example) for number, example in zip(numbers, examples, strict=True)]

    def read_sequence(self, index: int, frames: Sequence[int] | slice, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """(frames_TxHxWxC uint8, pose_Tx4x4 float64) of these frames of a sequence, decoded by that many threads."""
        all_T = np.arange(self.reader.sequences[index].length)
        frame_T = all_T[frames if isinstance(frames, slice) else np.asarray(frames, np.int64)]
        found = self.read(index, frame_T.tolist(), {key: self.schema[key] for key in (PICTURE, POSE)})
        pose_Tx4x4 = self._poses(index, found)
        frames_TxHxWxC = np.empty((len(found), self.size, self.size, 3), np.uint8)

        def fill(t: int) -> None:
            frames_TxHxWxC[t] = self._picture(found[t])

        with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
            list(pool.map(fill, range(len(found))))
        return frames_TxHxWxC, pose_Tx4x4

    def poses(self, index: int) -> np.ndarray:
        """pose_Tx4x4 float64 of all frames of a sequence; no picture is looked at, though its bytes are read."""
        frames = range(self.reader.sequences[index].length)
        return self._poses(index, self.read(index, frames, {POSE: self.schema[POSE]}))

    def _poses(self, sequence: int, found: Sequence[Read]) -> np.ndarray:
        """pose_Tx4x4 of records of a sequence, in the order given; RecordError where one is not finite."""
        pose_Tx4x4 = np.array([example[POSE] for _, example in found], np.float64).reshape(-1, 4, 4)
        finite_T = np.isfinite(pose_Tx4x4).all(axis=(1, 2))
        if not finite_T.all():
            where = f"sequence {self.reader.sequences[sequence].name} (in {found[int(np.argmin(finite_T))][0]})"
            raise RecordError(f"a camera pose of {where} is not finite: prepare the records again, without that frame")
        return pose_Tx4x4

    def _picture(self, one: Read) -> np.ndarray:
        """The decoded picture of a record, HxWxC uint8."""
        name, example = one
        frame_HxWxC = transforms.decode_jpeg(cast(bytes, example[PICTURE]), name)
        height, width, _ = frame_HxWxC.shape
        if (height, width) != (self.size, self.size):
            size = f"{width}x{height} pixels, its manifest says {self.size}"
            raise RecordError(f"the picture in {name} has {size}: prepare the records again")
        return frame_HxWxC
