"""Data prepared by many tasks and merged: the bytes are those of one run; what is missing or damaged is named, with its remedy."""

import json
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from data_prep import co3d, image_shard, images, parts, tasks
from niso.data import datasets, records, stream
from niso.errors import UserError
from tests import co3d_tree, prep_runs
from tests.prep_runs import by_two_tasks, check_a_killed_run, contents, noisy_pictures, refusal

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 4
PICTURES = {"size": SIZE, "shards": 3, "test_fraction": 0.3, "crops": 2, "progress": False}
FLAGS = ["--size", str(SIZE), "--shards", "3", "--test_fraction", "0.3", "--crops", "2", "--workers", "1"]
VICTIM = "train-00002-of-00003.array_record"  # of six, the last of task 0/2


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    return noisy_pictures(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="module")
def unbroken(tree, tmp_path_factory) -> dict[str, bytes]:
    """What one run on the pictures leaves behind."""
    out = tmp_path_factory.mktemp("out") / "records"
    images.prepare(tree, out, **PICTURES)
    return contents(out)


@pytest.fixture(scope="module")
def two_tasks(tree, tmp_path_factory) -> pathlib.Path:
    """What two tasks leave behind before they are merged; not to be changed."""
    return by_two_tasks(images.prepare, tree, tmp_path_factory.mktemp("shared") / "records", **PICTURES)


@pytest.fixture
def out(two_tasks, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(two_tasks, tmp_path / "records"))


def run(tree, out, *more: str) -> int:
    return images.main(["--root", str(tree), "--out", str(out), *FLAGS, *more])


def refused(capsys, tree, out, *more: str) -> str:
    """The one line with which it is refused."""
    return refusal(capsys, images.main, "--root", str(tree), "--out", str(out), *FLAGS, *more)


def obey(line: str, task: int | None = None) -> None:
    """Runs the command in a message; where it is for several tasks, as one of them."""
    prep_runs.obey(images, line, "--workers", "1", task=task)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 11])
def test_tasks_in_any_order_and_a_merge_write_what_one_run_writes(tree, unbroken, tmp_path, count):
    numbers = list(range(count))
    random.Random(count).shuffle(numbers)
    for number in numbers:
        assert images.prepare(tree, tmp_path, task=f"{number}/{count}", **PICTURES) is None
        assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob("index-*"))
    merged = images.prepare(tree, tmp_path, merge=True, **PICTURES)
    assert merged == records.Manifest.read(tmp_path) and contents(tmp_path) == unbroken


def test_co3d_too_from_the_annotations_that_a_task_needs(tmp_path, monkeypatch):
    root = co3d_tree.make_tree(tmp_path / "co3d")
    more = co3d_tree.EVERYTHING | {"shards": None}
    monkeypatch.setattr(co3d, "_SEQUENCES_PER_SHARD", 2)
    co3d.prepare(root, tmp_path / "one", **more)
    read, read_frames = [], co3d.co3d_source.read_frames

    def noticed(root, category, names):
        read.append(category)
        return read_frames(root, category, names)

    monkeypatch.setattr(co3d.co3d_source, "read_frames", noticed)
    for number in range(3):
        co3d.prepare(root, tmp_path / "many", task=f"{number}/3", **more)
    # Four shards of training sequences, the first two of apples, and two of test sequences.
    assert read == ["apple", "bench", "apple", "bench"]
    co3d.prepare(root, tmp_path / "many", merge=True, **more)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_merge_that_co3d_prints_has_its_flags(tmp_path, capsys):
    root, out = co3d_tree.make_tree(tmp_path / "a tree"), tmp_path / "out"
    names = list(co3d.co3d_source.read_scores(root, ["apple"])["apple"])
    (tmp_path / "list.json").write_text(json.dumps({"train": {"apple": names[:4], "pear": ["x"]}, "test": {"bench": names[4:]}}))
    flags = ["--splits", str(tmp_path / "list.json"), "--categories", "bench", "apple", "--size", "16"]
    for number in range(2):
        words = ["--root", str(root), "--out", str(out), "--workers", "1", "--task", f"{number}/2"]
        assert co3d.main([*words, *flags]) == 0
        printed = capsys.readouterr().out
    assert co3d.main(shlex.split(printed.partition(" tasks are done: ")[2])[3:]) == 0
    assert "train: 4 sequences of 1 categories, 20 frames" in capsys.readouterr().out


def test_tasks_of_processes_at_once_and_the_merge_that_they_print(tree, unbroken, tmp_path):
    command = [sys.executable, "-m", "data_prep.images", "--root", str(tree), "--out", str(tmp_path), *FLAGS]
    # The last twice, as where a machine that was thought to be gone is not.
    calls = (["--task", "0/2", "--workers", "2"], ["--task", "1/2"], ["--task", "1/2"])
    processes = [
        subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for more in calls
    ]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert said[0][1].splitlines()[-1].startswith("3/3 shards, ")
    merges = [out.splitlines()[-1].partition(" tasks are done: ")[2] for out, _ in said]
    assert len(set(merges)) == 1 and [out.split(":")[0] for out, _ in said] == ["task 0/2", "task 1/2", "task 1/2"]
    words = shlex.split(merges[0])
    assert words[:2] == ["python", "-m"]
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, timeout=100, capture_output=True)
    assert contents(tmp_path) == unbroken


def test_a_killed_task_continues(tree, unbroken, tmp_path):
    out = tmp_path / "out"

    def again() -> None:
        for number in range(2):
            images.prepare(tree, out, task=f"{number}/2", **PICTURES)
        images.prepare(tree, out, merge=True, **PICTURES)

    arguments = f"{str(tree)!r}, {str(out)!r}, size={SIZE}, shards=3, test_fraction=0.3, crops=2, task='0/2'"
    check_a_killed_run("images", arguments, out, again, unbroken)


def test_one_run_may_end_what_tasks_began(tree, unbroken, tmp_path):
    images.prepare(tree, tmp_path, task="1/3", **PICTURES)
    images.prepare(tree, tmp_path, **PICTURES)
    assert contents(tmp_path) == unbroken


def test_a_task_and_a_merge_too_many_change_nothing(tree, unbroken, out, capsys):
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert run(tree, out, "--task", "0/2") == 0 and run(tree, out, "--merge") == 0
    capsys.readouterr()
    assert run(tree, out, "--task", "2/5") == 0
    assert capsys.readouterr().out == f"{out}: nothing to do, the records are complete\n"
    assert run(tree, out, "--merge") == 0
    assert "train: 5" in capsys.readouterr().out
    assert contents(out) == unbroken and {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")} == before


@pytest.mark.parametrize(("shards", "count"), [(7, 3), (3, 7), (1135, 100), (5, 1), (0, 2)])
def test_every_shard_is_of_one_task_and_they_have_equally_many(shards, count):
    dealt = [tasks.Share(number, count).of(range(shards)) for number in range(count)]
    assert [shard for share in dealt for shard in share] == list(range(shards))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_names_of_unfinished_files_are_never_the_same(tmp_path):
    """As those of the same process number on two machines were: every pod of Kubernetes has a process 1."""
    assert len({records.temporary(tmp_path / "options.json") for _ in range(9)}) == 9


# ---- what is missing or damaged --------------------------------------------------------------------------------------


def change_note(**changes):
    def change(out: pathlib.Path) -> None:
        note = out / "parts" / f"{VICTIM}.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | changes))

    return change


def change_shard(change):
    return lambda out: (out / VICTIM).write_bytes(change((out / VICTIM).read_bytes()))


def take_the_note_of_another(out: pathlib.Path) -> None:
    """And its shard, so that they fit each other."""
    other = VICTIM.replace("00002-", "00000-")
    shutil.copy(out / other, out / VICTIM)
    shutil.copy(out / "parts" / f"{other}.json", out / "parts" / f"{VICTIM}.json")


DAMAGES = {
    "no shard": (lambda out: (out / VICTIM).unlink(), "is missing"),
    "no note": (lambda out: (out / "parts" / f"{VICTIM}.json").unlink(), "is missing"),
    "truncated": (change_shard(lambda content: content[:-10]), r"has \d+ bytes, it was made with \d+"),
    "another of its size": (change_shard(lambda content: bytes([content[0] ^ 1]) + content[1:]), "its checksum is another"),
    "of other settings": (change_note(settings="0123456789abcdef"), "was made with other options"),
    "records": (change_note(sequences=[]), r"has a note on \d+ records of .* with sequences of 0"),
    "of another name": (take_the_note_of_another, r"has a note on \d+ records of train-00000"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_with_the_command_that_mends_it(tree, unbroken, out, capsys, monkeypatch, damage):
    do, words = DAMAGES[damage]
    do(out)
    line = refused(capsys, tree, out, "--merge")
    assert line.startswith(f"{out} cannot be merged, 1 of 6 shards are missing or damaged ({VICTIM} ")
    assert re.search(words, line) and "--task 0/2`, then merge again" in line and not (out / "manifest.json").exists()
    built, build = [], image_shard.build
    monkeypatch.setattr(image_shard, "build", lambda job: built.append(job.file) or build(job))
    obey(line)
    assert built == [VICTIM]
    assert run(tree, out, "--merge") == 0 and contents(out) == unbroken


def test_a_merge_before_all_are_done_names_the_tasks(tree, unbroken, tmp_path, capsys):
    images.prepare(tree, tmp_path, task="1/6", **PICTURES)
    images.prepare(tree, tmp_path, task="3/6", **PICTURES)
    line = refused(capsys, tree, tmp_path, "--merge")
    assert "4 of 6 shards are missing or damaged (train-00000-of-00003.array_record is missing, " in line
    assert ", 1 more)" in line and "--task I/6` for I = 0,2,4-5, then merge again" in line
    for number in (0, 2, 4, 5):
        obey(line, number)
    assert run(tree, tmp_path, "--merge") == 0 and contents(tmp_path) == unbroken


def test_a_damaged_folder_without_tasks_is_mended_by_one_run(tree, unbroken, out, capsys):
    assert run(tree, out, "--merge") == 0
    DAMAGES["another of its size"][0](out)
    line = refused(capsys, tree, out, "--merge")
    assert "--task" not in line
    obey(line)
    assert contents(out) == unbroken


def test_shards_of_other_records_are_named(tree, out, capsys):
    shutil.copy(out / VICTIM, out / "train-00002-of-00004.array_record")
    line = refused(capsys, tree, out, "--merge")
    assert line == f"{out} holds 1 shards that are none of these records, train-00002-of-00004.array_record first: delete them"


def test_a_disk_that_fails_is_no_damage(tree, out, capsys, monkeypatch):
    before = contents(out)

    def fail(path, count):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(records, "describe_shard", fail)
    assert "cannot be read (Input/output error)" in refused(capsys, tree, out, "--merge")
    assert contents(out) == before


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "5/5"], "--task is 5/5, but tasks are counted from 0: of 5 the last is 4/5"),
        (["--task", "x"], "--task is 'x', it must be I/N"),
        (["--task", "/100"], "--task is '/100', it must be I/N"),  # the variable is not set
        (["--task", "0/0"], "--task is '0/0', it must be I/N"),
        (["--task=-1/5"], "--task is '-1/5', it must be I/N"),
        (["--task", "0/2", "--merge"], "--task and --merge are both set: run every task first"),
        (["--merge"], "run every task first, `python -m data_prep.images --root"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(tree, tmp_path, capsys, more, words):
    assert words in refused(capsys, tree, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_other_settings_than_the_tasks_had_are_refused(tree, two_tasks, capsys):
    before = contents(two_tasks)
    for more in (["--merge"], ["--task", "0/2"]):
        line = refused(capsys, tree, two_tasks, *more, "--crops", "3")
        assert "crops 2 then, 3 now" in line and "another --out" in line
    assert contents(two_tasks) == before


def test_another_number_of_tasks_is_refused_until_the_first_is_given_up(tree, unbroken, tmp_path, capsys):
    assert run(tree, tmp_path, "--task", "0/3") == 0
    line = refused(capsys, tree, tmp_path, "--task", "1/2")
    assert f"{tmp_path} is being made by 3 tasks, not 2: use --task I/3" in line
    pathlib.Path(re.findall(r"delete (\S+),", line)[0]).unlink()
    assert run(tree, tmp_path, "--task", "1/2") == 0 and run(tree, tmp_path, "--task", "0/2") == 0
    assert run(tree, tmp_path, "--merge") == 0 and contents(tmp_path) == unbroken


@pytest.mark.parametrize(("file", "other"), [("options.json", {"size": 99}), ("tasks.json", {"tasks": 7})])
def test_two_that_begin_at_once_with_other_settings_notice(tree, tmp_path, monkeypatch, file, other):
    """The one that looks and sees nothing, writes, and finds that another has done so, too."""
    write = records.write_json

    def late(path, value):
        write(path, value | other if pathlib.Path(path).name == file else value)

    monkeypatch.setattr(records, "write_json", late)
    with pytest.raises(UserError, match="size 99 then, 4 now" if file == "options.json" else "by 7 tasks, not 2"):
        images.prepare(tree, tmp_path, task="0/2", **PICTURES)
    assert not list(tmp_path.glob("*.array_record"))


def test_training_on_shards_that_are_not_merged_says_so(tree, out):
    def check() -> None:
        stream.check_records(out, "images", datasets.find("images"), SIZE)

    with pytest.raises(UserError, match="are not merged yet: run the command of their tasks with --merge") as caught:
        check()
    assert "\n" not in str(caught.value)
    images.prepare(tree, out, merge=True, **PICTURES)
    check()
    assert not parts.shared(out).exists()


def test_numbers_are_told_as_slurm_reads_them():
    assert [tasks.ranges(numbers) for numbers in ([3], [5, 0, 1, 2], range(4), [1, 3])] == ["3", "0-2,5", "0-3", "1,3"]


def test_notes_of_earlier_versions_are_believed(tree, unbroken, out, monkeypatch):
    """They do not say under which settings; the folder does."""
    for note in out.glob("parts/*.array_record.json"):
        content = json.loads(note.read_text())
        del content["settings"]
        note.write_text(json.dumps(content))
    monkeypatch.setattr(image_shard, "build", None)
    images.prepare(tree, out, task="1/2", **PICTURES)
    images.prepare(tree, out, merge=True, **PICTURES)
    assert all(contents(out)[name] == unbroken[name] for name in unbroken if "parts" not in name)
