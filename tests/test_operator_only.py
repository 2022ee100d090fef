"""The operator experiments: their losses against NumPy float64, their draws, and what the figures of merit measure."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from niso import metrics, rng
from niso.config import Experiment
from niso.errors import UserError
from niso.geometry import recovery
from niso.geometry import spectrum as spectral
from niso.geometry.laplacian import Eigenbasis, eigenspaces, spherical, toric, toric_stencil
from niso.step import Program
from niso.tasks.laplacian import Laplacian
from tests.conftest import mesh_of
from tests.test_autoencode import polar64
from tests.test_step import check_golden

DOMAINS = ("toric", "spherical")


def config(domain: str, **overrides: Any) -> ConfigDict:
    """Quick, on 8 x 8 grids, with few channels."""
    tiny = importlib.import_module(f"configs.{domain}_laplacian").get_config("quick")
    values = {"data.twin": "tiny", "data.size": 8, "data.stack": 30, "task.rank": 16, "batch": 4, "seed": 3, "seeds": 1}
    tiny.update_from_flattened_dict(values | {name.replace("__", "."): value for name, value in overrides.items()})
    return tiny


def program(domain: str, data: int = 1, space: int = 1, **overrides: Any) -> Program:
    e = Experiment.from_config(config(domain, **overrides))
    return Program(e, mesh_of(data, space), e.data.batch_shapes(e.batch))


def batch(rows: int = 4, size: int = 8, channels: int = 90) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (rows, size, size, channels), np.uint8)
    return {"images_BxHxWxC": images, "weight_B": np.ones(rows, np.float32)}


@functools.cache
def task_and_model(domain: str, **overrides: Any) -> tuple[Laplacian, Any]:
    task = Experiment.from_config(config(domain, **overrides)).task
    assert isinstance(task, Laplacian)
    return task, task.init_model(nnx.Rngs(params=0))


def learned(model: Any) -> list[np.ndarray]:
    s = model.operator.maps().spectrum
    return [np.asarray(a, np.float64) for a in (s.basis_NxK, s.eigenvalue_K, s.mass_N)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_losses_against_float64(domain: str) -> None:
    """The loss with dropout, the evaluation without it."""
    task, model = task_and_model(domain)
    drawn = task.draw(batch(), rng.stream(0, "draw", 1))
    basis, eigen, mass = learned(model)
    first, second = (np.asarray(drawn[name], np.float64) for name in ("first_BxNxC", "second_BxNxC"))
    a, b = (np.einsum("nk,n,bnc->bkc", basis, mass, x) for x in (first, second))
    mask = np.exp(-np.abs(eigen[:, None] - eigen))
    tau = polar64(mask * np.einsum("bic,bjc->bij", b, a))
    laplacian = np.diag(mask.sum(1)) - mask
    multiplicity = np.sqrt((laplacian**2).sum() + 1e-8) / 16

    def reconstruction(keep: np.ndarray) -> float:
        there, back = basis @ (keep * (tau @ a)), basis @ (keep * (tau.swapaxes(1, 2) @ b))
        return float(np.abs(there - second).mean() + np.abs(back - first).mean())

    keep = np.asarray(drawn["keep_BxK"], np.float64)[..., None]
    assert 0 < keep.mean() < 1
    value, measured = task.loss(model, drawn)
    found = metrics.values(measured)
    # 2e-4: float32 through an SVD of condition ~1e3.
    assert found["reconstruction"] == pytest.approx(reconstruction(keep), rel=2e-4)
    assert float(value) == pytest.approx(reconstruction(keep) + task.beta * multiplicity, rel=2e-4)
    evaluated = metrics.values(task.evaluate(model, drawn))
    assert evaluated["reconstruction"] == pytest.approx(reconstruction(np.ones(1)), rel=2e-4)
    error = ((tau @ a - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2))
    assert evaluated["equivariance_error"] == pytest.approx(100 * error.mean(), rel=1e-3)


def test_toric_draws_are_shifts() -> None:
    task, _ = task_and_model("toric")
    images = batch()["images_BxHxWxC"].astype(np.float32) / 127.5 - 1
    found = set()
    for step in range(40):
        drawn = task.draw(batch(), rng.stream(0, "draw", step))
        np.testing.assert_allclose(drawn["first_BxNxC"], images.reshape(4, 64, 90), atol=1e-6)
        for image, moved in zip(images, np.asarray(drawn["second_BxNxC"]).reshape(4, 8, 8, 90), strict=True):
            by = [(i, j) for i in range(8) for j in range(8) if np.allclose(np.roll(image, (i, j), (0, 1)), moved, atol=1e-6)]
            assert len(by) == 1
            found.add(by[0])
    assert len(found) > 50  # of 64, in 160 draws: 59 are expected, fewer than 51 happen once in a million


def test_spherical_draws_are_rotations() -> None:
    """In the harmonics' coefficients: orthogonal within every degree, and nothing is added to the band-limited image."""
    task, _ = task_and_model("spherical")
    drawn = task.draw(batch(), rng.stream(0, "draw", 0))
    y = spherical(8)
    a, b = (np.einsum("nl,n,bnc->blc", y.basis_NxK, y.mass_N, drawn[name]) for name in ("first_BxNxC", "second_BxNxC"))
    np.testing.assert_allclose(np.einsum("nl,blc->bnc", y.basis_NxK, b), drawn["second_BxNxC"], atol=1e-5)
    assert not np.allclose(a, b, atol=0.1)
    for space in eigenspaces(y.eigenvalue_K):
        np.testing.assert_allclose(
            np.einsum("blc,bld->bcd", a[:, space], a[:, space]), np.einsum("blc,bld->bcd", b[:, space], b[:, space]), atol=1e-3
        )  # inner products between channels: rotations keep them, sums over 90 channels in float32


@pytest.mark.parametrize("domain", DOMAINS)
def test_draws_depend_on_their_key_only(domain: str) -> None:
    task, _ = task_and_model(domain)
    one, same, other = (task.draw(batch(), rng.stream(0, "draw", n)) for n in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["second_BxNxC"], other["second_BxNxC"])


def test_beta_changes_along_the_run() -> None:
    """β L_M with β from 0.4 to 0.1: the loss of the middle of a run has 0.25."""
    task, model = task_and_model("toric", task__beta=0.4, task__beta_final=0.1)
    drawn = task.draw(batch(), rng.stream(0, "draw", 1))
    for progress, beta in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1)):
        found = metrics.values(task.at(jnp.float32(progress)).loss(model, drawn)[1])
        assert found["loss"] == pytest.approx(found["reconstruction"] + beta * found["multiplicity"], rel=1e-5)
    p = program("toric", task__beta=0.4, task__beta_final=0.1, steps=400, optimizer__warmup=2)
    state = dataclasses.replace(p.init({}), step=jnp.int32(200))
    found = metrics.values(p.train(state, p.place(batch()))[1])
    assert found["loss"] == pytest.approx(found["reconstruction"] + 0.25 * found["multiplicity"], rel=1e-5)


@pytest.mark.parametrize("law", spectral.DROPOUT_LAWS)
def test_spectral_dropout_keeps_leading_coefficients(law: str) -> None:
    rank, count = 16, 20_000
    keep_BxK = np.asarray(spectral.dropout(jax.random.key(0), count, rank, 0.5, law))
    assert set(np.unique(keep_BxK)) == {0.0, 1.0} and (np.diff(keep_BxK, axis=1) <= 0).all() and keep_BxK[:, 0].all()
    kept_B = keep_BxK.sum(axis=1)
    assert np.mean(kept_B == rank) == pytest.approx(0.5, abs=0.015)  # four standard deviations
    share_K = np.array([np.mean(kept_B == index) for index in range(1, rank)])
    if law == "uniform":
        np.testing.assert_allclose(share_K, 0.5 / (rank - 1), atol=0.006)
    else:
        np.testing.assert_allclose(share_K, 0.5 * np.log1p(1 / np.arange(1, rank)) / np.log(rank), atol=0.011)
    assert not (1 - np.asarray(spectral.dropout(jax.random.key(0), 100, rank, 0.0))).any()
    assert np.asarray(spectral.dropout(jax.random.key(0), 3, 1, 1.0)).all()


def test_share_within_clusters() -> None:
    eigenvalue_K = jnp.array([0.0, 0.1, 0.2, 2.0, 2.1])
    tau_BxKxK = jnp.ones((2, 5, 5)).at[1].set(jnp.eye(5))
    np.testing.assert_allclose(spectral.share_within_clusters(tau_BxKxK, eigenvalue_K), [13 / 25, 1.0])
    assert spectral.cluster_labels(eigenvalue_K).tolist() == [0, 0, 0, 1, 1]
    assert recovery.starts(np.asarray(eigenvalue_K)) == [0, 3]


def rotated_within(true: Eigenbasis, seed: int = 0) -> Eigenbasis:
    """The same operator with another basis of every eigenspace."""
    random, basis_NxK = np.random.default_rng(seed), true.basis_NxK.copy()
    for space in eigenspaces(true.eigenvalue_K):
        turn = np.linalg.qr(random.normal(size=(space.stop - space.start,) * 2))[0]
        basis_NxK[:, space] = basis_NxK[:, space] @ turn
    return dataclasses.replace(true, basis_NxK=basis_NxK)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_true_operator_has_perfect_figures(domain: str) -> None:
    task, _ = task_and_model(domain)
    true = toric(8, 8) if domain == "toric" else spherical(8)
    same = rotated_within(true)
    found = task.examine({"basis_NxK": same.basis_NxK, "eigenvalue_K": same.eigenvalue_K, "mass_N": same.mass_N})
    assert found["commutation"] < 1e-5  # rotations are float32
    assert found["energy"] == pytest.approx(100) and found["energy_worst"] == pytest.approx(100)
    assert found["energy_by_order"] == pytest.approx(100) and found["energy_by_rayleigh"] == pytest.approx(100)
    assert found["angle_worst"] < 1e-4 and found["kernel_correlation"] == pytest.approx(1)
    if domain == "spherical":
        assert found["clusters"] == 4 and found["largest_cluster"] == 7 and found["mass_correlation"] == pytest.approx(1)


def test_a_toric_operator_with_another_order_of_waves_is_told_apart() -> None:
    """Shifts fix pairs of waves, not their order: eigenspaces are found by energy or Rayleigh quotient, not by places."""
    true = rotated_within(toric(8, 8))
    spaces = eigenspaces(true.eigenvalue_K)
    order = np.concatenate([np.arange(64)[space] for space in reversed(spaces)])
    shuffled = Eigenbasis(true.basis_NxK[:, order], np.arange(64.0), true.mass_N)
    found = recovery.figures_of_merit(shuffled, toric(8, 8), recovery.shifts(8), 25)
    assert found["energy"] == pytest.approx(100) and found["energy_by_rayleigh"] == pytest.approx(100)
    assert found["energy_by_order"] < 50
    assert found["commutation"] > 0.01  # its eigenvalues split the eigenspaces
    assert found["clusters"] == 64


def test_a_random_operator_has_poor_figures() -> None:
    random = np.random.default_rng(0)
    basis_NxK = np.linalg.qr(random.normal(size=(64, 64)))[0]
    noise = Eigenbasis(basis_NxK, np.sort(random.uniform(0, 8, 64)), np.ones(64))
    found = recovery.figures_of_merit(noise, toric(8, 8), recovery.shifts(8), 25)
    assert found["energy"] < 40 and found["energy_by_rayleigh"] < 25 and found["commutation"] > 0.5 and found["angle_worst"] > 60
    assert abs(found["kernel_correlation"]) < 0.8


def test_one_function_in_two_eigenspaces_is_half_captured() -> None:
    """A quarter turn between a function of each of two eigenspaces leaves half of both functions' energy."""
    true = toric(8, 8)
    spaces = eigenspaces(true.eigenvalue_K)
    i, j = spaces[1].start, spaces[2].start
    mixed = true.basis_NxK.copy()
    mixed[:, i] = (true.basis_NxK[:, i] + true.basis_NxK[:, j]) / 2**0.5
    mixed[:, j] = (true.basis_NxK[:, i] - true.basis_NxK[:, j]) / 2**0.5
    found = recovery.recovered(mixed, true, 3)
    assert [space.size for space in found] == [1, 4, 4]
    assert [space.energy for space in found] == pytest.approx([1, 1 - 0.5 / 4, 1 - 0.5 / 4])
    assert found[1].angle_M.max() == pytest.approx(45, abs=1e-4) and found[1].angle_M[:3].max() < 1e-4


def test_moves_are_the_symmetry() -> None:
    shifts = list(recovery.shifts(4))
    assert len(shifts) == 15
    stencil_NxN = toric_stencil(4, 4)
    assert recovery.commutation(stencil_NxN, shifts) < 1e-12
    image = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal((shifts[0] @ image.reshape(-1)).reshape(4, 4), np.roll(image, (0, 1), (0, 1)))
    y = spherical(8)
    for turn_NxN in recovery.rotations(8, 3):
        kept = turn_NxN @ y.basis_NxK
        np.testing.assert_allclose(kept.T @ (y.mass_N[:, None] * kept), np.eye(16), atol=1e-5)


@pytest.mark.parametrize("domain", DOMAINS)
def test_golden_step(domain: str) -> None:
    """Three steps on fixed data."""
    p = program(domain)
    state = p.init({})
    for n in range(3):
        shifted = batch()
        shifted["images_BxHxWxC"] = np.roll(shifted["images_BxHxWxC"], n, axis=3)
        state, window = p.train(state, p.place(shifted))
    check_golden(f"{domain}_laplacian", metrics.values(window))


@pytest.mark.parametrize("domain", ["toric", pytest.param("spherical", marks=pytest.mark.slow)])
def test_eight_devices_are_one_device(domain: str) -> None:
    results = []
    for p in (program(domain), program(domain, 4, 2)):
        state = p.init({})
        for _ in range(3):
            state, window = p.train(state, p.place(batch()))
        results.append((jax.device_get(state.params), metrics.values(window)))
    (one, a), (eight, b) = results
    for name in one:  # through Adam, as in test_step
        np.testing.assert_allclose(eight[name], one[name], 1e-3, 5e-4, err_msg=name)
    assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.parametrize("domain", DOMAINS)
def test_figures_are_drawn(domain: str) -> None:
    p = program(domain)
    arrays = jax.device_get(p.inspect(p.init({}), batch()))
    drawn = p.task.figures(arrays)
    assert set(drawn) == {"eigenfunctions", "operator", "isometries", "multiplicities", "masses", "spectrum"}
    assert all(image.dtype == np.uint8 and image.ndim == 3 and np.ptp(image) > 0 for image in drawn.values())


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"task__domain": "klein"}, "task.domain='klein': choose one of torus, sphere"),
        ({"task__dropout": 1.5}, "task.dropout=1.5: a probability"),
        ({"task__dropout_law": "linear"}, "task.dropout_law='linear': choose one of uniform, log"),
        ({"task__rank": 65}, "task.rank=65: the grid has 8 x 8 = 64 points, choose a rank from 1 to 64"),
        ({"task__damping": 0.0}, "task.damping=0.0: a share of the largest singular value, between 0 and 1, such as 1e-7"),
        ({"task__ridge": -0.1}, "task.ridge=-0.1: a share of the norm, from 0 (none) to less than 1, such as 1e-4"),
        ({"task__group": "U"}, "task.group='U': choose one of O, SO"),
        ({"data__size": 7}, "task.size=7"),
    ],
)
def test_mistakes_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Experiment.from_config(config("toric", **overrides))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_observations_of_another_shape_are_named() -> None:
    task, _ = task_and_model("toric")
    with pytest.raises(UserError, match=r"observations are \[8, 8, 30\], but task.size=8 and task.channels=90"):
        task.draw(batch(channels=30), rng.stream(0, "draw"))
