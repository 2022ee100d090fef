"""A process that reads data is killed, as by a machine without memory: one line, and a run that can go on."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from absl import flags

from niso.data import batches, pipeline
from niso.errors import LostError
from tests import runs
from tests.test_survival_peers import FAILED, HOST, SLEEP, ends, members
from tests.toy_records import TEST, TRAIN, data, write_records


def test_it_is_named_with_a_remedy(tmp_path) -> None:
    root = write_records(tmp_path / "records", {"train": TRAIN, "test": TEST})
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for its own; main parses them
    dataset = pipeline.open_dataset(data(root, workers=2, prefetch=2))
    with dataset.train_batches(batch=2, seed=0, start=0, steps=10_000, rows=slice(None)) as stream:
        next(stream)
        victim = batches._workers()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LostError) as caught:
            for _ in range(100):
                next(stream)
    line = str(caught.value)
    assert line.startswith(f"worker process {victim} (signal 9) on {HOST}, which reads data, was killed while step ")
    assert "short of memory: lower data.workers" in line and "\n" not in line
    assert batches._workers() == []


def test_the_other_processes_end_as_when_starting_again_may_help() -> None:
    lost = "time.sleep(0.3); from niso.errors import LostError; raise LostError('worker killed')"
    with members(SLEEP, lost) as both:
        (code, said), _ = ends(both, 10)
    assert (code, said) == (1, FAILED.format(1, 2, HOST))


def worker_of(process: int) -> int | None:
    """A process that multiprocessing spawned for that one, other than its tracker of resources."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and b"spawn_main" in (path / "cmdline").read_bytes():
                return int(path.name)
        except (OSError, ValueError):
            continue
    return None


def test_it_ends_when_the_one_that_it_reads_for_is_killed(tmp_path) -> None:
    """Its memory would stay taken, and the pipes of its standard output open."""
    root = write_records(tmp_path / "records", {"train": TRAIN, "test": TEST})
    command = [sys.executable, "-c", "from tests import test_worker_killed; test_worker_killed.read_on()", root]
    started = subprocess.Popen(command, cwd=runs.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "reading\n"
    assert worker_of(started.pid) is not None
    started.kill()
    assert runs.end(started, 20).code == -signal.SIGKILL  # once all that could write have ended


def read_on() -> None:
    """Has a worker process read ahead in the records that the command line names."""
    flags.FLAGS.mark_as_parsed()
    stream = pipeline.open_dataset(data(sys.argv[1], workers=1, prefetch=2))
    with stream.train_batches(batch=2, seed=0, start=0, steps=10_000, rows=slice(None)) as batches_:
        next(batches_)
        print("reading", flush=True)
        time.sleep(100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_ends_with_one_line_and_goes_on(tmp_path) -> None:
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    options: dict[str, Any] = {"data__workers": 1, "steps": 60, "log__evaluate_every": 60, "log__figures_every": 60}
    assert runs.end(runs.start(unbroken, **options), 300).code == 0
    started = runs.start(workdir, **options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (workdir / "checkpoints" / "5").exists():
        time.sleep(0.005)
    victim = worker_of(started.pid)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    ended = runs.end(started, 300)
    assert ended.code == 1, ended
    assert ended.err.startswith(f"niso: worker process {victim} (signal 9) on {HOST}") and ended.err.count("\n") == 1, ended.err
    assert runs.steps(workdir)[-1] < 60
    ended = runs.end(runs.start(workdir, **options), 300)
    assert ended.code == 0 and "resuming at step" in ended.out, ended
    assert runs.same(runs.arrays(workdir, 60), runs.arrays(unbroken, 60))
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
