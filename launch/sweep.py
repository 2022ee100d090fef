"""Every entry of a config's sweep() as a run of its own, one after the other.

  python -m launch.sweep --config=configs/pose_encode.py

An entry's folder is named from what it changes: runs/pose_encode-paper-0, runs/pose_encode-paper-0-without-operator. Runs that are
finished say so and are passed over; the others go on from their checkpoints: the same command again continues a sweep. An entry
that changes "variant" is a run of that variant. What follows the flags below is given to every run.
"""

import argparse
import contextlib
import importlib.util
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from niso.errors import UserError

PREEMPTED = 42  # as niso.train's
WARM_START = "task.warm_start"


def commands(config: str, root: str = "runs", extra: tuple[str, ...] = ()) -> list[list[str]]:
    """The arguments of niso.main for every entry of the sweep() of `config`, a file with or without :variant.

    Raises:
      UserError: no such file, sweep or variant, or two entries that would share a folder.
    """
    if any(argument.lstrip("-").startswith("workdir") for argument in extra):
        raise UserError("every run of a sweep has a folder of its own; --root=FOLDER says where these are, not --workdir")
    file, _, variant = config.partition(":")
    module = _load(Path(file))
    entries, folders = [dict(entry) for entry in module.sweep()], []
    for entry in entries:
        changed = {key: value for key, value in entry.items() if key not in ("variant", "seeds", WARM_START)}
        own = entry.get("variant", variant)
        described = module.get_config(own) if own else module.get_config()
        folders.append("-".join([f"{described.experiment}-{described.variant}", *map(_word, changed, changed.values())]))
    # The run that an entry starts from is a part of its name only where nothing else tells it from another.
    short = Counter(folders)
    for i, entry in enumerate(entries):
        if short[folders[i]] > 1 and entry.get(WARM_START):
            folders[i] += f"-from-{'-'.join(Path(run).name for _, run in entry[WARM_START])}"
    twice = [folder for folder, times in Counter(folders).items() if times > 1]
    if twice:
        raise UserError(f"two entries of sweep() in {file} have one folder, {twice[0]}: they differ in nothing that names it")
    lines = []
    for entry, folder in zip(entries, folders, strict=True):
        own = entry.pop("variant", variant)
        line = [f"--config={file}{f':{own}' if own else ''}"]
        line += [f"--config.{key}={value if isinstance(value, str) else repr(value)}" for key, value in entry.items()]
        lines.append([*line, *extra, f"--workdir={root}/{folder}"])
    return lines


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--config={path}: no such file; give one such as configs/pose_encode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise UserError(f"--config={path}: the file has no sweep(); write one, or run it with niso.main")
    return module


def _word(key: str, value: Any) -> str:
    """What an override adds to the name of a folder."""
    name = key.rpartition(".")[2]
    if isinstance(value, bool):
        return f"{'with' if value else 'without'}-{name}"
    word = re.sub(r"[^\w.+]+", "-", str(value)).strip("-")
    return word if name == "seed" else f"{name}-{word}"


def _run(line: list[str]) -> int:
    """Runs niso.main to its end and returns its exit code; a SIGTERM is passed on to it."""
    program = subprocess.Popen([sys.executable, "-m", "niso.main", *line])
    left = False

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal left
        left = True
        program.terminate()

    before = {name: signal.signal(name, pass_on) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = program.wait()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    code = 128 - code if code < 0 else code
    if left:
        raise SystemExit(code)
    return code


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 42 if a run was asked to leave, 2 for a user's mistake, or the first bad run's code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE[:VARIANT]", required=True, help="the config whose sweep() is run")
    parser.add_argument("--print", action="store_true", help="print the commands instead of running them")
    parser.add_argument("--index", type=int, metavar="I", help="run only the entry I, from 0: for job arrays")
    parser.add_argument("--root", default="runs", metavar="FOLDER", help="where the runs' folders are (default: runs)")
    options, extra = parser.parse_known_args(argv)
    try:
        lines = commands(options.config, options.root, tuple(extra))
        if options.index is not None:
            if not 0 <= options.index < len(lines):
                raise UserError(f"--index={options.index}: the sweep has {len(lines)} entries, from 0 to {len(lines) - 1}")
            lines = [lines[options.index]]
    except UserError as error:
        print(f"launch.sweep: {error}", file=sys.stderr)
        return 2
    result = 0
    with contextlib.suppress(BrokenPipeError):
        for line in lines:
            print(shlex.join(["python", "-m", "niso.main", *line]), flush=True)
            code = 0 if options.print else _run(line)
            if code == PREEMPTED:
                return code
            result = result or code
    return result


if __name__ == "__main__":
    sys.exit(main())
