"""What can happen to a run of one process or of two, for tests/campaign.py: each accident starts the run and ends it again."""

import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from niso.checkpoint import UNREADABLE
from tests import runs

STEPS: Any = runs.OPERATOR["steps"]
PATIENCE = 300  # seconds for what ends by itself
SURVIVORS = 5.0  # seconds in which a process whose peer was killed has to end
KILL, LEAVE = "killed", "told to leave"
# The names of methods, for runs of one process and of two; besides kills and orders to leave, which come in numbers.
OTHERS = {1: ("damage", "lose_config", "fill", "tear", "leave_and_kill")}
OTHERS[2] = (*OTHERS[1], "pause", "kill_all")
Happened = tuple[str, str]  # (KILL, LEAVE or "" for neither, what happened; "" if the run was over before)


class Accidents:
    """Those of one run; `check(sound, what)` hears of all that must be so, `survived` how long the other of two lived on."""

    def __init__(
        self, workdir: pathlib.Path, processes: int, draw: random.Random, check: Callable[[bool, str], None],
        survived: Callable[[float], None],
    ):  # fmt: skip
        self.workdir, self.processes, self.draw = workdir, processes, draw
        self._check, self.survived = check, survived
        self.changed = False

    @property
    def ready(self) -> bool:
        """Whether there are checkpoints to damage, and steps left."""
        return len(saved(self.workdir)) > 1 and newest(self.workdir) < STEPS - 20

    def sudden(self, kind: str) -> Happened:
        """Starts the run and ends it at a random moment: at its start, before its first step, in a save, or after one."""
        before, moment = newest(self.workdir), self.draw.choice(["saving", "saving", "between saves", "starting"])
        started = self.start_until(moment if kind == KILL else self.draw.choice(["saving", "between saves"]))
        victim = self.draw.choice(started)
        running = all(process.poll() is None for process in started)
        begun = time.monotonic()
        victim.kill() if kind == KILL else victim.send_signal(signal.SIGTERM)
        others = [runs.end(process, PATIENCE) for process in started if process is not victim]
        took = time.monotonic() - begun
        ended = [runs.end(victim, PATIENCE), *others]
        self.check_resumed(ended, before)
        if not running:
            return "", ""
        if kind == KILL:
            if others:
                self.survived(took)
            self.check(took < SURVIVORS and all(one.code == 1 for one in others), f"{took:.1f} s after a kill: {ended}")
            return KILL, f"{KILL}, {moment}"
        if any(one.code != 0 for one in ended):  # asked after the last step, it is done
            said = re.search(r"asked to leave: step (\d+) is saved", "".join(one.out for one in ended))
            sound = said is not None and int(said[1]) == newest(self.workdir) and {one.code for one in ended} == {42}
            self.check(sound, f"told to leave: {ended}, newest is {newest(self.workdir)}")
            return LEAVE, LEAVE
        return "", ""

    def damage(self) -> Happened:
        """Bits of the newest checkpoint's numbers change: the run goes on from the one before."""
        return self._without_newest(runs.spoil, "newest checkpoint damaged, then killed")

    def lose_config(self) -> Happened:
        """The newest checkpoint's config is gone."""
        return self._without_newest(lambda path: (path / "meta/metadata").write_bytes(b""), "its config empty, then killed")

    def _without_newest(self, spoil: Callable[[pathlib.Path], object], what: str) -> Happened:
        """The run goes on from the one before, and is killed once it has saved again."""
        *_, sound, damaged = saved(self.workdir)
        spoil(self.workdir / "checkpoints" / str(damaged))
        started = self.start()
        self.wait(
            started, lambda: (self.workdir / UNREADABLE / str(damaged)).exists() and newest(self.workdir) > damaged, PATIENCE
        )  # fmt: skip
        ended = self.end_all(started)
        line = f"niso: checkpoint {damaged} cannot be used ("
        self.check(line in ended[0].err and f"going on from {sound}" in ended[0].err, f"{what} {damaged}: {ended}")
        shutil.rmtree(self.workdir / UNREADABLE, ignore_errors=True)
        return KILL, what

    def fill(self) -> Happened:
        """The disk is full when the next but one checkpoint is written: exit code 2 and one line; what was saved stays."""
        before = newest(self.workdir)
        size = runs.largest(self.workdir / "checkpoints" / str(before)).stat().st_size // 2
        hook = [f"full={before + 6}:{size}"]
        ended = [runs.end(process, PATIENCE) for process in self.start(hooks=hook if self.processes == 1 else (hook, []))]
        sound = {one.code for one in ended} == {2} and ended[0].err.startswith("niso: cannot write ")
        self.check(sound and newest(self.workdir) >= before, f"full disk: {ended}")
        return "", "disk full"

    def tear(self) -> Happened:
        """The last line of metrics.jsonl is half there, and the newest event file is cut off, as by a power failure."""
        with (self.workdir / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 11')
        events = max(self.workdir.glob("events.out.tfevents.*"), key=lambda path: path.name)
        events.write_bytes(events.read_bytes()[:-7])
        return "", "half a line in metrics.jsonl"

    def leave_and_kill(self) -> Happened:
        """Told to leave, and killed before or while it does."""
        before, started = newest(self.workdir), self.start_until("between saves")
        running = all(process.poll() is None for process in started)
        started[0].send_signal(signal.SIGTERM)
        self.wait(started, lambda: False, self.draw.uniform(0, 0.3))
        self.check_resumed(self.end_all(started), before)
        return (KILL, "told to leave, then killed") if running else ("", "")

    def pause(self) -> Happened:
        """One of two processes is stopped for a few seconds; both go on, and are killed after their next save."""
        before, started = newest(self.workdir), self.start_until("between saves")
        started[1].send_signal(signal.SIGSTOP)
        time.sleep(3)
        running, saved_before = all(process.poll() is None for process in started), newest(self.workdir)
        started[1].send_signal(signal.SIGCONT)
        self.wait(started, lambda: newest(self.workdir) > saved_before, PATIENCE)
        self.check(newest(self.workdir) > saved_before, f"stopped for a while: nothing is saved after step {saved_before}")
        self.check_resumed(self.end_all(started), before)
        return (KILL, "stopped for 3 s, then killed") if running else ("", "")

    def kill_all(self) -> Happened:
        """All processes at once, in a save."""
        before, started = newest(self.workdir), self.start_until("saving")
        running = all(process.poll() is None for process in started)
        self.check_resumed(self.end_all(started), before)
        return (KILL, "both killed, saving") if running else ("", "")

    def finish(self) -> None:
        """The rest of the run, which nothing happens to."""
        before = newest(self.workdir)
        ended = [runs.end(process, PATIENCE) for process in self.start()]
        self.check({one.code for one in ended} == {0}, f"{ended}")
        if before < STEPS:
            self.check_resumed(ended, before)

    def check(self, sound: bool, what: str) -> None:
        self._check(sound, f"{self.workdir.name}: {what}")

    def check_resumed(self, ended: list[runs.Ended], before: int) -> None:
        """Where it came so far as to say where it goes on, that is from the newest checkpoint there was."""
        said = re.search(r"; (?:resuming at|from) step (\d+)", "".join(one.out for one in ended))
        self.check(said is None or int(said[1]) == before, f"went on from {said and said[1]}, not from {before}")

    def start(self, changed: bool = False, **options: Any) -> list[subprocess.Popen]:
        """The processes of the run; `changed`: from now on under a config that may be another than that of the checkpoint."""
        self.changed |= changed
        accept = ("--accept_config_changes",) * self.changed
        options = {"config": "toric_laplacian", "devices": 1} | options
        if self.processes == 1:
            return [runs.start(self.workdir, *accept, **options)]
        return runs.start_pair(self.workdir, arguments=accept, **options)

    def start_until(self, moment: str) -> list[subprocess.Popen]:
        """The processes of the run at that moment, or at their end if that comes first."""
        config, begun = self.workdir / "config.json", time.time_ns()
        started = self.start()
        if moment == "starting":
            # One of two that is killed before they have met is waited for, a minute long.
            if self.processes == 2 or self.draw.random() < 0.5:
                self.wait(started, lambda: config.exists() and config.stat().st_mtime_ns > begun, PATIENCE)
            self.wait(started, lambda: False, self.draw.uniform(0, 4))
            return started
        seen: set[str] = set()
        saves = self.draw.randint(1, 4)

        def temporary() -> bool:
            names = [path.name for path in (self.workdir / "checkpoints").glob("*") if not path.name.isdigit() and new(path)]
            seen.update(names)
            return len(seen) >= saves and bool(names)

        def new(path: pathlib.Path) -> bool:  # not what was left when a process was killed
            try:
                return path.stat().st_mtime_ns > begun
            except FileNotFoundError:
                return False

        self.wait(started, temporary, PATIENCE)
        if moment == "between saves":
            self.wait(started, lambda: False, self.draw.uniform(0, 0.3))
        return started

    def wait(self, started: list[subprocess.Popen], until: Callable[[], bool], seconds: float) -> None:
        """Until that holds, so many seconds are over, or a process has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until() and all(process.poll() is None for process in started):
            time.sleep(0.002)

    def end_all(self, started: list[subprocess.Popen]) -> list[runs.Ended]:
        for process in started:
            process.kill()
        return [runs.end(process, PATIENCE) for process in started]


def saved(workdir: pathlib.Path) -> list[int]:
    return runs.steps(workdir) if (workdir / "checkpoints").is_dir() else []


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max(saved(workdir), default=0)
