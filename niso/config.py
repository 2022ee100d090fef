"""The one door between command lines, config files and the frozen dataclasses that the trainer runs on.

Command line -> ConfigDict -> Experiment. A key is in the config or does not exist: there is no reader with a default. Every
mistake is one line (UserError) that names the key, the flag or the config file's line.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from niso.data.pipeline import kind_of
from niso.data.stream import Source
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
    """Everything about a run, frozen and typed; `resolved` is the same as plain nested dicts, for the workdir.

    `seeds` replicas are trained side by side, with seeds `seed`, `seed + 1`, ...
    """

    experiment: str
    variant: str
    seed: int
    seeds: int
    steps: int
    batch: int
    task: tasks.Task
    data: Source
    optimizer: Optimizer
    mesh: MeshShape
    log: Log
    checkpoint: Checkpoint
    resolved: dict[str, Any] = dataclasses.field(compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, "", steps=1, batch=1, seed=0, seeds=1)
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
        self.task.check_data(self.data)

    @staticmethod
    def from_config(config: ConfigDict) -> "Experiment":
        """The experiment that a config describes.

        Raises:
          UserError: a key too many or missing, a wrong type, or an impossible combination.
        """
        resolved = config.to_dict()
        sections: dict[str, Any] = dict(resolved)
        sections["task"] = make_task(sections.get("task") or {})
        for name, kind in (SECTIONS | {"data": _data_kind(sections.get("data") or {})}).items():
            sections[name] = _build(kind, sections.get(name) or {}, f"{name}.")
        return dataclasses.replace(_build(Experiment, sections, ""), resolved=resolved)


def make_task(section: dict[str, Any]) -> tasks.Task:
    """The task that the section `task` of a config describes, be it that of a saved one.

    Raises:
      UserError: a key too many or missing, a wrong type, or an impossible combination.
    """
    keys = {key: value for key, value in section.items() if key != "name"}
    return _build(tasks.load(section.get("name", "")), keys, "task.")


def _data_kind(section: dict[str, Any]) -> type[Source]:
    """The class of the section `data`, which its dataset decides."""
    if "dataset" not in section:
        raise UserError("data.dataset is missing from the config")
    return kind_of(_typed(section["dataset"], str, "data.dataset"))


SECTIONS = {"data": Source, "optimizer": Optimizer, "mesh": MeshShape, "log": Log, "checkpoint": Checkpoint}


def base() -> ConfigDict:
    """Every key that the trainer reads, with the published optimiser. A config fills in experiment, steps, batch, data and task."""
    return ConfigDict(
        {
            "experiment": "",
            "variant": "paper",
            "seed": 0,
            "seeds": 1,  # replicas side by side in one program, with the seeds seed, seed + 1, ...
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


def size_and_arm(variant: str, sizes: tuple[str, ...], arms: tuple[str, ...]) -> tuple[str, str]:
    """The parts of a variant such as small-pairs; without a dash it is of the first arm. Raises UserError for any other one."""
    size, dash, arm = variant.partition("-")
    if size not in sizes or (dash and arm not in arms):
        choices = f"choose one of {', '.join(sizes)}, and after it a dash and one of {', '.join(arms)}, if you want"
        raise UserError(f"no variant {variant!r}: {choices}")
    return size, arm or arms[0]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key in which two resolved configs differ."""
    a, b = flat(old), flat(new)
    return [f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def define_flag() -> flags.FlagHolder:
    """The --config flag; its value is the locked ConfigDict that it names, with the overrides of the command line."""
    return config_flags.DEFINE_config_file(
        "config", None, "configs/<experiment>.py[:variant]; --config.<key>=<value> changes a key.", lock_config=True
    )


def parse(argv: list[str]) -> list[str]:
    """Parses all flags, overrides such as --config.task.rank=64 among them; returns what is left over.

    Raises:
      UserError: one line for whatever is wrong with them, instead of ml-collections' tracebacks.
    """
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        if "--config" in argv[:-1]:  # and its value apart
            at = argv.index("--config")
            argv[at : at + 2] = [f"--config={argv[at + 1]}"]
        sys.argv = argv  # where ml-collections looks for the overrides, whatever it is given to parse
        _check_names(argv)
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = _near(error.flagname, flags.FLAGS, "--") or "; keys of the config are set with --config.<key>=<value>"
        raise UserError(f"--{error.flagname}: no such flag{near}") from None
    except flags.IllegalFlagValueError as error:
        raise UserError(f"{_line(error)} (a key keeps the type that it has in the config file)") from None
    except flags.Error as error:
        raise UserError(_line(error)) from None


def _check_names(argv: list[str]) -> None:
    """Loads the config file by itself: what goes wrong then is its own, and it knows which keys there are to override."""
    files = [argument for argument in argv if re.match(r"--?config=", argument)]
    if not files:
        return
    named = files[-1].partition("=")[2]
    path = Path(named.partition(":")[0])
    if not path.is_file():
        near = _near(str(path), map(str, path.parent.glob("*.py"))) or "; give one such as configs/pose_encode.py"
        raise UserError(f"--config={named}: no file {path} in {Path.cwd()}{near}")
    alone = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=[argv[0], files[-1]])
    try:
        alone([argv[0], files[-1]])
        value = holder.value
    except UserError:
        raise
    except Exception as error:  # whatever a user's file raises
        told = "".join(traceback.format_exception(error))  # ml-collections may put the file's own traceback into a message
        inside = re.findall(rf'{re.escape(path.name)}", line (\d+)', told)
        where = f"{path}, line {inside[-1]}" if inside else str(path)
        raise UserError(f"--config={named}: error in {where}: {told.strip().splitlines()[-1]}") from error
    if not isinstance(value, ConfigDict):
        raise UserError(f"--config={named}: get_config of {path} returned {type(value).__name__}, it must return a ConfigDict")
    known = flat(value.to_dict())
    for override in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", override)
        if match is None or (key := match[1]) in known:
            continue
        if any(other.startswith(f"{key}.") for other in known):
            raise UserError(f"--config.{key} is a section: set its keys one by one, as in --config.<section>.<key>=<value>")
        beside = [other for other in known if other.rpartition(".")[0] == key.rpartition(".")[0]] or sorted(known)
        near = _near(key, known, "--config.") or f"; there are {', '.join(beside)}"
        raise UserError(f"--config.{key}: the config has no such key{near}")


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
    for key in wanted:
        if key not in section:
            raise UserError(f"{where}{key} is missing from the config")
    return kind(**{key: _typed(section[key], hint, where + key) for key, hint in wanted.items()})


def _is_key(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint` (an int passes for a float, a list for a tuple)."""
    plain, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if plain is types.UnionType:
        for part in parts:
            with contextlib.suppress(UserError):
                return _typed(value, part, where)
    elif plain is tuple and isinstance(value, tuple | list):
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(hints) == len(value):
            return tuple(_typed(item, h, f"{where}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True)))
    elif plain is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif plain not in (tuple, float) and isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    expected = "a finite float" if plain is float else hint if parts else plain.__name__
    raise UserError(f"{where}={value!r}: expected {expected}")
