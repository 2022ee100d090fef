"""A run's logs and figures where its folder is in a bucket: written to a folder of this machine, and copied from there.

Buckets know whole objects only, and logs grow line by line. Before a checkpoint is saved everything written is in the bucket, so
what a run resumes from never knows of lines that are not; in between it is copied now and then, for those who watch. The folder
here goes when the run ends; one that is killed leaves it among the temporary files.
"""

import concurrent.futures
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence

from niso import folders
from niso.errors import LostError

EVERY = 30.0  # seconds between two copies for those who watch


class Mirror:
    """Keeps a run's folder `workdir` as the folder that is written to.

    Args:
      resumed: files that a resumed run reads and goes on with, fetched if they are there.
      clock: seconds; for tests.

    Attributes:
      folder: where to write: `workdir` itself where that is of a file system, and nothing is copied.

    Raises:
      LostError: from the constructor and any method but `close`, where the bucket cannot be read or written.
    """

    def __init__(self, workdir: str | os.PathLike[str], resumed: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._target, self._clock, self._pushed = folders.named(workdir), clock, clock()
        self._remote = folders.remote(self._target)
        self.folder = self._target
        self._seen: dict[pathlib.Path, tuple[int, int]] = {}
        if not self._remote:
            return
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "niso-mirror")
        self._copying: concurrent.futures.Future[None] | None = None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="niso-run-"))
        for name in resumed:
            try:
                (self.folder / name).write_bytes((self._target / name).read_bytes())
            except FileNotFoundError:
                continue
            except folders.failures() as error:
                raise LostError(f"cannot read {self._target / name}: {folders.reason(error)}; run the same command again") from None

    def push(self) -> None:
        """Copies what has changed, and returns once it is in the bucket."""
        if self._remote:
            self._begin().result()

    def push_now_and_then(self) -> None:
        """The same in the background, where the last copy is EVERY seconds old; raises what an earlier one met."""
        if not self._remote or (self._copying and not self._copying.done()):
            return
        if self._copying:
            self._copying.result()
        if self._clock() - self._pushed >= EVERY:
            self._begin()

    def close(self) -> None:
        """Removes the folder of this machine, if that is not the run's own."""
        if self._remote:
            self._thread.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> concurrent.futures.Future[None]:
        self._pushed = self._clock()
        self._copying = self._thread.submit(self._copy)
        return self._copying

    def _copy(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            found = path.stat()
            state = found.st_size, found.st_mtime_ns
            if not path.is_file() or self._seen.get(path) == state:
                continue
            target = self._target / path.relative_to(self.folder).as_posix()
            try:
                folders.upload(path, target)
            except folders.failures() as error:
                raise LostError(f"cannot write {target}: {folders.reason(error)}; run the same command again to resume") from None
            self._seen[path] = state  # as it was before: what has come since is for the next time
