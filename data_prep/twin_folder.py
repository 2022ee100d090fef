"""The folder of a synthetic twin (data_prep/synthetic_co3d.py), which tasks can share as they share a folder of records.

A shard is the folder of a sequence.  The notes of tasks are only there until they are merged: what is left is what one run
leaves, which makes none and goes on frame by frame.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping

from data_prep import parts, record_folder, tasks
from data_prep.parts import Part
from data_prep.twin import Sequence
from niso.data import records
from niso.errors import UserError


@dataclasses.dataclass(frozen=True)
class Twin(record_folder.Folder[Sequence]):
    """What is to be made: the plan has the sequences of every category.

    Attributes:
        annotate: Writes the files that concern a category, whose sequences are given.
        subsets: The content of the last file, which concerns all.
    """

    annotate: Callable[[list[Sequence]], None] = dataclasses.field(kw_only=True)
    subsets: bytes = dataclasses.field(kw_only=True)

    @property
    def _begun(self) -> pathlib.Path:
        return self.out / "twin.json"

    @property
    def _last(self) -> pathlib.Path:
        return self.out / "category_to_subset_name_list.json"

    def is_shared(self) -> bool:
        """Whether tasks have begun to make it, whose notes tell what is to be made again, and it is not complete."""
        return parts.shared(self.out).parent.exists() and not self._last.exists()

    def begin(self) -> None:
        """Marks the folder as this twin's, or refuses it."""
        if not self.is_begun():
            write(self._begun, json.dumps(self.options).encode())
        self.is_begun()  # another task may have begun it in the same moment

    def claim(self) -> None:
        """The same for tasks, which note what they have made."""
        self.begin()
        for category in self.plan:
            record_folder.make_folder(parts.shared(self.out).parent / category)

    def is_begun(self) -> bool:
        """Whether there is such a folder; UserError if it holds anything else."""
        if self._begun.exists():
            found = records.read_json(self._begun)
            if found != self.options:
                remedy = "choose another folder or remove it"
                raise UserError(f"{self.out} holds a twin with {found}, not {self.options}: {remedy}")
            return True
        if self._last.exists():
            raise UserError(f"{self.out} holds a CO3D data set that is no twin: choose another folder")
        return False

    def is_finished(self, progress: bool) -> bool:
        """Whether it is complete; says so.

        Raises:
            UserError: it was, but a picture has gone since; there are no notes of tasks any more.
        """
        if not self._last.exists():
            return False
        for path in (path for file in self.files for path in pictures(self.out, self._sequence(self.out / file))):
            if not path.exists():
                raise UserError(f"{path} has gone from a twin that was complete: make it again with `{tasks.command(self)}`")
        self._tidy()
        if progress:
            print(f"{self.out}: nothing to do, the twin is complete")
        return True

    def find(self, file: str) -> tuple[Part | None, str]:
        """What is there of a sequence, by the bytes of its pictures."""
        return parts.find(self.out, file, self.settings, self._size)

    def verify(self, file: str) -> tuple[Part | None, str]:
        """The same of a sequence whose pictures are read."""
        return parts.verify(self.out, self.settings, file, self._size, self._describe)

    def finish(self, made: Mapping[str, Part], summarise: Callable[[record_folder.Kept], None] | None) -> None:
        """Writes the files that concern all sequences; removes the notes on them, and what killed runs left half-written."""
        if summarise:
            summarise({category: [s for file in files for s in made[file].sequences] for category, files in self.plan.items()})
        for of_category in self.plan.values():
            self.annotate([sequence for (sequence,) in of_category.values()])
        self.end()

    def end(self) -> None:
        """Writes the last file of all."""
        write(self._last, self.subsets)
        self._tidy()

    def _tidy(self) -> None:
        for stale in self.out.rglob(".*.tmp-*"):
            stale.unlink(missing_ok=True)
        shutil.rmtree(parts.shared(self.out).parent, ignore_errors=True)

    def _sequence(self, folder: pathlib.Path) -> Sequence:
        (sequence,) = self.plan[folder.parent.name][f"{folder.parent.name}/{folder.name}"]
        return sequence

    def _size(self, folder: pathlib.Path) -> int:
        found = pictures(self.out, self._sequence(folder))
        return sum(path.stat().st_size for path in found if path.exists())

    def _describe(self, folder: pathlib.Path, count: int) -> records.Shard:
        return describe(self.out, self._sequence(folder))


def pictures(out: pathlib.Path, sequence: Sequence) -> list[pathlib.Path]:
    """The files that a sequence is to have."""
    return [out / sequence.image_path(t) for t in sequence.image_numbers]


def describe(out: pathlib.Path, sequence: Sequence) -> records.Shard:
    """The entry of a sequence whose pictures are there; its checksum is of them all, in order of time."""
    digest, size, found = hashlib.sha256(), 0, pictures(out, sequence)
    for path in found:
        content = path.read_bytes()
        digest.update(hashlib.sha256(content).digest())  # so that it matters where one ends
        size += len(content)
    return records.Shard(sequence.folder, len(found), size, digest.hexdigest())


def note(out: pathlib.Path, sequence: Sequence) -> Part:
    """What a task notes of a sequence that it has made."""
    shard = describe(out, sequence)
    return Part(shard, (records.Sequence(sequence.name, sequence.category, shard.file, 0, shard.records, sequence.quality),), {})


def write(path: pathlib.Path, content: bytes) -> None:
    """All of the file under its name or none of it, whoever writes the same; UserError when it cannot be written."""
    scratch = records.temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --out") from error
