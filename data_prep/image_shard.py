"""One shard of still images: files of any kind to squares of one size."""

import collections
import dataclasses
import hashlib
import math
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps

from data_prep import record_folder, sources
from niso import folders
from niso.data import records, transforms
from niso.geometry import camera

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make: its file name in the folder `out`, and the pictures of it, as paths within `root`."""

    root: str
    out: str
    file: str
    size: int
    crops: int
    seed: int
    pictures: tuple[str, ...]


def build(job: Job) -> record_folder.Part:
    """Makes the shard; depends on nothing but the job and the pictures, so a second run gives equal bytes."""
    left_out: collections.Counter[str] = collections.Counter()
    named = []
    schema, root = records.still(job.size), folders.named(job.root)
    with records.ShardWriter(folders.named(job.out) / job.file) as writer:
        for picture in job.pictures:
            path = root / picture
            try:
                squares = cut(path, job.size, [random_square(job.seed, picture, n) for n in range(job.crops)])
            except transforms.UNREADABLE as error:
                record_folder.blame_the_disk(path, error)
                left_out["unreadable images"] += 1
                named.append(f"{picture} ({(str(error) or type(error).__name__).splitlines()[0]})")
            else:
                for square in squares:
                    writer.write(records.encode({"image_HxWxC": np.asarray(square)}, schema))
    # A reader wants sequences: there is one, of all images.
    sequence = records.Sequence(job.file.partition(".")[0], "images", job.file, 0, writer.count, None)
    return record_folder.note(writer, [sequence] if writer.count else [], left_out, named)


def random_square(seed: int, picture: str, number: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) that choose the side and place of a square: a function of its arguments, uniform over them."""
    digest = hashlib.blake2b(f"{seed}/{number}/{picture}".encode(errors="surrogateescape"), digest_size=24).digest()
    side, left, top = (int.from_bytes(digest[k : k + 8]) / 2**64 for k in (0, 8, 16))
    return side, left, top


def cut(path: pathlib.Path, size: int, squares: list[tuple[float, float, float]]) -> list[Image.Image]:
    """Squares of the picture, upright and RGB, each resized once to size x size (Lanczos).

    Without `squares` it is the largest one in the middle.  Else those that `random_square` chose: sides log-uniform from
    `size` to the shorter side of the picture, places uniform; a picture smaller than `size` is enlarged.

    Raises:
        transforms.UNREADABLE: it is no picture, a damaged one, or one of real numbers.
    """
    # Of a million files, thousands have odd EXIF entries or palettes that Pillow warns of.
    with warnings.catch_warnings(action="ignore"), Image.open(sources.opened(path)) as image:
        width, height = transforms.upright_size(image)
        if squares:
            boxes = [_box(width, height, size, *square) for square in squares]
        else:
            boxes = [camera.centre_square(height, width)]
            transforms.decode_smaller(image, min(width, height), size)
        upright = _rgb(ImageOps.exif_transpose(image))
        return [transforms.resize_square(upright, box, width, size) for box in boxes]


def _box(width: int, height: int, size: int, side: float, left: float, top: float) -> Box:
    """left, top, right, bottom of a square in a picture, from three numbers in [0, 1)."""
    shorter = min(width, height)
    edge = min(shorter, size * math.exp(side * math.log(max(1.0, shorter / size))))
    x, y = left * (width - edge), top * (height - edge)
    return x, y, min(x + edge, width), min(y + edge, height)


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: transparent parts over white, 16 bits as their upper eight."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("its pixels are real numbers")
    if image.mode.startswith("I"):  # Pillow would clip them at 255
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
