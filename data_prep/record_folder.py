"""A folder of records, made shard by shard, by a run that may be killed at any moment, or by many (data_prep/tasks.py).

`parts/options.json` says what the folder was begun with.  `parts/<shard>.json` (data_prep/parts.py) follows every shard that is
complete; report.jsonl, if the preparation has one, and the indices come after all shards, the manifest last of all.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from data_prep import parts as shard_parts
from data_prep import pool
from data_prep.parts import Part, note
from niso import folders
from niso.data import records
from niso.errors import LostError, UserError

__all__ = ["Folder", "Kept", "Part", "Plan", "Rule", "blame_the_disk", "check", "command_line", "deal", "note"]

REPORT = "report.jsonl"
_MOST_SHARDS = 1024

W = TypeVar("W")
J = TypeVar("J")
# Shard file name -> what it is to hold, in order.
Plan = dict[str, tuple[W, ...]]
Kept = dict[str, list[records.Sequence]]
Rule = tuple[str, Any, bool, str]


@dataclasses.dataclass(frozen=True)
class Folder(Generic[W]):
    """What is to be made.

    Attributes:
        out: The folder; made if it does not exist.
        dataset: Row of niso/data/datasets.py.
        options: What the preparation was asked for; "size" and "source", the fingerprint of what it reads, among them.
        plan: The shards of every split.
        units: What is counted, "frames" or "images".
        changed: What another "source" means to the user.
        empty: The error when nothing of a split is usable, with {split} and {reasons}.
        left_out: What was dropped before any shard, per reason.
        flags: Those of the command line that are not among the options, or are told in other words there.
        facts: What the manifest is to say of all records, which lie there with their indices; the manifest is given without it.
        pieces: What a shard is called, "sequences" where it is a folder (data_prep/twin_folder.py).
    """

    out: pathlib.Path
    dataset: str
    options: dict[str, Any]
    plan: dict[str, Plan[W]]
    units: str
    changed: str
    empty: str
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: Callable[[records.Manifest], dict[str, Any]] | None = None
    pieces: str = "shards"

    def make(
        self,
        build: Callable[[J], Part],
        jobs: Callable[[Plan[W]], Iterable[J]],
        summarise: Callable[[Kept], None],
        workers: int,
        progress: bool,
    ) -> records.Manifest | None:
        """Makes what is missing, and returns the manifest.

        Args:
            build: makes one shard; depends on nothing but its job and the files that it reads.
            jobs: those of the shards that are missing.
            summarise: prints what was kept of every split.
            workers: processes; one means this one.
            progress: print progress (stderr) and the summary (stdout).

        Raises:
            UserError: the folder was begun with other options or cannot be written, or a split has nothing usable.
        """
        self.claim()
        pending = self.pending(self.files)
        if not pending and self.is_finished(progress):
            return records.Manifest.read(self.out)
        self.make_shards(pending, build, jobs, workers, progress)
        self.look()
        made = {file: part for file in self.files if (part := self.find(file)[0])}
        if len(made) < len(self.files):
            raise UserError(f"{self.out}: {self.pieces} vanished while they were made: run the same command again")
        return self.finish(made, summarise if progress else None)

    def look(self) -> None:
        """Where the folder is in a bucket: sees it as it is now, whoever has written there."""
        folders.look(self.out, self._begun.parent)

    @functools.cached_property
    def files(self) -> list[str]:
        """The shards of all splits."""
        return [file for of_split in self.plan.values() for file in of_split]

    def pending(self, files: Sequence[str]) -> Plan[W]:
        """Those of the shards that are to be made."""
        self.look()
        items = {file: items for of_split in self.plan.values() for file, items in of_split.items()}
        return {file: items[file] for file in files if self.find(file)[0] is None}

    def is_finished(self, progress: bool) -> bool:
        """Whether a run has come to its end here; says so."""
        names = ["manifest.json", *(f"index-{split}.json" for split in self.plan)]
        finished = all((self.out / name).exists() for name in names)
        if finished and self.facts:  # earlier versions wrote the manifest first without them
            finished = bool(records.Manifest.read(self.out).facts)
        if finished and progress:
            print(f"{self.out}: nothing to do, the records are complete")
        return finished

    def make_shards(
        self,
        pending: Plan[W],
        build: Callable[[J], Part],
        jobs: Callable[[Plan[W]], Iterable[J]],
        workers: int,
        progress: bool,
    ) -> None:
        """Makes these shards and their notes; the arguments are those of `make`."""
        bar = pool.Progress(len(pending), self.units, self.pieces)
        for part in pool.run(functools.partial(shard_parts.make, build, self.out, self.settings), jobs(pending), workers):
            if progress:
                bar.add(part.shard.records)

    def claim(self) -> None:
        """Notes the options in a new folder; refuses a folder that was begun with others."""
        self.look()
        if not self._begun.exists():
            if (self.out / "manifest.json").exists():
                raise UserError(f"{self.out} holds records that were not made by this program: choose another --out")
            if not folders.remote(self.out):  # there every name may have slashes
                make_folder(self._begun.parent)
            records.write_json(self._begun, self.options)
        self.is_begun()  # another task may have begun it in the same moment

    def is_begun(self) -> bool:
        """Whether there is such a folder; UserError if it was begun with other options."""
        if not self._begun.exists():
            return False
        before = records.read_json(self._begun)
        differing = [
            f"{name} {before.get(name)} then, {value} now"
            for name, value in self.options.items()
            if before.get(name) != value and name != "source"
        ]
        if not differing and before.get("source") != self.options["source"]:
            differing = [self.changed]
        if differing:
            raise UserError(f"{self.out} was begun with other options ({'; '.join(differing)}): use the same, or another --out")
        return True

    @property
    def _begun(self) -> pathlib.Path:
        return self.out / "parts" / "options.json"

    @functools.cached_property
    def settings(self) -> str:
        """Changes with the options, and with what is read."""
        return hashlib.sha256(json.dumps([self.dataset, self.options], sort_keys=True).encode()).hexdigest()[:16]

    def find(self, file: str) -> tuple[Part | None, str]:
        """What is there of a shard, see parts.find."""
        return shard_parts.find(self.out, file, self.settings, folders.size)

    def verify(self, file: str) -> tuple[Part | None, str]:
        """The same of a shard that is read as a whole, see parts.verify."""
        return shard_parts.verify(self.out, self.settings, file, folders.size, records.describe_shard)

    def finish(self, made: Mapping[str, Part], summarise: Callable[[Kept], None] | None) -> records.Manifest | None:
        """Writes the report, the indices and, last of all, the manifest; removes what killed runs left half-written."""
        left_out, splits, kept = collections.Counter(self.left_out), {}, {}
        named: list[str] = []
        reports: list[dict[str, Any]] = []
        for split, files in self.plan.items():
            parts = [made[file] for file in files]
            splits[split] = tuple(part.shard for part in parts)
            kept[split] = [sequence for part in parts for sequence in part.sequences]
            for part in parts:
                left_out.update(part.left_out)
                named += part.named
                reports += part.reports
        if reports:
            records.write_text(self.out / REPORT, "".join(f"{json.dumps(report)}\n" for report in reports))
        if summarise:
            summarise(kept)
            for reason, count in sorted(left_out.items()):
                if count:
                    print(f"left out: {count} {reason}")
            for file in named:
                print(f"left out: {file}")
        for split, sequences in kept.items():
            if not sequences:
                reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
                raise UserError(self.empty.format(split=split, reasons=reasons))
            records.write_index(self.out, split, sequences)
        for stale in (*self.out.glob(".*.tmp-*"), *self.out.glob("parts/.*.tmp-*")):
            stale.unlink(missing_ok=True)
        size = self.options["size"]
        manifest = records.Manifest(records.FORMAT, self.dataset, size, self.options, splits, dict(left_out))
        if self.facts:
            manifest = dataclasses.replace(manifest, facts=self.facts(manifest))
        manifest.write(self.out)
        shard_parts.shared(self.out).unlink(missing_ok=True)
        return manifest


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder of this machine, and those above it; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --out") from error


def blame_the_disk(path: pathlib.Path, error: Exception) -> None:
    """Raises a UserError if a picture could not be read because of the operating system, not because of what is in it.

    Such errors have a number (permission, a lost network disk): to leave the picture out for that would make the records
    depend on the day.  Pillow's own complaints about a file's content have none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot read {path}: {error.strerror}; run again when it can be read") from error


def deal(split: str, items: Sequence[W], shards: int | None, each: int) -> Plan[W]:
    """The items in even, consecutive parts: `shards` of them, or one for every `each` items and at most 1024."""
    total = len(items)
    count = min(total, shards or min(_MOST_SHARDS, -(-total // each)))
    edges = [total * i // count for i in range(count + 1)]
    return {f"{split}-{i:05d}-of-{count:05d}.array_record": tuple(items[edges[i] : edges[i + 1]]) for i in range(count)}


def check(size: int, workers: int, shards: int | None, *more: Rule) -> None:
    """Refuses numbers that mean nothing; `more` are (name, value, whether it is good, the rule that it breaks)."""
    for name, value, good, rule in (
        *more,
        ("size", size, size >= 1, "at least 1"),
        ("workers", workers, workers >= 1, "at least 1"),
        ("shards", shards, shards is None or 1 <= shards <= 99_999, "between 1 and 99999"),
    ):
        if not good:
            raise UserError(f"--{name} is {value}, it must be {rule}")


def command_line(prepare: Callable[..., Any], parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Runs prepare with the arguments; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C.

    1 after a message on what is no mistake: a bucket was lost.
    """
    given = vars(parser.parse_args(argv))
    try:
        prepare(**given)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except folders.failures() as error:
        urls = [value for value in given.values() if isinstance(value, str) and folders.remote(value)]
        if not urls:
            raise
        print(f"cannot use {' or '.join(urls)}: {folders.reason(error)}; run again when it can be used", file=sys.stderr)
        return LostError.code
    except KeyboardInterrupt:
        print("interrupted: run the same command again, what is finished is kept", file=sys.stderr)
        return 130
    return 0
