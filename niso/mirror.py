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
import threading
import time
from collections.abc import Callable, Sequence

from niso import folders
from niso.errors import LostError, UserError
from niso.run_files import COPY

EVERY = 30.0  # seconds between two copies for those who watch
LONGEST = 180.0  # seconds for one copy; fsspec itself tries for half a minute


class Mirror:
    """Keeps a run's folder `workdir` as the folder that is written to.

    Args:
      resumed: files that a resumed run reads and goes on with, fetched if they are there.
      clock: seconds; for tests.

    Attributes:
      folder: where to write: `workdir` itself where that is of a file system, and nothing is copied.

    Raises:
      LostError: from the constructor and any method but `close`, where the bucket cannot be read or written, or does not answer.
      UserError: from the constructor, where no folder can be made among the temporary files.
    """

    def __init__(self, workdir: str | os.PathLike[str], resumed: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._target, self._clock, self._pushed = folders.named(workdir), clock, clock()
        self._remote = folders.remote(self._target)
        self.folder = self._target
        self._seen: dict[pathlib.Path, tuple[int, int]] = {}
        self._copying: concurrent.futures.Future[None] | None = None
        self._failed: LostError | None = None
        if not self._remote:
            return
        fetched = {name: content for name in resumed if (content := self._fetch(name)) is not None}
        try:
            self.folder, self._lock = _folder()
            for name, content in fetched.items():
                (self.folder / name).write_bytes(content)
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
        try:
            self._wait()
            self._begin()
            self._wait()
        except LostError as error:
            self._failed = error
            raise

    def push_now_and_then(self) -> None:
        """The same in the background, where the last copy is EVERY seconds old; raises what an earlier one met."""
        if self._clock() - self._pushed >= EVERY:
            self.push_soon()

    def push_soon(self) -> None:
        """The same, at once."""
        if self._remote and (self._copying is None or self._copying.done()):
            self._wait()
            self._begin()

    def close(self) -> None:
        """Removes the folder of this machine, if that is not the run's own."""
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _begin(self) -> None:
        """Begins to copy, in a thread that does not hold the end of the program."""
        self._pushed = self._clock()
        copying = self._copying = concurrent.futures.Future[None]()

        def run() -> None:
            try:
                self._copy()
                copying.set_result(None)
            except BaseException as error:
                copying.set_exception(error)

        threading.Thread(target=run, name="niso-mirror", daemon=True).start()

    def _wait(self) -> None:
        """For the copy that is under way."""
        if self._failed:
            raise self._failed
        if self._copying:
            try:
                self._copying.result(LONGEST)
            except concurrent.futures.TimeoutError:
                told = f"{self._target} has not answered for {LONGEST:.0f} s; run the same command again to resume"
                raise LostError(told) from None

    def _copy(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            target = self._target / path.relative_to(self.folder).as_posix()
            try:
                found = path.stat()
                state = found.st_size, found.st_mtime_ns
                if not path.is_file() or self._seen.get(path) == state:
                    continue
                folders.upload(path, target)
            except folders.failures() as error:
                if not path.exists():  # it has become another, as files do that are replaced
                    continue
                raise LostError(f"cannot write {target}: {folders.reason(error)}; run the same command again to resume") from None
            self._seen[path] = state  # as it was before: what has come since is for the next time


def _folder() -> tuple[pathlib.Path, int]:
    """A new folder among the temporary files, and the descriptor that locks it as long as this process lives. Folders that nobody
    locks are removed first."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{COPY}*"):
        with contextlib.suppress(OSError):  # another's, or in use
            lock = _locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=COPY))
        with contextlib.suppress(OSError):  # another process has taken it for one that is left
            lock = _locked(folder)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _locked(folder: pathlib.Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
