"""Replicas: several seeds side by side in one program are the runs that each would have been alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import niso
from niso import checkpoint_files, metrics, warm_start
from niso.errors import UserError
from niso.replicas import Replicas, mean_and_error
from niso.step import Program, TrainState
from tests import runs, tiny
from tests import test_operator_only as operator_only
from tests.conftest import mesh_of

COUNT, STEPS = 2, 4


def trained(p: Program, steps: int = STEPS, make: Callable[..., dict] = tiny.batch) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after some steps on which every replica has batches of its own seed, and the metrics of each replica."""
    state = p.init({})
    for n in range(steps):
        batches = [make(seed=100 * seed + n) for seed in p.replicas.seeds]
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        state, window = p.train(state, p.place(stacked if p.replicas.count > 1 else batches[0]))
    return state, metrics.by_replica(window)


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]]:
    """Parameters, training metrics and evaluation of each seed by itself."""
    found = []
    for seed in range(COUNT):
        p = tiny.program(seed=seed)
        state, window = trained(p)
        evaluated = metrics.values(p.evaluate(state, p.place_test(tiny.batch(seed=7)), 0))
        found.append((jax.device_get(state.params), window[0], evaluated))
    return found


@pytest.mark.parametrize("data,space,axis,mapped", [(1, 1, None, False), (2, 1, "data", True), (2, 2, None, False)])
@pytest.mark.slow
def test_replicas_are_the_single_runs(
    alone: list, data: int, space: int, axis: str | None, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device, split over `data`, and with examples split over `data` because rows are over `space`; `mapped` as on a GPU."""
    if mapped:
        monkeypatch.setattr(Replicas, "written_out", False)
    p = tiny.program(data, space, seeds=COUNT)
    assert p.replicas.axis == axis
    state, windows = trained(p)
    evaluated = metrics.by_replica(p.evaluate(state, p.place_test(tiny.batch(seed=7)), 0))
    for index, (params, window, values) in enumerate(alone):
        for name, value in params.items():
            # Through Adam: roundings of nearly vanishing gradients become parts of whole steps of 3e-3 (as in test_step).
            np.testing.assert_allclose(jax.device_get(state.params[name])[index], value, 1e-3, 5e-4, err_msg=name)
        assert windows[index] == pytest.approx(window, rel=1e-3)
        assert evaluated[index] == pytest.approx(values, rel=1e-3)
    assert len({window["loss"] for window in windows}) == COUNT


def test_replicas_of_an_operator_alone_are_the_single_runs() -> None:
    """What the test before this one shows of networks, where a step is compiled in seconds: each draws its own shifts."""

    def after(**seeds: int) -> tuple[TrainState, list[dict[str, float]]]:
        return trained(operator_only.program("toric", **seeds), make=lambda seed: operator_only.batch())

    together, windows = after(seed=0, seeds=COUNT)
    for index in range(COUNT):
        alone, (window,) = after(seed=index)
        for name, value in alone.params.items():
            np.testing.assert_allclose(jax.device_get(together.params[name])[index], value, 1e-3, 5e-4, err_msg=name)
        assert windows[index] == pytest.approx(window, rel=1e-3)
    assert windows[0]["loss"] != windows[1]["loss"]


def test_solves_of_replicas_wait_for_each_other() -> None:
    """On a CPU: of any two LAPACK calls in the compiled step one needs the other's result. Independent ones can deadlock."""
    p = tiny.program(1, 1, seeds=COUNT)
    text = p.train.lower(p.state_shapes, p.batch_shapes).compile().as_text()
    bodies: dict[str, list[str]] = {}  # computation -> its instructions, in the order of the text, which is one of execution
    for line in text.splitlines():
        if begun := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            entry = begun[1]  # it comes last
            bodies[entry] = []
        elif line.startswith(" "):
            bodies[entry].append(line)
    names = {name: [re.findall(r"%([\w.-]+)", line) for line in lines] for name, lines in bodies.items()}
    solving = {name for name, lines in bodies.items() if any("lapack" in line for line in lines)}
    while more := {n for n in bodies if n not in solving and any(solving & set(used) for used in names[n])}:
        solving |= more
    needs: dict[str, set[str]] = {}  # instruction -> solves that it needs
    solves: list[str] = []
    for line, (name, *used) in zip(bodies[entry], names[entry], strict=True):
        needs[name] = set().union(*(needs[one] | ({one} & set(solves)) for one in used if one in needs))
        if "lapack" in line or solving & set(used):
            solves.append(name)
    assert len(solves) >= 2 * COUNT  # of the basis and of the maps
    for index, name in enumerate(solves):
        assert set(solves[:index]) <= needs[name], (name, solves)


@pytest.mark.slow
def test_initial_parameters_are_bit_identical() -> None:
    together = jax.device_get(tiny.program(seeds=COUNT).init({}).params)
    for index in range(COUNT):
        for name, value in jax.device_get(tiny.program(seed=index).init({}).params).items():
            np.testing.assert_array_equal(together[name][index], value, err_msg=name)


@pytest.mark.slow
def test_split_replicas_need_no_communication() -> None:
    """Over `data` nothing crosses devices but the metrics on their way out, one number each."""
    p = tiny.program(2, 1, seeds=COUNT)
    assert p.state_sharding.params["operator/basis"].spec == PartitionSpec("data", "space", None)
    text = p.train.lower(p.state_shapes, p.batch_shapes).compile().as_text()
    found = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert found and all(kind == "all-gather" and re.fullmatch(r"f32\[2\]\S*", shape) for shape, kind in found), found


def test_batches_are_those_of_each_seed() -> None:
    """A stream per replica, opened with its seed; without several replicas the stream itself."""
    opened = []

    class Stream(list):
        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None:
            opened.append("closed")

    def open_stream(*, seed: int, batch: int, start: int, steps: int, rows: list[int]) -> Stream:
        opened.append((seed, rows))
        return Stream({"x_BxC": np.full((len(rows), 2), 10 * seed + n)} for n in range(start, steps))

    with Replicas(mesh_of(2), 5, 3).train_batches(open_stream, 4, 1, 3) as batches:  # type: ignore[arg-type]
        first, second = batches
    assert first["x_BxC"].shape == (3, 4, 2)
    assert first["x_BxC"][:, 0, 0].tolist() == [51, 61, 71] and second["x_BxC"][:, 0, 0].tolist() == [52, 62, 72]
    assert opened == [(5, [0, 1, 2, 3]), (6, [0, 1, 2, 3]), (7, [0, 1, 2, 3])] + 3 * ["closed"]
    with Replicas(mesh_of(2), 5, 1).train_batches(open_stream, 4, 1, 3) as batches:  # type: ignore[arg-type]
        assert next(iter(batches))["x_BxC"].shape == (4, 2)


def test_mean_and_standard_error() -> None:
    means, errors = mean_and_error([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}, {"a": 5.0, "b": 2.0, "c": 1.0}])
    assert means == {"a": 3.0, "b": 2.0} and errors == pytest.approx({"a": 2 / 3**0.5, "b": 0.0})
    assert mean_and_error([{"a": 1.0}]) == ({"a": 1.0}, {})


def test_a_batch_that_cannot_be_shared_is_named() -> None:
    Replicas(mesh_of(4), 0, 4).check_batch(3, 1)
    with pytest.raises(UserError, match="multiple of 4"):
        Replicas(mesh_of(4), 0, 3).check_batch(6, 1)
    with pytest.raises(UserError, match=r"batch=3 cannot be split into optimizer\.accumulate=2"):
        Replicas(mesh_of(4), 0, 4).check_batch(3, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two seeds."""
    workdir = tmp_path_factory.mktemp("replicas") / "run"
    ended = runs.run(workdir, seeds=2)
    assert ended.code == 0, ended.err
    assert "2 replicas (seeds 0 to 1) of" in ended.out
    assert re.search(r"evaluation at step 16: standard errors of 2 replicas: .*equivariance_error", ended.out)
    return workdir


def lines(workdir: Path) -> dict[int, dict[str, float]]:
    """Everything in metrics.jsonl, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["step"], {}).update(values)
    return found


@pytest.mark.slow
@pytest.mark.slow
def test_a_run_of_replicas_survives_a_kill_and_reports_each(run: Path, tmp_path: Path) -> None:
    """Bit-identical to an unbroken one; means, standard errors and every replica's values, which are those of its single run."""
    assert runs.run(tmp_path / "killed", hooks=["kill=7"], seeds=2).code == -9
    ended = runs.run(tmp_path / "killed", seeds=2)
    assert ended.code == 0 and "resuming at step 5" in ended.out
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    assert runs.run(tmp_path / "single", seed=1).code == 0
    together, single = lines(run)[16], lines(tmp_path / "single")[16]
    for name in ("eval/loss", "eval/equivariance_error", "train/reconstruction"):
        kind, _, metric = name.partition("/")
        pair = [together[f"{kind}_seed_{seed}/{metric}"] for seed in (0, 1)]
        assert pair[1] == pytest.approx(single[name], rel=2e-3), name  # 16 steps of Adam on rounding
        assert together[name] == pytest.approx(np.mean(pair))
        assert together[f"{kind}_standard_error/{metric}"] == pytest.approx(abs(pair[0] - pair[1]) / 2)


@pytest.mark.slow
def test_a_replica_is_loaded_and_warms_others_up(run: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    codes = [niso.load(run, replica=index).encode(frames) for index in range(2)]
    assert not np.allclose(codes[0], codes[1])
    with pytest.raises(UserError, match="no replica 2: choose one from 0 to 1"):
        niso.load(run, replica=2)

    def warmed(source: Path, seeds: int) -> dict[str, jax.Array]:
        small = {"data__size": 8, "task__widths": (4,)}
        p = tiny.program(seeds=seeds, task__warm_start=(("operator/.*", str(source)),), **small)
        return warm_start.take(p.task.warm_start, p)

    taken = warmed(run, 2)
    saved = checkpoint_files.parameters(checkpoint_files.find(run), *wanted(taken))
    np.testing.assert_array_equal(taken["operator/basis"], saved["operator/basis"])
    with pytest.raises(UserError, match=r"has seeds=2 replicas, here there are 3; set --config.seeds=2"):
        warmed(run, 3)


@pytest.mark.slow
def test_one_run_warms_up_every_replica(tmp_path: Path) -> None:
    assert runs.run(tmp_path, steps=5).code == 0
    small = {"data__size": 8, "task__widths": (4,)}
    p = tiny.program(seeds=3, task__warm_start=(("operator/.*", str(tmp_path)),), **small)
    taken = warm_start.take(p.task.warm_start, p)
    state = p.init(taken)
    one = np.asarray(taken["operator/basis"])[0]
    assert all(np.array_equal(one, each) for each in np.asarray(state.params["operator/basis"]))


def wanted(taken: dict[str, jax.Array]) -> tuple[dict, dict]:
    return taken, {name: leaf.sharding for name, leaf in taken.items()}
