"""A run that is killed, taken away or goes wrong ends as if nothing had happened, or says in one line why it does not."""

import contextlib
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from niso import train
from niso.checkpoint import Checkpoints
from niso.errors import UserError
from niso.journal import Journal
from niso.metrics import Mean
from niso.optimizer import Optimizer
from niso.replicas import Replicas
from niso.step import TrainState
from tests import runs
from tests.conftest import mesh_of

TOO_MUCH = {"optimizer__peak": 1e10, "optimizer__weight_decay": 1e30}  # their product overflows in an update


def assert_as_unbroken(workdir, unbroken) -> None:
    assert runs.same(runs.arrays(workdir, runs.STEPS), runs.arrays(unbroken, runs.STEPS))
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def one_line(ended: runs.Ended) -> str:
    """What a user's mistake prints."""
    assert ended.code == 2, (ended.out, ended.err)
    assert ended.err.startswith("niso: ") and ended.err.count("\n") == 1, ended.err
    return ended.err


# How a run ends, its exit code, and the checkpoints that there are then. Only whole ones count: that of step 10 was not whole
# when its writer was killed.
ENDINGS = (
    ("kill=3", -9, []), ("kill=9", -9, [5]), ("kill_commit=10", -9, [5]), ("term=13", 42, [5, 10, 13]),
    ("kill=16", -9, [5, 10, 13, 15]), ("term=end", 0, [5, 10, 13, 15, 16]),
)  # fmt: skip


@pytest.mark.parametrize("chosen", [(1, 2, 3, 5), pytest.param(range(6), marks=pytest.mark.slow)], ids=["three", "five"])
def test_endings_leave_no_trace(chosen: Sequence[int], tmp_path) -> None:
    """Killed before the first checkpoint; in the middle of a window of metrics; while a checkpoint is about to get its name;
    asked to leave; killed after the last update; asked to leave when all is done. Each time the same command is given again."""
    for hook, code, saved in (ENDINGS[n] for n in chosen):
        ended = runs.run(tmp_path, hooks=[hook])
        assert ended.code == code, (hook, ended.out, ended.err)
        assert ended.err == "", hook
        assert runs.steps(tmp_path) == saved, hook
    assert_as_unbroken(tmp_path, runs.unbroken())


@pytest.mark.slow
def test_killed_on_eight_devices_accumulating_profiled_and_with_divided_optimizer_state(tmp_path) -> None:
    killed = runs.run(tmp_path, hooks=["kill=9"], devices=8, **runs.ON_EIGHT)
    assert (killed.code, runs.steps(tmp_path)) == (-9, [5])
    assert runs.run(tmp_path, devices=8, **runs.ON_EIGHT).code == 0
    assert_as_unbroken(tmp_path, runs.unbroken(8))
    assert list(tmp_path.rglob("*.xplane.pb"))  # the profiler did run


def test_finished_run_says_so_and_touches_nothing() -> None:
    workdir = runs.unbroken()
    before = runs.snapshot(workdir)
    ended = runs.run(workdir)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{workdir}: this run is finished ({runs.STEPS} steps); see it with: tensorboard --logdir {workdir}\n"
    assert runs.snapshot(workdir) == before


def test_another_config_is_refused_and_another_shape_named() -> None:
    workdir = runs.unbroken()
    before = runs.snapshot(workdir / "checkpoints")
    assert "task.alpha: 0.5 -> 0.25" in one_line(runs.run(workdir, task__alpha=0.25))
    line = one_line(runs.run(workdir, "--accept_config_changes", task__rank=4, steps=20))
    assert "params.operator/basis is (64, 8) there and (64, 4) here" in line
    assert runs.snapshot(workdir / "checkpoints") == before


@pytest.mark.slow
def test_divergence_stops_saves_nothing_and_can_be_resumed(tmp_path) -> None:
    shutil.copytree(runs.unbroken(), tmp_path, dirs_exist_ok=True)
    for step in (10, 15, 16):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    good = runs.arrays(tmp_path, 5)
    # The loss of step 6 is still finite: it is its update that ruins the parameters.
    at_once = one_line(runs.run(tmp_path, "--accept_config_changes", **TOO_MUCH, checkpoint__every=1))
    assert "parameters or optimiser state not finite in steps 6 to 6" in at_once
    later = one_line(runs.run(tmp_path, "--accept_config_changes", optimizer__peak=1e38))
    assert "loss" in later and "not finite in steps 6 to 8; nothing of them was saved, the newest checkpoint is step 5" in later
    assert runs.steps(tmp_path) == [5]
    assert runs.same(runs.arrays(tmp_path, 5), good)
    assert runs.run(tmp_path).code == 0
    assert_as_unbroken(tmp_path, runs.unbroken())


def test_clipping_can_be_switched_on_in_a_running_run() -> None:
    """As the line about a loss that is not finite advises."""
    plain = Optimizer(1e-3, 1e-4, 4, 0, 0.9, 0.999, 1e-4, ".*", 0.0, 1)
    clipped = Optimizer(1e-3, 1e-4, 4, 0, 0.9, 0.999, 1e-4, ".*", 1.0, 1)
    params = {"a": jnp.ones(3)}
    states = [optimizer.transformation(10).init(params) for optimizer in (plain, clipped)]
    plain_tree, clipped_tree = (str(jax.tree.structure(state)) for state in states)
    assert plain_tree == clipped_tree


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_checkpoint_of_eight_devices_on_fewer(devices: int, tmp_path) -> None:
    """All arrays, those that eight devices had divided among them included, bit for bit; beside an outdated checkpoint whose
    deletion was interrupted."""
    workdir = tmp_path / "run"
    shutil.copytree(runs.unbroken(8), workdir)
    for path in sorted(path for path in (workdir / "checkpoints" / "5").rglob("*") if path.is_file())[::2]:
        path.unlink()
    program = runs.program(devices, mesh__zero=True, optimizer__accumulate=2)
    checkpoints = Checkpoints(str(workdir), 9)
    try:
        state = checkpoints.restore(program)
    finally:
        checkpoints.close()
    assert runs.same(runs.named(state), runs.arrays(workdir, runs.STEPS))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {devices}
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state)) == (devices > 1)


def test_what_is_saved_is_the_state_before_the_next_update(tmp_path, monkeypatch) -> None:
    """Writing goes on while training does, in the very buffers that the next update is given: no byte of it may be newer."""
    mesh = mesh_of(8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    big = jnp.arange(1 << 18, dtype=jnp.float32).reshape(8, -1)
    params = {f"p{i}": jax.device_put(big + i, place if i % 2 else whole) for i in range(6)}
    state = TrainState(jax.device_put(jnp.zeros((), jnp.int32), whole), params, {}, {}, {})
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    opened: list[float] = []
    real = tensorstore.open

    def late(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        opened.append(time.monotonic())
        return real(*args, **options)

    monkeypatch.setattr(tensorstore, "open", late)
    checkpoints = Checkpoints(str(tmp_path), 1)
    checkpoints.save(1, state, {})
    for _ in range(4):
        state = update(state)
    jax.block_until_ready(state)
    updated = time.monotonic()
    checkpoints.close()
    assert opened and max(opened) > updated  # it was still being written
    saved = runs.arrays(tmp_path, 1)
    assert all(np.array_equal(saved[f"params.p{i}"], np.asarray(big) + i) for i in range(6))


class _Spy:
    """Stands for everything the loop talks to, and writes down in which order."""

    def __init__(self, leave: int = 0, broken: int = 0) -> None:
        self.said: list[str] = []
        self.leave, self.broken = leave, broken
        every = SimpleNamespace(every=2, evaluate_every=3, figures_every=99, figure_examples=1)
        self.experiment = SimpleNamespace(steps=6, batch=8, seed=0, log=every, checkpoint=SimpleNamespace(every=3), resolved={})
        self.mesh = mesh_of(1)
        self.replicas = Replicas(self.mesh, 0, 1)

    def place(self, batch: dict) -> dict:
        return batch

    def train(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        step = int(state.step) + 1
        self.said.append(f"update {step}")
        window_is_broken = step >= self.broken > (step - 1) // 2 * 2  # a sum stays NaN until the window ends
        total = jnp.asarray(np.nan if window_is_broken else 1.0)
        window = {"loss": Mean(total, jnp.ones(()))}
        return TrainState(jnp.asarray(step), state.params, {}, {}, window), window

    def save(self, step: int, state: TrainState, resolved: dict) -> None:
        assert int(state.step) == step
        self.said.append(f"save {step}")

    def scalars(self, step: int, values: dict) -> None:
        self.said.append(f"log {step}")

    def run(self, monkeypatch, tmp_path) -> int:
        journal = Journal(self, _Batches(), _Silent(self))  # type: ignore[arg-type]
        monkeypatch.setattr(journal, "evaluate", lambda step, state: self.said.append(f"evaluate {step}"))
        start = TrainState(jnp.asarray(0), {"p": jnp.zeros(2)}, {}, {}, {"loss": Mean(jnp.zeros(()), jnp.zeros(()))})
        return train.loop(self, _Batches(), self, journal, start)  # type: ignore[arg-type]

    def learning_rate(self, step: int) -> float:
        return 0.0

    def preempted(self, step: int) -> bool:
        return step == self.leave

    def newest(self) -> str:
        return "the newest checkpoint is step 3"


class _Silent:
    """Telemetry of which only the scalars matter."""

    def __init__(self, spy: _Spy) -> None:
        self.scalars = spy.scalars
        self.flush = lambda: spy.said.append("flush")
        self.waiting = contextlib.nullcontext
        self.compile = lambda program: program.train
        self.workdir = self.folder = Path("run")

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


class _Batches:
    """A dataset of empty batches."""

    replaced = None

    def name_batch(self, *, batch: int, seed: int, n: int) -> list[str]:
        return [f"record {8 * n + b}" for b in range(batch)]

    def train_batches(self, **options: Any) -> "_Batches":
        return self

    def __enter__(self) -> Any:
        return iter([{}] * 6)

    def __exit__(self, *_: Any) -> None: ...


def test_order_within_a_step(monkeypatch, tmp_path) -> None:
    """Update, log, evaluate, save; a line that nothing else waits for is written one step late. A checkpoint is begun only
    when what was logged is on disk: a resumed run would never write it again."""
    spy = _Spy()
    assert spy.run(monkeypatch, tmp_path) == 0
    assert spy.said == [
        "evaluate 0", "update 1", "update 2", "update 3", "log 2", "evaluate 3", "flush", "save 3",
        "update 4", "update 5", "log 4", "update 6", "log 6", "evaluate 6", "flush", "save 6",
    ]  # fmt: skip


def test_leaving_saves_first(monkeypatch, tmp_path) -> None:
    spy = _Spy(leave=4)
    assert spy.run(monkeypatch, tmp_path) == train.PREEMPTED
    assert spy.said[-3:] == ["log 4", "flush", "save 4"]


def test_leaving_after_the_last_step_is_being_done(monkeypatch, tmp_path) -> None:
    assert _Spy(leave=6).run(monkeypatch, tmp_path) == 0


@pytest.mark.parametrize(("broken", "window"), [(3, "steps 3 to 3"), (4, "steps 4 to 4"), (5, "steps 5 to 6")])
def test_no_evaluation_and_no_checkpoint_after_a_broken_step(broken: int, window: str, monkeypatch, tmp_path) -> None:
    spy = _Spy(broken=broken)
    with pytest.raises(UserError, match=f"loss not finite in {window}; nothing of them was saved, the newest"):
        spy.run(monkeypatch, tmp_path)
    assert f"evaluate {6 if broken > 3 else 3}" not in spy.said and f"save {6 if broken > 3 else 3}" not in spy.said


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(tmp_path) -> None:
    """Compiled as for real, nothing kept between the processes; killed five times after random times, then left alone."""
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    begun = time.monotonic()
    assert runs.run(unbroken, optimize=True).code == 0
    whole, draw, codes = time.monotonic() - begun, random.Random(0), []
    for _ in range(5):
        process = runs.start(workdir, optimize=True)
        deadline = time.monotonic() + whole * draw.uniform(0.5, 0.9)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        codes.append(runs.end(process).code)
    assert -9 in codes and set(codes) <= {-9, 0}
    assert runs.run(workdir, optimize=True).code == 0
    assert_as_unbroken(workdir, unbroken)
