"""What the folder of a run says, read without jax: its resolved config, its last evaluation, how long it took."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from niso import folders
from niso.errors import UserError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
HOURS_FILE = "hours.jsonl"  # beside metrics.jsonl, which holds what a rerun reproduces
HOURS = "time/device_hours"
COPIED = ".niso-copied"  # a file in a folder of this machine whose files are copied into a bucket's
EVALUATIONS = ("eval", "trajectories")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Fields:
      path: as the user wrote it. config: resolved, as plain nested dicts and lists.
      last: "eval" and "trajectories" -> (step, {full name: value}) of the last evaluation, as far as there is one.
      hours: device hours up to the last line that says so; None if the run does not know.
    """

    path: str
    config: dict[str, Any]
    last: dict[str, tuple[int, dict[str, Any]]]
    hours: float | None

    @property
    def folder(self) -> Path:
        """Its absolute path."""
        return folders.resolved(folders.named(self.path))

    @property
    def task(self) -> dict[str, Any]:
        """The section `task` of the config."""
        return self.config["task"]

    @property
    def data(self) -> dict[str, Any]:
        """The section `data` of the config."""
        return self.config["data"]

    @property
    def seeds(self) -> list[int]:
        """The seed of every replica."""
        return [self.config["seed"] + index for index in range(self.config.get("seeds", 1))]

    def values(self, metric: str) -> dict[int, float]:
        """{seed: value} of a metric such as eval/accuracy in the last evaluation; without the seeds that lack it.

        Raises:
          UserError: it is no number.
        """
        kind, _, name = metric.partition("/")
        found = self.last.get(kind, (0, {}))[1]
        names = {seed: f"{kind}_seed_{seed}/{name}" if len(self.seeds) > 1 else metric for seed in self.seeds}
        try:
            return {seed: float(found[full]) for seed, full in names.items() if full in found}
        except (TypeError, ValueError):
            raise UserError(f"{self.path}: {metric} in {METRICS_FILE} is not a number; is it a run of niso?") from None


def read(path: str) -> Run:
    """The run in a folder.

    Raises:
      UserError: there is no run, or one of its files is damaged.
    """
    folder = folders.named(path, "the run")
    if not folders.remote(folder) and not folder.is_dir():
        raise UserError(f"{path} is not a folder: give the folder of a run, such as runs/pose_pred-small")
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for line in _lines(folder / METRICS_FILE):
        for kind in EVALUATIONS:
            if any(name.startswith(f"{kind}/") for name in line):
                last[kind] = (line["step"], line)
    hours = [line[HOURS] for line in _lines(folder / HOURS_FILE) if HOURS in line]
    return Run(path, _config(folder / CONFIG_FILE), last, float(hours[-1]) if hours else None)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in nested.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted


def _config(path: Path) -> dict[str, Any]:
    text = _bytes(path)
    if text is None:
        raise UserError(f"{path.parent} has no {path.name}: it is not the folder of a run")
    try:
        config = json.loads(text)
    except ValueError as error:
        where = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise UserError(f"{where}: unreadable JSON; copy the run's folder again") from None
    kinds = {"experiment": str, "variant": str, "seed": int, "steps": int, "task": dict, "data": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(config, dict) or not isinstance(config.get(key), kind)]
    if wrong:
        raise UserError(f"{path} is not the config of a run: it lacks {', '.join(wrong)}")
    return config


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none if there is no file. A last line without its end is still being written."""
    found = []
    for number, line in enumerate((_bytes(path) or b"").splitlines(keepends=True), 1):
        try:
            found.append(_line(line))
        except ValueError:
            if line.endswith(b"\n"):
                raise UserError(
                    f"{path}, line {number}: unreadable JSON; copy the run's folder again, or take the line out"
                ) from None
    return found


def _line(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no step")
    return record


def _bytes(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except folders.failures() as error:
        raise folders.complaint(path, error, f"cannot read {path}") from None
