"""A run's logs and figures where its folder is in a bucket: written to a folder of this machine, and copied from there.

Buckets know whole objects only, and logs grow line by line. Before a checkpoint is saved everything written is in the bucket, so
what a run resumes from never knows of lines that are not; in between it is copied now and then, for those who watch. The folder
here goes when the run ends; that of one that was killed, when the next one begins.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence

from niso import folders
from niso.errors import LostError, UserError
from niso.run_files import COPIED

EVERY = 30.0  # seconds between two copies for those who watch


class Mirror:
    """Keeps a run's folder `workdir` as the folder that is written to.

    Args:
      resumed: files that a resumed run reads and goes on with, fetched if they are there.
      clock: seconds; for tests.

    Attributes:
      folder: where to write: `workdir` itself where that is of a file system, and nothing is copied.

    Raises:
      LostError: from the constructor and `push`, where the bucket cannot be read or written, or does not answer.
      UserError: from the constructor, where no folder can be made among the temporary files.
    """

    def __init__(self, workdir: str | os.PathLike[str], resumed: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._target, self._clock, self._pushed = folders.named(workdir), clock, clock()
        self._remote = folders.remote(self._target)
        self.folder = self._target
        self._seen: dict[pathlib.Path, tuple[int, int]] = {}
        self._copying = concurrent.futures.Future[None]()
        self._copying.set_result(None)
        self._failed: LostError | None = None
        if not self._remote:
            return
        fetched = {name: content for name in resumed if (content := self._fetch(name)) is not None}
        try:
            self.folder, self._lock = _folder(fetched)
        except OSError as error:
            reason = f"no folder for what is copied to {self._target} ({error.strerror})"
            raise UserError(f"{reason}: set TMPDIR to a folder with space for the run's logs") from None

    def _fetch(self, name: str) -> bytes | None:
        try:
            return (self._target / name).read_bytes()
        except FileNotFoundError:
            return None
        except folders.failures() as error:
            raise LostError(f"cannot read {self._target / name}: {folders.reason(error)}; run the same command again") from None

    def push(self) -> None:
        """Copies what has changed, and returns once it is in the bucket; after a copy that failed none is tried again."""
        if not self._remote:
            return
        if self._failed:
            raise self._failed
        try:
            concurrent.futures.wait((self._copying,))
            self._begin()
            self._copying.result()
        except LostError as error:
            self._failed = error
            raise

    def push_now_and_then(self) -> None:
        """The same in the background, where the last copy is EVERY seconds old; one that fails is left to the next."""
        if self._clock() - self._pushed >= EVERY:
            self.push_soon()

    def push_soon(self) -> None:
        """The same, at once."""
        if self._remote and self._copying.done() and not self._failed:
            self._begin()

    def close(self) -> None:
        """Removes the folder of this machine, if that is not the run's own."""
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _begin(self) -> None:
        self._pushed = self._clock()
        self._copying = folders.begun(self._copy)

    def _copy(self) -> None:
        below = os.walk(self.folder)  # it does not mind what goes meanwhile
        for path in sorted(pathlib.Path(folder, name) for folder, _, names in below for name in names if name != COPIED):
            target = self._target / path.relative_to(self.folder).as_posix()
            try:
                found = path.stat()
                state = found.st_size, found.st_mtime_ns
                if self._seen.get(path) == state:
                    continue
                folders.upload(path, target)
            except folders.failures(ValueError, RuntimeError) as error:  # those, of some answers of a bucket
                if not path.exists():  # it has become another, as files do that are replaced
                    continue
                raise LostError(f"cannot write {target}: {folders.reason(error)}; run the same command again to resume") from None
            self._seen[path] = state  # as it was before: what has come since is for the next time


def _folder(files: dict[str, bytes]) -> tuple[pathlib.Path, int]:
    """A new folder among the temporary files with these in it, and the descriptor that locks it as long as this process lives.

    Those of niso that nobody locks are removed first; where files cannot be locked none is.
    """
    for mark in pathlib.Path(tempfile.gettempdir()).glob(f"niso-run-*/{COPIED}"):
        with contextlib.suppress(OSError):
            _remove_left(mark)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="niso-run-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        new = folder / f"{COPIED}-new"  # nobody looks for that before it is locked
        lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder / COPIED)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, lock


def _remove_left(mark: pathlib.Path) -> None:
    """Removes the folder of a process that is gone, by its marked file; raises OSError where it is not, or another user's."""
    lock = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)
    finally:
        os.close(lock)
