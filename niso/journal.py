"""What a run writes down about itself: its introduction, its log lines, its evaluations and figures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from niso import evaluate, figures, poses, sequences, trajectories, trajectory_figure, tree
from niso.config import flat
from niso.data.pipeline import PairDataset
from niso.data.stream import Examples
from niso.errors import UserError
from niso.inference import CHUNK, Model
from niso.poses import Stride
from niso.replicas import mean_and_error
from niso.step import Program, TrainState
from niso.telemetry import Telemetry, format_metrics


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last one is due after `step`."""
    return step == last or bool(every and step % every == 0)


class Journal:
    """Evaluates, draws and logs one run; all hosts take part, the first writes."""

    def __init__(self, program: Program, dataset: Examples, telemetry: Telemetry):
        self.program, self.dataset, self.telemetry = program, dataset, telemetry
        self.rows = program.replicas.rows(program.experiment.batch)
        self._model: Model | None = None
        self._motions: dict[int, np.ndarray | None] = {}

    def introduce(self, start: int) -> None:
        """Says what is about to be trained, on what, with what."""
        e, mesh = self.program.experiment, self.program.mesh
        hparams: dict[str, Any] = {k: v for k, v in flat(e.resolved).items() if isinstance(v, int | float | str | bool)}
        self.telemetry.config(json.dumps(e.resolved, indent=2), hparams)
        cost = self.dataset.bytes_per_example()
        replicas = f"{e.seeds} replicas (seeds {e.seed} to {e.seed + e.seeds - 1}) of " if e.seeds > 1 else ""
        self.telemetry.say(
            f"{e.experiment}:{e.variant}: {replicas}{tree.count(self.program.parameter_shapes):,} parameters on {mesh.size} "
            f"{jax.default_backend()} device(s), mesh data {mesh.shape['data']} x space {mesh.shape['space']}; "
            f"{'resuming at' if start else 'from'} step {start}"
        )
        self.telemetry.say(
            f"{self.dataset.train_size:,} training and {self.dataset.test_size:,} test examples, each a {e.data.example}; "
            f"one reads {cost['disk'] / 1e3:.1f} kB and sends {cost['device'] / 1e3:.1f} kB to the device"
        )

    def log(self, step: int, values: list[dict[str, float]]) -> None:
        """Writes the training metrics of the window that ends at `step`, one dict for each replica."""
        means, _ = self._write(step, "train", values, {"learning_rate": self.program.learning_rate(step)})
        counts, replicas = {}, self.program.replicas
        if self.dataset.replaced is not None:
            of = replicas.count * self.program.experiment.batch
            counts["data/skipped"] = self._everywhere(self.dataset.replaced, len(replicas.local()) * len(self.rows), of)
        self.telemetry.progress(step, {name: value for name, value in means.items() if name != "gradient_norm"}, counts)

    def _everywhere(self, examples: int, read: int, of: int) -> int:
        """How many examples there were in all processes, each counted once, where a process reads `read` of every `of` of them.

        Processes between which examples are split by rows read the same ones.  All of them call this.
        """
        all_Px2 = multihost_utils.process_allgather(np.array([examples, read], np.int32)).reshape(-1, 2)
        return round(of * int(all_Px2[:, 0].sum()) / int(all_Px2[:, 1].sum()))

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates the whole test split and, where they are due, draws figures."""
        e = self.program.experiment
        with self.telemetry.aside():
            with self.dataset.test_batches(batch=e.batch, rows=self.rows) as batches:
                values = evaluate.evaluate(self.program, state, batches)
            if self.dataset.replaced is not None:
                left_out = self._everywhere(batches.replaced, len(self.rows), e.batch)
                if left_out:
                    lost = f"{left_out} of {self.dataset.test_size} test examples cannot be read and are left out"
                    self.telemetry.say(f"evaluation at step {step}: {lost}")
            examined = jax.device_get(self.program.examine(state))
            for index, of_one in enumerate(values):
                of_one |= self.program.task.examine(self.program.replicas.pick(examined, index))
            means, errors = self._write(step, "eval", values)
            for line in self.program.task.summary(means):
                self.telemetry.say(f"evaluation at step {step}: {line}")
            if errors:
                listed = format_metrics({name: error for name, error in errors.items() if error == error})
                self.telemetry.say(f"evaluation at step {step}: standard errors of {len(values)} replicas: {listed}")
            if due(step, e.log.figures_every, e.steps):
                self._draw(step, state)
                if self.program.task.trajectory_strides():
                    self._follow(step, state)

    def _write(
        self, step: int, kind: str, values: list[dict[str, float]], common: dict[str, float] | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Writes metrics as scalars: the replicas' means and standard errors, which it returns, and each one's values."""
        means, errors = mean_and_error(values)
        scalars = {f"{kind}/{name}": value for name, value in (means | (common or {})).items()}
        scalars |= {f"{kind}_standard_error/{name}": value for name, value in errors.items()}
        if errors:
            for seed, of_one in zip(self.program.replicas.seeds, values, strict=True):
                scalars |= {f"{kind}_seed_{seed}/{name}": value for name, value in of_one.items()}
        self.telemetry.scalars(step, scalars)
        return means, errors

    def close(self) -> None:
        """Says where to look."""
        workdir, last = self.telemetry.workdir, _figure_folder(self.program.experiment.steps)
        self.telemetry.say(f"done: figures in {workdir / last}; tensorboard --logdir {workdir}")

    def _draw(self, step: int, state: TrainState) -> None:
        """Figures of test examples, and of training ones where they differ (an operator's do not), named train_*; of the first
        replica."""
        count, first = self.program.experiment.log.figure_examples, partial(self.program.replicas.pick, index=0)
        batches = [self.dataset.figure_batch(count), self.dataset.figure_batch(count, train=True)]
        arrays, trained = (first(jax.device_get(self.program.inspect(state, batch))) for batch in batches)
        if jax.process_index() != 0:
            return
        drawn = self.program.task.figures(arrays)
        for name, image in self.program.task.figures(trained).items():
            if not np.array_equal(image, drawn[name]):
                drawn[f"train_{name}"] = image
        self._keep(step, drawn)
        self.telemetry.histograms(step, {name: array for name, array in arrays.items() if array.ndim == 1})

    def _follow(self, step: int, state: TrainState) -> None:
        """Scores the trajectories of whole test videos, draws the first replica's, and keeps its poses for
        `python -m niso.trajectories`."""
        replicas = self.program.replicas
        runs = [self._trajectories(self.program.parameters(state, index)) for index in range(replicas.count)]
        limit, found = self.program.task.trajectory_limit(), runs[0]
        scores, _ = self._write(step, "trajectories", [trajectories.score_all(of_one, limit) for of_one in runs])
        self.telemetry.say(trajectories.table(scores))
        if jax.process_index() != 0:
            return
        self._keep(step, {f"trajectories_stride_{b}": trajectory_figure.draw(part.sequences) for b, part in found.items()})
        poses.save(self.telemetry.folder / _figure_folder(step) / "trajectories.npz", found, limit)

    def _trajectories(self, params: tree.Params) -> dict[int, Stride]:
        """True and estimated poses of the whole test videos, by stride."""
        strides, limit = self.program.task.trajectory_strides(), self.program.task.trajectory_limit()
        assert isinstance(self.dataset, PairDataset)  # the only kind with poses, which the task has asked for
        if self._model is None:
            parts = self.program.mesh.shape["data"]
            self._model = Model(self.program.task, self.program.graphdef, params, self.program.mesh, -(-CHUNK // parts) * parts)
            self._motions = sequences.mean_motions(self.dataset, strides)
        return sequences.estimate(self._model.with_params(params), self.dataset, strides, limit, self._motions)

    def _keep(self, step: int, drawn: dict[str, np.ndarray]) -> None:
        """Figures in TensorBoard, and as files."""
        self.telemetry.images(step, drawn)
        folder = self.telemetry.folder / _figure_folder(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in drawn.items():
                figures.save(folder / f"{name}.png", image)
        except OSError as error:
            raise UserError(f"cannot write figures in {folder}: {error}; make room there, then resume") from None


def _figure_folder(step: int) -> Path:
    """Where the figures of a step are, below the run's folder."""
    return Path("figures", f"step_{step:08d}")
