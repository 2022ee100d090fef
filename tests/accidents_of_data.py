"""What can happen to a run's data, readers and numbers, for tests/campaign.py, besides what can happen to any run."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
from typing import Any

from niso.data import pipeline, synthetic
from tests import accidents, runs, test_stills, toy_records
from tests.accidents import KILL, PATIENCE, Accidents, Happened, newest
from tests.test_worker_killed import worker_of

OTHERS = {
    n: (*names, "damage_record", "kill_worker", "stop_worker", "lose_finiteness") for n, names in accidents.OTHERS.items()
}  # fmt: skip
# Records read by threads or by a process, when they are needed: what changes no batch.
READ_LATE: dict[str, Any] = {"data__in_memory": False}
BY_WORKER: dict[str, Any] = READ_LATE | {"data__workers": 1}
STUCK = 2.0  # seconds for which a worker is stopped


class AccidentsOfData(Accidents):
    """Once they are over, the run goes on as if they had not been."""

    def damage_record(self) -> Happened:
        """One of a batch some steps ahead is damaged: it is named, and what was saved stays. Made whole again, it is read."""
        step, records = self.step_ahead(), copy_of_records(self.workdir.with_name(f"{self.workdir.name}-records"))
        number = next(n for n in images(step) if n and not any(n in images(s) for s in range(newest(self.workdir) + 1, step)))
        spoil_record(records, number)
        options: dict[str, Any] = READ_LATE | {"data__twin": "", "data__records": records, "changed": True}
        ended = [runs.end(process, PATIENCE) for process in self.start(**options)]
        told = re.search(rf"^niso: .*{records}/train-\S+: record {number} is damaged", "\n".join(one.err for one in ended), re.M)
        self.check_stopped(told is not None, step, f"record {number} damaged", ended)
        shutil.rmtree(records)
        copy_of_records(records)
        self.check_goes_on(self.start(**options))
        shutil.rmtree(records)
        return KILL, "record damaged, made whole, then killed"

    def lose_finiteness(self) -> Happened:
        """The loss of a step is not finite, because of one process: it is named with its batch, and what was saved stays."""
        step = self.step_ahead()
        hook = [f"nan={step}"]
        ended = [runs.end(process, PATIENCE) for process in self.start(hooks=hook if self.processes == 1 else ([], hook))]
        began = f"It began in step {step}, on {'; '.join(names(step)[:10])} and {len(names(step)) - 10} more\n"
        saved = (
            f" not finite in steps .*; nothing of them was saved, the newest checkpoint is step {step - 2}: .*{re.escape(began)}"
        )
        self.check_stopped(any(re.search(f"^niso: .*loss,.*{saved}", one.err) for one in ended), step, "loss not finite", ended)
        return "", "loss not finite"

    def kill_worker(self) -> Happened:
        """A process that reads data is killed: it is named, and the run ends as when starting again may help."""
        before = newest(self.workdir)
        started, victim = self.start_with_workers()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        ended = [runs.end(process, PATIENCE) for process in started]
        self.check_resumed(ended, before)
        if {one.code for one in ended} == {0}:
            return "", ""
        said = any(f"niso: worker process {victim} (signal 9) on " in one.err for one in ended)
        self.check(said and {one.code for one in ended} == {1}, f"worker process {victim} killed: {ended}")
        return "", "worker process killed"

    def stop_worker(self) -> Happened:
        """A process that reads data is stuck: it is named while it is. Then it goes on, and so does the run, which is killed."""
        before = newest(self.workdir)
        started, victim = self.start_with_workers(f"limit={STUCK / 4}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)
            time.sleep(STUCK)
            os.kill(victim, signal.SIGCONT)
        stuck = newest(self.workdir)
        self.wait(started, lambda: newest(self.workdir) > stuck, PATIENCE)
        running = all(process.poll() is None for process in started)
        ended = self.end_all(started)
        self.check_resumed(ended, before)
        said = "\n".join(one.err for one in ended)
        told = re.search(rf"^niso: no data yet for step \d+ after \d+ s, .* it waits for .*worker process {victim}\b", said, re.M)
        if not running and told is None:
            return "", ""
        self.check(told is not None and newest(self.workdir) > stuck, f"worker process {victim} stopped at {stuck}: {ended}")
        return KILL if running else "", "worker process stopped, then killed"

    def start_with_workers(self, *hooks: str) -> tuple[list[subprocess.Popen], int]:
        """The processes of the run, each with one that reads for it, after their first save; and the number of one reader."""
        before = newest(self.workdir)
        started = self.start(hooks=hooks if self.processes == 1 else (hooks, hooks), changed=True, **BY_WORKER)
        reading = self.draw.choice(started).pid
        found: list[int] = []  # the first is that of the training batches
        self.wait(started, lambda: (worker := worker_of(reading)) is not None and not found.append(worker), PATIENCE)
        self.wait(started, lambda: newest(self.workdir) > before, PATIENCE)
        self.check(bool(found), "no worker process")
        return started, found[0]

    def step_ahead(self) -> int:
        """The second step after the next checkpoint."""
        return newest(self.workdir) // 5 * 5 + 5 + 2

    def check_stopped(self, told: bool, step: int, what: str, ended: list[runs.Ended]) -> None:
        """As by something of the user's at that step, with that said."""
        sound = told and {one.code for one in ended} == {2} and newest(self.workdir) == step - 2
        self.check(sound, f"{what} in step {step}, newest is {newest(self.workdir)}: {ended}")

    def check_goes_on(self, started: list[subprocess.Popen]) -> None:
        """From the newest checkpoint to the next; then it is killed."""
        before = newest(self.workdir)
        self.wait(started, lambda: newest(self.workdir) > before, PATIENCE)
        ended = self.end_all(started)
        self.check(newest(self.workdir) > before, f"nothing is saved after step {before}: {ended}")
        self.check_resumed(ended, before)


def stream(records: str = "") -> Any:
    """The data of the runs, from those records or from the built-in twin."""
    keys = {key.removeprefix("data."): value for key, value in runs.OPERATOR.items() if key.startswith("data.")}
    return pipeline.open_dataset(test_stills.data(records, **keys | ({"twin": ""} if records else {})))


@functools.cache
def names(step: int) -> list[str]:
    """What the images of the batch of a step are called, in its order."""
    return stream().name_batch(batch=runs.OPERATOR["batch"], seed=0, n=step - 1)


def images(step: int) -> list[int]:
    """The numbers of these images, which are those of their records."""
    return [int(re.match(r"image (\d+) ", name)[1]) for name in names(step)]  # type: ignore[index]


def copy_of_records(folder: pathlib.Path) -> pathlib.Path:
    """The built-in twin's records, to be damaged."""
    return shutil.copytree(synthetic.ensure_twin(stream().data), folder)


def spoil_record(records: pathlib.Path, number: int) -> None:
    """One bit of a training image."""
    image_HxWxC = stream(str(records))._train.read_one(number)["image_HxWxC"]
    toy_records.flip(str(records), "train", image_HxWxC.tobytes())
