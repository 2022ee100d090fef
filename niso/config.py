"""The one door between ConfigDicts and the frozen dataclasses that the trainer runs on.

A key is in the config or does not exist: there is no reader with a default. Every mistake is one line (UserError).
"""

import dataclasses
import difflib
import typing
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from niso.data.pipeline import Data
from niso.errors import UserError
from niso.optimizer import Optimizer
from niso.sharding import MeshShape
from niso.tasks import base as tasks


@dataclasses.dataclass(frozen=True)
class Log:
    """Steps between training lines, evaluations of the whole test split, and figures (0: at the end only); examples in a figure;
    first and one-past-last step of a profiler trace (0, 0: none)."""

    every: int
    evaluate_every: int
    figures_every: int
    figure_examples: int
    profile_steps: tuple[int, int]

    def __post_init__(self) -> None:
        for field in ("every", "evaluate_every", "figure_examples"):
            if getattr(self, field) < 1:
                raise UserError(f"log.{field}={getattr(self, field)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Steps between checkpoints, and how many of the newest are kept."""

    every: int
    keep: int

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError(f"checkpoint.every={self.every}, checkpoint.keep={self.keep}: both must be at least 1")


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
    resolved: dict[str, Any] = dataclasses.field(compare=False)

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
        built = _build(Experiment, sections | {"resolved": resolved}, "")
        if built.steps < 1 or built.batch < 1:
            raise UserError(f"steps={built.steps}, batch={built.batch}: both must be at least 1")
        return built


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
    missing = "absent"
    return [f"{key}: {a.get(key, missing)} -> {b.get(key, missing)}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def define_flag() -> flags.FlagHolder:
    """The --config flag: a config file, its variant after a colon, and overrides such as --config.task.rank=64."""
    return config_flags.DEFINE_config_file("config", None, "configs/<experiment>.py[:variant]", lock_config=True)


def parse(argv: list[str]) -> list[str]:
    """Parses all flags; returns what is left over.

    Raises:
      UserError: one line for whatever is wrong with them, instead of ml-collections' tracebacks.
    """
    try:
        return flags.FLAGS(argv)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        lines = [line for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
        raise UserError(f"{' '.join(lines)} (see the keys in the config file named by --config)") from None


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
    wanted = {field.name: hints[field.name] for field in dataclasses.fields(kind) if _required(field)}
    for key in section:
        if key not in wanted:
            near = difflib.get_close_matches(key, wanted, 1)
            raise UserError(f"{where}{key}: no such key" + (f"; did you mean {where}{near[0]}?" if near else ""))
    for key, hint in wanted.items():
        if key not in section:
            raise UserError(f"{where}{key} is missing from the config")
        section[key] = _typed(section[key], hint, where + key)
    return kind(**section)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint` (an int passes for a float, a list for a tuple)."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, tuple | list):
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(hints) == len(value):
            return tuple(_typed(item, h, f"{where}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True)))
    plain = origin or hint
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r}: expected {getattr(plain, '__name__', plain)}, got {type(value).__name__}")
    return value
