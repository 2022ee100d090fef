"""The built-in twins: synthetic data in the layout of the real one, made once into a cache folder."""

import fcntl
import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from niso.data.records import FORMAT
from niso.errors import UserError

if TYPE_CHECKING:
    from niso.data.stream import Source


def cache_folder() -> pathlib.Path:
    """$NISO_CACHE, else $XDG_CACHE_HOME/niso, else ~/.cache/niso."""
    if "NISO_CACHE" in os.environ:
        return pathlib.Path(os.environ["NISO_CACHE"]).expanduser()
    if "XDG_CACHE_HOME" in os.environ:
        return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "niso"
    return pathlib.Path.home() / ".cache" / "niso"


def ensure_twin(data: "Source") -> pathlib.Path:
    """The folder of records of the twin data.twin of data.dataset, data.size pixels wide; made on the first call.

    The twin's source pictures are kept beside it, so that another size costs only the preparation.  Any number of
    processes may ask at once and any of them may be killed: a folder under its final name is complete, and the next
    call goes on where a killed one was.  Folders of other versions of the generator or of the records are left alone.

    Raises:
        UserError: unknown twin, the cache folder cannot be written, or a package that the generator needs is missing.
    """
    # data_prep is above this layer.
    generator = importlib.import_module(f"data_prep.synthetic_{data.dataset}")
    chosen = generator.PREPARATION  # twin -> how its records are prepared
    if data.twin not in chosen:
        raise UserError(f"unknown twin {data.twin!r}: --config.data.twin is one of {', '.join(chosen)}, or empty")
    preparation = importlib.import_module(f"data_prep.{data.dataset}")
    name = f"{data.dataset}-{data.twin}-v{generator.VERSION}"
    source, records = cache_folder() / name, cache_folder() / f"{name}-{data.size}px-v{FORMAT}"
    tiny = data.twin == "tiny"
    # A second's work is not worth starting processes for.
    options = {"workers": 1 if tiny else os.cpu_count() or 1, "progress": not tiny}

    def generate(folder: pathlib.Path) -> None:
        generator.generate(folder, data.twin, **options)

    def prepare(folder: pathlib.Path) -> None:
        preparation.prepare(source, folder, size=data.size, **chosen[data.twin], **options)

    try:
        if not records.is_dir():
            _make_once(source, generate)
            _make_once(records, prepare)
    except OSError as error:
        where = cache_folder()
        raise UserError(f"cannot make the {data.twin} twin in {where} ({error}): set NISO_CACHE to a folder") from error
    return records


def _make_once(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Has fill complete a scratch folder and renames it to folder, unless that exists or another process is at it."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock when its holder ends, however it ends, so whoever has it owns the scratch folder.
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to make {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        print(f"making {folder}, once", file=sys.stderr, flush=True)
        scratch = folder.with_name(f".{folder.name}.unfinished")
        scratch.mkdir(exist_ok=True)
        fill(scratch)
        scratch.rename(folder)
