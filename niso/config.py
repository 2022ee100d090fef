"""The one door between command lines, config files and the frozen dataclasses that the trainer runs on.

Command line -> ConfigDict -> Experiment. A key is in the config or does not exist: there is no reader with a default. Every
mistake is one line (UserError) that names the key, the flag or the config file's line. ml-collections has flags of its own for
this; their errors are tracebacks, and they read the overrides from sys.argv whatever they are asked to parse.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.machinery
import math
import operator
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from niso.data.pipeline import Data
from niso.errors import UserError
from niso.optimizer import Optimizer
from niso.sharding import MeshShape
from niso.tasks import base as tasks


@dataclasses.dataclass(frozen=True)
class Log:
    """Steps between training lines, evaluations of the whole test split, and figures (0: at the end only); examples in a figure;
    updates before a profiler trace, and up to its end (0, 0: none)."""

    every: int
    evaluate_every: int
    figures_every: int
    figure_examples: int
    profile_steps: tuple[int, int]

    def __post_init__(self) -> None:
        _at_least(self, "log.", every=1, evaluate_every=1, figures_every=0, figure_examples=1)
        first, last = self.profile_steps
        if not 0 <= first <= last:
            raise UserError(f"log.profile_steps={first},{last}: must not be negative, nor the last before the first; 0,0 for none")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Steps between checkpoints, and how many of the newest are kept."""

    every: int
    keep: int

    def __post_init__(self) -> None:
        _at_least(self, "checkpoint.", every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything about a run, frozen and typed; `resolved` is the same as plain nested dicts, for the workdir."""

    experiment: str
    variant: str
    seed: int
    steps: int
    batch: int
    task: tasks.Task
    data: Data
    optimizer: Optimizer
    mesh: MeshShape
    log: Log
    checkpoint: Checkpoint
    resolved: dict[str, Any] = dataclasses.field(compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, "", steps=1, batch=1, seed=0)
        if self.mesh.space < 1 or (self.mesh.data < 1 and self.mesh.data != -1):
            at = f"mesh.data={self.mesh.data}, mesh.space={self.mesh.space}"
            raise UserError(f"{at}: both must be at least 1 (mesh.data=-1 takes what mesh.space leaves)")
        warm = (("task.warm_start", pattern) for pattern, _ in self.task.warm_start)
        for key, pattern in (("optimizer.decay", self.optimizer.decay), ("task.trainable", self.task.trainable), *warm):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{key}={pattern!r} is not a regular expression ({error}); .* matches everything") from None
        self.optimizer.schedule(self.steps)  # raises where the warm-up does not fit

    @staticmethod
    def from_config(config: ConfigDict) -> "Experiment":
        """The experiment that a config describes.

        Raises:
          UserError: a key too many or missing, a wrong type, or an impossible combination.
        """
        resolved = config.to_dict()
        sections: dict[str, Any] = dict(resolved)
        task = dict(sections.get("task") or {})
        sections["task"] = _build(tasks.load(task.pop("name", "")), task, "task.")
        for name, kind in SECTIONS.items():
            sections[name] = _build(kind, sections.get(name) or {}, f"{name}.")
        return dataclasses.replace(_build(Experiment, sections, ""), resolved=resolved)


SECTIONS = {"data": Data, "optimizer": Optimizer, "mesh": MeshShape, "log": Log, "checkpoint": Checkpoint}


def base() -> ConfigDict:
    """Every key that the trainer reads, with the published optimiser. A config fills in experiment, steps, batch, data and task."""
    return ConfigDict(
        {
            "experiment": "",
            "variant": "paper",
            "seed": 0,
            "steps": 0,
            "batch": 0,
            "task": {},
            "data": {},
            "optimizer": {
                "peak": 5e-4, "final": 5e-5, "warmup": 2_000, "decay_steps": 0, "b1": 0.9, "b2": 0.999,
                "weight_decay": 1e-4, "decay": ".*", "clip": 0.0, "accumulate": 1,
            },
            "mesh": {"data": -1, "space": 1, "zero": False},
            "log": {
                "every": 100, "evaluate_every": 5_000, "figures_every": 5_000, "figure_examples": 6, "profile_steps": (0, 0),
            },
            "checkpoint": {"every": 5_000, "keep": 3},
        }
    )  # fmt: skip


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key in which two resolved configs differ."""
    a, b = flat(old), flat(new)
    return [f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def define_flag() -> flags.FlagHolder:
    """The --config flag; its value is the ConfigDict that it names, with the overrides of the command line once `parse` is done."""
    return flags.DEFINE(_ConfigParser(), "config", None, "configs/<experiment>.py[:variant]; --config.<key>=<value> changes a key.")


def parse(argv: list[str]) -> list[str]:
    """Parses all flags, applies the overrides (--config.task.rank=64) and locks the config; returns what is left over.

    Raises:
      UserError: one line for whatever is wrong with them.
    """
    flag = flags.FLAGS["config"]
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        overrides = [argument for argument in argv if re.match(r"--?config\.", argument)]
        left = flags.FLAGS([argument for argument in argv if argument not in overrides])
    except flags.UnrecognizedFlagError as error:
        keys = flat(flag.value.to_dict()) if flag.value else ()
        near = _near(error.flagname, [*flags.FLAGS, *(f"config.{key}" for key in keys)], "--")
        raise UserError(f"--{error.flagname}: no such flag{near}") from None
    except flags.Error as error:
        raise UserError(_line(error)) from None
    if flag.value:
        for argument in overrides:
            _override(flag.value, argument)
        flag.value.lock()
    return left


def load(argument: str) -> ConfigDict:
    """The config that `<file>[:variant]` names: what the file's get_config(variant) returns.

    Raises:
      UserError: no such file, or anything that goes wrong inside it, with the line where it does.
    """
    path, colon, variant = argument.partition(":")
    if not Path(path).is_file():
        near = _near(path, map(str, Path(path).parent.glob("*.py")))
        raise UserError(f"--config={argument}: no file {path} in {Path.cwd()}{near or '; give one such as configs/pose_encode.py'}")
    module = types.ModuleType("niso_config")
    module.__file__ = path
    try:
        importlib.machinery.SourceFileLoader(module.__name__, path).exec_module(module)
        config = module.get_config(variant) if colon else module.get_config()
    except Exception as error:
        if isinstance(error, UserError):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"--config={argument}: error in {where}: {type(error).__name__}: {_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={argument}: get_config of {path} returned {type(config).__name__}, it must return a ConfigDict")
    return config


class _ConfigParser(flags.ArgumentParser):
    """What absl calls with the text of --config."""

    def parse(self, argument: str) -> ConfigDict:
        return load(argument)


def _override(config: ConfigDict, argument: str) -> None:
    """Applies one --config.<key>=<value>, read as the type that the key has in the config."""
    name, equals, text = argument.partition("=")
    key = name.lstrip("-").removeprefix("config.")
    known = flat(config.to_dict())
    if key not in known:
        inside = [other for other in known if other.startswith(f"{key}.")]
        if inside:
            raise UserError(f"--config.{key} is a section: set its keys one by one, such as --config.{inside[0]}=...")
        beside = [other for other in known if other.rpartition(".")[0] == key.rpartition(".")[0]] or config
        near = _near(key, known, "--config.") or f"; there are {', '.join(beside)}"
        raise UserError(f"--config.{key}: the config has no such key{near}")
    present = functools.reduce(operator.getitem, key.split("."), config)
    kind = type(present)
    try:
        if not equals:
            raise ValueError
        config.update_from_flattened_dict({key: _READERS[kind](text)})
    except (ValueError, SyntaxError, TypeError):
        expected = {bool: "true or false", tuple: "a tuple"}.get(kind, kind.__name__)
        example = ",".join(map(repr, present)) or "()" if kind is tuple else str(present)
        raise UserError(f"{name}{equals}{text}: expected {expected}, such as --config.{key}={example}") from None


def _tuple(text: str) -> tuple:
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


_READERS: dict[type, Callable[[str], Any]] = {
    str: str, int: int, float: float, tuple: _tuple, bool: lambda text: ("false", "true").index(text.lower()) == 1,
}  # fmt: skip


def _at_least(section: Any, where: str, **least: int) -> None:
    for key, minimum in least.items():
        if getattr(section, key) < minimum:
            raise UserError(f"{where}{key}={getattr(section, key)}: must be at least {minimum}")


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question with the known name that is most like it, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _line(error: Exception) -> str:
    """The error's message as one line (str of a KeyError would be its repr)."""
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys; tuples as lists, as they come back from JSON."""
    dotted: dict[str, Any] = {}
    for key, value in nested.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return dotted


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _build(kind: type, section: dict[str, Any], where: str) -> Any:
    """`kind(**section)` with every key present, none unknown, and each of its field's type."""
    hints = typing.get_type_hints(kind)
    wanted = {field.name: hints[field.name] for field in dataclasses.fields(kind) if _is_key(field)}
    for key in section:
        if key not in wanted:
            near = _near(key, wanted, where) or f"; there are {', '.join(wanted)}"
            raise UserError(f"{where}{key}: nothing reads this key{near}")
    for key, hint in wanted.items():
        if key not in section:
            raise UserError(f"{where}{key} is missing from the config")
        section[key] = _typed(section[key], hint, where + key)
    return kind(**section)


def _is_key(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint` (an int passes for a float, a list for a tuple)."""
    plain, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if plain is tuple and isinstance(value, tuple | list):
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(hints) == len(value):
            return tuple(_typed(item, h, f"{where}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True)))
    elif plain is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif plain not in (tuple, float) and isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    expected = "a finite float" if plain is float else hint if parts else plain.__name__
    raise UserError(f"{where}={value!r}: expected {expected}")
