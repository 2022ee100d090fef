"""Stored bytes to arrays."""

import io

import numpy as np
from PIL import Image

from niso.errors import UserError


def decode_jpeg(data: bytes, name: str) -> np.ndarray:
    """The picture as uint8 HxWx3 RGB in 0..255; grey and CMYK pictures are converted.

    Args:
        data: A JPEG file.
        name: What the error calls it: the record it came from.

    Raises:
        UserError: data is no JPEG, or one cut short.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture in {name} is damaged ({len(data)} bytes): prepare the records again") from error
