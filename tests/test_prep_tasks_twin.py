"""data_prep.synthetic_co3d by many tasks and merged: the tree is that of one run; what is missing or damaged is named."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from data_prep import synthetic_co3d, twin, twin_folder
from tests.prep_runs import by_two_tasks, contents, obey, refusal

ROOT = pathlib.Path(__file__).parents[1]
SEQUENCES = [sequence.folder for sequence in twin.plan(twin.SIZES["tiny"], 0)]
VICTIM = SEQUENCES[4]  # of six, the second of task 1/2
LAST = "category_to_subset_name_list.json"
generate = functools.partial(synthetic_co3d.generate, size="tiny", progress=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """What one run leaves behind."""
    out = tmp_path_factory.mktemp("one")
    generate(out)
    return contents(out)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory) -> pathlib.Path:
    """What two tasks leave behind before they are merged; not to be changed."""
    return by_two_tasks(lambda _, out, **more: generate(out, **more), pathlib.Path(), tmp_path_factory.mktemp("two") / "a twin")


@pytest.fixture
def out(two_tasks, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(two_tasks, tmp_path / "a twin"))


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The sequences that tasks make in this process."""
    made, build = [], synthetic_co3d.build
    monkeypatch.setattr(synthetic_co3d, "build", lambda out, sequence: made.append(sequence.folder) or build(out, sequence))
    return made


def flags(out: pathlib.Path, *more: str) -> list[str]:
    return ["--out", str(out), "--size", "tiny", *more]


def refused(capsys, out: pathlib.Path, *more: str) -> str:
    """The one line with which it is refused."""
    return refusal(capsys, synthetic_co3d.main, *flags(out, *more))


def picture(out: pathlib.Path) -> pathlib.Path:
    """One of VICTIM."""
    return sorted((out / VICTIM / "images").iterdir())[3]


# ---- the same tree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 11])
def test_tasks_in_any_order_and_a_merge_write_what_one_run_writes(unbroken, tmp_path, count):
    for number in reversed(range(count)):
        generate(tmp_path, task=f"{number}/{count}")
        assert not list(tmp_path.rglob("*.jgz")) and not (tmp_path / LAST).exists()
    generate(tmp_path, merge=True)
    assert contents(tmp_path) == unbroken and not (tmp_path / "parts").exists()


def test_tasks_of_processes_at_once_and_the_merge_that_they_print(unbroken, tmp_path):
    out = tmp_path / "two words"
    command = [sys.executable, "-m", "data_prep.synthetic_co3d", *flags(out)]
    # The last twice, as where a machine that was thought to be gone is not.
    calls = (["--task", "0/2", "--workers", "2"], ["--task", "1/2"], ["--task", "1/2"])
    processes = [
        subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for more in calls
    ]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert said[0][1].splitlines()[-1].startswith("3/3 sequences, ")
    assert said[1][0].startswith("task 1/2: 3 of the 6 sequences, complete; when all 2 tasks are done: python -m ")
    obey(synthetic_co3d, said[1][0])
    assert contents(out) == unbroken


def test_two_that_write_the_same_picture_do_not_meet(tmp_path, monkeypatch):
    replace = pathlib.Path.replace

    def late(scratch: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        monkeypatch.undo()
        twin_folder.write(target, b"whole")
        return replace(scratch, target)

    monkeypatch.setattr(pathlib.Path, "replace", late)
    twin_folder.write(tmp_path / "1.jpg", b"whole")
    assert contents(tmp_path) == {"1.jpg": b"whole"}


def test_a_killed_task_keeps_what_is_finished_and_makes_the_rest_again(unbroken, out, built, monkeypatch):
    shutil.rmtree(out / "parts" / "crate")
    shutil.rmtree(out / "crate")
    render, rendered = synthetic_co3d.render, []

    def killed(*arguments: Any) -> Any:
        if len(rendered) == 20:
            raise KeyboardInterrupt
        rendered.append(arguments)
        return render(*arguments)

    monkeypatch.setattr(synthetic_co3d, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(out, task="1/2")
    monkeypatch.setattr(synthetic_co3d, "render", render)
    half = picture(out)
    half.write_bytes(b"")  # as after a loss of power
    half.with_name(f".{half.name}.tmp-0123456789abcdef").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for folder in SEQUENCES[:4] for path in (out / folder).rglob("*.jpg")}
    assert built == SEQUENCES[3:5] and len(before) > 50
    generate(out, task="1/2")
    assert built[2:] == SEQUENCES[4:] and {path: path.stat().st_mtime_ns for path in before} == before
    generate(out, merge=True)
    assert contents(out) == unbroken


def test_a_merge_that_is_killed_in_the_end_is_ended(unbroken, out, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(twin_folder.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        generate(out, merge=True)
    assert (out / LAST).exists() and (out / "parts").exists()
    assert synthetic_co3d.main(flags(out, "--merge")) == 0
    assert capsys.readouterr().out == f"{out}: nothing to do, the twin is complete\n" and contents(out) == unbroken


def test_one_run_may_end_what_tasks_began_and_tasks_what_one_run_began(unbroken, tmp_path, built):
    generate(tmp_path / "tasks", task="1/3")
    generate(tmp_path / "tasks")
    assert contents(tmp_path / "tasks") == unbroken and built == [*SEQUENCES[2:4], *SEQUENCES[:2], *SEQUENCES[4:]]
    generate(tmp_path / "run")
    (tmp_path / "run" / LAST).unlink()  # annotations of a category are there before all is made
    for more in ({"task": "0/2"}, {"task": "1/2"}, {"merge": True}):
        generate(tmp_path / "run", **more)
    assert contents(tmp_path / "run") == unbroken


def test_a_task_and_a_merge_too_many_change_nothing(unbroken, out, capsys, built):
    assert synthetic_co3d.main(flags(out, "--merge")) == 0
    assert capsys.readouterr().out.startswith("stilllife: 3 sequences, 4")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for more in (["--merge"], ["--task", "2/5"]):
        assert synthetic_co3d.main(flags(out, *more)) == 0
        assert capsys.readouterr().out == f"{out}: nothing to do, the twin is complete\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before and built == []


# ---- what is missing, damaged or a mistake ---------------------------------------------------------------------------


def note(out: pathlib.Path) -> pathlib.Path:
    return out / "parts" / f"{VICTIM}.json"


def change(what: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], object]:
    return lambda out: picture(out).write_bytes(what(picture(out).read_bytes()))


def swap(out: pathlib.Path) -> None:
    """Two pictures, so that all bytes of the sequence are there."""
    first, second = sorted((out / VICTIM / "images").iterdir())[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "no sequence": (lambda out: shutil.rmtree(out / VICTIM), "is missing"),
    "no note": (lambda out: note(out).unlink(), "is missing"),
    "no picture": (lambda out: picture(out).unlink(), "bytes, it was made with"),
    "truncated": (change(lambda content: content[:-10]), "bytes, it was made with"),
    "another of its size": (
        change(lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]),
        "its checksum is another",
    ),
    "exchanged": (swap, "its checksum is another"),
    "of other settings": (lambda out: edit(out, settings="0123456789abcdef"), "was made with other options"),
    "counts": (lambda out: edit(out, sequences=[]), "with sequences of 0"),
    "of another": (lambda out: shutil.copy(out / "parts" / f"{SEQUENCES[0]}.json", note(out)), "bytes, it was made with"),
}


def edit(out: pathlib.Path, **changes: object) -> None:
    note(out).write_text(json.dumps(json.loads(note(out).read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_with_the_command_that_mends_it(unbroken, out, capsys, built, damage):
    do, words = DAMAGES[damage]
    do(out)
    line = refused(capsys, out, "--merge")
    assert line.startswith(f"{out} cannot be merged, 1 of 6 sequences are missing or damaged ({VICTIM} ")
    assert words in line and "--task 1/2`, then merge again" in line
    assert not list(out.rglob("*.jgz")) and not (out / LAST).exists()
    obey(synthetic_co3d, line)
    assert built == [VICTIM]
    generate(out, merge=True)
    assert contents(out) == unbroken


def test_a_disk_that_fails_is_no_damage(out, capsys, monkeypatch):
    before = contents(out)

    def fail(out: pathlib.Path, sequence: twin.Sequence) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(twin_folder, "describe", fail)
    assert f"{SEQUENCES[0]} cannot be read (Input/output error)" in refused(capsys, out, "--merge")
    assert contents(out) == before


@pytest.mark.parametrize("given_up", [False, True])
def test_one_run_mends_what_a_merge_has_found_damaged(unbroken, out, capsys, built, given_up):
    DAMAGES["another of its size"][0](out)
    assert "its checksum is another" in refused(capsys, out, "--merge")
    if given_up:
        (out / "parts" / "tasks.json").unlink()
    generate(out)
    assert contents(out) == unbroken and built == [VICTIM]


def test_a_merge_before_all_are_done_names_the_tasks(unbroken, tmp_path, capsys):
    generate(tmp_path, task="1/6")
    generate(tmp_path, task="3/6")
    line = refused(capsys, tmp_path, "--merge")
    assert f"4 of 6 sequences are missing or damaged ({SEQUENCES[0]} is missing, " in line and ", 1 more)" in line
    assert "--task I/6` for I = 0,2,4-5, then merge again" in line
    for number in (0, 2, 4, 5):
        obey(synthetic_co3d, line, task=number)
    generate(tmp_path, merge=True)
    assert contents(tmp_path) == unbroken


def test_a_picture_that_went_after_the_merge_is_named_with_the_command_that_makes_it(unbroken, out, capsys):
    generate(out, merge=True)
    gone = picture(out)
    gone.unlink()
    for more in (["--merge"], ["--task", "0/2"]):
        line = refused(capsys, out, *more)
        assert line.startswith(f"{gone} has gone from a twin that was complete: make it again with `")
    obey(synthetic_co3d, line)
    assert contents(out) == unbroken


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "1/3"], "is being made by 2 tasks, not 3: use --task I/2"),
        (["--task", "2/2"], "--task is 2/2, but tasks are counted from 0"),
        (["--task", "0/2", "--merge"], "--task and --merge are both set"),
        (["--task", "0/2", "--seed", "1"], "'seed': 1, 'version': 1}: choose another folder"),
        (["--merge", "--seed", "1"], "'seed': 1, 'version': 1}: choose another folder"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(out, capsys, more, words):
    note(out).unlink()  # so that there is something to do
    before = contents(out)
    assert words in refused(capsys, out, *more)
    assert contents(out) == before


def test_nothing_to_merge_is_one_line_and_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "out"
    line = refused(capsys, out, "--merge")
    first = f"python -m data_prep.synthetic_co3d --out {out} --size tiny --seed 0 --task I/N"
    assert line == f"nothing to merge in {out}: run every task first, `{first}` with I from 0 to N - 1" and not out.exists()


@pytest.mark.parametrize("more", [[], ["--task", "0/2"]])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, more):
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path}/file/out/twin.json: Not a directory" in refused(capsys, tmp_path / "file/out", *more)
