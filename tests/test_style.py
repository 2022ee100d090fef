"""The parts of the house style (ARCHITECTURE.md) that a program can check."""

import ast
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for folder in ("niso", "data_prep", "configs", "launch") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if "niso" in path.relative_to(ROOT).parts]
# Who may speak to the terminal; everything else returns, raises or goes through telemetry.
SPEAKERS = {
    "niso/checkpoint.py", "niso/distributed.py", "niso/dry_run.py", "niso/main.py", "niso/peers.py", "niso/predict.py",
    "niso/report.py", "niso/telemetry.py", "niso/train.py", "niso/trajectories.py", "niso/data/reading.py",
    "niso/data/synthetic.py", "niso/data/watchdog.py",
}  # fmt: skip
LONGEST = 300

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "command", ["ruff check -q --output-format=concise", "ruff format -q --check --output-format=concise", "mypy"]
)
def test_tools_have_nothing_to_say(command: str) -> None:
    tool, *arguments = command.split()
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install -e .[test]")
    command_line = [sys.executable, "-m", tool, *arguments]  # what they look at stands in pyproject.toml
    ended = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, f"{command}:\n{ended.stdout[-5000:]}{ended.stderr[-2000:]}"


def test_files_are_one_noun() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {file: lines for file, lines in lengths.items() if lines >= LONGEST} == {}
    assert [file for file in lengths if pathlib.Path(file).stem in ("utils", "util", "helpers", "misc", "common")] == []


def prints(source: str) -> list[int]:
    """Lines that call print."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_few_speak_to_the_terminal() -> None:
    speakers = {name(path) for path in LIBRARY if prints(path.read_text())}
    assert speakers == SPEAKERS


def public(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions and methods that another file may call: of the module and of its public classes."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and (not inner.name.startswith("_") or inner.name == "__init__"):
                    yield f"{node.name}.{inner.name}", inner


def unannotated(function: Function) -> bool:
    """Whether a parameter (but self and cls) or the result has no type; __init__ returns nothing."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    bare = [one for one in named if one.annotation is None and one.arg not in ("self", "cls")]
    return bool(bare) or (function.returns is None and function.name != "__init__")


def undocumented(source: str) -> list[str]:
    """The module, its public classes and functions, if they have no docstring. (Methods may inherit theirs.)"""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(node.name)
    return found


def test_public_signatures_are_annotated() -> None:
    bare = [
        f"{name(path)}: {which}" for path in LIBRARY for which, node in public(ast.parse(path.read_text())) if unannotated(node)
    ]
    assert bare == []


def test_what_is_public_is_documented() -> None:
    assert [f"{name(path)}: {which}" for path in LIBRARY for which in undocumented(path.read_text())] == []


def test_the_checks_find_what_they_look_for() -> None:
    assert prints("def f():\n    print(1)\n    x.print(2)") == [2]
    assert undocumented("def f(): pass\nclass A:\n    def g(self): pass\ndef _h(): pass") == ["the module", "f", "A"]
    assert undocumented('"""M."""\ndef f():\n    """F."""') == []
    written = """
def a(x): ...
def b(x: int): ...
def c(*x) -> int: ...
def d(*, y) -> int: ...
def e(x: int) -> int: ...
def _f(x): ...
class A:
    def __init__(self, x): ...
    def m(self) -> int: ...
    def _n(self, x): ...
class _B:
    def o(self): ...
"""
    assert [which for which, node in public(ast.parse(written)) if unannotated(node)] == ["a", "b", "c", "d", "A.__init__"]
