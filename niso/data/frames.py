"""A user's own frames, from a folder of pictures or a video file: squares of one size, cut and resized as those of the records."""

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from niso.data import transforms
from niso.errors import UserError
from niso.geometry import camera

PICTURES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_EXTRA = "reading a video needs another package: pip install imageio-ffmpeg, or give a folder of pictures"


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame.

    Fields:
      name: of its file, or its number in the video.
      time: seconds from the start of a video; a frame's place in its folder, from 0.
      image_HxWxC: the square, RGB, uint8; None where it cannot be read.
      problem: why not.
    """

    name: str
    time: float
    image_HxWxC: np.ndarray | None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Frames:
    """Every `stride`-th frame of `path`, a folder of pictures (in natural order: 2 before 10) or a video file.

    Fields:
      principal_2: centre (x, y) of the square, in continuous pixel coordinates of the original frames: the square is the largest
        around it. None: the records' square, the largest one in the middle of each frame.

    Raises:
      UserError: there is no such folder or file, it cannot be opened, it holds no picture or is one itself.
    """

    path: Path
    stride: int = 1
    principal_2: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise UserError(f"no folder or video {self.path}")
        try:
            empty = self.path.is_dir() and not self._pictures()
        except OSError as error:
            raise UserError(f"cannot read the folder {self.path}: {error.strerror}") from error
        if empty:
            raise UserError(f"{self.path} holds no pictures ({', '.join(PICTURES)})")
        if self.path.is_file() and self.path.suffix.lower() in PICTURES:
            raise UserError(f"{self.path} is one picture: give the folder that holds all of them, or a video")

    def count(self) -> int | None:
        """How many frames there are to read, readable or not; None where that is not known before the end."""
        return len(self._pictures()[:: self.stride]) if self.path.is_dir() else None

    def read(self, size: int) -> Iterator[Frame]:
        """The frames in order, size x size pixels, read as they are asked for.

        Raises:
          UserError: the video cannot be read, its reader is not installed, or the principal point is outside of a frame.
        """
        return self._folder(size) if self.path.is_dir() else self._video(size)

    def _pictures(self) -> list[Path]:
        found = [path for path in self.path.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
        return sorted(found, key=lambda path: (_natural(path.name), path.name))

    def _folder(self, size: int) -> Iterator[Frame]:
        for place, path in list(enumerate(self._pictures()))[:: self.stride]:
            try:
                yield Frame(path.name, float(place), self._read(path, size))
            except transforms.UNREADABLE as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
                yield Frame(path.name, float(place), None, reason.splitlines()[0])

    def _read(self, path: Path, size: int) -> np.ndarray:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode}, not 8 bits per channel")
            width, height = transforms.upright_size(image)
            box = self._square(height, width)
            transforms.decode_smaller(image, box[2] - box[0], size)
            return np.asarray(transforms.resize_square(ImageOps.exif_transpose(image), box, width, size))

    def _video(self, size: int) -> Iterator[Frame]:
        try:
            import imageio_ffmpeg
        except ImportError:
            raise UserError(_EXTRA) from None
        logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of frames that ffmpeg turns upright
        stream = imageio_ffmpeg.read_frames(str(self.path), pix_fmt="rgb24")
        try:
            with warnings.catch_warnings():  # jax warns of every fork; what is forked here becomes ffmpeg at once
                warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                meta = next(stream)  # of upright frames: ffmpeg turns those that a telephone stored lying
            (width, height), rate = meta["size"], meta["fps"] or 1.0
            box = self._square(height, width)
            for number, data in enumerate(stream):
                if number % self.stride == 0:
                    image = Image.frombuffer("RGB", (width, height), data)
                    square = np.asarray(transforms.resize_square(image, box, width, size))
                    yield Frame(f"{number:06d}", number / rate, square)
        # What its reading of ffmpeg's words raises where ffmpeg finds no video.
        except (OSError, RuntimeError, LookupError, AttributeError, AssertionError, ValueError, StopIteration) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UserError(f"{self.path} cannot be read as a video ({reason})") from error
        finally:
            stream.close()

    def _square(self, height: int, width: int) -> tuple[float, float, float, float]:
        if self.principal_2 is None:
            return camera.centre_square(height, width)
        x, y = self.principal_2
        half = min(x, y, width - x, height - y)
        if half <= 0:
            raise UserError(f"the principal point {x:g},{y:g} of --intrinsics lies outside of frames of {width} x {height} pixels")
        return x - half, y - half, x + half, y + half


def _natural(name: str) -> list[str | int]:
    """Numbers in a name by their value: words and numbers alternate, so that only like is compared with like."""
    return [int(part) if k % 2 else part.casefold() for k, part in enumerate(re.split("([0-9]+)", name))]
