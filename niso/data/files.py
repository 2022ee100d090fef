"""Small files of a folder of records, in a file system or a bucket: whole or not at all."""

import json
import os
import pathlib
from typing import Any

from niso import folders
from niso.errors import LostError, UserError

REPAIR = "delete that file and run the data preparation again, it makes only what is missing"


def temporary(path: pathlib.Path) -> pathlib.Path:
    """The name a file has while it is being written: hidden, beside its final place, another for every writer on any machine."""
    return path.with_name(f".{path.name}.tmp-{os.urandom(8).hex()}")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes the value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes the file whole or not at all (temporary name, flushed, renamed); UserError when it cannot (in a bucket LostError)."""
    path = folders.named(path)
    if folders.remote(path):
        try:
            path.write_text(text, encoding="utf-8")
        except folders.failures() as error:
            raise LostError(
                f"cannot write {path}: {folders.reason(error)}; run the same command again, or with another --out"
            ) from error
        return
    scratch = temporary(path)
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --out") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The parsed file; UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(folders.named(path).read_bytes())
    except folders.failures() as error:
        raise folders.complaint(path, error, f"cannot read {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {REPAIR}") from error
