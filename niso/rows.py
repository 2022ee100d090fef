"""Which line of the paper's tables a run fills, read off its resolved config, and the figures of the runs that fill one."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from niso import folders, run_files
from niso.errors import UserError
from niso.published import PARTS, Part
from niso.run_files import Run

NOT_RUN, NOTHING = "not run", "-"
HEADS = ("classify", "pose")  # tasks that go on from an encoder's run
# Keys that change how a run is computed or written down, and not what comes out.
ALIKE = {"variant", "seed", "seeds", "task.warm_start", "task.remat"}
ALIKE |= {"data.threads", "data.prefetch", "data.workers", "data.in_memory"}
ALIKE_SECTIONS = ("log.", "checkpoint.", "mesh.")
SHOWN = {"step", "steps", "encoder.step", "encoder.steps"}  # a line says these anyway


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run in its place: the line it fills, the encoder's run (or its path where it was `missing`), the step of its evaluation."""

    run: Run
    part: Part
    label: str
    encoder: Run | None
    missing: str
    step: int

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must agree in to be seeds of one experiment, by dotted key."""
        found = {"step": self.step, "encoder": self.missing} | _compared(self.run.config)
        if self.encoder is not None:
            theirs = {"step": encoder_step(self.encoder)} | _compared(self.encoder.config)
            found |= {f"encoder.{key}": value for key, value in theirs.items()}
        return found

    @property
    def steps(self) -> str:
        """Steps of the encoder and of the run, or how far they are."""
        own = _progress(self.step, self.run.config["steps"])
        if self.encoder is None:
            return f"? + {own}" if self.missing else own
        return f"{_progress(encoder_step(self.encoder), self.encoder.config['steps'])} + {own}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table; `figures` has (mean, standard error) for every column, None for what is not known."""

    label: str
    setting: str
    figures: tuple[tuple[float | None, float | None], ...]
    seeds: int = 0
    steps: str = NOTHING
    hours: float | None = None
    runs: tuple[str, ...] = ()


def read(paths: Iterable[str]) -> tuple[list[Entry], list[str]]:
    """The runs in their places, and a sentence about each run that has none.

    Raises:
      UserError: no run there, none that was evaluated, or damaged files.
    """
    entries, notes = [], []
    for path in paths:
        run = run_files.read(path)
        parts = [part for part in PARTS if part.experiment == run.config["experiment"]]
        if not parts:
            notes.append(f"{run.config['experiment']}: in none of these tables")
        for part in parts:
            entry, told = _place(run, part)
            entries += [entry] if entry else []
            notes += told
    return entries, list(dict.fromkeys(notes))


def _place(run: Run, part: Part) -> tuple[Entry | None, list[str]]:
    kind = part.metrics[0].partition("/")[0]
    if kind not in run.last:
        what = "evaluation" if kind == "eval" else "evaluation of trajectories"
        raise UserError(f"{run.path} has no {what} in {run_files.METRICS_FILE} yet: wait for it, or leave this run out")
    if not any(run.values(metric) for metric in part.metrics):
        why = ": the regime reconstruction has none" if run.task.get("regime") == "reconstruction" else ""
        return None, [f"{run.path}: no {part.metrics[0].partition('/')[2]} in its last evaluation{why}; left out"]
    encoder, missing, notes = _encoder(run) if run.task.get("name") in HEADS else (None, "", [])
    label = describe(run, encoder)
    if missing and run.task.get("name") == "classify":  # a pose head says itself whether there is an operator
        label = f"encoder unknown ({missing} not found)"
    return Entry(run, part, part.names.get(label, label), encoder, missing, run.last[kind][0]), notes


def _encoder(run: Run) -> tuple[Run | None, str, list[str]]:
    """The run that a head went on from, or its path if it is not there; and what is to be said of that.

    It is looked for below this folder, then beside the run's own.
    """
    sources = run.task.get("warm_start")
    if not sources:
        return None, "", []
    wanted = next((folder for pattern, folder in sources if "encoder" in pattern), sources[0][1])
    places = [folders.named(wanted), run.folder.parent.parent / wanted]
    found = []
    for place in places:
        try:
            found += [place] * (folders.kind(place / run_files.CONFIG_FILE) == "file")
        except folders.failures() as error:
            raise folders.complaint(place, error, f"cannot look for {place}") from None
    if not found:
        return None, wanted, [f"{run.path}: its encoder {wanted} was not found; its steps and device hours are not counted"]
    other = [place for place in found[1:] if folders.resolved(place) != folders.resolved(found[0])]
    notes = [f"{run.path}: its encoder was taken to be {found[0]}; there is also {place}" for place in other]
    return run_files.read(str(found[0])), "", notes


def describe(run: Run, encoder: Run | None) -> str:
    """What a run is, from its own config and its encoder's: NIso (pairs), without L_E."""
    task, source = run.task, (encoder or run).task
    regime, operator, augment = source.get("regime", "pairs"), source.get("operator", True), task.get("augment", False)
    classifies = task.get("name") == "classify"
    if regime == "reconstruction":
        words = ["autoencoder" + (" + augmentation" if augment else "")]
        told = {"no augmentation": classifies and not augment, "with Ω": operator}
    else:
        words = [f"NIso ({regime})"]
        told = {
            "without L_E": source.get("alpha") == 0, "without L_M": source.get("beta") == 0 and operator, "without Ω": not operator,
            "with augmentation": augment, "ordinary head": task.get("head") == "mlp",
        }  # fmt: skip
    told["no trained encoder"] = task.get("name") in HEADS and not task.get("warm_start")
    told["tested on unperturbed images"] = not task.get("warped", True) and not run.data.get("test_records")
    return ", ".join(words + [word for word, applies in told.items() if applies])


def setting(run: Run, encoder: Run | None) -> str:
    """With which data and sizes, and what of the loss is not the paper's: `small, twin small, 1,000 test examples`."""
    data, task = run.data, run.task
    loss = (encoder or run).task
    words = [
        run.config["variant"],
        f"twin {data['twin']}" if data.get("twin") else Path(data.get("records", "")).name or "no records",
    ]
    if data.get("test_records"):
        words.append(f"test set {Path(data['test_records']).name}")
    if "test_examples" in data:
        words.append(f"{data['test_examples']:,} test examples")
    if loss.get("equivariance", "absolute") != "absolute" and loss.get("alpha"):
        words.append(f"L_E {loss['equivariance']}")
    if "scale" in task:
        words.append(f"scale {task['scale']}")
    if task.get("warm_start") and task.get("name") not in HEADS:
        words.append("warm-started")
    if task.get("name") in HEADS and task.get("trainable") != "head/.*":
        words.append(f"trains {task.get('trainable')}")
    return ", ".join(words)


def lines(entries: Iterable[Entry], part: Part) -> list[Line]:
    """The lines of a part of a table: the published rows in their order, then others.

    Raises:
      UserError: two runs are the same seed of the same experiment.
    """
    rows: dict[str, dict[str, list[Entry]]] = {label: {} for label in part.rows}
    for entry in entries:
        if entry.part is part:
            key = json.dumps(entry.settings, sort_keys=True)
            rows.setdefault(entry.label, {}).setdefault(key, []).append(entry)
    found = []
    for label, groups in rows.items():
        found += _lines(list(groups.values())) or [Line(label, NOT_RUN, ((None, None),) * len(part.columns))]
    return found


def _lines(groups: Sequence[Sequence[Entry]]) -> list[Line]:
    """A line for each experiment of a row; where there are several, their settings say in what they differ."""
    settings = [{key: json.dumps(value) for key, value in group[0].settings.items()} for group in groups]
    keys = sorted({key for of_one in settings for key in of_one} - SHOWN)
    differ = [key for key in keys if len({of_one.get(key) for of_one in settings}) > 1]
    found = []
    for group, of_one in zip(groups, settings, strict=True):
        words = [f"{key}={of_one.get(key, 'absent')}" for key in differ[:4]] + ["..."] * (len(differ) > 4)
        found.append(_pool(group, ", ".join([setting(group[0].run, group[0].encoder), *words])))
    return found


def _pool(group: Sequence[Entry], words: str) -> Line:
    """The runs of one experiment as one line."""
    first, owner = group[0], dict[int, Run]()
    for entry in group:
        for seed in entry.run.seeds:
            if seed in owner:
                both = f"{owner[seed].path} and {entry.run.path}"
                raise UserError(f"{both} are both seed {seed} of {first.label} ({words}): give one of them")
            owner[seed] = entry.run
    encoders = {entry.encoder.folder: entry.encoder for entry in group if entry.encoder is not None}
    hours = [run.hours for run in (*(entry.run for entry in group), *encoders.values())]
    known = None not in hours and not first.missing
    return Line(
        first.label, words, tuple(_mean_and_error(group, metric, len(owner)) for metric in first.part.metrics), len(owner),
        first.steps, sum(one for one in hours if one is not None) if known else None, tuple(entry.run.path for entry in group),
    )  # fmt: skip


def _mean_and_error(group: Sequence[Entry], metric: str, count: int) -> tuple[float | None, float | None]:
    """Over all seeds, standard deviation with n − 1; nothing where a seed lacks the metric, as the trainer does."""
    values = [value for entry in group for value in entry.run.values(metric).values()]
    if len(values) < count:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1) / count**0.5) if count > 1 else None


def encoder_step(encoder: Run) -> int:
    """How far an encoder was trained: its last evaluation, which comes with its last step; else what its config says."""
    return encoder.last["eval"][0] if "eval" in encoder.last else encoder.config["steps"]


def _progress(step: int, steps: int) -> str:
    return f"{steps:,}" if step == steps else f"step {step} of {steps}"


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    flat = {"warm_started": bool(config["task"].get("warm_start"))} | run_files.flat(config)
    return {key: value for key, value in flat.items() if key not in ALIKE and not key.startswith(ALIKE_SECTIONS)}
