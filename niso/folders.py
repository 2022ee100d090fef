"""Where runs and records are: folders of a file system that every process of a run sees, or of a bucket, by its gs:// URL.

Records are read in a bucket where they lie, single ones by ranges (array_record's own reader), and checkpoints are written there
by orbax; what grows line by line is written to a folder of this machine and copied (niso.mirror). The rest goes through etils' and
fsspec's paths, whose objects have the methods of pathlib's, and here what those lack.
"""

import concurrent.futures
import contextlib
import errno
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

from niso.errors import LostError, UserError

if TYPE_CHECKING:
    from gcsfs import GCSFileSystem

BUCKET = "gs://"
SILENCE = 30.0  # seconds without a byte from a bucket that was asked, after which gcsfs asks again, five times
LONGEST = 300.0  # seconds in which none of some megabytes that are sent arrives
ANONYMOUS = "Anonymous caller"  # as buckets call whoever has no credentials
LOGIN = "log in with gcloud auth application-default login, or give the machine an account that may"
INSTALL = 'pip install -e ".[gcs]"'


def named(path: str | os.PathLike[str], what: str = "the folder") -> pathlib.Path:
    """The folder that a user named; `what` it is for, as in a sentence that begins with it. Nothing is looked up there.

    Of a bucket an object of etils, with the methods of pathlib's that niso uses, but for those that this file has instead.

    Raises:
      UserError: it is a URL of another kind, or names no bucket; or what reads buckets is not installed; or ~NAME is no user.
    """
    text = os.fspath(path)
    if "://" not in text:
        try:
            return pathlib.Path(text).expanduser()
        except RuntimeError:
            raise UserError(f"{what} {text} is in the home of a user that there is not: write the folder in full") from None
    if not text.startswith(BUCKET):
        raise UserError(f"{what} {text} is a URL of another kind than gs://: mount it, and give the mounted folder")
    if not text.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{what} {text} names no bucket: write gs://BUCKET/FOLDER")
    try:
        import aiohttp
        import fsspec.config
        import gcsfs  # noqa: F401 (what fsspec reads buckets with)
        from etils import epath
    except ImportError:
        raise UserError(f"{what} {text} is in a bucket, and the packages for these are not installed: {INSTALL}") from None
    for library in ("fsspec", "gcsfs", "google.auth"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they log, with tracebacks, what they raise
    silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    fsspec.config.conf.setdefault("gcs", {}).setdefault("requests_timeout", silence)
    return cast(pathlib.Path, epath.Path(text.rstrip("/")))


def here(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """As `named`, of files and folders that must be of this machine.

    Raises:
      UserError: it is a URL.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{what} {os.fspath(path)} is a URL: give a path of this machine, and copy from or to that")
    return named(path, what)


def remote(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a file is in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """The folder or file, whatever the working directory is; what is in a bucket is so already."""
    return path if remote(path) else path.absolute()


def resolved(path: pathlib.Path) -> pathlib.Path:
    """The same without symbolic links."""
    return path if remote(path) else path.resolve()


def probe(folder: pathlib.Path) -> None:
    """Sees that a folder of a bucket can be written, by an object that goes again; raises what `failures` lists."""
    path = folder / f".writable-{os.urandom(8).hex()}"
    path.write_bytes(b"")
    path.unlink()


def size(path: pathlib.Path) -> int:
    """Bytes of a file; raises what `failures` lists."""
    found = path.stat()
    return found.length if remote(path) else found.st_size  # type: ignore[attr-defined]


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a folder; in a bucket, where these have no names of their own, object by object. Raises what `failures` lists."""
    if not remote(source):
        source.rename(target)
        return
    _buckets().invalidate_cache()  # tensorstore has written there
    _buckets().copy(os.fspath(source), os.fspath(target), recursive=True)
    _buckets().rm(os.fspath(source), recursive=True)


def failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading or writing raises where a disk, a bucket or the way to it fails, and `more`: `except failures() as error`."""
    if "gcsfs" not in sys.modules:
        return (OSError, *more)
    import aiohttp
    import google.api_core.exceptions
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    return (
        OSError, HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError,
        google.api_core.exceptions.GoogleAPIError, *more,
    )  # fmt: skip


def reason(error: BaseException) -> str:
    """Why one of `failures` came, in some words."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer"
    words = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return f"no such file or bucket ({words})" if isinstance(error, FileNotFoundError) and error.errno is None else words[:300]


def passing(path: str | os.PathLike[str], error: BaseException) -> bool:
    """Whether one of `failures` at a folder or file is an outage, after which the same may succeed: of a bucket, or of who renews
    credentials, but where there is no such thing, no permission, or nobody has logged in."""
    if not remote(path) or isinstance(error, FileNotFoundError) or ANONYMOUS in str(error):
        return False
    return getattr(error, "code", None) not in (403, "403") and not str(error).startswith("Forbidden")


def complaint(path: str | os.PathLike[str], error: BaseException, text: str, remedy: str = "") -> UserError:
    """The error to be raised for one of `failures`, with its reason: after an outage one that has launchers start again."""
    text = f"{text}: {reason(error)}"
    if passing(path, error):
        return LostError(f"{text}; run the same command again")
    remedy = LOGIN if ANONYMOUS in str(error) else remedy
    return UserError(f"{text}; {remedy}" if remedy else text)


def upload(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file of this machine into a bucket, where it appears whole or not at all. Raises what `failures` lists.

    Also where the bucket takes no more for LONGEST seconds: gcsfs would wait as long as there is a connection.
    """
    from fsspec.callbacks import Callback

    moved = time.monotonic()

    def move(*_: object, **__: object) -> None:
        nonlocal moved
        moved = time.monotonic()

    told = Callback(hooks={"moved": move})
    copying = begun(lambda: _buckets().put_file(os.fspath(source), os.fspath(target), callback=told))
    while not copying.done():
        patience = moved + LONGEST - time.monotonic()
        if patience <= 0:
            raise TimeoutError
        concurrent.futures.wait((copying,), patience)
    copying.result()


def begun(call: Callable[[], object]) -> "concurrent.futures.Future[None]":
    """A call under way in a thread that does not hold the end of the program."""
    found = concurrent.futures.Future[None]()

    def run() -> None:
        try:
            call()
            found.set_result(None)
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="niso-folders", daemon=True).start()
    return found


def download(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file of a bucket to this machine. Raises what `failures` lists."""
    _buckets().get_file(os.fspath(source), os.fspath(target))


def read(path: pathlib.Path) -> bytes:
    """The content of a file, in a bucket by one request.

    Raises:
      OSError: with a number: as pathlib's; in a bucket, there is no such file.
      LostError: the bucket cannot be read.
    """
    if not remote(path):
        return path.read_bytes()
    try:
        return cast(bytes, _buckets().cat_file(os.fspath(path)))
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
    except failures() as error:
        raise LostError(f"cannot read {path}: {reason(error)}; run the same command again") from error


def kind(path: pathlib.Path) -> Literal["folder", "file", ""]:
    """What there is of that name. Raises what `failures` lists of a bucket that cannot be asked: etils' `is_dir` then says no."""
    if not remote(path):
        return "folder" if path.is_dir() else "file" if path.is_file() else ""
    try:
        return "folder" if path.stat().is_directory else "file"  # type: ignore[attr-defined]
    except FileNotFoundError:
        return ""


def entries(folder: pathlib.Path) -> list[tuple[str, bool]]:
    """The names in a folder, as they are now, and whether each is that of a folder; in a bucket by a request for a thousand.

    Raises what `failures` lists.
    """
    if not remote(folder):
        with os.scandir(folder) as found:
            return [(entry.name, entry.is_dir()) for entry in found]
    url = os.fspath(folder)
    listed = _buckets().ls(url, detail=True, refresh=True)
    _buckets().invalidate_cache(url)  # a million pictures' would stay in memory
    below = ((pathlib.PurePosixPath(entry["name"]), entry["type"] == "directory") for entry in listed)
    return [(path.name, is_folder) for path, is_folder in below if path != pathlib.PurePosixPath(url.removeprefix(BUCKET))]


def look(*several: pathlib.Path) -> None:
    """Forgets what this process knows of buckets, which others write too, and lists these folders anew.

    To ask for one of their files, or its size, is then no request, until this process writes to the folder. Raises what
    `failures` lists.
    """
    if there := [os.fspath(folder) for folder in several if remote(folder)]:
        _buckets().invalidate_cache()
        for url in there:
            with contextlib.suppress(FileNotFoundError):
                _buckets().ls(url)


def _buckets() -> "GCSFileSystem":
    """The very object that etils' paths ask, in every thread: what is written here it must not remember otherwise."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(BUCKET)
