"""The idx format of MNIST's files: a magic number, the length of each axis, then bytes, in C order and big-endian.

Source: the format's description on the page of the MNIST database (LeCun, Cortes and Burges).  Of its types of values only
the one that MNIST has, unsigned bytes, is read.
"""

import gzip
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from niso import folders
from niso.errors import UserError

# Third byte: the type of the values, 8 for unsigned bytes. Fourth: the number of axes.
_UNSIGNED_BYTES = 0x0800
_GZIP = b"\x1f\x8b"
_REPAIR = "fetch it again"


def encode(array: np.ndarray) -> bytes:
    """An array of uint8 as the content of an idx file."""
    lengths = struct.pack(f">{1 + array.ndim}I", _UNSIGNED_BYTES | array.ndim, *array.shape)
    return lengths + array.astype(np.uint8, casting="equiv").tobytes()


def decode(content: bytes, axes: int, path: str | os.PathLike[str]) -> np.ndarray:
    """The array of uint8 with so many axes, read-only; `path` is what an error names.

    Raises:
        UserError: the content is of another type or number of axes, truncated, or followed by more.
    """
    head = 4 * (1 + axes)
    if len(content) < head:
        raise UserError(f"{path} is truncated: it has {len(content)} bytes, the head of an idx file alone {head}; {_REPAIR}")
    magic, *shape = struct.unpack_from(f">{1 + axes}I", content)
    if magic != _UNSIGNED_BYTES | axes:
        expected = f"it begins with the number {magic}, not {_UNSIGNED_BYTES | axes}"
        raise UserError(f"{path} is no idx file of bytes on {axes} axes: {expected}; {_REPAIR}")
    size = head + math.prod(shape)
    if len(content) != size:
        what = "truncated" if len(content) < size else "too long"
        raise UserError(f"{path} is {what}: it has {len(content)} bytes, {size} by its head; {_REPAIR}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def read(path: pathlib.Path) -> bytes:
    """The file's content, unpacked if it is gzip's, whatever the file is called; UserError if it cannot be read or unpacked."""
    try:
        content = folders.read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run again when it can be read") from error
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); {_REPAIR}") from error
