"""Where runs and records are: folders of a file system, which every process of a run sees."""

import os
from pathlib import Path

from niso.errors import UserError


def named(path: str | os.PathLike[str], what: str) -> Path:
    """The folder that a user named; `what` it is for, as in a sentence that begins with it.

    Raises:
      UserError: it is a URL. Records are read at random places, and logs written to their end: buckets do neither, but when they
        are mounted.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{what} {text} is a URL: mount the bucket (README, On a pod) and give the mounted folder")
    return Path(text).expanduser()
