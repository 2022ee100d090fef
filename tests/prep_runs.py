"""Runs of a data preparation that are killed, shared or refused, and what folders of records hold."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

_REPO = pathlib.Path(__file__).parents[1]
_SLOWLY = """
import sys, time
from niso.data import records
from data_prep import {module}
encode = records.encode
def slowly(*arguments):
    time.sleep(0.03)
    return encode(*arguments)
records.encode = slowly
{module}.prepare({arguments}, progress=False)
"""


def noisy_pictures(root: pathlib.Path) -> pathlib.Path:
    """Forty of them in folders within folders; returns root."""
    rng = np.random.default_rng(0)
    for n in range(40):
        path = root / f"class {n % 3}" / ("deep" if n % 2 else "") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12 + n % 5, 14, 3), np.uint8)).save(path)
    return root


def contents(out: pathlib.Path) -> dict[str, bytes]:
    """Every file below out."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def kill_in_the_third_shard(out: pathlib.Path, script: str, *arguments: object) -> dict[pathlib.Path, int]:
    """Runs a script that fills out slowly, and kills it; returns the two shards that are finished, and when they were written."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], cwd=_REPO)
    deadline = time.monotonic() + 20
    while not (len(list(out.glob("parts/*record.json"))) == 2 and list(out.glob(".*.tmp-*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: os.stat(path).st_mtime_ns for path in out.glob("*.array_record")}
    assert len(done) == 2 and list(out.glob(".*.tmp-*")), "the run was not broken off in the middle of a shard"
    return done


def check_a_killed_run(
    module: str, arguments: str, out: pathlib.Path, again: Callable[[], object], unbroken: dict[str, bytes]
) -> None:
    """Kills `data_prep.module.prepare(arguments)`, which fills out with stills in three shards, and runs it again: `again`.

    What is finished must not be made again, and the end must be what an unbroken run leaves behind.
    """
    done = kill_in_the_third_shard(out, _SLOWLY.format(module=module, arguments=arguments))
    again()
    assert contents(out) == unbroken
    assert all(os.stat(path).st_mtime_ns == before for path, before in done.items()), "finished shards were made again"


def by_two_tasks(prepare: Callable[..., Any], root: pathlib.Path, out: pathlib.Path, **options: Any) -> pathlib.Path:
    """The folder that two tasks have made, not merged."""
    for number in range(2):
        assert prepare(root, out, task=f"{number}/2", **options) is None
    return out


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: str, code: int = 2) -> str:
    """The one line with which a command is refused; the lines of its progress are not counted."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if not re.match(r"\d+/\d+ (shards|sequences), ", line)]
    assert said.out == ""
    return line


def obey(module: Any, line: str, *more: str, task: int | None = None) -> None:
    """Runs the command in a message, with these flags, too; where it is for several tasks, as one of them."""
    (command,) = re.findall(r"(?:`|done: )(python -m data_prep\.\w+ [^`\n]*)", line)
    words = shlex.split(command.replace("--task I/", f"--task {task}/"))
    assert words[:3] == ["python", "-m", module.__name__] and module.main([*words[3:], *more]) == 0
