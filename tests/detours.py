"""Runs that may end with other bits than the unbroken one, for tests/campaign.py, and what must hold instead.

Sums over other devices are taken in another order; where records are skipped, other examples stand in for theirs.
"""

import pathlib
import random
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from tests import runs
from tests.accidents import PATIENCE, STEPS, Accidents, newest
from tests.accidents_of_data import copy_of_records, images, spoil_record
from tests.test_processes import excess

DETOURS = ("on_two_devices", "in_one_process", "skipping")  # the names of methods
EVERY: Any = runs.OPERATOR["checkpoint.every"]
LEFT = STEPS - 2 * EVERY  # the step at which a run goes elsewhere; at the next checkpoint it comes back
BAD = (7, 333, 1500)  # images


class Detours:
    """`check(sound, what)` hears of all that must be so; `folder` has the unbroken runs of one process and of two."""

    def __init__(self, folder: pathlib.Path, check: Callable[[bool, str], None]):
        self.folder, self._check = folder, check

    def on_two_devices(self) -> str:
        """A run of one device goes on with two, and then with one again."""
        self._elsewhere(1, 1, 2)
        return "1 device -> 2 devices -> 1 device"

    def in_one_process(self) -> str:
        """A run of two processes with one device each goes on in one with one device, and then in two again."""
        self._elsewhere(2, 1, 1)
        return "2 processes -> 1 -> 2"

    def _elsewhere(self, processes: int, elsewhere: int, devices: int) -> None:
        """What is restored is the checkpoint, bit for bit; after five steps elsewhere the parameters are the unbroken run's but for
        what rounding can do. (Not after five more: absolute differences turn their signs, and rounding decides when.) Back where it
        was, the run is that of any other from the checkpoint it came back with."""
        unbroken, name = self.folder / f"unbroken-{processes}", f"elsewhere-{processes}"
        workdir = self.folder / name
        shutil.copytree(unbroken, workdir)
        for step in (LEFT + EVERY, STEPS):
            shutil.rmtree(workdir / "checkpoints" / str(step))
        run = self._leg(name, elsewhere, devices, kill=LEFT + EVERY + 1)
        self._compare(run, workdir, unbroken)
        shutil.copytree(workdir, self.folder / f"{name}-again")
        ends = [self._leg(one, processes, 1).workdir for one in (name, f"{name}-again")]
        both = [runs.arrays(end, STEPS) for end in ends], [(end / "metrics.jsonl").read_bytes() for end in ends]
        run.check(runs.same(*both[0]) and both[1][0] == both[1][1], "two runs from one checkpoint end differently")

    def _leg(self, name: str, processes: int, devices: int, kill: int | None = None) -> Accidents:
        """The run goes on to its next checkpoint, and is killed then, or ends; on so many devices each."""
        run, restored = self._accidents(name, processes), self.folder / f"{name}.npz"
        before = newest(run.workdir)
        saved, hooks = runs.arrays(run.workdir, before), [f"restored={restored}", *([f"kill={kill}"] if kill else [])]
        started = run.start(hooks=hooks if processes == 1 else (hooks, []), devices=devices)
        ended = [runs.end(process, PATIENCE) for process in started]
        run.check(ended[0].code == (-9 if kill else 0) and newest(run.workdir) == before + EVERY, f"{ended}")
        run.check_resumed(ended, before)
        with np.load(restored) as arrays:
            run.check(runs.same(dict(arrays), saved), f"other bits are restored than those of checkpoint {before}")
        return run

    def _compare(self, run: Accidents, workdir: pathlib.Path, unbroken: pathlib.Path) -> None:
        """The newest parameters with those of the unbroken run, by what rounding can do from LEFT on."""
        step = newest(workdir)
        rates = [
            line["train/learning_rate"] for line in runs.lines(unbroken) if line["step"] > LEFT - EVERY and "train/loss" in line
        ]
        how = {"step": step, "updates": step - LEFT, "travelled": (step - LEFT) * max(rates)}
        reference = runs.arrays(unbroken, step)
        away, earlier = (
            np.concatenate([share.ravel() for share in excess(arrays, reference, **how).values()])
            for arrays in (runs.arrays(workdir, step), runs.arrays(unbroken, step - EVERY))
        )
        run.check(0 < away.max() <= 1, f"parameters are {away.max():.2g} of what rounding can do away, after {step - LEFT} steps")
        run.check(np.mean(earlier > 1) > 0.9, "the bound says nothing: five updates do not break it")

    def skipping(self) -> str:
        """With records that cannot be read, to be skipped: a run that is killed ends as one that is not; all that was skipped is
        said and counted."""
        records = copy_of_records(self.folder / "records-to-skip")
        for number in BAD:
            spoil_record(records, number)
        options = {"data__twin": "", "data__records": records, "data__unreadable": "skip"}
        whole, killed = (self._accidents(name, 1) for name in ("skipping", "skipping-killed"))
        half = STEPS // 2
        kill = f"kill={half + 1}"
        ways = ((whole, 0, [], 0), (killed, 0, [kill], -9), (killed, half, [], 0))
        for run, begin, hooks, code in ways:
            (ended,) = [runs.end(process, PATIENCE) for process in run.start(hooks=hooks, **options)]
            run.check_resumed([ended], begin)
            said = re.findall(r"^niso: skipped: \S+/train-\S+: record (\d+) is damaged", ended.err, re.M)
            run.check(ended.code == code and sorted(map(int, said)) == sorted(BAD), f"{ended}")
            counted = re.findall(r"data/skipped (\d+) ", ended.out)
            expected = sum(replaced(step) for step in range(begin + 1, STEPS + 1))
            run.check(code != 0 or int(counted[-1]) == expected > 0, f"{expected} examples to be counted, counted {counted}")
        sound = runs.same(runs.arrays(whole.workdir, STEPS), runs.arrays(killed.workdir, STEPS))
        lines = [(run.workdir / "metrics.jsonl").read_bytes() for run in (whole, killed)]
        self._check(sound and lines[0] == lines[1], "skipping: another end when killed on the way")
        return "records skipped"

    def _accidents(self, name: str, processes: int) -> Accidents:
        return Accidents(self.folder / name, processes, random.Random(0), self._check, lambda _: None)


def replaced(step: int) -> int:
    """The examples of the batch of a step in which something stands in for one of BAD."""
    image_BxS = np.reshape(images(step), (runs.OPERATOR["batch"], runs.OPERATOR["data.stack"]))  # type: ignore[arg-type]
    return int(np.isin(image_BxS, BAD).any(axis=1).sum())
