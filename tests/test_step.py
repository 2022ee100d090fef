"""The jitted step: golden numbers, accumulation, freezing, schedules, meshes."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from niso import metrics, rng
from niso.errors import UserError
from niso.metrics import Mean
from niso.optimizer import Optimizer
from niso.step import Program, TrainState
from tests import tiny


def steps(p: Program, count: int = 5) -> tuple[TrainState, dict[str, float]]:
    state = p.init({})
    for n in range(count):
        state, window = p.train(state, tiny.place(p, tiny.batch(seed=n)))
    return state, metrics.values(window)


def close(a: TrainState, b: TrainState, rtol: float, atol: float) -> None:
    for name in a.params:
        np.testing.assert_allclose(jax.device_get(a.params[name]), jax.device_get(b.params[name]), rtol, atol, err_msg=name)


def check_golden(name: str, found: dict[str, float], rel: float = 1e-4) -> None:
    """Against golden_<name>.json, to rounding (1e-4: float32 through an SVD, other CPUs' instructions)."""
    golden = json.loads(Path(__file__).with_name(f"golden_{name}.json").read_text())
    for key, value in golden.items():
        assert found[key] == pytest.approx(value, rel=rel), (
            f"{key} moved: the mathematics of a step is not what it was. If that was meant, say why in the commit and write "
            f"{ {n: round(v, 7) for n, v in found.items()} } to golden_{name}.json"
        )
    assert golden.keys() == found.keys()


def test_golden_step() -> None:
    """Three steps of a fixed experiment on fixed data."""
    check_golden("pose_encode", steps(tiny.program(), 3)[1])


def test_window_sums_between_log_points() -> None:
    p = tiny.program(log__every=3)
    state, single, counts = p.init({}), [], []
    for n in range(5):
        state, window = p.train(state, tiny.place(p, tiny.batch(seed=n)))
        counts.append(float(window["loss"].count))
        single.append(metrics.values(window)["loss"])
    assert counts == [8, 16, 24, 8, 16]
    assert not math.isclose(single[3], single[2])  # begun anew


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(parts: int) -> None:
    # A step of Adam divides by the gradient's own size, which lifts rounding of nearly vanishing gradients: 2e-4 of 3e-3 steps.
    (whole, a), (pieces, b) = steps(tiny.program()), steps(tiny.program(optimizer__accumulate=parts))
    close(whole, pieces, 1e-3, 5e-4)
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "data,space,zero",
    [(4, 2, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((8, 1, True), (8, 1, False), (2, 4, True)))],
)
def test_eight_devices_are_one_device(data: int, space: int, zero: bool) -> None:
    (one, a), (eight, b) = steps(tiny.program()), steps(tiny.program(data, space, mesh__zero=zero))
    close(one, eight, 1e-3, 5e-4)
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_frozen_parameters_stay_bit_identical_under_weight_decay() -> None:
    p = tiny.program(task__trainable="decoder/.*", optimizer__weight_decay=0.5)
    state = p.init({})
    before = jax.device_get(state.frozen)
    assert {name.split("/")[0] for name in before} == {"encoder", "operator"}
    trained = jax.device_get(state.params)
    for n in range(3):
        state, _ = p.train(state, tiny.place(p, tiny.batch(seed=n)))
    for name, value in before.items():
        np.testing.assert_array_equal(value, state.frozen[name])
    assert all(np.any(value != np.asarray(state.params[name])) for name, value in trained.items() if "kernel" in name)
    moments = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0] if hasattr(path[-1], "key")}
    assert moments == set(trained)


def test_mistakes_that_only_the_model_can_see_are_named() -> None:
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        tiny.program(task__trainable="nothing")
    with pytest.raises(UserError, match=r"frames are \[16, 16, 3\], but task.size=16 and task.channels=1"):
        tiny.program(task__channels=1)
    with pytest.raises(UserError, match=r"task.regime=pairs takes 2 frames, not 3: set data\.views to that"):
        tiny.program(data__views=3)
    with pytest.raises(UserError, match="blocks=0: must be"):
        tiny.experiment(task__blocks=0)


def first_update(optimizer: Optimizer) -> tuple[dict[str, np.ndarray], Any]:
    """Of parameters that are all one, with gradients 1, 2, ..., and the state of the optimiser after it."""
    names = ("encoder/stem/kernel", "encoder/stem/bias", "operator/basis", "operator/eigenvalue")
    params = {name: np.ones(3, np.float32) for name in names}
    gradients = {name: np.full(3, n, np.float32) for n, name in enumerate(names, start=1)}
    chain = optimizer.transformation(100)
    return chain.update(gradients, chain.init(params), params)


def test_decay_reaches_what_its_pattern_names() -> None:
    plain = Optimizer(1e-3, 1e-4, 10, 0, 0.9, 0.999, 0.5, ".*/kernel", 0.0, 1)
    (kernels, _), (everywhere, _) = first_update(plain), first_update(dataclasses.replace(plain, decay=".*"))
    differ = {name for name in everywhere if not np.array_equal(everywhere[name], kernels[name])}
    assert differ == {"encoder/stem/bias", "operator/basis", "operator/eigenvalue"}
    np.testing.assert_allclose(everywhere["operator/basis"], 1.5 * kernels["operator/basis"], rtol=1e-5)  # (1 + 0.5 θ) / 1


def test_clip_bounds_what_adam_sees() -> None:
    free = Optimizer(1e-3, 1e-4, 10, 0, 0.9, 0.999, 0.0, ".*", 0.0, 1)
    norms = []
    for optimizer in (free, dataclasses.replace(free, clip=1e-3)):
        _, state = first_update(optimizer)
        norms.append(math.sqrt(sum(float((x**2).sum()) for x in state[-3].mu.values())))
    assert norms == pytest.approx([0.1 * math.sqrt(3 * (1 + 4 + 9 + 16)), 0.1 * 1e-3], rel=1e-5)


@pytest.mark.slow
def test_the_norm_is_measured_before_clipping() -> None:
    (_, norm), (clipped, measured) = steps(tiny.program(), 1), steps(tiny.program(optimizer__clip=1e-3), 1)
    assert measured["gradient_norm"] == pytest.approx(norm["gradient_norm"], rel=1e-6) and norm["gradient_norm"] > 2e-3
    mu = jax.tree.leaves(clipped.opt_state[-3].mu)
    assert math.sqrt(sum(float((x**2).sum()) for x in mu)) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_schedule() -> None:
    optimizer = Optimizer(5e-4, 5e-5, 2_000, 0, 0.9, 0.999, 1e-4, ".*", 0.0, 1)
    rate = optimizer.schedule(200_000)
    # 1e-4: optax's schedules are float32.
    assert rate(0) == pytest.approx(5e-4 / 2_000, rel=1e-4) and rate(1_999) == pytest.approx(5e-4, rel=1e-4)
    assert rate(101_000 - 1) == pytest.approx((5e-4 + 5e-5) / 2, rel=1e-3) and rate(199_999) == pytest.approx(5e-5, rel=1e-4)
    for count in (0, 3, 1_998, 1_999, 2_000, 100_000, 199_999, 300_000):
        assert optimizer.rate(200_000, count) == pytest.approx(float(rate(count)), rel=1e-4), "what is logged"
    longer = Optimizer(5e-4, 5e-5, 2_000, 1_000_000, 0.9, 0.999, 1e-4, ".*", 0.0, 1).schedule(200_000)
    assert longer(199_999) > 4.5e-4  # the reference code's schedule hardly decays within the run
    with pytest.raises(UserError, match="warmup"):
        optimizer.schedule(2_000)


def test_draws_depend_on_the_address_only() -> None:
    def draw(*address: Any) -> list[int]:
        return jax.random.bits(rng.stream(*address), (4,)).tolist()

    assert draw(0, "draw", 7) == draw(0, "draw", 7)
    assert len({tuple(draw(*a)) for a in [(0, "draw", 7), (0, "draw", 8), (0, "init", 7), (1, "draw", 7)]}) == 4
    batch = tiny.batch()
    task = tiny.experiment().task
    assert all(np.array_equal(task.draw(batch, rng.stream(0, "draw", 3))[name], batch[name]) for name in batch)


def test_initialisation_depends_on_the_seed_only() -> None:
    a, b, c = (tiny.program(data, seed=seed).init({}) for data, seed in ((1, 0), (8, 0), (1, 1)))
    for name in a.params:
        np.testing.assert_array_equal(jax.device_get(a.params[name]), jax.device_get(b.params[name]), err_msg=name)
    assert np.any(np.asarray(a.params["operator/basis"]) != np.asarray(c.params["operator/basis"]))


def test_means_are_never_averages_of_averages() -> None:
    a = Mean.of(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    b = Mean.of(np.array([10.0, np.nan]), np.array([1.0, 0.0]))
    assert (a + b).value() == pytest.approx(4.0)
    assert math.isnan(Mean.of(np.zeros(2), np.zeros(2)).value())
    assert math.isnan((a + Mean.of(np.array([np.nan]), np.ones(1))).value())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_step_of_the_published_sizes() -> None:
    """pose_encode `paper` on one CPU device, batch 2: finite from initialisation (several GB, about a minute)."""
    from configs.pose_encode import get_config
    from niso.config import Experiment
    from tests.conftest import mesh_of

    config = get_config("paper")
    config.batch = 2
    e = Experiment.from_config(config)
    p = Program(e, mesh_of(1), tiny.shapes(e))
    state, window = p.train(p.init({}), tiny.place(p, tiny.batch(rows=2, size=144)))
    assert all(np.isfinite(value) for value in metrics.values(window).values())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(state.params)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_of_an_accelerator_leaves_it_neither_for_the_host_nor_for_a_solver(platform: str) -> None:
    """Lowered for hardware that is not here: no callback, no loop with a test, no LAPACK but the Cholesky factor of one K x K
    matrix (Φ's derivative), convolutions in bfloat16, the operator's and the solve's products in full float32."""
    p = tiny.program(8, task__dtype="bfloat16")
    text = p.train.trace(p.state_shapes, p.batch_shapes).lower(lowering_platforms=(platform,)).as_text()
    assert set(re.findall(r"custom_call @([\w.]+)", text)) <= {"cusolver_potrf_ffi"}
    assert "stablehlo.while" not in text and "callback" not in text
    convolutions = re.findall(r"stablehlo\.convolution.*-> tensor<\S*x(\w+)>", text)
    assert len(convolutions) == 24 and set(convolutions) == {"bf16"}  # 8 convolutions: forward, by input, by weight
    float32 = [line for line in text.splitlines() if "stablehlo.dot_general" in line and line.rstrip().endswith("xf32>")]
    assert len(float32) > 150 and all("[HIGHEST, HIGHEST]" in line for line in float32)
