"""Accidents, one after the other: `python -m tests.campaign --minutes=25 --kills=100 --terms=20` prints a table at the end.

Runs of one process and of two are killed (SIGKILL) at random moments and in the midst of saving, told to leave (SIGTERM), given
damaged checkpoints and a full disk, and started again with the same command until they are done. Each must end with the bytes
of a run that nothing happened to: parameters, optimiser state, metrics.jsonl.
"""

import argparse
import collections
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from niso.checkpoint import UNREADABLE
from tests import runs

STEPS: Any = runs.OPERATOR["steps"]
PATIENCE = 300  # seconds for what ends by itself
SURVIVORS = 5.0  # seconds in which a process whose peer was killed has to end
KILL, LEAVE = "killed", "told to leave"


class Campaign:
    """What has happened so far, in `folder`, and what is still to happen."""

    def __init__(self, folder: pathlib.Path, kills: int, terms: int, seconds: float, seed: int):
        self.folder, self.wanted, self.draw = folder, {KILL: kills, LEAVE: terms}, random.Random(seed)
        self.deadline = time.monotonic() + seconds
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0  # seconds from the death of a process to the end of the other

    def run(self) -> None:
        """Runs of one process and of two in turn, until all has happened or time is over."""
        for processes in (1, 2):
            self.finish(self.folder / f"unbroken-{processes}", processes)
        number, half = 0, -(-sum(self.wanted.values()) // 2)
        while any(self.left(kind) > 0 for kind in self.wanted) and time.monotonic() < self.deadline:
            self.life(self.folder / f"run-{number}", 1 + number % 2, half)
            number += 1

    def life(self, workdir: pathlib.Path, processes: int, most: int) -> None:
        """One run from its first step to its last, with accidents on the way, of which the random ones are no more than `most`."""
        special = [self.damage, self.fill]
        for _ in range(most):
            kinds = [kind for kind in self.wanted if self.left(kind) > 0]
            if not kinds or newest(workdir) == STEPS or time.monotonic() > self.deadline:
                break
            self.accident(workdir, processes, self.draw.choices(kinds, [self.left(kind) for kind in kinds])[0])
            if special and len(saved(workdir)) > 1 and newest(workdir) < STEPS - 20:
                self.happened(special.pop(0)(workdir, processes), processes)
        self.finish(workdir, processes)
        unbroken = self.folder / f"unbroken-{processes}"
        same = runs.same(runs.arrays(workdir, STEPS), runs.arrays(unbroken, STEPS))
        self.check(same, f"{workdir.name}: other parameters or optimiser state than the unbroken run")
        lines = (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
        self.check(lines, f"{workdir.name}: another metrics.jsonl than the unbroken run")
        self.happened("ended with the same bytes" if same and lines else "ended WRONG", processes)
        shutil.rmtree(workdir)

    def accident(self, workdir: pathlib.Path, processes: int, kind: str) -> None:
        """Starts the run and ends it at a random moment: in a save, shortly after one, or at any time."""
        before, started = newest(workdir), self.start(workdir, processes)
        # One of two that is killed before they have met is waited for, a minute long.
        alone = kind == KILL and processes == 1
        moment = self.draw.choice(["saving", "between saves", "starting"] if alone else ["saving", "between saves"])
        if moment == "starting":
            self.wait(started, lambda: False, self.draw.uniform(0, 8))
        else:
            seen: set[str] = set()
            saves = self.draw.randint(1, 5)

            def temporary() -> bool:
                names = [path.name for path in (workdir / "checkpoints").glob("*") if not path.name.isdigit()]
                seen.update(names)
                return len(seen) >= saves and bool(names)

            self.wait(started, temporary, PATIENCE)
            if moment == "between saves":
                self.wait(started, lambda: False, self.draw.uniform(0, 0.3))
        victim = self.draw.choice(started)
        running = all(process.poll() is None for process in started)
        begun = time.monotonic()
        victim.kill() if kind == KILL else victim.send_signal(signal.SIGTERM)
        others = [runs.end(process, PATIENCE) for process in started if process is not victim]
        took = time.monotonic() - begun
        ended = [runs.end(victim, PATIENCE), *others]
        self.check_resumed(ended, before)
        if not running:
            return
        if kind == KILL:
            self.slowest = max(self.slowest, took)
            self.check(took < SURVIVORS and all(one.code == 1 for one in others), f"{took:.1f} s after a kill: {ended}")
            self.happened(f"{KILL}, {moment}", processes)
        elif any(one.code != 0 for one in ended):  # asked after the last step, it is done
            said = re.search(r"asked to leave: step (\d+) is saved", "".join(one.out for one in ended))
            sound = said is not None and int(said[1]) == newest(workdir) and {one.code for one in ended} == {42}
            self.check(sound, f"told to leave: {ended}, newest is {newest(workdir)}")
            self.happened(LEAVE, processes)
        self.done[kind] += 1

    def damage(self, workdir: pathlib.Path, processes: int) -> str:
        """Bits of the newest checkpoint's numbers change: the run goes on from the one before, and is soon killed again."""
        *_, sound, damaged = saved(workdir)
        runs.spoil(workdir / "checkpoints" / str(damaged))
        started = self.start(workdir, processes)
        self.wait(started, lambda: (workdir / UNREADABLE / str(damaged)).exists() and newest(workdir) > damaged, PATIENCE)
        started[0].kill()
        ended = [runs.end(process, PATIENCE) for process in started]
        line = f"niso: checkpoint {damaged} cannot be used ("
        self.check(line in ended[0].err and f"going on from {sound}" in ended[0].err, f"damaged {damaged}: {ended}")
        shutil.rmtree(workdir / UNREADABLE, ignore_errors=True)
        return "newest checkpoint damaged"

    def fill(self, workdir: pathlib.Path, processes: int) -> str:
        """The disk is full when the next but one checkpoint is written: exit code 2 and one line; what was saved stays."""
        before = newest(workdir)
        size = runs.largest(workdir / "checkpoints" / str(before)).stat().st_size // 2
        hook = [f"full={before + 6}:{size}"]
        started = self.start(workdir, processes, hooks=hook if processes == 1 else (hook, []))
        ended = [runs.end(process, PATIENCE) for process in started]
        sound = {one.code for one in ended} == {2} and ended[0].err.startswith("niso: cannot write ")
        self.check(sound and newest(workdir) >= before, f"full disk: {ended}")
        return "disk full"

    def finish(self, workdir: pathlib.Path, processes: int) -> None:
        """The rest of the run, which nothing happens to."""
        before = newest(workdir)
        ended = [runs.end(process, PATIENCE) for process in self.start(workdir, processes)]
        self.check({one.code for one in ended} == {0}, f"{workdir.name}: {ended}")
        if before < STEPS:
            self.check_resumed(ended, before)

    def check_resumed(self, ended: list[runs.Ended], before: int) -> None:
        """Where it came so far as to say where it goes on, that is from the newest checkpoint there was."""
        said = re.search(r"; (?:resuming at|from) step (\d+)", "".join(one.out for one in ended))
        self.check(said is None or int(said[1]) == before, f"went on from {said and said[1]}, not from {before}")

    def start(self, workdir: pathlib.Path, processes: int, **options: Any) -> list[subprocess.Popen]:
        options |= {"config": "toric_laplacian", "devices": 1}
        return [runs.start(workdir, **options)] if processes == 1 else runs.start_pair(workdir, **options)

    def wait(self, started: list[subprocess.Popen], until: Any, seconds: float) -> None:
        """Until that holds, so many seconds are over, or a process has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until() and all(process.poll() is None for process in started):
            time.sleep(0.002)

    def left(self, kind: str) -> int:
        return self.wanted[kind] - self.done[kind]

    def happened(self, what: str, processes: int) -> None:
        self.done[f"{what} ({processes} process{'es' * (processes > 1)})"] += 1
        print(f"{KILL} {self.done[KILL]}, {LEAVE} {self.done[LEAVE]}: {what}", flush=True)

    def check(self, sound: bool, what: str) -> None:
        if not sound:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    def table(self) -> str:
        rows = [f"{count:>6}  {what}" for what, count in sorted(self.done.items())]
        rows.append(f"{self.slowest:>6.1f}  seconds at most from the kill of one process to the end of the other")
        return "\n".join([*rows, f"{len(self.wrong):>6}  wrong", *self.wrong])


def saved(workdir: pathlib.Path) -> list[int]:
    return runs.steps(workdir) if (workdir / "checkpoints").is_dir() else []


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max(saved(workdir), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="after which no accident is begun any more")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="niso-campaign-") as folder:
        campaign = Campaign(pathlib.Path(folder), given.kills, given.terms, 60 * given.minutes, given.seed)
        campaign.run()
    print(campaign.table())
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
