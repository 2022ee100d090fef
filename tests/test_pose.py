"""The pose task: losses against NumPy float64, the sign of the scale, what is frozen, and that it learns."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from configs.pose_encode import get_config as get_encode_config
from configs.pose_pred import VARIANTS, get_config
from niso import metrics, tree, warm_start
from niso.checkpoint import Checkpoints
from niso.config import Experiment
from niso.errors import UserError
from niso.geometry import trajectory
from niso.models.heads import PoseHead
from niso.step import Program
from niso.tasks.latent import Latent
from niso.tasks.pose import Pose
from tests import tiny
from tests.conftest import mesh_of
from tests.test_heads import numbers64
from tests.test_se3 import gram_schmidt64
from tests.test_step import check_golden

SIZE, BATCH, VIEWS = 8, 4, 4
TINY = {
    "data.size": SIZE, "task.widths": (4, 8), "task.latent_channels": 4, "task.rank": 4, "optimizer.weight_decay": 0.1,
    "optimizer.warmup": 5, "optimizer.peak": 3e-3, "steps": 200,
}  # fmt: skip
HEAD = {"batch": BATCH, "data.views": VIEWS, "task.warm_start": (), "task.layers": 3, "task.head_width": 16}


def experiment(**overrides: Any) -> Experiment:
    config = get_config("quick")
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    config.update_from_flattened_dict(TINY | HEAD | changes)
    return Experiment.from_config(config)


@functools.cache
def program(data: int = 1, space: int = 1, **overrides: Any) -> Program:
    e = experiment(**overrides)
    return Program(e, mesh_of(data, space), tiny.shapes(e))


def poses(count: int, seed: int = 0) -> np.ndarray:
    """Relative poses of a few degrees, float32."""
    random = np.random.default_rng(seed)
    relative = np.tile(np.eye(4), (count, VIEWS - 1, 1, 1))
    six = np.array([1, 0, 0, 0, 1, 0]) + 0.05 * random.normal(size=(count, VIEWS - 1, 6))
    relative[..., :3, :3] = gram_schmidt64(six)
    relative[..., :3, 3] = 3 * random.normal(size=(count, 1, 3)) + random.normal(size=(count, VIEWS - 1, 3))
    return relative.astype(np.float32)


def batch(count: int = BATCH) -> dict[str, np.ndarray]:
    frames = np.random.default_rng(1).integers(0, 256, (count, VIEWS, SIZE, SIZE, 3)).astype(np.uint8)
    return {
        "frames_BxTxHxWxC": frames, "relative_BxPx4x4": poses(count), "skip_B": np.zeros(count, np.int32),
        "weight_B": np.ones(count, np.float32),
    }  # fmt: skip


@functools.cache
def setup(**overrides: Any) -> tuple[Pose, nnx.GraphDef, tree.Params]:
    """With poses that depend on the maps: the head at initialisation says the identity to all."""
    task = experiment(**overrides).task
    assert isinstance(task, Pose)
    graphdef, shapes = tree.flatten(nnx.eval_shape(lambda: task.init_model(nnx.Rngs(params=0))))
    params = jax.jit(lambda: tree.flatten(task.init_model(nnx.Rngs(params=0)))[1])()
    kernel = 0.1 * jax.random.normal(jax.random.key(1), shapes["head/output/kernel"].shape)
    return task, graphdef, params | {"head/output/kernel": kernel}


@functools.cache
def compiled(**overrides: Any) -> Any:
    """(params, batch) -> (loss, metrics, τ of all pairs)."""
    task, graphdef, _ = setup(**overrides)

    def run(params: tree.Params, host: dict[str, np.ndarray]) -> Any:
        model: Any = tree.merge(graphdef, params)
        return *task.loss(model, host), task._isometries(model, host["frames_BxTxHxWxC"])

    return jax.jit(run)


def measured(params: tree.Params, host: dict[str, np.ndarray], **overrides: Any) -> dict[str, float]:
    return metrics.values(compiled(**overrides)(params, host)[1])


def head_of(graphdef: nnx.GraphDef, params: tree.Params) -> PoseHead:
    model: Any = tree.merge(graphdef, params)
    return model.head


def expected64(task: Pose, head: PoseHead, tau_BxPxKxK: np.ndarray, host: dict[str, np.ndarray]) -> dict[str, float]:
    """All metrics from τ on, in float64."""
    nine = numbers64(head, tau_BxPxKxK.reshape(-1, 4, 4)).reshape(BATCH, VIEWS - 1, 9)
    rotation, t_hat = gram_schmidt64(nine[..., :6]), nine[..., 6:]
    truth = host["relative_BxPx4x4"].astype(np.float64)
    true_rotation, t = truth[..., :3, :3], truth[..., :3, 3]
    translation = []
    for one, true in zip(t_hat, t, strict=True):
        if task.scale == "published":
            translation.append(np.abs(np.trace(true.T @ one) / np.linalg.norm(one) ** 2 * one - true).mean())
        else:
            one, true = (v / np.sqrt(np.mean(np.linalg.norm(v, axis=1) ** 2)) for v in (one, true))
            translation.append(np.abs(one - true).mean())
    cosine = (t_hat * t).sum(-1) / np.linalg.norm(t_hat, axis=-1) / np.linalg.norm(t, axis=-1)
    terms = {"rotation": np.abs(rotation - true_rotation).mean(), "translation": np.mean(translation)}
    return terms | {
        "loss": sum(terms.values()),
        "rotation_error": trajectory.rotation_angle((np.swapaxes(rotation, -1, -2) @ true_rotation).reshape(-1, 3, 3)).mean(),
        "rotation_baseline": trajectory.rotation_angle(true_rotation.reshape(-1, 3, 3)).mean(),
        "direction_error": np.degrees(np.arccos(cosine)).mean(),
    }


@pytest.mark.parametrize("scale", ["positive", "published"])
def test_losses_against_float64(scale: str) -> None:
    task, graphdef, params = setup(task__scale=scale)
    value, found, tau = jax.device_get(compiled(task__scale=scale)(params, batch()))
    found, expected = metrics.values(found), expected64(task, head_of(graphdef, params), tau, batch())
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=2e-4), name  # the floor of "positive" is 1e-5 of these estimates
    assert float(value) == pytest.approx(found["loss"], rel=1e-6)


def test_maps_are_those_of_the_pairs() -> None:
    task, graphdef, params = setup()

    @jax.jit
    def one_by_one(params: tree.Params, frames_BxTxHxWxC: jax.Array) -> list[jax.Array]:
        model: Any = tree.merge(graphdef, params)
        maps = model.operator.maps()
        coefficients = [task.encode(model, maps, frames_BxTxHxWxC[:, t]) for t in range(VIEWS)]
        return [task.isometry(maps, *pair) for pair in itertools.pairwise(coefficients)]

    found = compiled()(params, batch())[2]
    assert found.shape == (BATCH, VIEWS - 1, 4, 4)
    np.testing.assert_allclose(found, np.stack(one_by_one(params, batch()["frames_BxTxHxWxC"]), axis=1), atol=1e-4)


def estimates(graphdef: nnx.GraphDef, params: tree.Params, tau_BxPxKxK: jax.Array) -> np.ndarray:
    """Relative poses through the method for inference, B x P x 4 x 4."""
    model: Any = tree.merge(graphdef, params)
    pose = jax.jit(lambda tau_QxKxK: setup()[0].relative_pose(model, tau_QxKxK))(tau_BxPxKxK.reshape(-1, 4, 4))
    assert pose.shape == (BATCH * (VIEWS - 1), 4, 4)
    return np.asarray(pose).reshape(BATCH, VIEWS - 1, 4, 4)


def test_the_published_scale_is_blind_to_the_sign() -> None:
    """The trap: with the truth of a perfect head, the head that says the opposite of every direction has the same loss."""
    _, graphdef, params = setup()
    mirror = jnp.array([1.0] * 6 + [-1.0] * 3)
    opposite = params | {name: mirror * params[name] for name in ("head/output/kernel", "head/output/bias")}
    perfect = batch() | {"relative_BxPx4x4": estimates(graphdef, params, compiled()(params, batch())[2])}
    losses = {}
    for scale in ("published", "positive"):
        right, wrong = (measured(p, perfect, task__scale=scale) for p in (params, opposite))
        assert right["rotation_error"] < 0.05 and right["direction_error"] < 0.05 and wrong["direction_error"] > 179.9
        assert right["loss"] < 1e-5  # relative_pose is what the loss sees
        losses[scale] = wrong["loss"]
    assert losses["published"] < 1e-5 and losses["positive"] > 0.5


def residual(scale: str, estimate: Any, truth: Any) -> jax.Array:
    return setup(task__scale=scale)[0]._translation_residual(jnp.asarray(estimate), jnp.asarray(truth))


def test_scales_and_rest() -> None:
    """The positive law knows the scale of neither side; a camera that rests teaches nothing; nothing divides by zero."""
    estimate, truth = poses(BATCH, 5)[..., :3, 3], poses(BATCH)[..., :3, 3]
    scale = np.array([0.1, 1.0, 10.0, 1e3], np.float32)[:, None, None]
    for law in ("positive", "published"):
        value = jax.jit(functools.partial(residual, law))
        gradient = jax.jit(jax.grad(lambda a, b, law=law: jnp.sum(jnp.abs(residual(law, a, b)))))
        found = value(estimate, truth)
        other = truth / scale if law == "positive" else truth
        np.testing.assert_allclose(value(estimate * scale, other), found, atol=1e-4)  # FLOOR at 0.1
        assert np.abs(found).mean() > 0.1 and not np.any(value(estimate, 0 * truth))
        for a, b in ((0 * estimate, truth), (0 * estimate, 0 * truth), (estimate, 0 * truth), (1e-20 * estimate, truth)):
            assert np.isfinite(gradient(a, b)).all()
    # The gradient is perpendicular to the estimate: that of a constant scale would wear estimates down.
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(jnp.abs(residual("positive", a, b)))))(estimate, truth)
    np.testing.assert_allclose(np.sum(gradient * estimate, axis=(1, 2)), 0, atol=1e-4)
    assert np.linalg.norm(gradient) > 0.1


def test_a_resting_camera_has_no_direction() -> None:
    resting = batch() | {"relative_BxPx4x4": np.tile(np.eye(4, dtype=np.float32), (BATCH, VIEWS - 1, 1, 1))}
    task, _, params = setup()
    found = measured(params, resting)
    assert found["translation"] == found["rotation_baseline"] == 0 and "direction_error" not in found
    assert "no camera moves" in task.summary(found)[1]


def test_padding_counts_for_nothing() -> None:
    params = setup()[2]
    weight = np.array([1, 1, 0, 0], np.float32)
    clean = batch() | {"weight_B": weight}
    dirty = {name: value.copy() for name, value in clean.items()}
    dirty["frames_BxTxHxWxC"][2:] = 255
    dirty["relative_BxPx4x4"][2:] = np.nan
    a, b, whole = (measured(params, host) for host in (clean, dirty, batch()))
    for name in whole:
        assert b[name] == pytest.approx(a[name], rel=1e-5) != whole[name], name


def test_a_step_is_finite_whatever_the_head_says() -> None:
    """All numbers zero, and vectors parallel: an output layer that has neither weights nor a bias to tell them apart."""
    p = program()
    for bias in (0.0, 1.0):
        state = p.init({})
        state.params["head/output/kernel"] = jnp.zeros_like(state.params["head/output/kernel"])
        state.params["head/output/bias"] = jnp.full(9, bias)
        state, window = p.train(state, tiny.place(p, batch()))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state, window)))


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def convolutions(function: Any, *arguments: Any) -> list[int]:
    """Leading dimension of what each convolution returns."""
    found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return [one.outvars[0].aval.shape[0] for one in found if one.primitive.name == "conv_general_dilated"]


@pytest.mark.parametrize("remat", [False, True])
def test_frames_are_encoded_once_and_never_differentiated(remat: bool) -> None:
    """A train step has the convolutions of one encoder, on B x T frames: no pair encodes again, no gradient goes through."""
    p = program(task__remat=remat)
    once = [BATCH * VIEWS] * (2 * 2)  # two levels of one block of two
    assert convolutions(p._train, 0, p.state_shapes, p.batch_shapes) == once
    assert convolutions(p._evaluate, 0, p.state_shapes, p.batch_shapes, 0) == once
    if not remat:
        joint = program(task__trainable=".*")  # the test can fail
        assert len(convolutions(joint._train, 0, joint.state_shapes, joint.batch_shapes)) > 2 * len(once)


def test_encoder_and_operator_stay_bit_for_bit() -> None:
    p = program()
    state = p.init({})
    before = jax.device_get(state)
    assert set(before.params) == {
        f"head/{part}/{x}" for part in ("layers/0", "layers/1", "layers/2", "output") for x in ("kernel", "bias")
    }
    for _ in range(3):
        state, _ = p.train(state, tiny.place(p, batch()))
    after = jax.device_get(state)
    assert all(name.startswith(("encoder/", "operator/")) for name in after.frozen) and len(after.frozen) > 10
    for name, value in before.frozen.items():
        assert after.frozen[name].tobytes() == value.tobytes(), name
    for name, value in before.params.items():
        assert not np.array_equal(after.params[name], value), name
    moments = {tree.leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]} - {""}
    assert moments == set(before.params)


def test_without_an_operator_maps_act_on_channels() -> None:
    p = program(task__operator=False, task__latent_channels=6)
    assert p.state_shapes.params["head/layers/0/kernel"].shape == (36, 16)
    assert not any(name.startswith("operator/") for name in p.state_shapes.frozen)
    assert jax.eval_shape(p.inspect, p.state_shapes, p.batch_shapes)["tau_BxKxK"].shape == (BATCH, 6, 6)


def test_a_batch_is_learned_by_heart() -> None:
    p = program()
    state, window = p.init({}), None
    placed = tiny.place(p, batch())
    start = metrics.values(p.evaluate(state, placed, 0))
    assert start["rotation_error"] == pytest.approx(start["rotation_baseline"], rel=0.2)  # it begins at the identity
    for _ in range(200):
        state, window = p.train(state, tiny.place(p, batch()))
    end = metrics.values(p.evaluate(state, placed, 0))
    assert end["rotation_error"] < 0.5 * end["rotation_baseline"]
    assert end["direction_error"] < 0.3 * start["direction_error"]
    assert set(metrics.values(window)) == {*end, "gradient_norm"}
    lines = p.task.summary(end)
    assert lines[1].startswith(f"rotation {end['rotation_error']:.2f} deg (identity: {end['rotation_baseline']:.2f} deg, ratio 0.")
    drawn = p.task.figures(jax.device_get(p.inspect(state, batch())))
    assert set(drawn) == {"isometries"} and drawn["isometries"].dtype == np.uint8


@pytest.mark.slow
def test_the_first_kernel_is_split_over_space() -> None:
    p, whole = program(2, 4), program()
    assert p.state_sharding.params["head/layers/0/kernel"].spec == PartitionSpec(None, "space")
    start = jax.device_get(whole.init({}))
    results = []
    for one in (p, whole):
        state = jax.device_put(start, one.state_sharding)
        results.append(metrics.values(one.train(state, tiny.place(one, batch()))[1]))
    for name, value in results[1].items():
        assert results[0][name] == pytest.approx(value, rel=1e-3), name
    with pytest.raises(UserError, match=r"head/layers/0/kernel is 16 x 6, and mesh\.space=4 does not divide its 6"):
        program(1, 4, task__head_width=6)


def finished_encode(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """A checkpoint of pose_encode's tiny network, of random numbers; its encoder and operator."""
    config = get_encode_config("quick")
    config.update_from_flattened_dict({name: value for name, value in TINY.items() if not name.startswith("optimizer")})
    e = Experiment.from_config(config)
    random = np.random.default_rng(2)
    shapes = Program(e, mesh_of(1), tiny.shapes(e)).state_shapes
    state = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    checkpoints = Checkpoints(str(workdir), 1)
    checkpoints.save(1, state, e.resolved)
    checkpoints.close()
    return {name: leaf for name, leaf in state.params.items() if not name.startswith("decoder/")}


def test_it_goes_on_from_pose_encode(tmp_path: pathlib.Path) -> None:
    source = finished_encode(tmp_path / "encode")
    spec = (("(encoder|operator)/.*", str(tmp_path / "encode")),)
    taken = warm_start.take(spec, program())
    assert set(taken) == set(program().state_shapes.frozen) == set(source)
    for name, value in source.items():
        assert np.asarray(taken[name]).tobytes() == value.tobytes(), name
    for run, changes, message in (
        ("none", {}, "no checkpoint in"),
        ("encode", {"task__rank": 3}, r"operator/basis is \(16, 4\) there and \(16, 3\) here"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            warm_start.take(((spec[0][0], str(tmp_path / run)),), program(**changes))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_has_pose_encodes_network_and_finds_its_run(variant: str) -> None:
    encode, e = (Experiment.from_config(get(variant)) for get in (get_encode_config, get_config))
    for field in dataclasses.fields(Latent):
        if field.name not in ("trainable", "warm_start"):
            assert getattr(e.task, field.name) == getattr(encode.task, field.name), field.name
    assert e.task.warm_start == (("(encoder|operator)/.*", f"runs/{encode.experiment}-{encode.variant}"),)
    assert (e.data.records, e.data.twin, e.data.size) == (encode.data.records, encode.data.twin, encode.data.size)


def test_mistakes_are_one_clear_line() -> None:
    for changes, message in (
        ({"task__scale": "negative"}, "task.scale='negative': choose one of positive, published"),
        ({"task__layers": 1}, "task.layers=1: must be at least 2"),
        ({"task__head_width": 0}, "task.head_width=0: must be at least 1"),
        ({"data__poses": False}, "set data.poses=True"),
    ):
        with pytest.raises(UserError) as caught:
            program(**changes)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_golden_step() -> None:
    """Three steps of the head on fixed data (1e-3: its translations are near 0 at first, and divided by their own size)."""
    p = program()
    state = p.init({})
    for _ in range(3):
        state, window = p.train(state, tiny.place(p, batch()))
    check_golden("pose_pred", metrics.values(window), rel=1e-3)
