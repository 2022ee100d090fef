"""Source files for the libraries that open them: those of this machine where they lie, those of a bucket fetched."""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator

from niso import folders
from niso.errors import LostError


class _Fetched(io.BytesIO):
    """The content of a file in a bucket, which errors of libraries call by its URL, as they do others by their paths."""

    def __init__(self, path: pathlib.Path):
        super().__init__(folders.read(path))
        self._url = os.fspath(path)

    def __repr__(self) -> str:
        return repr(self._url)


def opened(path: pathlib.Path) -> pathlib.Path | io.BytesIO:
    """What a library is to open: the path, or the content of a file in a bucket. Of these raises what `folders.read` does."""
    return _Fetched(path) if folders.remote(path) else path


@contextlib.contextmanager
def on_disk(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The path, or that of a copy of a file in a bucket, which is there as long as it is needed.

    Raises:
        LostError: it cannot be fetched.
    """
    if not folders.remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="niso-source-") as scratch:
        copy = pathlib.Path(scratch, path.name)
        try:
            folders.download(path, copy)
        except folders.failures() as error:
            remedy = "run the same command again; if that disk is full, with another TMPDIR"
            raise LostError(f"cannot copy {path} to {scratch}: {folders.reason(error)}; {remedy}") from error
        yield copy
