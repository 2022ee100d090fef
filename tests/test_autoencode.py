"""The pairwise task: its losses against NumPy float64, its ablations, and that it learns."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from niso import metrics, tree
from niso.errors import UserError
from niso.models.autoencoder import Decoder
from niso.tasks.autoencode import Autoencode, Autoencoder
from tests import tiny


@functools.cache
def task_and_model(**overrides: Any) -> tuple[Autoencode, Autoencoder]:
    task = tiny.experiment(**overrides).task
    assert isinstance(task, Autoencode)
    return task, task.init_model(nnx.Rngs(params=0))


def polar64(x: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(x)
    return u @ vt


def test_losses_against_float64() -> None:
    task, model = task_and_model()
    batch = tiny.batch()
    value, measured = jax.jit(lambda batch: task.loss(model, batch))(batch)
    x = batch["frames_BxTxHxWxC"].astype(np.float64) / 127.5 - 1
    z = np.stack([np.asarray(model.encoder(jnp.asarray(x[:, t], jnp.float32)), np.float64).reshape(8, 64, 8) for t in (0, 1)])
    s = model.operator.maps().spectrum
    basis, eigen, mass = (np.asarray(a, np.float64) for a in (s.basis_NxK, s.eigenvalue_K, s.mass_N))
    a, b = np.einsum("nk,n,tbnc->tbkc", basis, mass, z)
    mask = np.exp(-np.abs(eigen[:, None] - eigen))
    tau = polar64(mask * np.einsum("bic,bjc->bij", b, a))
    moved, back = tau @ a, tau.swapaxes(1, 2) @ b

    def decode(c: np.ndarray) -> np.ndarray:
        return np.asarray(model.decoder(jnp.asarray((basis @ c).reshape(8, 8, 8, 8), jnp.float32)), np.float64)

    laplacian = np.diag(mask.sum(1)) - mask
    expected = {
        "reconstruction": np.abs(decode(moved) - x[:, 1]).mean() + np.abs(decode(back) - x[:, 0]).mean(),
        "equivariance": np.abs(moved - b).mean(),
        "multiplicity": np.sqrt((laplacian**2).sum() + 1e-8) / 8,
    }
    expected["loss"] = expected["reconstruction"] + 0.5 * expected["equivariance"] + 0.025 * expected["multiplicity"]
    found = metrics.values(measured)
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=2e-4), name  # float32 through an SVD of condition ~1e3
    assert float(value) == pytest.approx(found["loss"], rel=1e-6)
    error = 100 * (((moved - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2)))
    evaluated = metrics.values(jax.jit(lambda batch: task.evaluate(model, batch))(batch))
    assert evaluated["equivariance_error"] == pytest.approx(error.mean(), rel=1e-3)
    assert evaluated["equivariance_error_skip_3"] == pytest.approx(error[batch["skip_B"] == 3].mean(), rel=1e-3)
    assert "equivariance_error_skip_9" not in evaluated  # no such pair in the batch: not a number, and not a zero


def test_relative_equivariance_is_in_units_of_the_latents_spread_and_does_not_shrink_with_them() -> None:
    absolute, model = task_and_model()
    task, _ = task_and_model(task__equivariance="relative")
    batch = tiny.batch()
    seen = task._encode(model, batch)
    wanted_BxKxC, moved_BxKxC = (np.asarray(z, np.float64) for z in (seen.coefficient_BxTxKxC[:, 1], seen.moved(0, by=0)))
    spread = np.abs(wanted_BxKxC - wanted_BxKxC.mean(0)).mean()
    equivariance = [metrics.values(each.loss(model, batch)[1])["equivariance"] for each in (absolute, task)]
    assert equivariance == pytest.approx([np.abs(moved_BxKxC - wanted_BxKxC).mean() * scale for scale in (1, 1 / spread)], rel=1e-4)
    small = nnx.clone(model)
    small.encoder.head.kernel[...] *= 1e-3
    small.encoder.head.bias[...] *= 1e-3
    shrunk = [metrics.values(each.loss(small, batch)[1])["equivariance"] for each in (absolute, task)]
    assert shrunk == pytest.approx([1e-3 * equivariance[0], equivariance[1]], rel=1e-2)
    with pytest.raises(UserError, match="equivariance=relative compares examples: raise batch"):
        task.loss(model, {name: value[:1] for name, value in batch.items()})


@pytest.mark.parametrize("equivariance", ["absolute", "relative"])
def test_padding_counts_for_nothing(equivariance: str) -> None:
    task, model = task_and_model(task__equivariance=equivariance)
    whole = tiny.batch()
    padded = {name: np.concatenate([value, value[:2]]) for name, value in whole.items()}
    padded["frames_BxTxHxWxC"][8:] = 255
    padded["weight_B"][8:] = 0
    evaluate = jax.jit(lambda batch: task.evaluate(model, batch))
    a, b = metrics.values(evaluate(whole)), metrics.values(evaluate(padded))
    assert a.keys() == b.keys()
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_only_the_two_latents_of_the_loss_are_decoded() -> None:
    task, model = task_and_model()
    decoded = []
    call = Decoder.__call__

    def count(self: Decoder, z_BxHxWxC: jax.Array) -> jax.Array:
        decoded.append(z_BxHxWxC.shape[0])
        return call(self, z_BxHxWxC)

    with mock.patch.object(Decoder, "__call__", count):
        jax.eval_shape(lambda batch: task.loss(model, batch), tiny.batch())
        assert sum(decoded) == 2 * 8
        jax.eval_shape(lambda batch: task.inspect(model, batch), tiny.batch())
        assert sum(decoded) == 2 * 8 + 3 * 8  # figures also show the plain autoencoding


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"task__operator": False, "task__alpha": 0.0}, marks=pytest.mark.slow),
        {"task__group": "SO", "task__eigenvalues": "clustered", "task__dtype": "bfloat16", "task__remat": True, "task__beta": 0.0},
        pytest.param({"task__rank": 64, "task__ridge": 1e-4}, marks=pytest.mark.slow),
        pytest.param({"task__both_directions": True}, marks=pytest.mark.slow),
    ],
    ids=lambda o: "-".join(name.removeprefix("task__") for name in o),
)
def test_variants_learn(overrides: dict[str, Any]) -> None:
    p = tiny.program(**overrides)
    state = p.init({})
    before = float(metrics.values(p.evaluate(state, tiny.place(p, tiny.batch()), 0))["reconstruction"])
    for _ in range(60):
        state, window = p.train(state, tiny.place(p, tiny.batch()))
    after = metrics.values(window)
    assert all(np.isfinite(v) for v in after.values())
    assert after["reconstruction"] < 0.75 * before
    arrays = jax.device_get(p.inspect(state, tiny.batch()))
    tau = arrays["tau_BxKxK"].astype(np.float64)
    np.testing.assert_allclose(tau @ tau.swapaxes(1, 2), np.broadcast_to(np.eye(tau.shape[1]), tau.shape), atol=1e-5)
    if overrides.get("task__group") == "SO":
        np.testing.assert_allclose(np.linalg.det(tau), 1.0, atol=1e-4)
    drawn = p.task.figures(arrays)
    expected = {"reconstructions", "isometries"}
    if overrides.get("task__operator", True):
        expected |= {"eigenfunctions", "masses", "operator", "spectrum"}
    assert set(drawn) == expected and all(image.dtype == np.uint8 for image in drawn.values())


def test_terms_switched_off_do_not_reach_the_gradient() -> None:
    batch = tiny.batch()

    def gradient(**overrides: Any) -> dict[str, np.ndarray]:
        task, model = task_and_model(**overrides)
        graphdef, params = tree.flatten(model)
        return jax.device_get(jax.jit(jax.grad(lambda p: task.loss(tree.merge(graphdef, p), batch)[0]))(params))

    both, no_e, no_m = gradient(), gradient(task__alpha=0.0), gradient(task__beta=0.0)
    name = "operator/eigenvalue"
    assert np.abs(both[name] - no_m[name]).max() > 1e-6 < np.abs(both[name] - no_e[name]).max()
    np.testing.assert_allclose(both["encoder/stem/kernel"], no_m["encoder/stem/kernel"], atol=1e-7)  # L_M sees Λ alone
    off = gradient(task__operator=False)
    assert not any(n.startswith("operator") for n in off)


def test_float32_where_it_matters_whatever_the_networks_compute_in() -> None:
    task, model = task_and_model(task__dtype="bfloat16")
    assert model.encoder(jnp.zeros((1, 16, 16, 3))).dtype == jnp.bfloat16
    for name, leaf in tree.flatten(model)[1].items():
        assert leaf.dtype == jnp.float32, name

    def encoded(batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        seen = task._encode(model, batch)
        return seen.coefficient_BxTxKxC, seen.tau_BxPxKxK, seen.maps.spectrum.basis_NxK

    assert {array.dtype for array in jax.eval_shape(encoded, tiny.batch())} == {jnp.dtype(jnp.float32)}
    # The same weights in bfloat16: losses move by bfloat16's rounding (2^-8) through a few layers, no more.
    both = (task_and_model(), (task, model))
    a, b = (float(jax.jit(lambda batch, t=t, m=m: t.loss(m, batch)[0])(tiny.batch())) for t, m in both)
    assert b == pytest.approx(a, rel=0.03) and b != a


def test_what_bfloat16_networks_do_to_the_maps_and_to_every_loss() -> None:
    """Trained weights in both: 2^-8 is one rounding. What is compared with images moves by less than one; the equivariance loss
    is a difference of latents that are some hundred times as large, so it moves by tens; maps by as much as latents do through
    the layers, and they stay orthogonal."""
    p, rounded = tiny.program(), tiny.program(task__dtype="bfloat16")
    state, batch = p.init({}), tiny.place(p, tiny.batch())
    for _ in range(60):
        state, _ = p.train(state, batch)
    plain, found = (metrics.values(one.evaluate(state, batch, 0)) for one in (p, rounded))
    roundings = {"loss": 1, "reconstruction": 1, "multiplicity": 0, "equivariance": 30}
    for name, count in roundings.items():
        assert found[name] == pytest.approx(plain[name], rel=count * 2**-8 + 1e-6), name
    assert found["reconstruction"] != plain["reconstruction"]
    maps, tau = (jax.device_get(one.inspect(state, tiny.batch()))["tau_BxKxK"].astype(np.float64) for one in (p, rounded))
    assert np.abs(tau.swapaxes(1, 2) @ tau - np.eye(tau.shape[1])).max() <= 5e-6
    assert 1e-4 < np.linalg.norm(tau - maps, axis=(1, 2)).max() / tau.shape[1] ** 0.5 <= 16 * 2**-8


@pytest.mark.slow
def test_remat_changes_memory_not_numbers() -> None:
    batch = tiny.batch()

    def value_and_gradient(remat: bool) -> Any:
        task, model = task_and_model(task__remat=remat)
        graphdef, params = tree.flatten(model)
        step = jax.jit(jax.value_and_grad(lambda p: task.loss(tree.merge(graphdef, p), batch)[0]))
        return str(jax.make_jaxpr(step)(params)), step(params)

    (plain_code, plain), (remat_code, remat) = value_and_gradient(False), value_and_gradient(True)
    assert "remat" in remat_code or "checkpoint" in remat_code
    assert "remat" not in plain_code and "checkpoint" not in plain_code
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_published_sizes() -> None:
    """Latent grid 36 x 36, d = k = 128, and the layers' shapes, by eval_shape: nothing is computed."""
    from configs.pose_encode import get_config
    from niso.config import Experiment

    task = Experiment.from_config(get_config("paper")).task
    assert isinstance(task, Autoencode) and task.grid == (36, 36)
    params = tree.flatten(nnx.eval_shape(lambda: task.init_model(nnx.Rngs(params=0))))[1]
    assert params["operator/basis"].shape == (1296, 128) and params["operator/eigenvalue"].shape == (128,)
    assert params["encoder/stem/kernel"].shape == (3, 48) and params["encoder/head/kernel"].shape == (256, 128)
    assert sum(name.endswith("conv1/kernel") for name in params) == 2 * 3 * 4

    def block(i: int, f: int) -> int:
        return 9 * i * f + 9 * f * f + i * f + 2 * i + 2 * f  # two convolutions, the skip, two norms

    def net(inputs: int, widths: tuple[int, ...]) -> int:
        pairs = [(i, f) for before, f in zip((inputs, *widths), widths, strict=False) for i in (before, f, f, f)]
        return sum(block(i, f) for i, f in pairs) + 2 * widths[-1]

    encoder = 4 * 48 + net(48, (64, 128, 256)) + 257 * 128
    decoder = net(128, (256, 128, 64)) + 65 * 3
    assert tree.count(params) == encoder + decoder + 1296 * 128 + 1296 + 128


def test_no_gradient_is_rounding_noise() -> None:
    """Adam would scale it up to full steps: parameters that the loss cannot see (biases before a norm) must not exist."""
    task, model = task_and_model()
    graphdef, params = tree.flatten(model)
    gradients = jax.jit(jax.grad(lambda p: task.loss(tree.merge(graphdef, p), tiny.batch())[0]))(params)
    largest = {name: float(jnp.abs(g).max()) for name, g in gradients.items()}
    assert min(largest.values()) > 1e-4 * max(largest.values()), min(largest, key=lambda name: largest[name])
