"""Records on disk: shards, their index and manifest, and random access to them.

A folder of records holds, per split, shards `train-00000-of-00012.array_record` and `index-train.json` (where each
sequence lies), and one `manifest.json`, written last: without it the folder is unfinished.  A record is one frame, image or
surface (niso/data/schemas.py) as a serialised tf.train.Example (niso/data/example.py).  Files appear under their final name
only when they are complete.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import resource
import tempfile
import threading
from collections.abc import Sequence as Seq
from typing import Any

from array_record.python import array_record_module

from niso import folders
from niso.data.example import Example, Field, Schema, Value, decode, encode
from niso.data.files import REPAIR, read_json, temporary, write_json, write_text
from niso.data.schemas import FRAME, still, surface
from niso.errors import LostError, RecordError, UserError

__all__ = [
    "FRAME", "Example", "Field", "Manifest", "Reader", "Schema", "Sequence", "Shard", "ShardWriter", "Value", "decode",
    "describe_shard", "encode", "read_index", "read_json", "still", "surface", "temporary", "write_index", "write_json",
    "write_text",
]  # fmt: skip

FORMAT = 1
# group_size:1 reads one record in 10 us (140 us at 64); the payload is JPEG, so compression only costs time.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# No read-ahead and a small buffer: a record is a few kB, and hundreds of shards are open at once.
_FEWEST_OPEN = 16
_READER_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
# What array_record says of bytes that are not a shard's, as it does not of a bucket that cannot be reached.
_DAMAGED = re.compile(r"Riegeli|[Cc]orrupt|[Ii]nvalid (chunk|record)")
_MAKE = "make them with: python -m data_prep.DATASET --out"


class ShardWriter:
    """Context manager that writes one shard under a temporary name and renames it on a clean exit.

    What goes to a bucket is written to this machine's folder for temporary files first. On an exception the temporary file is
    removed; a killed process leaves it, and nothing ever reads it. `count` is the number of records written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = folders.named(path)
        self.count = 0
        local = pathlib.Path(tempfile.gettempdir(), self.path.name) if folders.remote(self.path) else self.path
        self._scratch = temporary(local)

    def __enter__(self) -> "ShardWriter":
        self._writer = self._guard(array_record_module.ArrayRecordWriter, str(self._scratch), _WRITER_OPTIONS)
        return self

    def write(self, data: bytes) -> None:
        """Appends one record; UserError when the file cannot be written (disk full, no permission)."""
        self._guard(self._writer.write, data)
        self.count += 1

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._guard(self._writer.close)
                self._publish()
        except folders.failures() as error:
            kind = LostError if folders.remote(self.path) else UserError
            raise kind(f"cannot write {self.path}: {folders.reason(error)}; run the same command again") from error
        finally:
            del self._writer
            self._scratch.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Gives the finished file its name."""
        if folders.remote(self.path):
            folders.upload(self._scratch, self.path)
            return
        with open(self._scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._scratch, self.path)

    def _guard(self, call: Any, *arguments: Any) -> Any:
        """call(*arguments), with array_record's RuntimeError as a UserError."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            reason = str(error).split(";")[0]
            message_ = f"cannot write {self._scratch.parent / self.path.name}: {reason}; free some space or choose another --out"
            raise UserError(message_) from error


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Records start .. start + length - 1 of a shard: one posed video in the order of its frame numbers, or any still images."""

    name: str
    category: str
    shard: str
    start: int
    length: int
    quality: float | None


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records, its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    records: int
    bytes: int
    sha256: str


def describe_shard(path: str | os.PathLike[str], records: int) -> Shard:
    """The manifest's entry for a finished file."""
    path = folders.named(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return Shard(path.name, records, folders.size(path), digest)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished folder of records holds.

    `size` is the side of the stored images in pixels, `options` what the preparation was asked for, `splits` the shards
    of each split in order, `left_out` how much was dropped, per reason, `facts` what the preparation learnt of all of them.
    """

    format: int
    dataset: str
    size: int
    options: dict[str, Any]
    splits: dict[str, tuple[Shard, ...]]
    left_out: dict[str, int]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, root: str | os.PathLike[str]) -> None:
        """Writes root/manifest.json, whole or not at all."""
        value = dataclasses.asdict(self)
        if not self.facts:
            del value["facts"]
        write_json(folders.named(root) / "manifest.json", value)

    @classmethod
    def read(cls, root: str | os.PathLike[str]) -> "Manifest":
        """The manifest of a finished folder; UserError when it is missing, malformed or of another format."""
        path = folders.named(root) / "manifest.json"
        try:
            missing = folders.kind(path) != "file"
        except folders.failures() as error:
            raise folders.complaint(path, error, f"cannot read {path}") from error
        if missing:
            raise UserError(f"no finished records in {root} (no manifest.json); {_MAKE} {root}")
        value = read_json(path)
        try:
            if value["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {value['format']}, this niso reads format {FORMAT}: "
                    f"use a niso of the same version or another folder; {_MAKE} FOLDER"
                )
            splits = {split: tuple(Shard(**shard) for shard in shards) for split, shards in value["splits"].items()}
            return cls(**(value | {"splits": splits}))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest of records ({error!r}); {REPAIR}") from error


def _index_path(root: str | os.PathLike[str], split: str) -> pathlib.Path:
    return folders.named(root) / f"index-{split}.json"


def write_index(root: str | os.PathLike[str], split: str, sequences: Seq[Sequence]) -> None:
    """Writes root/index-<split>.json, whole or not at all."""
    write_json(_index_path(root, split), [dataclasses.asdict(sequence) for sequence in sequences])


def read_index(root: str | os.PathLike[str], split: str) -> tuple[Sequence, ...]:
    """The sequences of a split in the order they were written; UserError when missing or malformed."""
    path = _index_path(root, split)
    entries = read_json(path)
    try:
        if not isinstance(entries, list):
            raise TypeError(f"a list is expected, not {type(entries).__name__}")
        return tuple(Sequence(**entry) for entry in entries)
    except TypeError as error:
        raise UserError(f"{path} is not an index of records ({error}); {REPAIR}") from error


class Reader:
    """Random access to one split; may be pickled (to a worker process) and shared between threads.  A manifest that is not
    written yet may be given.

    Files are opened when they are first read, at most half as many as the process may hold open; the least recently
    read one is closed when its last reader is done.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, schema: Schema, manifest: Manifest | None = None):
        self.root = folders.named(root)
        self.split = split
        self.schema = schema
        self.manifest = manifest or Manifest.read(root)
        if split not in self.manifest.splits:
            raise UserError(f"{root} has no split {split!r}, only {', '.join(sorted(self.manifest.splits))}")
        self._shards = {shard.file: shard for shard in self.manifest.splits[split]}
        self.sequences = read_index(root, split)
        for sequence in self.sequences:
            shard = self._shards.get(sequence.shard)
            if shard is None or sequence.start < 0 or sequence.start + sequence.length > shard.records:
                path = _index_path(root, split)
                raise UserError(f"{path} does not fit the manifest at sequence {sequence.name}; {REPAIR}")
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open_files: collections.OrderedDict[str, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_open_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def read(self, shard: str, records: Seq[int], schema: Schema | None = None) -> list[Example]:
        """The records with these numbers (0 is the first of the shard), in this order; reads no others.

        With a schema, these entries of them instead of the reader's own.

        Raises:
            UserError: the shard is missing or truncated; RecordError: one of these records is damaged.
            IndexError: no such record: a defect of the caller.
        """
        numbers = [int(number) for number in records]
        count = self._shards[shard].records
        if not all(0 <= number < count for number in numbers):
            raise IndexError(f"{shard} has records 0 .. {count - 1}, asked for {numbers}")
        file = self._file(shard)
        return [self._decode(shard, file, number, schema or self.schema) for number in numbers]

    def _decode(self, shard: str, file: Any, number: int, schema: Schema) -> Example:
        try:
            return decode(file.read([number])[0], schema)
        except (RuntimeError, ValueError) as error:  # array_record's errors name no file
            if folders.remote(self.root) and isinstance(error, RuntimeError) and not _DAMAGED.search(str(error)):
                where = f"record {number} of {self.root / shard}"
                raise LostError(f"cannot read {where} ({error}); run the same command again") from error
            raise RecordError(f"{self.root / shard}: record {number} is damaged ({error}); {REPAIR}") from error

    def _file(self, shard: str) -> Any:
        """The open shard; two threads that miss at once are served one after the other."""
        with self._lock:
            if shard not in self._open_files:
                self._open_files[shard] = self._open(self._shards[shard])
                most = max(_FEWEST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
                while len(self._open_files) > most:
                    self._open_files.popitem(last=False)
            self._open_files.move_to_end(shard)
            return self._open_files[shard]

    def _open(self, shard: Shard) -> Any:
        path = self.root / shard.file
        try:
            size = folders.size(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run the data preparation again, it makes only what is missing") from None
        except folders.failures() as error:
            raise LostError(f"cannot read {path}: {folders.reason(error)}; run the same command again") from error
        if size != shard.bytes:
            raise UserError(f"{path} is truncated or foreign: {size} bytes, the manifest says {shard.bytes}; {REPAIR}")
        try:
            file = array_record_module.ArrayRecordReader(str(path), **_READER_OPTIONS)
            records = file.num_records()  # array_record opens some damaged files and finds nothing in them
        except RuntimeError as error:
            if folders.remote(path) and not _DAMAGED.search(str(error)):
                raise LostError(f"cannot read {path} ({error}); run the same command again") from error
            raise UserError(f"{path} cannot be opened ({error}); {REPAIR}") from error
        if not records and folders.remote(path):  # or in a bucket that did not answer
            raise LostError(f"cannot read {path}: nothing came; run the same command again, or where that stays so: {REPAIR}")
        if records != shard.records:
            raise UserError(f"{path} has {records} records, the manifest says {shard.records}; {REPAIR}")
        return file
