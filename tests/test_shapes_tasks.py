"""data_prep.shapes by many tasks and merged: records, report and manifest are those of one run; what is wrong is named."""

import json
import pathlib
import random
import re
import shlex
import shutil

import pytest

from data_prep import parts, shape_shard, shapes
from niso.data import datasets, records, stream
from tests.prep_runs import by_two_tasks, check_a_killed_run, contents, refusal
from tests.shape_trees import CLASSES, EVERYTHING, SIZE, pebble, write_npz, write_tree
from tests.toy_records import message

FLAGS = ["--size", str(SIZE), "--train", "2", "--test", "1", "--shards", "3", "--workers", "1"]
VICTIM = "train-00002-of-00003.array_record"  # of six, the last of task 0/2


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    """With one training mesh that is left out: it is open."""
    root = write_tree(tmp_path_factory.mktemp("meshes"))
    chosen = shapes.choose(shapes.find(root, "folder", None), 2, 1, 0)["train"]
    vertex, face = pebble("egg", 0)
    write_npz(root / next(mesh.file for mesh in chosen if mesh.category == "egg"), vertex, face[1:])
    return root


@pytest.fixture(scope="module")
def unbroken(tree, tmp_path_factory) -> dict[str, bytes]:
    """What one run leaves behind."""
    out = tmp_path_factory.mktemp("out") / "records"
    shapes.prepare(tree, out, **EVERYTHING)
    return contents(out)


@pytest.fixture(scope="module")
def two_tasks(tree, tmp_path_factory) -> pathlib.Path:
    """What two tasks leave behind before they are merged; not to be changed."""
    return by_two_tasks(shapes.prepare, tree, tmp_path_factory.mktemp("shared") / "records", **EVERYTHING)


@pytest.fixture
def out(two_tasks, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(two_tasks, tmp_path / "records"))


def refused(capsys, tree, out, *more: str) -> str:
    """The one line with which it is refused."""
    return refusal(capsys, shapes.main, "--root", str(tree), "--out", str(out), *FLAGS, *more)


def obey(command: str) -> None:
    """Runs a command that was printed."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "data_prep.shapes"] and shapes.main([*words[3:], "--workers", "1"]) == 0


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 11])
def test_tasks_in_any_order_and_a_merge_write_what_one_run_writes(tree, unbroken, tmp_path, monkeypatch, count):
    numbers, written, write = list(range(count)), [], records.Manifest.write
    monkeypatch.setattr(records.Manifest, "write", lambda manifest, out: written.append(manifest) or write(manifest, out))
    random.Random(count).shuffle(numbers)
    for number in numbers:
        assert shapes.prepare(tree, tmp_path, task=f"{number}/{count}", **EVERYTHING) is None
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".array_record"} == {"parts"}
    merged = shapes.prepare(tree, tmp_path, merge=True, **EVERYTHING)
    assert merged == records.Manifest.read(tmp_path) and contents(tmp_path) == unbroken
    assert written == [merged] and set(merged.facts["classes"]) == set(CLASSES)  # once, as a whole
    reports = [json.loads(line) for line in unbroken["report.jsonl"].splitlines()]
    assert [report["accepted"] for report in reports].count(False) == 1 and len(reports) == 9
    assert [report["split"] for report in reports] == 6 * ["train"] + 3 * ["test"]
    assert merged.left_out == {"meshes that cannot be mapped": 1}


def test_a_killed_task_continues(tree, unbroken, tmp_path):
    out = tmp_path / "out"

    def again() -> None:
        for number in range(2):
            shapes.prepare(tree, out, task=f"{number}/2", **EVERYTHING)
        shapes.prepare(tree, out, merge=True, **EVERYTHING)

    arguments = f"{str(tree)!r}, {str(out)!r}, size={SIZE}, train=2, test=1, shards=3, task='0/2'"
    check_a_killed_run("shapes", arguments, out, again, unbroken)


def test_one_run_may_end_what_tasks_began(tree, unbroken, tmp_path):
    shapes.prepare(tree, tmp_path, task="1/3", **EVERYTHING)
    shapes.prepare(tree, tmp_path, **EVERYTHING)
    assert contents(tmp_path) == unbroken


def test_the_merge_that_a_task_prints_has_its_flags(tmp_path, capsys):
    root = write_tree(tmp_path / "a tree")
    for n in range(4):
        write_npz(root / "two words" / f"{n}.npz", *pebble("egg", n))
    given = ["--root", str(root), "--out", str(tmp_path / "out"), *FLAGS, "--split_seed", "3", "--without_maps", "--task", "0/1"]
    assert shapes.main([*given, "--exclude", "two words", *CLASSES[1:]]) == 0
    command = capsys.readouterr().out.partition(" tasks are done: ")[2]
    assert "--exclude 'two words' egg stone --without_maps" in command and "None" not in command
    obey(command)
    told = capsys.readouterr().out
    assert "train: 2 meshes of 1 classes" in told and "accepted: 3 of 3 meshes" in told


def test_a_merge_without_facts_is_not_complete(tree, unbroken, out, capsys):
    """As a run of an earlier version, which was killed in the end, left a folder behind."""
    shapes.prepare(tree, out, merge=True, **EVERYTHING)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"facts": {}}))
    shapes.prepare(tree, out, task="0/2", **EVERYTHING | {"progress": True})
    told = capsys.readouterr().out
    assert "nothing to do" not in told
    obey(told.partition(" tasks are done: ")[2])
    assert contents(out) == unbroken


def test_notes_of_earlier_versions_are_believed(tree, unbroken, out, monkeypatch):
    """The reports of their shards are files beside them."""
    for note in out.glob("parts/*.array_record.json"):
        content = json.loads(note.read_text())
        lines = [json.dumps(report) + "\n" for report in content.pop("reports")]
        note.with_suffix(".jsonl").write_text("".join(lines))
        note.write_text(json.dumps(content))
    monkeypatch.setattr(shape_shard, "build", None)
    shapes.prepare(tree, out, task="1/2", **EVERYTHING)
    shapes.prepare(tree, out, merge=True, **EVERYTHING)
    assert all(contents(out)[name] == unbroken[name] for name in unbroken if "parts" not in name)


# ---- what is missing, damaged or a mistake ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["is missing", "its checksum is another", r"has \d+ bytes, it was made with"])
def test_what_is_wrong_is_named_with_the_command_that_mends_it(tree, unbroken, out, capsys, monkeypatch, damage):
    content = (out / VICTIM).read_bytes()
    if damage == "is missing":
        (out / VICTIM).unlink()
    else:
        (out / VICTIM).write_bytes(bytes([content[0] ^ 1]) + content[1:] if "checksum" in damage else content[:-10])
    line = refused(capsys, tree, out, "--merge")
    assert line.startswith(f"{out} cannot be merged, 1 of 6 shards are missing or damaged ({VICTIM} ")
    assert re.search(damage, line) and "--task 0/2`, then merge again" in line and not (out / "manifest.json").exists()
    built, build = [], shape_shard.build
    monkeypatch.setattr(shape_shard, "build", lambda job: built.append(job.file) or build(job))
    obey(line.split("`")[1])
    assert built == [VICTIM]
    shapes.prepare(tree, out, merge=True, **EVERYTHING)
    assert contents(out) == unbroken


def test_a_merge_before_all_are_done_names_the_task(tree, tmp_path, capsys):
    shapes.prepare(tree, tmp_path, task="1/2", **EVERYTHING)
    line = refused(capsys, tree, tmp_path, "--merge")
    assert "3 of 6 shards are missing or damaged (train-00000-of-00003.array_record is missing, " in line
    assert "--task 0/2`, then merge again" in line and not (tmp_path / "report.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "1/3"], "is being made by 2 tasks, not 3: use --task I/2"),
        (["--task", "2/2"], "--task is 2/2, but tasks are counted from 0"),
        (["--task", "0/2", "--merge"], "--task and --merge are both set"),
        (["--task", "0/2", "--split_seed", "1"], "split_seed 0 then, 1 now"),
        (["--merge", "--exclude", "egg"], "others are excluded"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(tree, out, capsys, more, words):
    (out / VICTIM).unlink()  # so that there is something to do
    before = contents(out)
    assert words in refused(capsys, tree, out, *more)
    assert contents(out) == before


def test_meshes_that_only_one_task_sees_are_noticed(tree, two_tasks, tmp_path, capsys):
    """Splits and classes would not be the same."""
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "cup").mkdir()
    for n in range(3):
        write_npz(other / "cup" / f"{n}.npz", *pebble("egg", n))
    assert f"{other} has other meshes or Möbius maps than then" in refused(capsys, other, two_tasks, "--task", "1/2")


def test_nothing_to_merge_is_one_line_and_leaves_no_folder(tree, tmp_path, capsys):
    line = refused(capsys, tree, tmp_path / "out", "--merge")
    assert f"run every task first, `python -m data_prep.shapes --root {tree}" in line and not (tmp_path / "out").exists()


def test_training_on_shards_that_are_not_merged_says_so(tree, out):
    def check() -> None:
        stream.check_records(out, "shapes", datasets.find("shapes"), SIZE)

    assert "are not merged yet: run the command of their tasks with --merge" in message(check)
    shapes.prepare(tree, out, merge=True, **EVERYTHING)
    check()
    assert not parts.shared(out).exists()
