"""What the tests of launch/ share: its scripts started, and command lines read as niso.main reads them."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from absl import flags

from niso import config

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def shell(*command: str, cwd: pathlib.Path = ROOT, **environment: str) -> subprocess.Popen:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # where a script has begun the tests in the background, children too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = os.environ | {"BACKOFF": "0", "PYTHON": sys.executable}
    return subprocess.Popen(
        command, cwd=cwd, env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def until(path: pathlib.Path, lines: int = 1, within: float = 30) -> None:
    """Waits until a file has so many lines."""
    deadline = time.monotonic() + within
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.01)


def executable(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def read_flags(arguments: list[str]) -> dict[str, Any]:
    """The config that niso.main would make of them."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        holder = config.config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["niso"])
        assert config.parse(["niso", *arguments]) == ["niso"]
        return config.flat(holder.value.to_dict())
