"""A data preparation that many machines share: `--task I/N` makes one N-th of the shards, and `--merge` the records of them all.

`parts/tasks.json` says among how many tasks a folder is shared, until they are merged.  Tasks need nothing of each other but the
folder, which all of them see: they may run at once, one after the other, and again.  What concerns all records, such as splits
and the numbers of classes, each decides by itself, from names and lists that all of them read.

The bytes are those of one run; of data_prep.shapes, data_prep.homnist --mnist and data_prep.synthetic_co3d on machines of one
kind, the rounding of whose arithmetic is in what they make.

data_prep.synthetic_co3d makes no records: its shards are folders of pictures, a sequence each, and its merge writes the annotations
and removes `parts` (data_prep/twin_folder.py).
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import pathlib
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from data_prep import parts, pool
from data_prep.record_folder import Folder, Kept, Part, Plan
from niso import folders
from niso.data import records
from niso.errors import UserError

_SHOWN = 3

T = TypeVar("T")
W = TypeVar("W")
J = TypeVar("J")


@dataclasses.dataclass(frozen=True)
class Share:
    """What of a folder a run makes: everything; as a task, the number-th of `count` parts; or the records of all tasks' shards."""

    number: int = 0
    count: int | None = None
    merge: bool = False

    def of(self, shards: Sequence[T]) -> Sequence[T]:
        """The shards to be made, which follow each other: those of data_prep.co3d then need the annotations of few categories."""
        if self.count is None:
            return shards
        return shards[len(shards) * self.number // self.count : len(shards) * (self.number + 1) // self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse(task: str | None, merge: bool) -> Share:
    """What --task and --merge ask for.

    Raises:
        UserError: both are set, or the task is not I/N with 0 <= I < N.
    """
    if task is None:
        return Share(merge=merge)
    if merge:
        raise UserError("--task and --merge are both set: run every task first, then the same command with --merge alone")
    numbers = re.fullmatch(r"([0-9]{1,6})/([1-9][0-9]{0,5})", task)
    if not numbers:
        raise UserError(f"--task is {task!r}, it must be I/N: the number of this task, from 0, and that of all, such as 0/100")
    number, count = map(int, numbers.groups())
    if number >= count:
        raise UserError(f"--task is {task}, but tasks are counted from 0: of {count} the last is {count - 1}/{count}")
    return Share(number, count)


def add_flags(parser: argparse.ArgumentParser, pieces: str = "shards", whole: str = "the records") -> None:
    """Adds --task and --merge, of a preparation whose `pieces` are put together to the `whole`."""
    parser.add_argument(
        "--task",
        metavar="I/N",
        help=f"make one N-th of the {pieces}, I from 0 to N - 1, in a folder that all tasks share: "
        "$SLURM_ARRAY_TASK_ID/100 in a job array --array=0-99, $(JOB_COMPLETION_INDEX)/100 in a Kubernetes job",
    )
    parser.add_argument("--merge", action="store_true", help=f"after all tasks: verify their {pieces}, and make {whole} of them")


def claim(out: pathlib.Path, count: int) -> None:
    """Notes among how many tasks the folder is shared; UserError if it is shared among another number."""
    if not parts.shared(out).exists():
        records.write_json(parts.shared(out), {"tasks": count})
    before = among(out)  # read again: tasks of another number may have begun in the same moment
    if before not in (None, count):
        raise UserError(
            f"{out} is being made by {before} tasks, not {count}: use --task I/{before}; "
            f"or, when none of them runs any more, delete {parts.shared(out)}, what is finished is kept"
        )


def among(out: pathlib.Path) -> int | None:
    """The number of tasks that share a folder; None if it is not shared."""
    if not parts.shared(out).exists():
        return None
    value = records.read_json(parts.shared(out))
    count = value.get("tasks") if isinstance(value, dict) else None
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{parts.shared(out)} is malformed: delete it and run again")
    return count


def make(
    folder: Folder[W],
    share: Share,
    build: Callable[[J], Part],
    jobs: Callable[[Plan[W]], Iterable[J]],
    summarise: Callable[[Kept], None],
    workers: int,
    progress: bool,
) -> records.Manifest | None:
    """As folder.make, of what this run is to make alone; None from a task, which makes no manifest.

    Raises:
        UserError: also where the folder is shared among another number of tasks, or cannot be merged.
    """
    if share.merge:
        return folder.finish(_verified(folder, workers, progress), summarise if progress else None)
    if share.count is None:
        return folder.make(build, jobs, summarise, workers, progress)
    folder.claim()
    mine = share.of(folder.files)
    pending = folder.pending(mine)
    if not pending and folder.is_finished(progress):
        return None
    claim(folder.out, share.count)
    folder.make_shards(pending, build, jobs, workers, progress)
    if progress:
        have = f"{len(mine) or 'none'} of the {len(folder.files)} {folder.pieces}{', complete' if mine else ''}"
        print(f"task {share}: {have}; when all {share.count} tasks are done: {command(folder, '--merge')}")
    return None


def _verified(folder: Folder[W], workers: int, progress: bool) -> dict[str, Part]:
    """All shards, each read as a whole and found to be what its task made.

    Raises:
        UserError: one is not, or is missing; there are others; or the folder was begun with other options, or not at all.
    """
    out, files = folder.out, folder.files
    if not folder.is_begun():
        first = command(folder, "--task", "I/N")
        raise UserError(f"nothing to merge in {out}: run every task first, `{first}` with I from 0 to N - 1")
    there = {name for name, _ in folders.entries(out) if name.endswith(".array_record")}
    if others := sorted(there - set(files)):
        raise UserError(f"{out} holds {len(others)} shards that are none of these records, {others[0]} first: delete them")
    folder.look()
    verified: dict[str, Part] = {}
    wrong: dict[str, str] = {}
    bar = pool.Progress(len(files), folder.units, folder.pieces)
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:  # reading and hashing release the interpreter's lock
        found = threads.map(folder.verify, files)
        for file, (part, what) in zip(files, found, strict=True):
            if part is None:
                wrong[file] = what
            else:
                verified[file] = part
            if progress:
                bar.add(part.shard.records if part else 0)
    if wrong:
        raise UserError(_refusal(folder, wrong))
    return verified


def _refusal(folder: Folder[W], wrong: dict[str, str]) -> str:
    """Which shards are not as they should be, why, and the command that makes them anew."""
    worst = sorted(wrong, key=lambda file: wrong[file] == parts.MISSING)  # damage is rarer, and worse
    shown = [f"{file} {wrong[file]}" for file in worst[:_SHOWN]]
    if more := len(wrong) - len(shown):
        shown.append(f"{more} more")
    count, line = among(folder.out), command(folder)
    bad = f"{len(wrong)} of {len(folder.files)} {folder.pieces} are missing or damaged ({', '.join(shown)})"
    what = f"{folder.out} cannot be merged, {bad}"
    if count is None:
        return f"{what}: make them with `{line}`"
    tasks = [number for number in range(count) if not wrong.keys().isdisjoint(Share(number, count).of(folder.files))]
    if len(tasks) == 1:
        return f"{what}: make them with `{line} --task {tasks[0]}/{count}`, then merge again"
    return f"{what}: make them with `{line} --task I/{count}` for I = {ranges(tasks)}, then merge again"


def command(folder: Folder[W], *more: str) -> str:
    """The command line of a folder, and more words of it."""
    given = folder.flags | {"out": folder.out}
    given |= {name: value for name, value in folder.options.items() if name not in given and name != "source"}
    words = ["python", "-m", f"data_prep.{folder.dataset}"]
    for name, value in given.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *more])


def ranges(numbers: Collection[int]) -> str:
    """Numbers as `sbatch --array` reads them: 0-2,5."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)
