"""Homography MNIST: its views, regimes and losses against NumPy float64, and the head that is tested on warped images."""

import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import hmnist_encode, hmnist_pred
from niso import metrics, rng, tree
from niso.config import Experiment
from niso.errors import UserError
from niso.geometry import homography
from niso.models.operator import Unconstrained
from niso.step import Program
from niso.tasks import views
from niso.tasks.autoencode import Autoencode
from niso.tasks.classify import Classify
from niso.tasks.regimes import Views, compared
from tests import digits
from tests.test_autoencode import polar64
from tests.test_step import check_golden

KEY = rng.stream(0, "draw", 1)


@functools.cache
def encode_task(arm: str = "", **overrides: Any) -> tuple[Autoencode, Any]:
    task = digits.experiment("encode", arm, **overrides).task
    assert isinstance(task, Autoencode)
    return task, task.init_model(nnx.Rngs(params=0))


@functools.cache
def classify_task(arm: str = "", **overrides: Any) -> tuple[Classify, Any]:
    task = digits.experiment("pred", arm, **overrides).task
    assert isinstance(task, Classify)
    return task, task.init_model(nnx.Rngs(params=0))


def measured(task: Autoencode, model: Any, batch: dict[str, np.ndarray]) -> metrics.Metrics:
    return task.loss(model, task.draw(batch, KEY))[1]


def trained(p: Program, steps: int) -> tuple[Any, dict[str, float]]:
    state = p.init({})
    for n in range(steps):
        state, window = p.train(state, p.place(digits.batch(seed=n)))
    return state, metrics.values(window)


def test_views_are_the_image_and_its_images_under_t_and_t_squared() -> None:
    task, _ = encode_task()
    host = digits.batch()
    frames = np.asarray(jax.jit(task.draw)(host, KEY)["frames_BxTxHxWxC"])
    assert frames.shape == (8, 3, 40, 40, 1) and frames.min() >= -1 and frames.max() <= 1
    padded = np.pad(host["images_BxHxWxC"] / 255.0, ((0, 0), (6, 6), (6, 6), (0, 0)))
    np.testing.assert_allclose(frames[:, 0], 2 * padded - 1, atol=1e-6)
    coefficient_Bx8 = views.training_coefficients(host, jax.random.split(KEY)[0])
    t_Bx3x3 = jax.jit(homography.exponential)(coefficient_Bx8)
    for view, power in ((1, 1), (2, 2)):
        warped = jax.jit(homography.warp)(jnp.asarray(padded), homography.power(t_Bx3x3, power))
        np.testing.assert_allclose(frames[:, view], 2 * np.asarray(warped) - 1, atol=2e-3)  # exp(2x) and exp(x)² round apart
    assert np.abs(frames[:, 1] - frames[:, 0]).mean() > 0.02


def test_held_out_views_depend_on_image_copy_and_seed_alone() -> None:
    task, _ = encode_task()
    other_seed, _ = encode_task(task__test_seed=1)
    host = digits.batch()
    shuffled = {name: value[::-1] for name, value in host.items()}
    drawn = [np.asarray(jax.jit(t.draw_held_out)(b, k)["frames_BxTxHxWxC"]) for t, b, k in (
        (task, host, KEY), (task, shuffled, rng.stream(3, "evaluate", 9)), (other_seed, host, KEY),
        (task, host | {"copy_B": host["copy_B"] + 1}, KEY), (task, host | {"item_B": host["item_B"] + 1}, KEY),
    )]  # fmt: skip
    np.testing.assert_array_equal(drawn[0], drawn[1][::-1])
    for other in drawn[2:]:
        np.testing.assert_array_equal(other[:, 0], drawn[0][:, 0])
        assert all(np.abs(a - b).max() > 0.1 for a, b in zip(other[:, 1], drawn[0][:, 1], strict=True))
    # The law of homNIST, s/√2; that of training is wider.
    many = {"item_B": np.arange(4000, dtype=np.int32), "copy_B": np.zeros(4000, np.int32), "weight_B": np.ones(4000, np.float32)}
    held_out, training = views.held_out_coefficients(many, 0), views.training_coefficients(many, KEY)
    np.testing.assert_allclose(np.std(held_out, axis=0), np.array(homography.SCALES_8) / 2**0.5, rtol=0.05)  # 4 deviations
    np.testing.assert_allclose(np.std(training, axis=0), homography.SCALES_8, rtol=0.05)
    # The classifier is tested on the very same images.
    classify, _ = classify_task()
    np.testing.assert_array_equal(jax.jit(classify.draw_held_out)(host, KEY)["observation_BxHxWxC"], drawn[0][:, 1])


@pytest.mark.parametrize("arm", ["triplets", "pairs", "autoencoder"])
def test_losses_against_float64(arm: str) -> None:
    task, model = encode_task(arm)
    batch = task.draw(digits.batch(), KEY)
    x = np.asarray(batch["frames_BxTxHxWxC"], np.float64)
    encode, decoder = jax.jit(model.encoder), jax.jit(model.decoder)
    z = [np.asarray(encode(jnp.asarray(x[:, t], jnp.float32)), np.float64).reshape(8, 400, 8) for t in range(x.shape[1])]
    if arm == "autoencoder":
        basis, mask = np.eye(400), np.eye(8)
        a, moved, wanted = z, [z[0], z[1]], (0, 1)
    else:
        s = model.operator.maps().spectrum
        basis, eigen, mass = (np.asarray(v, np.float64) for v in (s.basis_NxK, s.eigenvalue_K, s.mass_N))
        mask = np.exp(-np.abs(eigen[:, None] - eigen))
        a = [np.einsum("nk,n,bnc->bkc", basis, mass, one) for one in z]
        tau, *sigma = (polar64(mask * np.einsum("bic,bjc->bij", b, c)) for c, b in itertools.pairwise(a))
        if arm == "triplets":
            moved, wanted = [sigma[0] @ a[0], tau @ a[1]], (1, 2)
        else:
            moved, wanted = [tau @ a[0], tau.swapaxes(1, 2) @ a[1]], (1, 0)

    def decode(c: np.ndarray) -> np.ndarray:
        return np.asarray(decoder(jnp.asarray((basis @ c).reshape(8, 20, 20, 8), jnp.float32)), np.float64)

    laplacian = np.diag(mask.sum(1)) - mask
    latent = [np.abs(m - a[view]).mean() for m, view in zip(moved, wanted, strict=True)]
    expected = {
        "reconstruction": sum(np.abs(decode(m) - x[:, view]).mean() for m, view in zip(moved, wanted, strict=True)),
        "equivariance": sum(latent) if arm == "triplets" else latent[0],
        "multiplicity": 0.0 if arm == "autoencoder" else np.sqrt((laplacian**2).sum() + 1e-8) / 8,
    }
    expected["loss"] = expected["reconstruction"] + task.alpha * expected["equivariance"] + task.beta * expected["multiplicity"]
    found = metrics.values(jax.jit(lambda batch: task.loss(model, batch)[1])(batch))
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=5e-4, abs=1e-7), name  # float32 through an SVD of condition ~1e3
    evaluated = metrics.values(jax.jit(lambda batch: task.evaluate(model, batch))(batch))
    if arm == "autoencoder":
        assert "equivariance_error" not in evaluated
    else:
        error = ((tau @ a[0] - a[1]) ** 2).sum((1, 2)) / (a[1] ** 2).sum((1, 2))
        assert evaluated["equivariance_error"] == pytest.approx(100 * error.mean(), rel=1e-3)


def test_maps_of_the_other_pair_know_the_transformation_only_if_it_is_shared() -> None:
    """What triplets ask for: a latent that shifts act on by one isometry gives no loss, whatever the image."""
    random = np.random.default_rng(0)
    q_KxK = np.linalg.qr(random.normal(size=(8, 8)))[0]
    first_BxKxC = random.normal(size=(4, 8, 16))
    orbit = np.stack([first_BxKxC, q_KxK @ first_BxKxC, q_KxK @ q_KxK @ first_BxKxC], axis=1)
    tau = np.stack([polar64(np.einsum("bic,bjc->bij", orbit[:, n + 1], orbit[:, n])) for n in (0, 1)], axis=1)
    seen = Views(jnp.zeros(()), Unconstrained(), jnp.asarray(orbit, jnp.float32), jnp.asarray(tau, jnp.float32))
    for moved_BxKxC, view in compared(seen, "triplets"):
        np.testing.assert_allclose(moved_BxKxC, orbit[:, view], atol=1e-5)
    swapped = Views(seen.frames_BxTxHxWxC, seen.maps, seen.coefficient_BxTxKxC[:, ::-1], seen.tau_BxPxKxK)
    for moved_BxKxC, view in compared(swapped, "triplets"):
        assert np.abs(moved_BxKxC - swapped.coefficient_BxTxKxC[:, view]).max() > 0.5


@pytest.mark.slow
def test_spectral_dropout_is_for_training_only_and_spares_the_equivariance() -> None:
    task, model = encode_task(task__dropout=1.0)
    plain, _ = encode_task()
    dropped, kept = (metrics.values(jax.jit(partial(measured, t, model))(digits.batch())) for t in (task, plain))
    assert dropped["equivariance"] == pytest.approx(kept["equivariance"], rel=1e-5)
    assert abs(dropped["reconstruction"] - kept["reconstruction"]) > 1e-3
    assert "keep_BxK" not in task.draw_held_out(digits.batch(), KEY)
    keep_BxK = np.asarray(task.draw(digits.batch(rows=8), KEY)["keep_BxK"])
    assert (keep_BxK.sum(1) < 8).all() and (np.diff(keep_BxK, axis=1) <= 0).all() and keep_BxK[:, 0].all()


@pytest.mark.parametrize(
    "arm,overrides",
    [
        pytest.param("triplets", {"task__dropout": 0.5, "task__group": "SO"}, marks=pytest.mark.slow),
        pytest.param("autoencoder", {}, marks=pytest.mark.slow),
    ],
    ids=["triplets-dropout-SO", "autoencoder"],
)
def test_every_regime_learns(arm: str, overrides: dict[str, Any]) -> None:
    p = digits.program("encode", arm, **overrides)
    before = metrics.values(p.evaluate(p.init({}), p.place_test(digits.batch()), 0))
    state, _ = trained(p, 30)
    after = metrics.values(p.evaluate(state, p.place_test(digits.batch()), 0))
    assert after["reconstruction"] < 0.8 * before["reconstruction"]
    drawn = p.task.figures(jax.device_get(p.inspect(state, digits.batch())))
    plain = {"reconstructions"}
    operator = {"isometries", "eigenfunctions", "masses", "operator", "spectrum"}
    assert set(drawn) == (plain if arm == "autoencoder" else plain | operator)


@pytest.mark.parametrize("stage", ["encode", "pred"])
def test_golden_step(stage: str) -> None:
    """Three steps of a fixed experiment on fixed data."""
    check_golden(f"hmnist_{stage}", trained(digits.program(stage), 3)[1])


@pytest.mark.parametrize(
    "stage,data,space",
    [("encode", 8, 1), ("encode", 4, 2), ("pred", 8, 1)],
)
@pytest.mark.slow
def test_eight_devices_are_one_device(stage: str, data: int, space: int) -> None:
    (one, a), (many, b) = (trained(digits.program(stage, data=d, space=s), 3) for d, s in ((1, 1), (data, space)))
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-3), name
    for name, value in jax.device_get(one.params).items():
        np.testing.assert_allclose(jax.device_get(many.params[name]), value, rtol=1e-3, atol=5e-4, err_msg=name)


def test_the_head_does_not_see_isometries_of_the_latents() -> None:
    """Logits of images whose coefficients an orthogonal map has turned are the images' own."""
    _, model = classify_task()
    random = np.random.default_rng(1)
    coefficient_BxKxC = random.normal(size=(6, 8, 8))
    q_BxKxK = np.linalg.qr(random.normal(size=(6, 8, 8)))[0]
    plain, turned = (
        np.asarray(jax.jit(model.head)(jnp.asarray(c, jnp.float32))) for c in (coefficient_BxKxC, q_BxKxK @ coefficient_BxKxC)
    )
    np.testing.assert_allclose(turned, plain, atol=1e-5 * np.abs(plain).max() + 1e-6)
    assert np.abs(plain[0] - plain[1]).max() > 1e-2


def test_training_images_are_unperturbed_unless_augmented() -> None:
    host = digits.batch()
    task, _ = classify_task()
    padded = 2 * np.pad(host["images_BxHxWxC"] / 255.0, ((0, 0), (6, 6), (6, 6), (0, 0))) - 1
    np.testing.assert_allclose(task.draw(host, KEY)["observation_BxHxWxC"], padded, atol=1e-6)
    augmented, _ = classify_task("autoencoder")
    assert augmented.augment and augmented.head == "mlp" and not augmented.operator
    assert np.abs(np.asarray(augmented.draw(host, KEY)["observation_BxHxWxC"]) - padded).mean() > 0.02
    as_they_are, _ = classify_task(task__warped=False)
    np.testing.assert_allclose(as_they_are.draw_held_out(host, KEY)["observation_BxHxWxC"], padded, atol=1e-6)
    large = host | {"images_BxHxWxC": np.pad(host["images_BxHxWxC"], ((0, 0), (6, 6), (6, 6), (0, 0)))}
    np.testing.assert_allclose(task.draw_held_out(large, KEY)["observation_BxHxWxC"], padded, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["", "autoencoder"])
def test_the_head_learns_and_nothing_else_moves(arm: str) -> None:
    p = digits.program("pred", arm, optimizer__weight_decay=0.5, task__augment=False)
    frozen = jax.device_get(p.init({}).frozen)
    assert {name.split("/")[0] for name in frozen} == ({"encoder"} if arm == "autoencoder" else {"encoder", "operator"})
    state, losses = p.init({}), []
    for _ in range(40):
        state, window = p.train(state, p.place(digits.batch()))
        losses.append(metrics.values(window)["loss"])
    assert losses[39] < 0.6 * losses[9]  # means over ten steps on one batch
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, state.frozen[name])
    found = metrics.values(p.evaluate(state, p.place_test(digits.batch(seed=99)), 0))
    assert set(found) == {"loss", "accuracy"}
    ((name, image),) = p.task.figures(jax.device_get(p.inspect(state, digits.batch()))).items()
    assert name == "predictions" and image.dtype == np.uint8


def test_accuracy_and_loss_by_hand() -> None:
    task, model = classify_task()
    batch = task.draw(digits.batch(), KEY)
    batch["weight_B"] = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    logit = np.asarray(model.head(task.encode(model, model.operator.maps(), batch["observation_BxHxWxC"])), np.float64)[:5]
    label = np.asarray(batch["label_B"])[:5]
    entropy = np.log(np.exp(logit).sum(1)) - logit[np.arange(5), label]
    found = metrics.values(task.loss(model, batch)[1])
    assert found["loss"] == pytest.approx(entropy.mean(), rel=1e-4)
    assert found["accuracy"] == pytest.approx(100 * (logit.argmax(1) == label).mean())
    with pytest.raises(UserError, match=r"labels have the shape \(8, 1\), expected \(8,\)"):
        task.loss(model, batch | {"label_B": np.zeros((8, 1), np.int32)})


@pytest.mark.parametrize(
    "stage,overrides,told",
    [
        ("encode", {"task__regime": "quartets"}, "task.regime='quartets': choose one of pairs, triplets, reconstruction"),
        ("encode", {"task__transformation": "given"}, "needs T²ψ, which a video does not have"),
        ("encode", {"task__regime": "reconstruction"}, "set task.operator=False"),
        ("encode", {"task__dropout": 1.5}, "task.dropout=1.5: a probability"),
        ("pred", {"task__head": "linear"}, "task.head='linear': choose one of equivariant, mlp"),
        ("pred", {"task__operator": False}, "needs an operator: set task.head=mlp"),
        ("pred", {"task__classes": 1}, "task.classes=1: must be at least 2"),
    ],
)
def test_impossible_settings(stage: str, overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        digits.experiment(stage, **overrides)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_warped_test_images_are_not_warped_once_more() -> None:
    assert digits.experiment("pred", data__test_records="records/homnist").data.test_records == "records/homnist"
    with pytest.raises(UserError, match=r"data.test_records=records/homnist: its images are warped already"):
        digits.experiment("encode", data__test_records="records/homnist")


def test_images_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"images of 28 x 28 pixels cannot lie in the middle of task.size=26: choose task.size=28"):
        digits.program("encode", task__size=26)
    with pytest.raises(UserError, match=r"homographies are of still images"):
        encode_task()[0].draw({"weight_B": np.ones(2, np.float32)}, KEY)
    with pytest.raises(UserError, match=r"task.transformation=given needs frames of videos"):
        task, model = encode_task("pairs", task__transformation="given")
        task.loss(model, digits.batch())
    unlabelled = {name: value for name, value in digits.batch().items() if name != "label_B"}
    with pytest.raises(UserError, match=r"task classify needs labels: choose a data\.dataset that has them"):
        classify_task()[0].draw(unlabelled, KEY)


def test_variants_are_sizes_and_arms() -> None:
    assert hmnist_encode.get_config("small").task == hmnist_encode.get_config("small-triplets").task
    pairs = hmnist_encode.get_config("paper-pairs")
    assert (pairs.task.regime, pairs.task.alpha, pairs.task.beta, pairs.task.widths) == ("pairs", 0.5, 0.1, (128, 256))
    assert hmnist_encode.get_config("paper-without_multiplicity").task.beta == 0.0
    # L_E is the paper's, but for pairs at `small`; the weights are the paper's there too.
    relative = {name for name in hmnist_encode.VARIANTS if hmnist_encode.get_config(name).task.equivariance == "relative"}
    assert relative == {"small-pairs", "small-without_equivariance", "small-without_multiplicity"}
    assert hmnist_encode.get_config("small-pairs").task.beta == hmnist_encode.get_config("small").task.beta == 0.1
    assert hmnist_pred.get_config("small-pairs").task.warm_start == (("(encoder|operator)/.*", "runs/hmnist_encode-small-pairs"),)
    assert hmnist_pred.get_config().data.test_examples == 320_000
    with pytest.raises(UserError, match="no variant 'small-quads'"):
        hmnist_encode.get_config("small-quads")


def test_published_sizes() -> None:
    """Latent grid 20 x 20, d = k = 32, by eval_shape: nothing is computed."""
    task = Experiment.from_config(hmnist_pred.get_config()).task
    assert isinstance(task, Classify) and task.grid == (20, 20)
    params = tree.flatten(nnx.eval_shape(lambda: task.init_model(nnx.Rngs(params=0))))[1]
    assert params["operator/basis"].shape == (400, 32) and params["encoder/head/kernel"].shape == (256, 32)
    assert params["head/hidden/kernel"].shape == (2080, 8320) and params["head/output/kernel"].shape == (8320, 10)
