"""The loop, read top to bottom. Order within a step: update, log, evaluate, save, leave if the machine is being taken away."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from niso import checkpoint, evaluate, figures, metrics, sharding, tree
from niso.checkpoint import Checkpoints
from niso.config import Experiment, flat
from niso.data.pipeline import PairDataset, open_dataset
from niso.errors import UserError
from niso.metrics import Metrics
from niso.step import Program, TrainState
from niso.telemetry import Telemetry

PREEMPTED = 42  # exit code that asks a launcher to start the same command again


def run(experiment: Experiment, workdir: str, accept_changes: bool = False) -> int:
    """Trains to the experiment's last step, going on from `workdir`'s newest checkpoint; returns the exit code.

    Raises:
      UserError: anything a user can put right.
    """
    checkpoints = Checkpoints(workdir, experiment.checkpoint.keep)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        checkpoints.check_config(experiment.resolved, accept_changes)
        primary = jax.process_index() == 0
        done = checkpoints.latest() or 0
        if done >= experiment.steps:
            if primary:
                print(f"{workdir}: this run is finished ({done} steps); see it with: tensorboard --logdir {workdir}")
            return 0
        mesh = sharding.make_mesh(experiment.mesh)
        sharding.check_batch(mesh, experiment.batch, experiment.optimizer.accumulate)
        dataset = open_dataset(experiment.data)
        program = Program(experiment, mesh, dataset.batch_shapes(experiment.batch))
        state, start = _begin(program, checkpoints)
        if primary:
            checkpoint.write_config(workdir, experiment.resolved)
        telemetry = stack.enter_context(
            Telemetry(
                workdir, steps=experiment.steps, batch=experiment.batch, resume_step=start, primary=primary,
                profile_steps=experiment.log.profile_steps,
            )
        )  # fmt: skip
        _introduce(telemetry, program, dataset, start)
        return _Loop(program, dataset, checkpoints, telemetry, Path(workdir)).run(state, start)


class _Loop:
    """What the steps of one run share."""

    def __init__(
        self, program: Program, dataset: PairDataset, checkpoints: Checkpoints, telemetry: Telemetry, workdir: Path
    ):
        self.experiment = program.experiment
        self.program, self.dataset, self.checkpoints, self.telemetry = program, dataset, checkpoints, telemetry
        self.workdir = workdir
        self.rows = sharding.host_rows(program.mesh, self.experiment.batch)
        self.sound = 0  # the last step known to be finite

    def run(self, state: TrainState, start: int) -> int:
        e = self.experiment
        self.sound = start
        if start == 0:
            self._evaluate(0, state)
        stream = self.dataset.train_batches(batch=e.batch, seed=e.seed, start=start, steps=e.steps, rows=self.rows)
        with stream as batches:
            pending: tuple[int, Metrics] | None = None
            window = state.window
            for step in range(start + 1, e.steps + 1):
                with self.telemetry.waiting():
                    batch = next(batches)
                previous = window
                state, window = self.program.train(
                    state, sharding.place_batch(self.program.batch_sharding, batch, e.batch)
                )
                if step > start + 1:
                    jax.block_until_ready(previous)  # at most two steps in flight: batches do not pile up
                self.telemetry.tick(step)

                # Read one step late, so that the device has work while the host writes.
                if pending:
                    self._log(*pending)
                pending = (step, window) if self._due(step, e.log.every) else None

                leave = self.checkpoints.preempted(step)
                evaluate_now = self._due(step, e.log.evaluate_every)
                save_now = self._due(step, e.checkpoint.every) or leave
                if evaluate_now or save_now:
                    if pending:
                        self._log(*pending)
                        pending = None
                    self._check_finite(step, metrics.values(window), state)
                if evaluate_now:
                    self._evaluate(step, state)
                if save_now:
                    self.telemetry.flush()  # a checkpoint never knows of steps that metrics.jsonl does not
                    self.checkpoints.save(step, state, e.resolved)
                if leave and step < e.steps:
                    self.telemetry.say(f"asked to leave: step {step} is saved; the same command goes on from there")
                    return PREEMPTED
        self.telemetry.say(f"done: figures in {self.figure_folder(e.steps)}; tensorboard --logdir {self.workdir}")
        return 0

    def figure_folder(self, step: int) -> Path:
        return self.workdir / "figures" / f"step_{step:08d}"

    def _due(self, step: int, every: int) -> bool:
        return step == self.experiment.steps or bool(every and step % every == 0)

    def _log(self, step: int, window: Metrics) -> None:
        values = metrics.values(window)
        self._check_finite(step, values)
        rate = {"learning_rate": self.program.learning_rate(step)}
        self.telemetry.scalars(step, {f"train/{name}": value for name, value in (values | rate).items()})
        self.telemetry.progress(step, {name: value for name, value in values.items() if name != "gradient_norm"})

    def _check_finite(self, step: int, values: dict[str, float], state: TrainState | None = None) -> None:
        """Stops the run if a metric, or anything in the state about to be used or saved, is not a finite number."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken and state is not None and not _all_finite(state):
            broken = ["parameters or optimiser state"]
        if broken:
            raise UserError(
                f"{', '.join(broken)} not finite in steps {self.sound + 1} to {step}; nothing of them was saved, "
                f"{self.checkpoints.newest()}: lower optimizer.peak, set optimizer.clip=1.0 or a task.ridge of 1e-4, "
                "then resume with --accept_config_changes"
            )
        self.sound = step

    def _evaluate(self, step: int, state: TrainState) -> None:
        e = self.experiment
        with self.telemetry.aside():
            with self.dataset.test_batches(batch=e.batch, rows=self.rows) as batches:
                values = evaluate.evaluate(self.program, state, batches)
            self.telemetry.scalars(step, {f"eval/{name}": value for name, value in values.items()})
            for line in self.program.task.summary(values):
                self.telemetry.say(f"evaluation at step {step}: {line}")
            if self._due(step, e.log.figures_every):
                self._draw(step, state)

    def _draw(self, step: int, state: TrainState) -> None:
        batch = self.dataset.figure_batch(self.experiment.log.figure_examples)
        arrays: dict[str, np.ndarray] = jax.device_get(self.program.inspect(state, batch))
        if jax.process_index() != 0:
            return
        drawn = self.program.task.figures(arrays)
        self.telemetry.images(step, drawn)
        self.telemetry.histograms(step, {name: array for name, array in arrays.items() if array.ndim == 1})
        folder = self.figure_folder(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in drawn.items():
                figures.save(folder / f"{name}.png", image)
        except OSError as error:
            raise UserError(f"cannot write figures in {folder}: {error}; make room there, then resume") from None


@jax.jit
def _all_finite(state: TrainState) -> Array:
    """Whether every floating-point number of the state is finite: a finite loss says nothing of the update after it."""
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))


def _begin(program: Program, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The newest checkpoint's state, or a new one; and its step."""
    if checkpoints.latest() is not None:
        state = checkpoints.restore(program)
    else:
        state = program.init(checkpoint.warm_start(program.task.warm_start, program))
    return state, int(state.step)


def _introduce(telemetry: Telemetry, program: Program, dataset: PairDataset, start: int) -> None:
    """Says what is about to be trained, on what, with what."""
    e, mesh = program.experiment, program.mesh
    hparams: dict[str, Any] = {k: v for k, v in flat(e.resolved).items() if isinstance(v, int | float | str | bool)}
    telemetry.config(json.dumps(e.resolved, indent=2), hparams)
    cost = dataset.bytes_per_pair()
    telemetry.say(
        f"{e.experiment}:{e.variant}: {tree.count(program.parameter_shapes):,} parameters on {mesh.size} "
        f"{jax.default_backend()} device(s), mesh data {mesh.shape['data']} x space {mesh.shape['space']}; "
        f"{'resuming at' if start else 'from'} step {start}"
    )
    telemetry.say(
        f"{dataset.train_size:,} training pairs, {dataset.test_size:,} test pairs; one pair reads {cost['disk'] / 1e3:.1f} kB and "
        f"sends {cost['device'] / 1e3:.1f} kB to the device"
    )
