"""launch.sweep: the lines that it prints mean what the configs' sweep() says, and it runs them."""

import pathlib
import shlex
import signal
import sys

import pytest

from launch import sweep
from niso import config
from niso.errors import UserError
from tests import runs
from tests.launching import LAUNCH, ROOT, read_flags, shell, until

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*_*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("file", CONFIGS)
def test_sweep_lines_say_what_the_sweep_says(file: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sweep.main([f"--config={file}", "--print", "--config.log.every=7"]) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    module = sweep._load(pathlib.Path(file))
    entries = list(module.sweep())
    assert len(printed) == len(entries) and len({line[-1] for line in printed}) == len(entries)
    for line, entry in zip(printed, entries, strict=True):
        assert line[:3] == ["python", "-m", "niso.main"] and line[-1].startswith("--workdir=runs/")
        wanted = module.get_config(*filter(None, [entry.get("variant")]))
        wanted.update_from_flattened_dict(entry | {"log.every": 7})
        assert read_flags(line[3:]) == config.flat(wanted.to_dict())


def folders(file: str) -> list[str]:
    return [line[-1].removeprefix("--workdir=") for line in sweep.commands(str(ROOT / file))]


def test_sweeps_leave_runs_where_others_look_for_them() -> None:
    """pose_pred goes on from the runs of pose_encode's sweep."""
    made = folders("configs/pose_encode.py")
    wanted = [run for entry in sweep._load(ROOT / "configs/pose_pred.py").sweep() for _, run in entry["task.warm_start"]]
    assert set(wanted) <= set(made)
    assert "runs/toric_laplacian-paper-peak-0.002" in folders("configs/toric_laplacian.py")


def written(tmp_path: pathlib.Path, entries: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant='paper'): return ConfigDict({'experiment': 'own', 'variant': variant})\n"
        f"def sweep(): return {entries}\n"
    )
    return str(path)


def test_sweep_names(tmp_path) -> None:
    file = written(tmp_path, "[{'variant': 'small-a', 'seeds': 3}, {'name': 'x y/z', 'seed': 1}, {'widths': (1, 2)}]")
    lines = sweep.commands(f"{file}:fast", "root")
    assert [line[-1] for line in lines] == [
        f"--workdir=root/own-{name}" for name in ("small-a", "fast-name-x-y-z-1", "fast-widths-1-2")
    ]
    assert [line[:-1] for line in lines] == [
        [f"--config={file}:small-a", "--config.seeds=3"],
        [f"--config={file}:fast", "--config.name=x y/z", "--config.seed=1"],
        [f"--config={file}:fast", "--config.widths=(1, 2)"],
    ]
    starts = [{"task.warm_start": (("a", f"runs/{run}"),)} for run in "xy"]
    lines = sweep.commands(written(tmp_path, repr(starts)))
    assert [line[-1] for line in lines] == ["--workdir=runs/own-paper-from-x", "--workdir=runs/own-paper-from-y"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config=configs/nothing.py"], "no such file"),
        (["--config=configs/__init__.py"], "the file has no sweep()"),
        (["--config=configs/pose_encode.py", "--index=20"], "the sweep has 20 entries, from 0 to 19"),
        (["--config=configs/pose_encode.py", "--workdir=runs/a"], "--root=FOLDER"),
        (["--config=configs/pose_encode.py:none"], "none"),
    ],
)
def test_sweep_mistakes(arguments: list[str], line: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sweep.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.sweep: ") and said.count("\n") == 1 and line in said


def test_sweep_with_one_folder_twice(tmp_path) -> None:
    with pytest.raises(UserError, match="have one folder, own-paper: they differ in nothing"):
        sweep.commands(written(tmp_path, "[{'seeds': 3}, {'seeds': 5}]"))


@pytest.mark.parametrize(("codes", "result", "ran"), [((0, 0, 0), 0, 3), ((0, 2, 7), 2, 3), ((0, 42, 0), 42, 2)])
def test_sweep_runs_one_after_the_other(codes: tuple[int, ...], result: int, ran: int, tmp_path) -> None:
    """A run that fails does not keep the others from theirs; one that is asked to leave does."""
    file = written(tmp_path, "[{'seed': i} for i in range(3)]")
    body = f"open('{tmp_path}/ran', 'a').write('x\\n'); sys.exit({codes}[int(arguments[1][-1])])"
    stand_in(tmp_path, body)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = runs.end(shell(sys.executable, str(LAUNCH / "sweep.py"), f"--config={file}", cwd=tmp_path, **environment))
    assert ended.code == result, ended.err
    assert len((tmp_path / "ran").read_text().splitlines()) == ran


def stand_in(tmp_path: pathlib.Path, body: str) -> None:
    """A package niso whose main is the body; what else launch needs of niso is the real one's."""
    (tmp_path / "niso").mkdir()
    (tmp_path / "niso/__init__.py").write_text(f"__path__.append({str(ROOT / 'niso')!r})\n")
    (tmp_path / "niso/main.py").write_text(f"import sys, signal, time\narguments = sys.argv[1:]\n{body}\n")


def test_sweep_passes_the_signal_on(tmp_path) -> None:
    file = written(tmp_path, "[{'seed': i} for i in range(3)]")
    stand_in(
        tmp_path,
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\nopen('{tmp_path}/ran', 'a').write('x\\n')\n"
        "while True: time.sleep(0.05)",
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    whole = shell(sys.executable, str(LAUNCH / "sweep.py"), f"--config={file}", cwd=tmp_path, **environment)
    until(tmp_path / "ran")
    whole.send_signal(signal.SIGTERM)
    assert runs.end(whole, 20).code == 42
    assert (tmp_path / "ran").read_text() == "x\n"
