"""A loss that is not finite: in which step it began, in which replica, and on which batch."""

import contextlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from niso import soundness, train
from niso.config import Experiment
from niso.data import pipeline
from niso.errors import UserError
from niso.metrics import Mean
from niso.replicas import Replicas
from niso.soundness import Soundness
from niso.step import Program, TrainState
from niso.tasks.laplacian import Laplacian
from tests import test_operator_only, test_stills
from tests.conftest import mesh_of
from tests.toy_records import message


class Silent:
    """A journal and its telemetry, checkpoints that are never saved."""

    def __init__(self) -> None:
        self.telemetry, self.logged = self, []
        self.waiting = contextlib.nullcontext
        self.compile = lambda program: program.train

    def log(self, step: int, values: list) -> None:
        self.logged.append(step)

    def preempted(self, step: int) -> bool:
        return False

    def newest(self) -> str:
        return "there is no checkpoint"

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def test_the_first_bad_step_of_a_run_is_named_with_its_batch(tmp_path, monkeypatch):
    """Two replicas, a window of ten steps, and an image that spoils the loss of whoever draws it, found from the seeds alone."""
    root = test_stills.write_records(tmp_path / "clean", {"train": test_stills.TRAINING, "test": test_stills.HELD_OUT})
    streams = [test_stills.train(root, seed=seed, batch=1, stack=2, steps=10) for seed in (0, 1)]
    drawn = [[test_stills.shown(batch)[0] for batch in stream] for stream in streams]
    begins = {image: min((n, seed) for seed in (0, 1) for n in range(10) if image in drawn[seed][n]) for image in drawn[1][5]}
    bad, (n, seed) = max(begins.items(), key=lambda one: one[1])
    assert 1 < n < 9
    draw = Laplacian.draw

    def spoil(self: Laplacian, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        spoilt_B = (batch["images_BxHxWxC"][:, 0, 0, ::3] == bad).any(axis=1)  # each image says its number there
        return draw(self, batch, key) | {"weight_B": jnp.where(spoilt_B, jnp.nan, batch["weight_B"])}

    monkeypatch.setattr(Laplacian, "draw", spoil)
    options = {"twin": "", "records": root, "size": test_stills.SIZE, "stack": 2, "test_examples": 2}
    config = test_operator_only.config("toric", **{f"data__{key}": value for key, value in options.items()})
    config.update_from_flattened_dict({"task.rank": 4, "batch": 1, "steps": 10, "seed": 0, "seeds": 2, "optimizer.warmup": 2})
    e = Experiment.from_config(config)
    dataset, silent = pipeline.open_dataset(e.data), Silent()
    p = Program(e, mesh_of(1), dataset.batch_shapes(1))
    with pytest.raises(UserError) as caught:
        train.loop(p, dataset, silent, silent, p.init({}))  # type: ignore[arg-type]
    line = str(caught.value)
    assert "loss" in line and "not finite in steps 1 to 10; nothing of them was saved, there is no checkpoint: lower" in line
    named = line.partition(f". It began in step {n + 1} of the replica with seed {seed}, on ")[2]
    assert re.findall(r"image (\d+) \(record", named) == [str(image) for image in drawn[seed][n]] and not silent.logged


def sound(count: int = 1, batch: int = 4) -> Soundness:
    """Of a run of some replicas at step 3, on a data set of numbers."""
    experiment = SimpleNamespace(batch=batch)
    program = SimpleNamespace(experiment=experiment, replicas=Replicas(mesh_of(1), 5, count))
    dataset = SimpleNamespace(name_batch=lambda *, batch, seed, n: [f"{seed}/{n}/{b}" for b in range(batch)])
    return Soundness(program, dataset, Silent(), 3)  # type: ignore[arg-type]


def window(*totals: float) -> dict[str, Mean]:
    total = jnp.array(totals if len(totals) > 1 else totals[0])
    return {"loss": Mean(total, jnp.ones_like(total)), "other": Mean(jnp.zeros_like(total), jnp.ones_like(total))}


def told(one: Soundness, step: int, *values: float, state: TrainState | None = None) -> str:
    return message(lambda: one.check(step, [{"loss": value} for value in values], state))


def test_the_first_bad_step_is_found_among_sums(monkeypatch):
    one = sound()
    for step, total in ((4, 1.0), (5, 2.0), (6, np.inf), (7, np.nan), (8, np.nan)):
        one.remember(step, window(total))
        if step == 6:
            one.check(5, [{"loss": 2.0}])  # a line is read one step late
    line = told(one, 8, np.nan)
    assert line.startswith("loss not finite in steps 6 to 8;") and line.endswith(
        ". It began in step 6, on 5/5/0; 5/5/1; 5/5/2; 5/5/3"
    )
    many = sound(batch=23)
    many.remember(4, window(np.nan))
    assert told(many, 4, np.nan).endswith("5/3/8; 5/3/9 and 13 more")


def test_the_replica_is_named():
    one = sound(3)
    for step, totals in ((4, (1.0, 1.0, 1.0)), (5, (1.0, 1.0, np.nan)), (6, (np.nan, 1.0, np.nan))):
        one.remember(step, window(*totals))
    assert ". It began in step 5 of the replica with seed 7, on 7/4/0;" in told(one, 6, np.nan, 1.0, np.nan)


def test_no_batch_is_named_that_may_not_be_the_one(monkeypatch):
    """Of a window with more steps than are remembered, all of which were bad."""
    monkeypatch.setattr(soundness, "REMEMBERED", 3)
    for bad, known in ((5, False), (6, False), (7, True)):
        one = sound()
        for step in range(4, 9):
            one.remember(step, window(np.nan if step >= bad else 1.0))
        line = told(one, 8, np.nan)
        assert line.startswith("loss not finite in steps 4 to 8;")
        assert line.endswith(". It began in step 7, on 5/6/0; 5/6/1; 5/6/2; 5/6/3") if known else "began" not in line


def test_a_state_that_is_not_finite_although_its_loss_was():
    def state(*values: float) -> TrainState:
        params = {"p": jnp.array(values).reshape(-1, 1) if len(values) > 1 else jnp.array(values)}
        return TrainState(jnp.asarray(4), params, {"f": jnp.ones((2, 2))}, {}, window(*[1.0] * len(values)))

    one = sound()
    one.remember(4, window(1.0))
    one.check(4, [{"loss": 1.0}], state(1.0))
    one.remember(5, window(1.0))
    line = told(one, 5, 1.0, state=state(np.inf))
    assert "parameters or optimiser state not finite in steps 5 to 5;" in line and "It began in step 5, on 5/4/0" in line
    assert "step 4 of the replica with seed 6, on 6/3/0" in told(sound(2), 4, 1.0, 1.0, state=state(1.0, np.nan))
