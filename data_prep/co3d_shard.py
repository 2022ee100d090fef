"""One shard of CO3Dv2 frames: source images to records."""

import collections
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_prep import record_folder, sources
from data_prep.co3d_source import Frame, Selected
from niso import folders
from niso.data import records, transforms
from niso.errors import UserError
from niso.geometry import camera

JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make: its file name in the folder `out`, and its sequences with their annotated frames."""

    root: str
    out: str
    file: str
    size: int
    sequences: tuple[tuple[Selected, tuple[Frame, ...]], ...]


class UnusableFrameError(Exception):
    """Why a frame is not stored: the reason as it is counted."""


def build(job: Job) -> record_folder.Part:
    """Makes the shard; depends on nothing but the job and the images, so a second run gives equal bytes.

    Sequences keep the job's order; one with fewer than two usable frames is left out (it has no motion).  Holds the
    encoded frames of one sequence and one full-size image at a time.
    """
    left_out: collections.Counter[str] = collections.Counter()
    sequences, root = [], folders.named(job.root)
    with records.ShardWriter(folders.named(job.out) / job.file) as writer:
        for selected, frames in job.sequences:
            encoded = []
            for frame in frames:
                try:
                    example = make_example(root, frame, job.size)
                except UnusableFrameError as reason:
                    left_out[str(reason)] += 1
                else:
                    encoded.append(records.encode(example, records.FRAME))
            if len(encoded) < 2:
                left_out["sequences with fewer than 2 usable frames"] += 1
                continue
            sequences.append(
                records.Sequence(selected.name, selected.category, job.file, writer.count, len(encoded), selected.quality)
            )
            for data in encoded:
                writer.write(data)
    return record_folder.note(writer, sequences, left_out)


def make_example(root: pathlib.Path, frame: Frame, size: int) -> records.Example:
    """The record of one frame: size x size JPEG, OpenCV camera-to-world pose, intrinsics in pixels of that JPEG.

    Raises:
        UnusableFrameError: the frame has no usable pose or image.
    """
    pose_4x4, intrinsics_3x3 = _cameras(frame, size)
    image = _load_square(root / frame.path, frame, size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return {
        "image_jpeg": buffer.getvalue(),
        "camera_to_world_4x4": pose_4x4,
        "intrinsics_3x3": intrinsics_3x3,
        "frame_number": np.asarray(frame.number, np.int64),
    }


def _cameras(frame: Frame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pose (4, 4) and intrinsics (3, 3) of the stored image."""
    view: dict[str, Any] | None = frame.viewpoint
    if view is None:
        raise UnusableFrameError("frames without viewpoint")
    try:
        pose_4x4 = camera.camera_to_world_from_pytorch3d(view["R"], view["T"])
        intrinsics_3x3 = camera.intrinsics_from_ndc(
            view["focal_length"], view["principal_point"], frame.height, frame.width, view.get("intrinsics_format")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"viewpoint of {frame.path} is malformed ({error}): is this CO3D version 2?") from error
    if not (np.isfinite(pose_4x4).all() and np.isfinite(intrinsics_3x3).all()):
        raise UnusableFrameError("frames with non-finite pose or intrinsics")
    return pose_4x4, camera.crop_and_resize_intrinsics(intrinsics_3x3, frame.height, frame.width, size)


def _load_square(path: pathlib.Path, frame: Frame, size: int) -> Image.Image:
    """The centre square of the image file, resized to size x size, in RGB."""
    try:
        with Image.open(sources.opened(path)) as image:
            return _resize_square(_oriented(image, frame, size), frame, size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnusableFrameError("frames with missing image") from error
    except transforms.UNREADABLE as error:
        record_folder.blame_the_disk(path, error)
        raise UnusableFrameError("frames with unreadable image") from error


def _oriented(image: Image.Image, frame: Frame, size: int) -> Image.Image:
    """The decoded image, upright as annotated; may be decoded at 1/2, 1/4 or 1/8 of the file's resolution.

    The cameras belong to an image of the annotated size.  A file of that size is taken as stored, whatever its EXIF
    orientation says; one of the exchanged size is turned if that tag says so; every other size is another image.
    """
    annotated = (frame.width, frame.height)
    turn = image.size != annotated
    if turn and transforms.upright_size(image) != annotated:
        raise UnusableFrameError("frames with image of another size than annotated")
    transforms.decode_smaller(image, min(annotated), size)
    return ImageOps.exif_transpose(image) if turn else image


def _resize_square(image: Image.Image, frame: Frame, size: int) -> Image.Image:
    """The centre square, resized."""
    return transforms.resize_square(image, camera.centre_square(frame.height, frame.width), frame.width, size)
