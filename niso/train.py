"""The loop, read top to bottom. Order within a step: update, log, evaluate, save, leave if the machine is being taken away."""

import contextlib

import jax

from niso import checkpoint, folders, metrics, sharding, warm_start
from niso.checkpoint import Checkpoints
from niso.config import Experiment
from niso.data.pipeline import open_dataset
from niso.data.stream import Examples
from niso.journal import Journal, due
from niso.metrics import Fetch
from niso.replicas import Replicas
from niso.soundness import Soundness
from niso.step import Program, TrainState
from niso.telemetry import Telemetry

PREEMPTED = 42  # exit code that asks a launcher to start the same command again


def run(experiment: Experiment, workdir: str, accept_changes: bool = False, *, for_good: bool = False) -> int:
    """Trains to the experiment's last step, going on from `workdir`'s newest checkpoint; returns the exit code.

    Args:
      for_good: it is all that this process is for: told to leave (SIGTERM) when it has ended, it keeps its exit code.

    Raises:
      UserError: anything a user can put right.
    """
    workdir = str(folders.named(workdir, "workdir"))
    checkpoints = Checkpoints(workdir, experiment.checkpoint.keep, for_good=for_good)
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, *_: checkpoints.close(failed=kind is not None))
        checkpoints.check_config(experiment.resolved, accept_changes)
        primary = jax.process_index() == 0
        done = checkpoints.latest() or 0
        if done >= experiment.steps:
            if primary:
                print(f"{workdir}: this run is finished ({done} steps); see it with: tensorboard --logdir {workdir}")
            return 0
        warm_start.check_sources(() if done else experiment.task.warm_start)
        mesh = sharding.make_mesh(experiment.mesh)
        Replicas(mesh, experiment.seed, experiment.seeds).check_batch(experiment.batch, experiment.optimizer.accumulate)
        dataset = open_dataset(experiment.data)
        program = Program(experiment, mesh, dataset.batch_shapes(experiment.batch))
        state = checkpoints.restore(program) if done else program.init(warm_start.take(program.task.warm_start, program))
        done = int(state.step)  # less than before where the newest checkpoint is damaged
        if primary:
            checkpoint.write_config(workdir, experiment.resolved)
        telemetry = stack.enter_context(Telemetry(
            workdir, steps=experiment.steps, batch=experiment.seeds * experiment.batch, resume_step=done, primary=primary,
            profile_steps=experiment.log.profile_steps,
        ))  # fmt: skip
        journal = Journal(program, dataset, telemetry)
        journal.introduce(done)
        return loop(program, dataset, checkpoints, journal, state)


def loop(program: Program, dataset: Examples, checkpoints: Checkpoints, journal: Journal, state: TrainState) -> int:
    """The steps that are left of a run, from `state`; returns the exit code."""
    e, telemetry = program.experiment, journal.telemetry
    train = telemetry.compile(program)
    start = int(state.step)
    soundness = Soundness(program, dataset, checkpoints, start)
    if start == 0:
        journal.evaluate(0, state)
    with program.replicas.train_batches(dataset.train_batches, e.batch, start, e.steps) as batches:
        pending: tuple[int, Fetch] | None = None
        window = None
        for step in range(start + 1, e.steps + 1):
            with telemetry.waiting():
                batch = next(batches)
            previous = window
            state, window = train(state, program.place(batch))
            soundness.remember(step, window)
            jax.block_until_ready(previous)  # at most two steps in flight: batches do not pile up
            telemetry.tick(step)

            # Fetched before the next step is given to the device and read after, so that it has work while the host writes; read
            # at once where something waits for it.
            late = pending
            pending = (step, Fetch.of(window)) if due(step, e.log.every, e.steps) else None
            leave = checkpoints.preempted(step)
            evaluate_now = due(step, e.log.evaluate_every, e.steps)
            save_now = due(step, e.checkpoint.every, e.steps) or leave
            for at, measured in filter(None, (late, pending if evaluate_now or save_now else None)):
                values = measured.by_replica()
                soundness.check(at, values)
                journal.log(at, values)
            if evaluate_now or save_now:
                pending = None
                soundness.check(step, metrics.by_replica(window), state)
            if evaluate_now:
                journal.evaluate(step, state)
            if save_now:
                telemetry.flush()  # a checkpoint never knows of steps that metrics.jsonl does not
                checkpoints.save(step, state, e.resolved)
            if leave and step < e.steps:
                telemetry.say(f"asked to leave: step {step} is saved; the same command goes on from there")
                return PREEMPTED
    journal.close()
    return 0
