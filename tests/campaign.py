"""Accidents in great number: `nice python -m tests.campaign --minutes=30 --kills=100 --terms=20` prints a table at the end.

Runs of one process and of two, some side by side, are killed (SIGKILL) at random moments, many of them in the midst of saving,
told to leave (SIGTERM), stopped for a while, given damaged files and records, a full disk, a loss that is not finite, and
readers of data that are killed or stuck; and started again until they are done. Each must end with the bytes of a run that nothing
happened to: parameters, optimiser state, metrics.jsonl. At the end runs go on with other devices and processes, and with records
skipped (tests/detours.py).
The exit code is 1 if anything was wrong, or if not all has happened that was asked for.
"""

import argparse
import collections
import contextlib
import itertools
import math
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from tests import runs
from tests.accidents import KILL, LEAVE, PATIENCE, STEPS, newest
from tests.accidents_of_data import OTHERS, AccidentsOfData
from tests.detours import DETOURS, Detours

SHARE = 0.22  # of the kills and of the orders to leave, those of runs of two processes, which take twice as long
COUNTED = (KILL, LEAVE)


class Campaign:
    """What has happened so far, in `folder`, and what is still to happen: so many kills and orders to leave, and each other
    accident once to a run of one process and once to one of two; then the detours, each once."""

    def __init__(self, folder: pathlib.Path, kills: int, terms: int, seconds: float, seed: int, jobs: int = 1):
        self.folder, self.seed, self.jobs = folder, seed, jobs
        self.deadline = time.monotonic() + seconds
        pairs = {KILL: math.ceil(SHARE * kills), LEAVE: math.ceil(SHARE * terms)}
        self.wanted = {(what, 2): pairs[what] for what in COUNTED}
        self.wanted |= {(what, 1): total - pairs[what] for what, total in zip(COUNTED, (kills, terms), strict=True)}
        self.others = {processes: list(OTHERS[processes]) for processes in (1, 2)}  # those still to come
        self.detours = list(DETOURS)  # the same
        self.counted: collections.Counter[tuple[str, int]] = collections.Counter()  # kills and orders to leave, of any kind
        self.count: collections.Counter[tuple[str, int]] = collections.Counter()  # of everything, as in the table
        self.seconds: collections.Counter[tuple[str, int]] = collections.Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0  # seconds from the death of a process to the end of the other
        self.lock, self.numbers = threading.Lock(), itertools.count()

    def run(self) -> None:
        """Runs of one process and of two, `jobs` at a time, until all has happened or time is over; and then the detours."""
        runs.folder()  # once, before there are threads
        unbroken = [lambda n=n: self._guarded(self._unbroken, n) for n in (1, 2)]
        for some in [unbroken] if self.jobs > 1 else [[one] for one in unbroken]:
            self._side_by_side(some)
        # The first job takes runs of two processes as long as there is something to happen to those.
        self._side_by_side([lambda first=job == 0: self._work(2 if first else 1) for job in range(self.jobs)])
        self._side_by_side([self._go_elsewhere] * self.jobs)

    def _side_by_side(self, jobs: list[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, preferred: int) -> None:
        while not self._over():
            processes = preferred if self.open(preferred) else 3 - preferred
            if not self.open(processes):
                return
            with self.lock:
                number = next(self.numbers)
            self._guarded(self._life, processes, number)

    def _go_elsewhere(self) -> None:
        while not self._over():
            with self.lock:
                if not self.detours:
                    return
                detour = self.detours.pop(0)
            self._guarded(self._detour, detour)

    def _detour(self, name: str) -> None:
        begun, processes = time.monotonic(), 2 if name == "in_one_process" else 1
        what = getattr(Detours(self.folder, self.check), name)()
        with self.lock:
            self.count[what, processes] += 1
            self.seconds[what, processes] += time.monotonic() - begun
            print(what, flush=True)

    def _guarded(self, act: Callable[..., None], *arguments: int | str) -> None:
        try:
            act(*arguments)
        except Exception as error:  # one life less; the others go on, and the end is not a success
            self.check(False, f"{act.__name__.strip('_')} {arguments}: {type(error).__name__}: {error}")

    def _unbroken(self, processes: int) -> None:
        with self.timed("unbroken", processes):
            self.accidents(processes, f"unbroken-{processes}", random.Random()).finish()

    def accidents(self, processes: int, name: str, draw: random.Random) -> AccidentsOfData:
        return AccidentsOfData(self.folder / name, processes, draw, self.check, self.survived)

    def _life(self, processes: int, number: int) -> None:
        """One run from its first step to its last, with accidents on the way."""
        name = f"run-{number}-of-{processes}"
        draw = random.Random(f"{self.seed} {number}")
        accidents = self.accidents(processes, name, draw)
        while self.open(processes) and not self._over() and newest(accidents.workdir) < STEPS:
            if kinds := [kind for kind in COUNTED if self.left(kind, processes) > 0]:
                weights = [self.left(kind, processes) for kind in kinds]
                self._happen(processes, draw.choices(kinds, weights)[0], accidents.sudden)
            else:
                self._happen(processes, "", accidents.sudden)  # for those that need checkpoints
            if accidents.ready and (other := self._next_other(processes)):
                self._happen(processes, "", getattr(accidents, other), other)
        with self.timed("rest of the run", processes):
            accidents.finish()
        unbroken = self.folder / f"unbroken-{processes}"
        same = runs.same(runs.arrays(accidents.workdir, STEPS), runs.arrays(unbroken, STEPS))
        self.check(same, f"{name}: other parameters or optimiser state than the unbroken run")
        lines = (accidents.workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
        self.check(lines, f"{name}: another metrics.jsonl than the unbroken run")
        with self.lock:
            self.count["ended with the same bytes" if same and lines else "ended with OTHER BYTES", processes] += 1
        if same and lines:
            shutil.rmtree(accidents.workdir)

    def _happen(self, processes: int, kind: str, act: Callable[..., tuple[str, str]], other: str = "") -> None:
        """Lets something happen and counts it; what could not happen, because the run was over before, comes again."""
        begun = time.monotonic()
        counts_as, what = act(kind or KILL) if not other else act()
        with self.lock:
            if not what:
                self.others[processes] += [other] * bool(other)
                return
            self.count[what, processes] += 1
            self.seconds[what, processes] += time.monotonic() - begun
            if counts_as:
                self.counted[counts_as, processes] += 1
            reached = ", ".join(f"{kind} {sum(self.counted[kind, n] for n in (1, 2))}" for kind in COUNTED)
            print(f"{reached}: {what} ({processes})", flush=True)

    def _next_other(self, processes: int) -> str:
        with self.lock:
            return self.others[processes].pop(0) if self.others[processes] else ""

    @contextlib.contextmanager
    def timed(self, what: str, processes: int) -> Iterator[None]:
        begun = time.monotonic()
        yield
        with self.lock:
            self.count[what, processes] += 1
            self.seconds[what, processes] += time.monotonic() - begun

    def left(self, kind: str, processes: int) -> int:
        return self.wanted[kind, processes] - self.counted[kind, processes]

    def open(self, processes: int) -> bool:
        """Whether something is still to happen to runs of so many processes."""
        return any(self.left(kind, processes) > 0 for kind in COUNTED) or bool(self.others[processes])

    def _over(self) -> bool:
        return time.monotonic() > self.deadline

    def survived(self, seconds: float) -> None:
        with self.lock:
            self.slowest = max(self.slowest, seconds)

    def check(self, sound: bool, what: str) -> None:
        if not sound:
            with self.lock:
                self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    def missing(self) -> list[str]:
        """What was asked for and has not happened."""
        found = [f"{self.left(*one)} x {one[0]} ({one[1]})" for one in self.wanted if self.left(*one) > 0]
        found += [f"{other} ({processes})" for processes, rest in self.others.items() for other in rest]
        found += self.detours
        ended = [n for n in (1, 2) if not self.count["ended with the same bytes", n]]
        return [*found, *(f"no run of {n} ended with the same bytes" for n in ended)]

    def table(self) -> str:
        """Accident x processes -> how often, and seconds each; then totals, what is missing, and what was wrong."""
        rows = [f"{'':44}{'of one process':>18}{'of two':>18}"]
        for what in sorted({what for what, _ in self.count}):
            cells = []
            for n in (1, 2):
                each = self.seconds[what, n] / max(1, self.count[what, n])
                cells.append(f"{self.count[what, n]:>8}" + (f"{each:>7.1f} s " if each else " " * 10))
            rows.append(f"{what:44}{''.join(cells)}")
        rows += [f"{f'all that were {kind}':44}{self.counted[kind, 1]:>8}{self.counted[kind, 2]:>18}" for kind in COUNTED]
        rows.append(f"{self.slowest:.1f} s at most from the kill of one process to the end of the other")
        rows.append(f"missing: {'; '.join(self.missing()) or 'nothing'}")
        return "\n".join([*rows, f"wrong: {len(self.wrong)}", *self.wrong])

    def result(self) -> int:
        """The exit code."""
        return 1 if self.wrong or self.missing() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=30, help=f"after which no accident is begun (the last may take {PATIENCE} s)"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="niso-campaign-") as folder:
        campaign = Campaign(pathlib.Path(folder), given.kills, given.terms, 60 * given.minutes, given.seed, given.jobs)
        campaign.run()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took, of_cores = (time.monotonic() - begun) / 60, (used.ru_utime + used.ru_stime) / 60
    print(f"{campaign.table()}\n{took:.1f} minutes, {of_cores:.1f} minutes of one core")
    return campaign.result()


if __name__ == "__main__":
    sys.exit(main())
