"""A user's mistake is one line on stderr that names the thing and the remedy, exit code 2, and leaves nothing behind that misleads.

Most of these run `niso.main.main` in this process, which is what `python -m niso.main` calls; the first test is the real thing.
"""

import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from absl import flags

from niso import main, train
from niso.data import records
from niso.errors import UserError
from tests import toy_records

REPOSITORY = pathlib.Path(__file__).parents[1]
QUICK = "--config=configs/pose_encode.py:quick"
# What the lines of test_mistakes repeat.
PINNED = [
    "--config.data.size=48", "--config.task.rank=32", "--config.task.alpha=0.5", "--config.batch=8",
    "--config.optimizer.warmup=100",
]  # fmt: skip
Tell = Callable[..., str]


@pytest.fixture
def tell(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Tell:
    """Calls main with a workdir of its own and returns the one line that it must answer with."""

    def call(*arguments: str, started: bool = False) -> str:
        forget_flags()
        workdir = tmp_path / "run"
        capfd.readouterr()
        assert main.main(["niso", f"--workdir={workdir}", *arguments]) == 2
        out, err = capfd.readouterr()
        if not started:  # a run that broke after its beginning may have said so
            assert out == ""
            assert not [path for path in workdir.rglob("*") if path.is_file()]
        assert not list(workdir.glob("checkpoints/*"))
        return one_line(err)

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("NISO_CACHE", str(tmp_path / "cache"))
    return call


def told_by_a_process(*arguments: str, devices: int = 1) -> str:
    """The same of `python -m niso.main`."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "niso.main", *arguments]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == ""
    return one_line(ended.stderr)


def forget_flags() -> None:
    """absl's flags are the process's, and ml-collections adds one for every override."""
    for name in list(flags.FLAGS):
        delattr(flags.FLAGS, name) if name.startswith("config.") else flags.FLAGS[name].unparse()


def one_line(err: str) -> str:
    assert err.startswith("niso: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err[len("niso: ") : -1]


def test_a_process_of_its_own(tmp_path: pathlib.Path) -> None:
    workdir = f"--workdir={tmp_path}/run"
    line = told_by_a_process(workdir, QUICK, "--config.task.rnak=8")
    assert line == "--config.task.rnak: the config has no such key; did you mean --config.task.rank?"
    line = told_by_a_process(workdir, QUICK, "--config.batch=6", devices=8)
    assert line == "batch=6 cannot be split over mesh.data=8 x optimizer.accumulate=1; choose a multiple of 8"
    line = told_by_a_process(workdir)
    assert "usage: python -m niso.main --config=configs/pose_encode.py:quick [--workdir=DIR]" in line


@pytest.mark.parametrize(
    "argument,wanted",
    [
        # names
        ("--config.task.rnak=8", "--config.task.rnak: the config has no such key; did you mean --config.task.rank?"),
        ("--config.tsak.rank=8", "--config.tsak.rank: the config has no such key; did you mean --config.task.rank?"),
        ("--config.mesh.qqq=8", "--config.mesh.qqq: the config has no such key; there are mesh.data, mesh.space, mesh.zero"),
        ("--config.task=8", "--config.task is a section: set its keys one by one"),
        ("--config.steps.x=8", "did you mean --config.steps?"),
        ("--noconfig.task.rmat", "--config.task.rmat: the config has no such key; did you mean --config.task.remat?"),
        ("--task.rank=8", "--task.rank: no such flag; did you mean --config.task.rank?"),
        ("--wrokdir=x", "--wrokdir: no such flag; did you mean --workdir?"),
        ("rank=8", "unknown argument 'rank=8'; usage: python -m niso.main --config="),
        # types
        ("--config.batch=abc", "flag --config.batch=abc: invalid literal for int() with base 10: 'abc' (a key keeps the type"),
        ("--config.batch=(8,8)", "flag --config.batch=(8,8): invalid literal for int()"),
        ("--config.batch", "Missing value for flag --config.batch"),
        ("--config.task.alpha=x", "flag --config.task.alpha=x: could not convert string to float"),
        ("--config.task.alpha=nan", "task.alpha=nan: expected a finite float"),
        ("--config.task.operator=maybe", "Non-boolean argument to boolean flag"),
        ("--config.task.widths=16,b", "task.widths[0]='16,b': expected int"),
        ("--config.task.widths=16,2.5", "task.widths[1]=2.5: expected int"),
        ("--config.log.profile_steps=1,2,3", "log.profile_steps=(1, 2, 3): expected tuple[int, int]"),
        # values
        ("--config.task.rank=577", "task.rank=577: the latent grid has 24 x 24 = 576 points, choose a rank from 1 to 576"),
        ("--config.task.widths=4,4,4,4,4,4", "task.size=48 cannot be halved between the 6 levels of task.widths"),
        ("--config.task.group=U", "task.group='U': choose one of O, SO"),
        ("--config.task.eigenvalues=any", "task.eigenvalues='any': choose one of cumulative, clustered"),
        ("--config.task.dtype=float8", "task.dtype='float8': choose one of float32, bfloat16"),
        ("--config.task.name=nope", "task.name='nope': there is no task of that name"),
        ("--config.task.trainable=(", "task.trainable='(' is not a regular expression"),
        ("--config.optimizer.decay=*", "optimizer.decay='*' is not a regular expression"),
        ("--config.steps=100", "optimizer.warmup=100 leaves nothing of the 100 steps"),
        ("--config.steps=0", "steps=0: must be at least 1"),
        ("--config.seed=-1", "seed=-1: must be at least 0"),
        ("--config.log.every=0", "log.every=0: must be at least 1"),
        ("--config.log.profile_steps=9,3", "log.profile_steps=9,3: must not be negative, nor the last before the first"),
        ("--config.checkpoint.keep=0", "checkpoint.keep=0: must be at least 1"),
        ("--config.optimizer.accumulate=0", "optimizer.accumulate=0: must be at least 1"),
        ("--config.mesh.space=0", "mesh.space=0: both must be at least 1"),
        # the eight devices of the tests
        ("--config.batch=6", "batch=6 cannot be split over mesh.data=8 x optimizer.accumulate=1; choose a multiple of 8"),
        ("--config.optimizer.accumulate=3", "mesh.data=8 x optimizer.accumulate=3; choose a multiple of 24"),
        ("--config.mesh.space=3", "mesh.space=3 does not cover the 8 device(s) here"),
        ("--config.mesh.data=2", "mesh.data=2 x mesh.space=1 does not cover the 8 device(s) here"),
        # data
        ("--config.data.dataset=coed", "unknown dataset 'coed': --config.data.dataset is one of co3d"),
    ],
)  # fmt: skip
def test_mistakes(tell: Tell, argument: str, wanted: str) -> None:
    assert wanted in tell(QUICK, *PINNED, argument)


@pytest.mark.parametrize(
    "argument,wanted",
    [
        ("--config=configs/pose_encode.py:quik", "pose_encode has no variant 'quik': choose one of paper, small, quick"),
        ("--config=configs/pose_encod.py:quick", f"no file configs/pose_encod.py in {REPOSITORY}; did you mean configs/pose_"),
        ("--config=configs/pose_encode:quick", "did you mean configs/pose_encode.py?"),
        ("--config=", "give one such as configs/pose_encode.py"),
        ("--config", "Missing value for flag --config"),
        ("--config.task.rank=8", "no such flag; keys of the config are set with --config.<key>=<value>"),
    ],
)  # fmt: skip
def test_no_such_config(tell: Tell, argument: str, wanted: str) -> None:
    assert wanted in tell(argument)


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("import nowhere", "error in {path}, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("\n\ndef get_config(:", "error in {path}, line 3: SyntaxError: invalid syntax"),
        ("def get_config():\n    return len(3)", "error in {path}, line 2: TypeError: object of type 'int' has no len()"),
        ("def get_config():\n    return {}['rank']", "error in {path}, line 2: KeyError: 'rank'"),
        ("def get_config():\n    return BASE.rnak", "error in {path}, line 2: NameError: name 'BASE' is not defined"),
        ("from niso.config import base\ndef get_config():\n    base().steps = 'x'", "{path}, line 3: TypeError: Could not"),
        ("def get_config():\n    pass", "get_config of {path} returned NoneType, it must return a ConfigDict"),
    ],
)  # fmt: skip
def test_defects_of_a_config_file_are_named_with_their_line(tell: Tell, tmp_path: pathlib.Path, text: str, wanted: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert wanted.format(path=path) in tell(f"--config={path}", "--config.task.rank=8")


def test_a_config_file_without_get_config(tmp_path: pathlib.Path) -> None:
    """In a process of its own: ml-collections loads every config file into one module, where an earlier get_config stays."""
    path = tmp_path / "mine.py"
    path.write_text("get_confg = dict")
    wanted = f"error in {path}: AttributeError: module 'config_config' has no attribute 'get_config'"
    assert wanted in told_by_a_process(f"--config={path}")


@pytest.mark.parametrize(
    "change,wanted",
    [
        ("c.stpes = 3", "stpes: nothing reads this key; did you mean steps?"),
        ("c.task.rnak = 3", "task.rnak: nothing reads this key; did you mean task.rank?"),
        ("c.resolved = {}", "resolved: nothing reads this key"),
        ("del c.task['rank']", "task.rank is missing from the config"),
        ("del c['mesh']", "mesh.data is missing from the config"),
        ("del c['task']", "task.name='': there is no task of that name"),
    ],
)
def test_keys_of_a_config_file(tell: Tell, tmp_path: pathlib.Path, change: str, wanted: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs.pose_encode import get_config as g\ndef get_config(v):\n    c = g(v)\n    {change}\n    return c\n"
    )
    assert wanted in tell(f"--config={path}:quick")


def test_other_ways_to_write_flags(tell: Tell, tmp_path: pathlib.Path) -> None:
    """The value of --config as an argument of its own, and flags from a file, are told about like any others."""
    (tmp_path / "flags").write_text(f"{QUICK}\n--config.task.rnak=8\n")
    for arguments in ([f"--flagfile={tmp_path}/flags"], [*QUICK.split("="), "--config.task.rnak=8"]):
        assert "--config.task.rnak: the config has no such key" in tell(*arguments)
    assert "no file nowhere in" in tell("--config", "nowhere")


def test_defects_of_niso_keep_their_traceback(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> int:
        return len(3)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(TypeError, match="has no len"):
        tell(QUICK)


def test_missing_records(tell: Tell) -> None:
    line = tell("--config=configs/pose_encode.py", "--config.data.records=records/nowhere")
    assert line.startswith("no records in records/nowhere: make them with `python -m data_prep.co3d --root CO3D_ROOT")
    assert "--out records/nowhere --size 144`" in line and "--config=configs/pose_encode.py:quick, which needs none" in line


def test_missing_source_of_a_warm_start(tell: Tell) -> None:
    line = tell("--config=configs/pose_pred.py:small")
    assert line.startswith("task.warm_start: no checkpoint in ") and "/runs/pose_encode-small/checkpoints; train that" in line


def test_folders_that_cannot_be_written(tell: Tell, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        line = tell(QUICK, f"--workdir={folder}")
        assert f"cannot write the run's folder {folder}" in line and "choose another with --workdir" in line
        monkeypatch.setenv("NISO_CACHE", str(folder))
        line = tell(QUICK)
        assert str(folder) in line and "set NISO_CACHE to a folder" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(toy_records.write_records(tmp_path / "records", {"train": (5, 4), "test": (5, 4)}))


def over(root: pathlib.Path, **changes: Any) -> list[str]:
    """The arguments of a small run over these records."""
    values = {
        "data.twin": "", "data.records": root, "data.size": toy_records.SIZE, "data.max_skip": 2, "data.test_skips": "0,2",
        "task.widths": 4, "task.latent_channels": 8, "task.rank": 8,
    }  # fmt: skip
    return [QUICK, *(f"--config.{key}={value}" for key, value in (values | changes).items())]


def test_records_of_another_kind(tell: Tell, root: pathlib.Path) -> None:
    line = tell(*over(root, **{"data.size": 16}))
    assert f"the records in {root} are 8 pixels wide, data.size is 16" in line
    assert "--config.data.size=8" in line and "--size 16" in line
    assert "has no pair of frames" in tell(*over(root, **{"data.test_skips": 90}))


def test_manifests(tell: Tell, root: pathlib.Path) -> None:
    path = root / "manifest.json"
    for text, wanted in {
        "{": "is not valid JSON",
        "[]": "is not a manifest of records",
        "{}": "is not a manifest of records",
        '{"format": 999}': "has format 999, this niso reads format 1",
        "": "no records in",
    }.items():
        path.write_text(text) if text else path.unlink()
        line = tell(*over(root))
        assert wanted in line and str(root) in line
        assert "data_prep" in line or "data preparation" in line


def test_a_truncated_file(tell: Tell, root: pathlib.Path) -> None:
    for path in root.glob("train-*"):
        path.write_bytes(path.read_bytes()[:-10])
    line = tell(*over(root), started=True)
    assert f"{root}/train-00000-of-00002.array_record is truncated or foreign" in line
    assert "delete that file and run the data preparation again" in line


def test_a_flipped_byte_found_by_a_thread(tell: Tell, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "test-00000-of-00002.array_record"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"JFIF", b"JFIX", 1))
    assert path.read_bytes() != whole
    decode, raised_by = records.Reader._decode, []

    def watched(*arguments: Any) -> records.Example:
        try:
            return decode(*arguments)
        except UserError:
            raised_by.append(threading.current_thread())
            raise

    monkeypatch.setattr(records.Reader, "_decode", watched)
    line = tell(*over(root), started=True)
    assert f"{path}: record 0 is damaged" in line and "delete that file and run the data preparation again" in line
    assert raised_by and threading.main_thread() not in raised_by


def test_an_index_that_does_not_fit(tell: Tell, root: pathlib.Path) -> None:
    index = records.read_index(root, "test")
    records.write_index(root, "test", [records.Sequence("far", "toy", index[0].shard, 10**6, 5, None)])
    assert "index-test.json does not fit the manifest at sequence far" in tell(*over(root))
    (root / "index-test.json").write_text("[1]")
    assert "index-test.json is not an index of records" in tell(*over(root))
