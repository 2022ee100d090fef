"""The benchmarks: they measure in turn, cover every method and config, and refuse in one line. Their numbers are not tested."""

import dataclasses
import json
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

import niso.models.convolution
from niso import cost, metrics
from niso.config import Experiment
from niso.geometry.polar import METHODS, polar_factor
from niso.step import Program
from tests import tiny
from tests.benchmarks import convolution, loop, pixels, published_step, solve, timing, train_step
from tests.conftest import mesh_of
from tests.test_polar import matrices, twin

# Without the operator, which takes most of such a program's compilation.
TINY = ["data.size=16", "task.widths=(8,)", "task.blocks=1", "task.latent_channels=8", "task.operator=False"]
ROW = {
    "config", "dtype", "batch", "remat", "devices", "lower_s", "compile_s", "step_ms", "temporary_bytes", "argument_bytes", "gflop",
    "tflops", "peak_tflops", "mfu", "nominal_tflops", "mfu_nominal",
}  # fmt: skip


def test_functions_take_turns_and_medians_are_returned() -> None:
    calls: list[str] = []
    now = 0.0
    # Seconds of a call: two to warm up, then three rounds.
    seconds = {"slow": iter((9.0, 9.0, 4.0, 2.0, 3.0)), "fast": iter((9.0, 9.0, 0.5, 8.0, 0.25))}

    def call(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(seconds[name])

    functions = {name: partial(call, name) for name in seconds}
    assert timing.median_ms(functions, 3, clock=lambda: now) == {"slow": 3000.0, "fast": 500.0}
    assert calls == ["slow", "fast"] * 5


def test_numbers_can_be_read() -> None:
    shown = {
        0.0: "0",
        0.012345: "0.0123",
        1.2345: "1.23",
        12.345: "12.3",
        123456.7: "123,457",
        -0.5: "-0.500",
        float("nan"): "nan",
    }
    assert {value: timing.readable(value) for value in shown} == shown
    assert [timing.readable(value) for value in (None, 3, "cpu")] == ["-", "3", "cpu"]


def report(path: pathlib.Path) -> dict[str, Any]:
    """The JSON of a benchmark, with its frame checked."""
    found = json.loads(path.read_text())
    assert found.keys() == {"device", "versions", "date", "argv", "rows"} and found["versions"]["jax"] == jax.__version__
    assert found["device"]["platform"] == "cpu" and f"--json={path}" in found["argv"]
    return found


def test_solve_has_a_row_for_every_method(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "solve.json"
    assert solve.main(["--sizes", "4", "--batches", "2", "--rounds", "1", "--tall", "9x4", f"--json={path}"]) == 0
    rows = report(path)["rows"]
    square = [("4x4", name, 2) for name in ("baseline", "svd_batched", *METHODS)]
    expected = [*square, ("9x4", "thin_svd", 1), ("9x4", "mass_orthonormal", 1)]
    assert [(row["shape"], row["method"], row["batch"]) for row in rows] == expected
    assert all(row[f"{part}_ms"] > 0 and row[f"{part}_ratio"] > 0 for row in rows for part in ("forward", "forward_backward"))
    assert {row["forward_ratio"] for row in rows if row["method"] in ("baseline", "thin_svd")} == {1.0}
    lines = capsys.readouterr().out.splitlines()
    assert jax.__version__ in lines[0] and len(lines) == 2 + len(rows)


def test_the_rows_to_compare_with_solve_the_same_problem() -> None:
    values = np.linalg.svd(np.asarray(solve.products(6, 2)), compute_uv=False)
    np.testing.assert_allclose(values, np.tile(np.logspace(0, -4, 6), (2, 1)), rtol=1e-2)
    x, g = matrices("white", 6, 2), np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
    _, expected = _with_gradient(polar_factor, x, g)
    for same in (solve.baseline, solve.svd_batched):
        q, gradient = _with_gradient(same, x, g)
        np.testing.assert_allclose(q, twin(x), atol=1e-5)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)
    solves, free_NxK = solve.eigenfunctions(9, 4)
    expected, found = (orthonormal(free_NxK) for orthonormal in solves.values())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _with_gradient(f: solve.Solve, x: np.ndarray, g: np.ndarray) -> tuple[Array, Array]:
    return solve._forward_backward(f, jax.numpy.asarray(x), jax.numpy.asarray(g))


def test_train_step_of_a_tiny_experiment(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "PEAK_ON_CPU", (1, (64,)))
    path = tmp_path / "step.json"
    given = ["--configs", "pose_encode", "--batch", "8", "--rounds", "1", f"--json={path}", "--set", *TINY]
    assert train_step.main(given) == 0
    found = report(path)
    (row,) = found["rows"]
    assert row.keys() == ROW and found["argv"] == given
    assert (row["config"], row["dtype"], row["batch"], row["remat"], row["devices"]) == ("pose_encode", "float32", 8, False, 8)
    numbers = ROW - {"config", "dtype", "remat", "nominal_tflops", "mfu_nominal"}
    assert all(row[name] > 0 for name in numbers) and row["nominal_tflops"] is row["mfu_nominal"] is None
    assert row["tflops"] == pytest.approx(row["gflop"] / 8 / row["step_ms"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "temporary_mb" in lines[1] and "e-" not in lines[2]


def test_the_published_step_takes_turns_with_nisos(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "PEAK_ON_CPU", (1, (64,)))
    path = tmp_path / "step.json"
    given = ["--configs=pose_encode", "--batch=8", "--rounds=3", "--as_published", f"--json={path}", "--set", *TINY]
    assert train_step.main(given) == 0
    own, published = report(path)["rows"]
    assert own.keys() == ROW and published.keys() == ROW | {"ratio", "ratios"}
    assert (own["config"], published["config"]) == ("pose_encode", "pose_encode, as published")
    assert published["gflop"] > own["gflop"] and published["tflops"] == pytest.approx(published["gflop"] / 8 / published["step_ms"])
    low, middle, high = sorted(published["ratios"])
    assert 0 < low <= published["ratio"] == middle <= high
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[4].startswith(f"pose_encode, as published: {timing.readable(middle)} times")


def published_and_own() -> tuple[Experiment, Experiment, Experiment]:
    """The tiny experiment with its operator: with the published step, with this but for niso's solve, and with niso's step."""
    own = train_step.experiment("pose_encode", ["batch=8", *TINY, "task.operator=True", "task.rank=8"])
    published = published_step.experiment("pose_encode", own)
    exact = dataclasses.replace(published, task=dataclasses.replace(published.task, procrustes=own.task.procrustes))
    return published, exact, own


def test_the_published_step_has_nisos_loss() -> None:
    """At equal parameters and batch; its gradients too, as soon as the derivative of the solve is exact."""
    published, exact, own = published_and_own()
    programs = [train_step.program(e, mesh_of(1)) for e in (own, exact, published)]
    assert programs[0].parameter_shapes == programs[2].parameter_shapes
    params, batch = programs[0].init({}).params, train_step.random_batch(programs[0])
    jax.tree.map(np.testing.assert_array_equal, programs[2].init({}).params, params)

    def gradients(p: Program) -> tuple[dict[str, Array], dict[str, float]]:
        found, measured = jax.jit(p._gradients)(params, {}, batch, jax.random.key(0), 0.0)
        return found, metrics.values(measured)

    (expected, terms), (same, same_terms), (damped, damped_terms) = map(gradients, programs)
    assert same_terms == pytest.approx(terms, rel=1e-6) and terms["loss"] > terms["reconstruction"] > 0
    assert damped_terms.pop("gradient_norm") != pytest.approx(terms.pop("gradient_norm"), rel=1e-6)
    assert damped_terms == pytest.approx(terms, rel=1e-6)
    # Sums over other numbers of examples, in float32: 5e-7 seen. The damping moves what lies before the solve by 2e-4 to 2e-3.
    assert max(_distance(same[name], expected[name]) for name in expected) < 1e-5
    before = [name for name in expected if not name.startswith("decoder")]
    assert min(_distance(damped[name], expected[name]) for name in before) > 5e-5


def _distance(found: Array, expected: Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_the_published_step_decodes_two_more_latents_of_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    published, exact, own = published_and_own()
    more = operations(exact) - operations(own)
    task: Any = own.task
    latents = jax.ShapeDtypeStruct((2 * own.batch, *task.grid, task.latent_channels), np.float32)
    decoder = task.init_decoder(nnx.Rngs(0))
    forward = cost.operations(jax.jit(lambda z_BxHxWxC: decoder(z_BxHxWxC)).trace(latents)).total
    unproject = 2 * task.rank * latents.size
    assert more == 3 * (forward + unproject)  # forward, and backward by each of two factors

    def refuse(*arrays: Array) -> Array:
        raise AssertionError("niso's own weight gradient")

    monkeypatch.setattr(niso.models.convolution, "weight_gradient", refuse)
    operations(published)
    with pytest.raises(AssertionError, match="own weight gradient"):
        operations(own)


@pytest.mark.slow
def test_the_loop_is_measured_without_and_with_log_points(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "loop.json"
    assert loop.main(["--steps=200", "--window=20", "--device_ms=1", f"--json={path}"]) == 0
    *rows, added = report(path)["rows"]
    assert [(row["loop"], row["windows"]) for row in rows] == [("bare", 5), ("no log point", 4), ("log every step", 3)]
    for row in rows:
        assert 0 < row["fastest_ms"] <= row["elapsed_ms"] and 0 < row["thread_ms"] <= row["elapsed_ms"]
    assert added["standard_error_ms"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    with pytest.raises(SystemExit):
        loop.main(["--steps=250"])


def test_convolution(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "convolution.json"
    assert convolution.main(["--shapes", "2,8,3,4", "1,6,2,2", "--rounds=2", f"--json={path}"]) == 0
    rows = report(path)["rows"]
    assert [(row["shape"], row["gflop"]) for row in rows] == [
        ("2,8,3,4", 2 * 9 * 2 * 64 * 12 / 1e9),
        ("1,6,2,2", 18 * 36 * 4 / 1e9),
    ]
    assert all(row[name] > 0 for row in rows for name in ("forward", "by_input", "by_kernel", "by_blocks", "gflop_s"))
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        convolution.main(["--shapes", "2,8,3"])
    assert "'2,8,3' is not images,pixels,inputs,outputs" in capsys.readouterr().err


def operations(e: Experiment) -> float:
    return train_step.program(e, mesh_of(1)).model_operations()


def test_operations_are_those_of_the_whole_step_whatever_recomputes_or_accumulates() -> None:
    plain = train_step.experiment("pose_encode", ["batch=8", *TINY])
    odd = train_step.experiment("pose_encode", ["batch=8", *TINY, "task.remat=True", "optimizer.accumulate=4"])
    twice = train_step.experiment("pose_encode", ["batch=16", *TINY])
    flops = operations(plain)
    assert operations(odd) == flops
    assert operations(twice) == pytest.approx(2 * flops, rel=0.1)  # less: the optimiser


def test_batches_are_those_of_the_pipeline() -> None:
    e = tiny.experiment()
    p = train_step.program(e, mesh_of(1))
    assert p.batch_shapes == {name: jax.ShapeDtypeStruct(*shape) for name, shape in tiny.shapes(e).items()}
    batch = train_step.random_batch(p)
    assert {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in batch.items()} == p.batch_shapes
    assert np.ptp(batch["frames_BxTxHxWxC"]) == 255 and np.all(np.asarray(batch["weight_B"]) > 0)


def test_every_config_is_found() -> None:
    folder = pathlib.Path(__file__).parents[1] / "configs"
    assert set(train_step.names()) == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    changed = train_step.experiment("pose_encode", ["task.dtype=bfloat16", "task.ridge=1e-4", "task.widths=8,16", "mesh.zero=True"])
    assert dataclasses.asdict(changed.task).items() >= {"dtype": "bfloat16", "ridge": 1e-4, "widths": (8, 16)}.items()
    assert changed.mesh.zero


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--configs=pose_enc"], "--configs pose_enc: there is no configs/pose_enc.py; there are"),
        (["--set", "task.rigde=1"], "no key task.rigde; did you mean task.ridge?"),
        (["--set", "task.ridge"], "written key=value"),
        (["--set", "task.ridge=soft"], "task.ridge is 0.0 in the config, and keeps that type"),
        (["--set", "task=1"], "no key task"),
        (["--set", "task.rank=0"], "choose a rank from 1"),
        (["--batch=3"], "choose a multiple of 8"),
        (["--as_published", "--set", "task.ridge=1e-4"], "the published solve has no ridge, as task.ridge=0.0001 of pose_encode"),
        (["--as_published", "--configs=hmnist_encode"], "hmnist_encode does not train on pairs: choose pose_encode, or --set"),
        (["--as_published", "--configs=pose_pred"], "pose_pred does not train on pairs"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert train_step.main(["--configs=pose_encode", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("niso: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--methods=qr"], ["--sizes=4,x"], ["--rounds=0"], ["--tall=4x9"], ["--json=nowhere/a.json"]]
)
def test_solve_refuses_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        solve.main(arguments)
    assert stopped.value.code == 2 and arguments[0].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_plain_network_fails_on_warped_digits(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor of Homography MNIST: it has learned the digits, and homographies of them are another matter."""
    monkeypatch.setenv("NISO_CACHE", str(tmp_path))
    found = pixels.measure("quick", 600, 0, data__test_examples=400, data__test_copies=2)
    assert found["unperturbed"] > 60 and found["warped"] < found["unperturbed"] - 20
