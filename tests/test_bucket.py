"""Records, checkpoints, logs and figures in a bucket: a run there is the run in a folder, whatever happens on the way.

Against an emulator on this machine; no bucket of the real thing was at hand.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import fsspec
import numpy as np
import pytest
import requests
from fsspec.callbacks import Callback
from gcsfs.retry import HttpError

import niso
from launch import newest
from niso import checkpoint, checkpoint_files, event_writer, folders, mirror, rows, run_files, warm_start
from niso.checkpoint import UNREADABLE, Checkpoints
from niso.data import records
from niso.data.schemas import FRAME
from niso.errors import LostError, RecordError, UserError
from niso.mirror import Mirror
from niso.telemetry import Telemetry
from tests import runs
from tests.bucket import FAULT
from tests.launching import shell
from tests.test_bad_input import one_line
from tests.test_resume import assert_as_unbroken
from tests.test_telemetry import read_as_tensorboard, scalars

Shard = tuple[str, Callable[[Callable[[bytes], bytes]], str]]
# What the clients say of an emulator to which nobody has to log in.
SAID_WITHOUT_CREDENTIALS = "Could not find the credentials file"


def bucket() -> fsspec.AbstractFileSystem:
    """Its objects as they are now: other processes write them too."""
    found = fsspec.filesystem("gcs")
    found.invalidate_cache()
    return found


def fetch(url: str, folder: pathlib.Path) -> pathlib.Path:
    bucket().get(url, str(folder), recursive=True)
    return folder


def whole(url: str) -> list[int]:
    """Steps of the whole checkpoints of a run."""
    found = bucket().glob(f"{url}/checkpoints/*/commit_success.txt")
    return sorted(int(path.split("/")[-2]) for path in found)


@pytest.fixture(scope="module")
def records_url(bucket_url: str) -> str:
    bucket().put(runs.tiny_records(), f"{bucket_url}/records", recursive=True)
    return f"{bucket_url}/records"


@pytest.fixture(scope="module")
def finished(bucket_url: str, records_url: str) -> str:
    """A run that was killed twice, once while a checkpoint was nearly whole, and came to its end; with records in the bucket."""
    url = f"{bucket_url}/killed"
    for hook, code, saved in (("kill_commit=10", -9, [5]), ("term=13", 42, [5, 10, 13]), ("kill=15", -9, [5, 10, 13])):
        ended = runs.run(url, hooks=[hook], data__records=records_url)
        assert ended.code == code, (hook, ended.out, ended.err)
        assert [line for line in ended.err.splitlines() if SAID_WITHOUT_CREDENTIALS not in line] == []
        assert whole(url)[: len(saved)] == saved  # that of step 15 may have become whole, or not
    ended = runs.run(url, data__records=records_url)
    assert ended.code == 0, ended.err
    assert ended.out.endswith(f"done: figures in {url}/figures/step_00000016; tensorboard --logdir {url}\n")
    return url


def test_a_run_in_a_bucket_is_that_in_a_folder(finished: str, tmp_path: pathlib.Path) -> None:
    """Parameters and optimiser state bit for bit, metrics.jsonl and figures byte for byte; nothing of it stays on this machine."""
    here, there = runs.unbroken(), fetch(finished, tmp_path / "fetched")
    assert_as_unbroken(there, here)
    drawn = sorted(path.relative_to(here) for path in here.rglob("*.png"))
    assert drawn == sorted(path.relative_to(there) for path in there.rglob("*.png"))
    assert all((here / path).read_bytes() == (there / path).read_bytes() for path in drawn)
    assert (there / "config.json").exists() and (there / "hours.jsonl").read_text().count('"time/restarts": 3') >= 1


def test_tensorboard_reads_it_where_it_is(finished: str) -> None:
    """By its URL, and without what was logged of steps that were lost."""
    read = read_as_tensorboard(finished)
    assert [step for step, _ in scalars(read, "train/loss")] == [4, 8, 12, 16]
    assert set(read.Tags()["tensors"]) >= {"eval/loss", "time/steps_per_second", "operator"}


def test_what_reads_runs_reads_it_there(finished: str) -> None:
    run = run_files.read(finished)
    assert run.last["eval"][0] == runs.STEPS and run.hours is not None
    model, here = niso.load(finished), niso.load(runs.unbroken())
    frames_TxHxWxC = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert np.array_equal(model.encode(frames_TxHxWxC), here.encode(frames_TxHxWxC))
    assert checkpoint_files.find(finished, 13).name == "13"
    assert newest.step(finished) == newest.step(str(runs.unbroken())) == runs.STEPS
    assert newest.step(f"{finished}/none") == -1
    with pytest.raises(UserError, match=f"no checkpoint in {finished}x/checkpoints"):
        niso.load(f"{finished}x")


def test_a_run_starts_from_one_there(finished: str, records_url: str, bucket_url: str, tmp_path: pathlib.Path) -> None:
    """All parameters here: the first evaluation is the other's last."""
    ended = runs.run(f"{bucket_url}/second", steps=5, data__records=records_url, task__warm_start=((".*", finished),))
    assert ended.code == 0, ended.err
    first = runs.lines(fetch(f"{bucket_url}/second", tmp_path / "second"))[0]
    assert first["eval/loss"] == pytest.approx(runs.lines(runs.unbroken())[-1]["eval/loss"])


def test_two_processes(records_url: str, bucket_url: str, tmp_path: pathlib.Path) -> None:
    """Both write their parts of the checkpoints, the first alone the rest; where one is killed both go on from there."""
    url = f"{bucket_url}/pair"
    first, killed = (runs.end(process) for process in runs.start_pair(url, ((), ["kill=9"]), data__records=records_url))
    assert killed.code == -9 and first.code == 1, first
    ended = [runs.end(process) for process in runs.start_pair(url, data__records=records_url)]
    assert {one.code for one in ended} == {0}, ended
    assert len(bucket().glob(f"{url}/events.out.tfevents.*")) == 2
    alone = tmp_path / "alone"
    assert {one.code for one in runs.run_pair(alone)} == {0}
    assert_as_unbroken(fetch(url, tmp_path / "fetched"), alone)


def test_a_damaged_checkpoint_is_set_aside(finished: str, records_url: str, bucket_url: str, tmp_path: pathlib.Path) -> None:
    url = f"{bucket_url}/damaged-ABORTED"  # a word of outages
    bucket().cp(finished, url, recursive=True)
    bucket().rm(f"{url}/checkpoints/16", recursive=True)
    last = whole(url)[-1]
    for path in bucket().glob(f"{url}/checkpoints/{last}/state/**/d/*"):
        content = bytearray(bucket().cat_file(path))
        content[32::64] = (value ^ 16 for value in content[32::64])
        bucket().pipe_file(path, bytes(content))
    ended = runs.run(url, data__records=records_url)
    assert ended.code == 0, ended.err
    assert f"niso: checkpoint {last} cannot be used (" in ended.err and f"it goes to {url}/{UNREADABLE}" in ended.err
    assert bucket().exists(f"{url}/{UNREADABLE}/{last}/_CHECKPOINT_METADATA")
    assert_as_unbroken(fetch(url, tmp_path / "fetched"), runs.unbroken())


@pytest.fixture
def fault(bucket_url: str) -> Iterator[Callable[[str], None]]:
    """What makes requests fail, by "CODE PATTERN", until the test ends."""
    yield lambda what: bucket().pipe_file(f"{bucket_url}/{FAULT}", what.encode())
    bucket().rm(f"{bucket_url}/{FAULT}")


@pytest.mark.parametrize("part", ["meta", "state"])
def test_an_outage_is_no_damage(part: str, finished: str, records_url: str, bucket_url: str, fault: Callable[[str], None]) -> None:
    """Nothing is set aside, and launchers start again."""
    url = f"{bucket_url}/outage-{part}"
    bucket().cp(finished, url, recursive=True)
    bucket().rm(f"{url}/checkpoints/16", recursive=True)
    before = sorted(bucket().find(url))
    last = whole(url)[-1]
    fault(f"403 outage-{part}/checkpoints/{last}/{part}/")
    ended = runs.run(url, data__records=records_url)
    assert ended.code == 1 and f"niso: cannot read the checkpoint {url}/checkpoints/{last} (" in ended.err, ended
    assert "Traceback" not in ended.err
    assert sorted(bucket().find(url)) == before


def test_an_outage_while_damage_is_set_aside(
    finished: str, records_url: str, bucket_url: str, fault: Callable[[str], None]
) -> None:
    """Launchers start again; so they do after any answer of a bucket but that there is no permission."""
    url = f"{bucket_url}/aside"
    bucket().cp(finished, url, recursive=True)
    bucket().rm(f"{url}/checkpoints/16", recursive=True)
    last = whole(url)[-1]
    bucket().pipe_file(f"{url}/checkpoints/{last}/meta/metadata", b"")
    fault(f"400 aside/{UNREADABLE}")
    ended = runs.run(url, data__records=records_url)
    assert ended.code == 1, ended
    told = f"niso: cannot move {url}/checkpoints/{last} to {url}/{UNREADABLE}: "
    assert told in ended.err and ended.err.endswith("; run the same command again\n") and "Traceback" not in ended.err, ended


def test_reasons() -> None:
    """As gcsfs raises them."""
    assert folders.reason(requests.exceptions.ProxyError()) == "ProxyError"  # for 502
    assert folders.reason(fsspec.exceptions.FSTimeoutError()) == "no answer"
    assert folders.reason(OSError("Forbidden: path\nwords")) == "Forbidden: path words"
    anonymous = HttpError({"code": 401, "message": "Anonymous caller does not have storage.objects.get access"})
    for error, passing in (
        (HttpError({"code": 401}), True), (anonymous, False), (HttpError({"code": 403}), False), (HttpError({"code": 503}), True),
    ):  # fmt: skip
        assert folders.passing("gs://bucket/it", error) == passing
    assert str(folders.complaint("gs://bucket/it", anonymous, "cannot read it", "x")).endswith(f", 401; {folders.LOGIN}")
    for words, outage in (
        ("UNAVAILABLE: Error reading", True), ("Error reading \"gs://b/ABORTED/x\": it is short", False),
        ("at gs://b/ABORTED: it is short", False), ("HTTP response code: 400 with body", True), ("HTTP response code: 404", False),
        ("Bad Request: path\nthe server got an invalid response", True),
    ):  # fmt: skip
        assert checkpoint_files._unreachable(ValueError(words)) == outage, words


def test_what_cannot_be_read_is_one_line(finished: str, shard: Shard, fault: Callable[[str], None]) -> None:
    name, changed = shard
    root = changed(lambda data: data)
    reader = records.Reader(root, "train", FRAME)
    fault(f"403 {name}|killed/metrics|killed/config")
    with pytest.raises(LostError, match=f"cannot read .*{name}"):
        reader.read(name, [3])
    with pytest.raises(UserError, match=r"cannot read .*(config.json|metrics.jsonl): Forbidden"):
        run_files.read(finished)
    with pytest.raises(LostError, match=f"task.warm_start: cannot read {finished}/checkpoints"):
        fault("400 killed/checkpoints")
        warm_start.check_sources(((".*", finished),))
    fault("400 none/config.json")
    entry = dataclasses.replace(run_files.read(finished), config={"task": {"warm_start": [[".*", f"{finished}/none"]]}})
    with pytest.raises(LostError, match=f"cannot look for {finished}/none"):
        rows._encoder(entry)
    fault("403 manifest")
    with pytest.raises(UserError, match=r"cannot read .*manifest.json: Forbidden"):
        records.Manifest.read(root)


def told(*arguments: str) -> str:
    """The one line of a mistake."""
    command = [sys.executable, "-m", "niso.main", "--config=configs/pose_encode.py:quick", *arguments]
    ended = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    return one_line(ended.stderr)


def test_mistakes(bucket_url: str, records_url: str) -> None:
    assert "cannot write the run's folder gs://no-such-bucket/run: no such file or bucket" in told(
        "--workdir=gs://no-such-bucket/run"
    )
    line = told(f"--workdir={bucket_url}/mistake", "--config.data.twin=", f"--config.data.records={bucket_url}/none")
    assert f"no records in {bucket_url}/none: make them with" in line
    line = told(f"--workdir={bucket_url}/mistake", "--config.data.twin=", f"--config.data.records={records_url}")
    assert f"the records in {records_url} are 8 pixels wide" in line
    assert not bucket().exists(f"{bucket_url}/mistake")


@pytest.fixture
def shard(records_url: str, bucket_url: str, request: pytest.FixtureRequest) -> Shard:
    """A shard's name, and what puts a copy of the records with that shard changed into the bucket and names its folder."""
    name = "train-00000-of-00002.array_record"

    def changed(change: Callable[[bytes], bytes]) -> str:
        url = f"{bucket_url}/{request.node.name}"
        bucket().cp(records_url, url, recursive=True)
        bucket().pipe_file(f"{url}/{name}", change(bucket().cat_file(f"{url}/{name}")))
        bucket()
        return url

    return name, changed


def same(a: list[records.Example], b: list[records.Example]) -> bool:
    return len(a) == len(b) and all(map(runs.same, map(arrays, a), map(arrays, b)))


def arrays(example: records.Example) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in example.items()}


def test_single_records_are_read_and_damaged_ones_named(shard: Shard) -> None:
    name, changed = shard
    here = records.Reader(runs.tiny_records(), "train", FRAME)
    there = records.Reader(changed(lambda data: data), "train", FRAME)
    assert same(there.read(name, [3, 0, 8]), here.read(name, [3, 0, 8]))
    flipped = records.Reader(changed(lambda data: data[:100] + bytes([data[100] ^ 16]) + data[101:]), "train", FRAME)
    assert same(flipped.read(name, [3]), here.read(name, [3]))
    with pytest.raises(RecordError, match=r"record 0 is damaged \(.*Riegeli"):
        flipped.read(name, [0])
    cut = records.Reader(changed(lambda data: data[:-1]), "train", FRAME)
    with pytest.raises(UserError, match=rf"{name} is truncated or foreign"):
        cut.read(name, [3])


def test_a_bucket_that_cannot_be_reached_damages_nothing(shard: Shard) -> None:
    """Such an error is not that of a record, which may be skipped: the run ends so that it is begun again."""
    name, changed = shard
    reader = records.Reader(changed(lambda data: data), "train", FRAME)
    reader.read(name, [0])
    bucket().rm(f"{reader.root}/{name}")
    with pytest.raises(LostError, match=r"cannot read record 1 of .*run the same command again") as caught:
        reader.read(name, [1])
    assert not isinstance(caught.value, RecordError) and caught.value.code == 1


def test_the_mirror_copies_what_has_changed(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, url, copied = [0.0], f"{bucket_url}/mirror", []
    upload = folders.upload
    monkeypatch.setattr(folders, "upload", lambda a, b: (copied.append(a.name), upload(a, b)))
    bucket().pipe_file(f"{url}/old", b"before\n")
    kept = Mirror(url, ("old", "none"), clock=lambda: now[0])
    assert (kept.folder / "old").read_bytes() == b"before\n" and not (kept.folder / "none").exists()
    (kept.folder / "deep").mkdir()
    (kept.folder / "deep/new").write_bytes(b"1")
    kept.push()
    assert sorted(copied) == ["new", "old"] and bucket().cat_file(f"{url}/deep/new") == b"1"
    with open(kept.folder / "old", "ab") as file:
        file.write(b"after\n")
    kept.push_now_and_then()
    assert len(copied) == 2
    now[0] += mirror.EVERY
    kept.push_now_and_then()
    kept.push()
    assert copied[2:] == ["old"] and bucket().cat_file(f"{url}/old") == b"before\nafter\n"
    (kept.folder / "new").write_bytes(b"1")
    now[0] += mirror.EVERY
    with monkeypatch.context() as outage:  # which a checkpoint may never meet
        outage.setattr(folders, "upload", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        kept.push_now_and_then()
        concurrent.futures.wait((kept._copying,))
    kept.push()
    assert bucket().cat_file(f"{url}/new") == b"1"
    (kept.folder / "new").write_bytes(b"12")
    monkeypatch.setattr(folders, "upload", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LostError, match=f"cannot write {url}/new: No space left; run the same command again to resume"):
        kept.push()
    kept.close()
    assert not kept.folder.exists()


class Stalling:
    """Takes what is called "slow" little by little, and nothing of other files."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ended = threading.Event()

    def put_file(self, source: str, target: str, callback: Callback) -> None:
        self.asked.append(os.path.basename(source))
        if self.asked[-1] == "slow":
            for part in range(6):
                self.ended.wait(0.1)
                callback.absolute_update(part)
        else:
            self.ended.wait(20)


def test_a_bucket_that_says_nothing_ends_the_run(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and without holding the end of the program; one that is slow does not."""
    there = Stalling()
    kept = Mirror(f"{bucket_url}/silent", ())
    monkeypatch.setattr(folders, "LONGEST", 0.3)
    monkeypatch.setattr(folders, "_buckets", lambda: there)
    (kept.folder / "slow").write_bytes(b"1")
    kept.push()
    (kept.folder / "log").write_bytes(b"1")
    for _ in range(2):
        with pytest.raises(
            LostError, match=f"cannot write {bucket_url}/silent/log: no answer; run the same command again to resume"
        ):
            kept.push()
    assert there.asked == ["slow", "log"]
    kept.close()
    there.ended.set()


def test_an_error_does_not_wait_for_a_bucket_that_says_nothing(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For long; where there is no error the run does."""
    monkeypatch.setattr(checkpoint, "LONGEST_REMOTE", 0.2)
    checkpoints = Checkpoints(f"{bucket_url}/failing", keep=1)
    checkpoints._saving = 7
    silent, close = threading.Event(), checkpoints.manager.close
    monkeypatch.setattr(checkpoints.manager, "close", lambda: (silent.wait(20), close()))
    begun = time.monotonic()
    checkpoints.close(failed=True)
    assert time.monotonic() - begun < 5
    assert capsys.readouterr().err == "niso: checkpoint 7 was still being written 0 s after the error, and may be lost\n"
    silent.set()


def test_a_profile_of_any_process_reaches_the_bucket(bucket_url: str) -> None:
    url = f"{bucket_url}/profiled"
    with Telemetry(url, steps=99, batch=1, primary=False) as run:
        for step in range(1, 9):
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            run.tick(step)
        deadline = time.monotonic() + 30
        while not bucket().glob(f"{url}/plugins/profile/*/*.xplane.pb"):  # while the run goes on
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_beginning_that_fails_leaves_nothing(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, handler = [], signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda make=tempfile.mkdtemp, **o: made.append(make(**o)) or made[-1])
    monkeypatch.setattr(folders, "upload", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LostError, match="No space left"):
        Telemetry(f"{bucket_url}/begun", steps=9, batch=1)
    assert made and not os.path.exists(made[0]) and signal.getsignal(signal.SIGUSR1) is handler


def test_folders_that_are_left_go(bucket_url: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of processes that were killed; not those of others that run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = Mirror(f"{bucket_url}/one", ())
    mine = {tmp_path / "niso-run-of-mine", tmp_path / "niso-run-fifo"}
    (tmp_path / "niso-run-of-mine/checkpoints").mkdir(parents=True)
    os.mkfifo(tmp_path / "niso-run-fifo")
    program = f"import os; from niso.mirror import Mirror; Mirror('{bucket_url}/two', ()); os._exit(0)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=runs.REPOSITORY, env=environment, check=True)
    assert len(list(tmp_path.iterdir())) == len(mine) + 2
    second = Mirror(f"{bucket_url}/three", ())
    assert set(tmp_path.iterdir()) == {first.folder, second.folder} | mine
    assert not bucket().exists(f"{bucket_url}/one/{run_files.COPIED}")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    third = Mirror(f"{bucket_url}/four", ())  # no lock: nothing is taken for left
    assert set(tmp_path.iterdir()) == {first.folder, second.folder, third.folder} | mine
    for one in (first, second, third):
        one.close()
    assert set(tmp_path.iterdir()) == mine


def test_a_disk_without_space_for_the_copy(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Telemetry(f"{bucket_url}/full", steps=9, batch=1)
    run._writers[1].file._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write .*No space left on device. Free space or set TMPDIR to another folder"):
        run.scalars(1, {"loss": 1.0})
        run.flush()
    with contextlib.suppress(UserError):
        run.close()
    monkeypatch.setattr(tempfile, "tempdir", "/nosuchfolder")
    with pytest.raises(UserError, match=r"No such file or directory.: set TMPDIR to a folder with space for the run's logs"):
        Telemetry(f"{bucket_url}/full", steps=9, batch=1)


def test_restart_counts_anew_after_a_checkpoint_there(finished: str, tmp_path: pathlib.Path) -> None:
    """By the interpreter that the command names; where that cannot ask, this is said."""
    url, program = f"{finished}-restarted", tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom tests.test_bucket import bucket\n"
        f"bucket().pipe_file('{url}/checkpoints/5/commit_success.txt', b'')\nsys.exit(1)\n"
    )
    options = {"RETRIES": "1", "PYTHON": "", "PYTHONPATH": str(runs.REPOSITORY)}
    ended = runs.end(shell("launch/restart.sh", sys.executable, str(program), f"--workdir={url}", **options))
    assert ended.code == 1 and ended.err.count("retry 1 of 1") == 1 and "cannot ask" not in ended.err, ended
    ended = runs.end(shell("launch/restart.sh", "false", f"--workdir={url}", **options | {"PYTHON": "false", "RETRIES": "0"}))
    assert f"restart.sh: false cannot ask {url} for checkpoints" in ended.err


def test_a_folder_is_its_own_mirror(tmp_path: pathlib.Path) -> None:
    kept = Mirror(tmp_path, ())
    assert kept.folder == tmp_path
    kept.push()
    kept.close()
    assert tmp_path.exists()


def test_event_files_end_where_copying_them_would_be_much(tmp_path: pathlib.Path) -> None:
    """The next one goes on, and forgets nothing of those before it."""
    writer = event_writer.EventWriter(tmp_path, 0, limit=2_000)
    for step in range(100):
        writer.write_scalars(step, {"loss": step / 7})
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3 and all(path.stat().st_size < 2_200 for path in files)
    assert [step for step, _ in scalars(read_as_tensorboard(tmp_path), "loss")] == list(range(100))


def test_what_else_is_a_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="workdir s3://b/run is a URL of another kind than gs://: mount it"):
        folders.named("s3://b/run", "workdir")
    with pytest.raises(UserError, match=r"workdir gs:// names no bucket: write gs://BUCKET/FOLDER"):
        folders.named("gs://", "workdir")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"workdir gs://b/run is in a bucket.*pip install -e"):
        folders.named("gs://b/run", "workdir")
    assert os.fspath(folders.named("~/run")) == os.path.expanduser("~/run")
