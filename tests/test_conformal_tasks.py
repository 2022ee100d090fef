"""Conformal shapes: views under random Möbius maps, grids that are not square, and a head that is trained with its encoder."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from niso import figures, metrics, rng, tree
from niso.errors import UserError
from niso.geometry import latlong, moebius
from niso.step import Program
from niso.tasks import views
from niso.tasks.autoencode import Autoencode
from niso.tasks.classify import Classify
from tests import bodies, digits
from tests.test_step import check_golden

KEY = rng.stream(0, "draw", 1)
SAMPLE = jax.jit(latlong.sample)


def encode_task(arm: str = "", **overrides: Any) -> Autoencode:
    task = bodies.experiment("encode", arm, **overrides).task
    assert isinstance(task, Autoencode)
    return task


def classify_task(arm: str = "", **overrides: Any) -> Classify:
    task = bodies.experiment("pred", arm, **overrides).task
    assert isinstance(task, Classify)
    return task


def stored(host: dict[str, np.ndarray], height: int, width: int, example: int, map_4x4: np.ndarray) -> np.ndarray:
    """What one example is under a map: the stored numbers at the points that come to the grid's, scaled and clipped, in float64."""
    point_Nx3 = latlong.points(height, width).astype(np.float64)
    metric = np.diag([1.0, -1.0, -1.0, -1.0])
    moved_Nx4 = np.insert(point_Nx3, 0, 1.0, axis=1) @ (metric @ map_4x4.astype(np.float64).T @ metric).T
    found = SAMPLE(host["signal_BxHxWxC"][[example]], (moved_Nx4[:, 1:] / moved_Nx4[:, :1])[None])
    scaled = host["low_BxC"][example] + host["step_BxC"][example] * np.asarray(found[0], np.float64)
    return np.clip(scaled, -1, 1).reshape(height, width, -1)


def test_training_views_are_the_surface_under_two_unrelated_maps() -> None:
    host, task = bodies.batch(), encode_task()
    drawn = jax.jit(task.draw)(host, KEY)
    frames = np.asarray(drawn["frames_BxTxHxWxC"])
    assert frames.shape == (8, 2, 8, 16, 16) and "signal_BxHxWxC" not in drawn
    map_QxXxY = np.asarray(jax.jit(moebius.random, static_argnums=(1, 2))(jax.random.split(KEY)[0], 16, views.SHIFT))
    for example, view in ((0, 0), (0, 1), (5, 1)):
        expected = stored(host, 8, 16, example, map_QxXxY[2 * example + view])
        np.testing.assert_allclose(frames[example, view], expected, atol=2e-5)
    assert np.abs(frames[:, 0] - frames[:, 1]).mean() > 0.05
    again, other = (np.asarray(jax.jit(task.draw)(host, key)["frames_BxTxHxWxC"]) for key in (KEY, rng.stream(0, "draw", 2)))
    np.testing.assert_array_equal(again, frames)
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(frames, other, strict=True))


def test_held_out_views_depend_on_surface_copy_and_seed_alone() -> None:
    host, task = bodies.batch(), encode_task()
    shuffled = {name: value[::-1] for name, value in host.items()}
    drawn = [np.asarray(jax.jit(t.draw_held_out)(b, k)["frames_BxTxHxWxC"]) for t, b, k in (
        (task, host, KEY), (task, shuffled, rng.stream(3, "evaluate", 9)), (encode_task(task__test_seed=1), host, KEY),
        (task, host | {"copy_B": host["copy_B"] + 1}, KEY), (task, host | {"item_B": host["item_B"] + 1}, KEY),
    )]  # fmt: skip
    np.testing.assert_array_equal(drawn[0], drawn[1][::-1])
    for other in drawn[2:]:
        assert all(np.abs(a - b).max() > 0.05 for a, b in zip(other, drawn[0], strict=True))
    # The classifier is tested on the second of them.
    found = jax.jit(classify_task().draw_held_out)(host, KEY)["observation_BxHxWxC"]
    np.testing.assert_allclose(found, drawn[0][:, 1], atol=1e-6)  # another program


def test_unmapped_surfaces_are_the_stored_ones_resampled() -> None:
    host, task = bodies.batch(), classify_task(task__warped=False, task__augment=False)
    for drawn in (jax.jit(task.draw)(host, KEY), jax.jit(task.draw_held_out)(host, KEY)):
        for example in (0, 3):
            np.testing.assert_allclose(drawn["observation_BxHxWxC"][example], stored(host, 8, 16, example, np.eye(4)), atol=2e-5)
    same = classify_task(task__warped=False, task__augment=False, task__size=(12, 24))
    signal = host["low_BxC"][:, None, None] + host["step_BxC"][:, None, None] * host["signal_BxHxWxC"]
    np.testing.assert_allclose(jax.jit(same.draw)(host, KEY)["observation_BxHxWxC"], np.clip(signal, -1, 1), atol=2e-5)
    warped = jax.jit(classify_task().draw)(host, KEY)["observation_BxHxWxC"]
    assert np.abs(np.asarray(warped) - drawn["observation_BxHxWxC"]).mean() > 0.05


def test_published_sizes() -> None:
    """Observations of 96 x 192, a latent grid of 12 x 24, d = k = 64: the parameters' shapes, nothing is computed."""
    from configs import cshrec11_encode, cshrec11_pred
    from niso.config import Experiment

    task = Experiment.from_config(cshrec11_encode.get_config()).task
    assert isinstance(task, Autoencode) and (task.shape, task.grid, task.points) == ((96, 192), (12, 24), 288)
    params = tree.flatten(nnx.eval_shape(lambda: task.init_model(nnx.Rngs(params=0))))[1]
    assert params["operator/basis"].shape == (288, 64) and params["encoder/stem/kernel"].shape == (16, 48)
    head = Experiment.from_config(cshrec11_pred.get_config("paper-autoencoder")).task
    assert isinstance(head, Classify)
    params = tree.flatten(nnx.eval_shape(lambda: head.init_model(nnx.Rngs(params=0))))[1]
    assert params["head/layers/0/kernel"].shape == (288 * 64, 128) and sum("head/layers" in name for name in params) == 8


def trained(p: Program, steps: int) -> tuple[Any, dict[str, float]]:
    state = p.init({})
    for n in range(steps):
        state, window = p.train(state, p.place(bodies.batch(seed=n)))
    return state, metrics.values(window)


@pytest.mark.parametrize("stage", ["encode", "pred"])
def test_golden_step(stage: str) -> None:
    """Three steps of a fixed experiment on fixed data; of the classifier, every part of which is trained."""
    state, found = trained(bodies.program(stage), 3)
    check_golden(f"cshrec11_{stage}", found)
    if stage == "pred":
        start = bodies.program(stage).init({})
        assert not state.frozen
        moved = {name.split("/")[0] for name, value in state.params.items() if np.any(value != start.params[name])}
        assert moved == {"encoder", "operator", "head"}


def test_figures_of_a_grid_that_is_not_square() -> None:
    p = bodies.program("encode")
    state = p.init({})
    arrays = jax.device_get(p.inspect(state, bodies.batch()))
    assert arrays["basis_NxK"].shape == (32, 8)  # 4 x 8 points
    drawn = p.task.figures(arrays)
    assert set(drawn) == {"reconstructions", "isometries", "eigenfunctions", "masses", "operator", "spectrum"}
    # Points are drawn as 4 rows of 8: the masses' picture is that of the same numbers in this order.
    expected = figures.masses(arrays["mass_N"], 4, 8)
    np.testing.assert_array_equal(drawn["masses"], expected)
    assert figures.masses(arrays["mass_N"], 8, 4).shape != expected.shape


@pytest.mark.parametrize("arm", ["", "autoencoder"])
def test_evaluation_reports_what_the_tables_need(arm: str) -> None:
    p = bodies.program("encode", arm)
    found = jax.eval_shape(p.evaluate, p.state_shapes, p.batch_shapes, 0)
    assert {"loss", "reconstruction"} <= set(found) and ("equivariance_error" in found) == (arm == "")


@pytest.mark.parametrize(
    "overrides,told",
    [
        ({"task__regime": "triplets"}, "needs T²ψ, which surfaces under two unrelated maps do not have"),
        ({"task__size": (8, 15)}, "task.size=(8, 15) cannot be halved between the 2 levels of task.widths"),
        ({"task__size": (0, 16)}, "task.size=(0, 16) cannot be halved"),
        ({"task__rank": 33}, "task.rank=33: the latent grid has 4 x 8 = 32 points, choose a rank from 1 to 32"),
        ({"task__damping": 1.0}, "task.damping=1.0: a share of the largest singular value, between 0 and 1"),
    ],
)
def test_impossible_settings(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        bodies.experiment("encode", **overrides)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_datasets_of_another_kind_are_refused() -> None:
    digit, body = digits.batch(), bodies.batch()
    for draw in (encode_task().draw, encode_task().draw_held_out):
        with pytest.raises(
            UserError, match=r"Möbius maps are of functions on the sphere: choose a data.dataset of these, such as shap"
        ):
            jax.eval_shape(draw, digit, KEY)
    for arm in ("triplets", "pairs"):
        with pytest.raises(UserError, match=r"homographies are of still images"):
            jax.eval_shape(digits.experiment("encode", arm).task.draw, body, KEY)
    given = encode_task(task__transformation="given")
    with pytest.raises(UserError, match=r"needs frames of videos: choose a data.dataset of these, or moebius"):
        jax.eval_shape(lambda batch: given.loss(given.init_model(nnx.Rngs(params=0)), batch), body)
    task = encode_task(task__channels=3)
    with pytest.raises(UserError, match=r"frames are \[8, 16, 16\], but task.size=\(8, 16\) and task.channels=3"):
        jax.eval_shape(lambda batch: task.loss(task.init_model(nnx.Rngs(params=0)), task.draw(batch, KEY)), body)
