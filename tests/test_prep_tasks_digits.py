"""data_prep.mnist and data_prep.homnist by many tasks and merged: the bytes are those of one run; what is wrong is named."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from data_prep import homnist, mnist
from tests import test_mnist_prep
from tests.prep_runs import by_two_tasks, check_a_killed_run, contents, obey, refusal
from tests.test_homnist_prep import COPIES, STILL, write_mat
from tests.test_stills import digit, write_records


@dataclasses.dataclass(frozen=True)
class Case:
    """A preparation of a source that lies in `root`, and what one run leaves behind; the second of two tasks makes `victim`."""

    module: Any
    flag: str
    root: pathlib.Path
    victim: str
    options: dict[str, Any]
    unbroken: dict[str, bytes]

    def prepare(self, root: pathlib.Path, out: pathlib.Path, **more: Any) -> Any:
        return self.module.prepare(out=out, **{self.flag: root}, **self.options | more)

    def flags(self, out: pathlib.Path, *more: str) -> list[str]:
        """The same as arguments of its command line."""
        numbers = [word for name in ("copies", "shards") if name in self.options for word in (f"--{name}", str(self.options[name]))]
        return [f"--{self.flag}", str(self.root), "--out", str(out), *numbers, *more]


def digits(folder: pathlib.Path) -> pathlib.Path:
    """Records of MNIST, a few."""
    return pathlib.Path(write_records(folder, {"train": (9,), "test": (2, 4)}, 28, "mnist", digit, STILL))


SOURCES: dict[str, tuple[Any, str, Callable[[pathlib.Path], pathlib.Path], str, dict[str, Any]]] = {
    "mnist": (mnist, "root", test_mnist_prep.write_files, "test-00001-of-00003", {"verify": False, "shards": 3}),
    "homnist --mnist": (homnist, "mnist", digits, "test-00002-of-00003", {"copies": COPIES, "shards": 3}),
    "homnist --mat": (homnist, "mat", write_mat, "test-00002-of-00004", {"shards": 4}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        module, flag, write, victim, options = SOURCES[name]
        folder = tmp_path_factory.mktemp("two words")
        root = write(folder / "source.mat")
        case = Case(module, flag, root, f"{victim}.array_record", options | {"progress": False}, {})
        case.prepare(root, folder / "out")
        return dataclasses.replace(case, unbroken=contents(folder / "out"))

    return make


@pytest.fixture(params=SOURCES)
def case(request, made, monkeypatch) -> Case:
    """Its digits pass for those of MNIST, whose checksums the command line asks for."""
    case = made(request.param)
    if case.module is mnist:
        sums = {name: hashlib.sha256((case.root / name).read_bytes()).hexdigest() for name in mnist.SHA256}
        monkeypatch.setattr(mnist, "SHA256", sums)
    return case


@pytest.mark.parametrize("count", [1, 3, 8])
def test_tasks_in_any_order_and_a_merge_write_what_one_run_writes(case, tmp_path, count):
    for number in reversed(range(count)):
        assert case.prepare(case.root, tmp_path, task=f"{number}/{count}") is None
        assert not (tmp_path / "manifest.json").exists()
    assert case.prepare(case.root, tmp_path, merge=True).dataset == case.module.DATASET
    assert contents(tmp_path) == case.unbroken


def test_the_merge_that_a_task_prints(case, tmp_path, capsys):
    for number in range(2):
        assert case.module.main(case.flags(tmp_path, "--task", f"{number}/2")) == 0
        printed = capsys.readouterr().out
    assert printed.startswith("task 1/2: ") and "--size" not in printed and "None" not in printed
    obey(case.module, printed)
    assert contents(tmp_path) == case.unbroken


@pytest.mark.parametrize("damage", ["is missing", "its checksum is another", "bytes, it was made with"])
def test_what_is_wrong_is_named_with_the_command_that_mends_it(case, tmp_path, capsys, monkeypatch, damage):
    by_two_tasks(case.prepare, case.root, tmp_path)
    path, total = tmp_path / case.victim, len(list(tmp_path.glob("*.array_record")))
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if "checksum" in damage else content[:-10])
    if damage == "is missing":
        path.unlink()
    line = refusal(capsys, case.module.main, *case.flags(tmp_path, "--merge"))
    assert line.startswith(f"{tmp_path} cannot be merged, 1 of {total} shards are missing or damaged ({case.victim} ")
    assert damage in line and "--task 1/2`, then merge again" in line and not (tmp_path / "manifest.json").exists()
    built, build = [], case.module.build
    monkeypatch.setattr(case.module, "build", lambda job: built.append(job.file) or build(job))
    obey(case.module, line)
    assert built == [case.victim]
    assert case.module.main(case.flags(tmp_path, "--merge")) == 0 and contents(tmp_path) == case.unbroken


@pytest.mark.parametrize("name", ["mnist", "homnist --mnist"])
def test_a_killed_task_continues(made, name, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as in conftest.py: a last bit can round to another grey level
    case, out = made(name), tmp_path / "out"
    count = 2 if case.module is mnist else 1  # so that the task has three shards

    def again() -> None:
        for number in range(count):
            case.prepare(case.root, out, task=f"{number}/{count}")
        case.prepare(case.root, out, merge=True)

    given = {case.flag: str(case.root), "out": str(out), "task": f"0/{count}"}
    words = [f"{key}={value!r}" for key, value in (given | case.options).items() if key != "progress"]
    check_a_killed_run(case.module.__name__.partition(".")[2], ", ".join(words), out, again, case.unbroken)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "3/3"], "--task is 3/3, but tasks are counted from 0"),
        (["--task", "0/2", "--merge"], "--task and --merge are both set"),
        (["--merge"], "run every task first, `python -m data_prep."),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(case, tmp_path, capsys, more, words):
    assert words in refusal(capsys, case.module.main, *case.flags(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
