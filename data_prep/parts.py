"""Finished shards and their notes, `parts/<shard>.json`; a shard of a twin is the folder of a sequence (data_prep/twin_folder.py).

A note is written after its shard has the final name, so a shard of the size that its note says is complete, whatever was
killed when, and on whichever machine.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from niso import folders
from niso.data import records
from niso.errors import LostError, UserError

MISSING = "is missing"

J = TypeVar("J")
Reports = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished shard: its manifest entry, its sequences, what was left out per reason, files that users want named, and its
    lines of report.jsonl, where the preparation has one."""

    shard: records.Shard
    sequences: tuple[records.Sequence, ...]
    left_out: dict[str, int]
    named: tuple[str, ...] = ()
    reports: tuple[dict[str, Any], ...] = ()


def note(
    writer: records.ShardWriter,
    sequences: Sequence[records.Sequence],
    left_out: dict[str, int],
    named: Sequence[str] = (),
    reports: Reports = (),
) -> Part:
    """What is to be noted of the shard of this closed writer: a builder's result, see `make`."""
    try:
        shard = records.describe_shard(writer.path, writer.count)
    except folders.failures() as error:
        raise LostError(f"cannot read {writer.path} again: {folders.reason(error)}; run the same command again") from error
    return Part(shard, tuple(sequences), dict(left_out), tuple(named), tuple(reports))


def make(build: Callable[[J], Part], out: pathlib.Path, settings: str, job: J) -> Part:
    """Makes one shard in the folder `out` and then its note, which says that it is done, and under which settings."""
    part = build(job)
    records.write_json(_note(out, part.shard.file), dataclasses.asdict(part) | {"settings": settings})
    return part


def find(out: pathlib.Path, file: str, settings: str, size: Callable[[pathlib.Path], int]) -> tuple[Part | None, str]:
    """The part if that shard is there, under these settings and of its size (`size` says which, such as folders.size); else
    None, and what is wrong with the shard."""
    note, shard = _note(out, file), out / file
    if not note.exists() or not shard.exists():
        return None, MISSING
    value = records.read_json(note)
    try:
        part = Part(
            records.Shard(**value["shard"]),
            tuple(records.Sequence(**sequence) for sequence in value["sequences"]),
            value["left_out"],
            tuple(value.get("named", ())),
            tuple(value["reports"] if "reports" in value else _earlier_reports(note)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{note} is malformed ({error!r}): delete it and run again") from error
    if value.get("settings", settings) != settings:  # notes of earlier versions have none
        return None, "was made with other options"
    found = size(shard)
    if found != part.shard.bytes:
        return None, f"has {found} bytes, it was made with {part.shard.bytes}"
    return part, ""


def verify(
    out: pathlib.Path,
    settings: str,
    file: str,
    size: Callable[[pathlib.Path], int],
    describe: Callable[[pathlib.Path, int], records.Shard],
) -> tuple[Part | None, str]:
    """As `find`, but reads the whole shard for its checksum (`describe`, such as records.describe_shard), and counts its records.

    A note that is proven wrong is deleted, so that the next run that is to make the shard does make it.
    """
    part, wrong = find(out, file, settings, size)
    if part is None:
        return None, wrong
    counted = sum(sequence.length for sequence in part.sequences)
    if (part.shard.file, part.shard.records) != (file, counted):
        wrong = f"has a note on {part.shard.records} records of {part.shard.file}, with sequences of {counted}"
    else:
        try:
            found = describe(out / file, counted)
        except folders.failures() as error:  # the disk's fault, not the note's
            return None, f"cannot be read ({folders.reason(error)})"
        if found != part.shard:
            wrong = "is not what was made: its checksum is another"
    if wrong:
        _note(out, file).unlink(missing_ok=True)
        return None, wrong
    return part, ""


def shared(out: pathlib.Path) -> pathlib.Path:
    """The file that says that tasks make a folder (data_prep/tasks.py); niso.data.stream looks for it."""
    return out / "parts" / "tasks.json"


def _earlier_reports(note: pathlib.Path) -> Reports:
    """Those of a note of earlier versions, in a file beside it; none of most preparations."""
    path = note.with_suffix(".jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else ()


def _note(out: pathlib.Path, file: str) -> pathlib.Path:
    return out / "parts" / f"{file}.json"
