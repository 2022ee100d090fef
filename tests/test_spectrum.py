"""The operator's mathematics against NumPy float64, and the isometry's defining properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from niso.geometry import spectrum as spectral
from niso.geometry.spectrum import Spectrum
from niso.models.operator import Operator


def some_operator(points: int = 25, rank: int = 9, eigenvalues: str = "cumulative", seed: int = 0) -> Spectrum:
    operator = Operator(points, rank, eigenvalues, rngs=nnx.Rngs(params=seed))
    operator.mass[...] = 1.0 + 0.3 * jax.random.normal(jax.random.key(seed), (points,))
    return operator.maps().spectrum


@pytest.mark.parametrize("eigenvalues", ["cumulative", "clustered"])
@pytest.mark.parametrize("points,rank", [(25, 9), (16, 16)])
def test_operator_is_mass_orthonormal_ascending_and_symmetric(points: int, rank: int, eigenvalues: str) -> None:
    s = some_operator(points, rank, eigenvalues)
    basis, mass, value = (np.asarray(a, np.float64) for a in (s.basis_NxK, s.mass_N, s.eigenvalue_K))
    np.testing.assert_allclose(basis.T @ (mass[:, None] * basis), np.eye(rank), atol=5e-6)
    assert np.all(np.diff(value) >= 0) and np.all(value >= 0) and np.all(mass > 0)
    omega = basis @ np.diag(value) @ basis.T @ np.diag(mass)
    np.testing.assert_allclose(mass[:, None] * omega, (mass[:, None] * omega).T, atol=1e-6)  # self-adjoint under the mass


def test_clustered_basis_follows_its_eigenvalues() -> None:
    operator = Operator(12, 5, "clustered", rngs=nnx.Rngs(params=3))
    unsorted = np.asarray(spectral.mass_orthonormal(operator.basis[...], operator.mass[...] ** 2 + 1e-8))
    squared = np.asarray(operator.eigenvalue[...]) ** 2
    s = operator.maps().spectrum
    for k in range(5):
        where = int(np.argmin(np.abs(squared - float(s.eigenvalue_K[k]))))
        np.testing.assert_allclose(s.basis_NxK[:, k], unsorted[:, where], atol=1e-6)


def test_project_and_unproject() -> None:
    s = some_operator(25, 9)
    c = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    np.testing.assert_allclose(spectral.project(s, spectral.unproject(s, c)), c, atol=1e-5)  # Φᵀ M Φ = I
    full = some_operator(16, 16)
    z = np.random.default_rng(1).normal(size=(2, 16, 4)).astype(np.float32)
    np.testing.assert_allclose(spectral.unproject(full, spectral.project(full, z)), z, atol=1e-4)  # full rank: Φ Φᵀ M = I


def test_projection_accumulates_in_float32() -> None:
    s = some_operator(25, 9)
    z = jax.random.normal(jax.random.key(0), (2, 25, 4), jnp.bfloat16)
    assert spectral.project(s, z).dtype == jnp.float32
    np.testing.assert_array_equal(spectral.project(s, z), spectral.project(s, z.astype(jnp.float32)))


def test_what_bfloat16_latents_do_to_the_map_and_to_the_losses() -> None:
    """A bfloat16 network hands over latents with 8 bits; everything after them is float32, so τ stays orthogonal, and the
    rounding of the latents moves the objective and the equivariance loss by their own size (4e-3), not more."""
    s = some_operator(100, 16)
    random = np.random.default_rng(5)
    first = random.normal(size=(4, 100, 24)) * np.linspace(1, 0.1, 24)
    second = first + 0.2 * random.normal(size=first.shape)
    mask = spectral.eigenvalue_mask(s.eigenvalue_K)

    def measure(dtype: jnp.dtype) -> tuple[np.ndarray, ...]:
        a, b = (spectral.project(s, jnp.asarray(z, dtype)) for z in (first, second))
        tau = spectral.solve_isometry(a, b, mask)
        moved = spectral.apply_isometry(tau, a)
        return np.asarray(tau), np.asarray(jnp.mean(jnp.abs(moved - b), axis=(1, 2))), np.asarray(jnp.vdot(moved, b))

    (tau, loss, objective), (rounded_tau, rounded_loss, rounded_objective) = measure(jnp.float32), measure(jnp.bfloat16)
    assert np.abs(np.swapaxes(rounded_tau, 1, 2) @ rounded_tau - np.eye(16)).max() <= 5e-6
    assert 1e-5 < np.abs(rounded_tau - tau).max() < 2e-2
    np.testing.assert_allclose(rounded_loss, loss, rtol=4e-3)
    np.testing.assert_allclose(rounded_objective, objective, rtol=4e-3)


def test_isometry_recovers_a_commuting_rotation() -> None:
    # Two eigenvalues, far apart: the mask is block diagonal, and eq. 8 must return the block rotation that made the pair.
    value = jnp.asarray([0.0, 0.0, 0.0, 50.0, 50.0])
    random = np.random.default_rng(2)
    blocks = [np.linalg.qr(random.normal(size=(n, n)))[0] for n in (3, 2)]
    tau = np.zeros((5, 5))
    tau[:3, :3], tau[3:, 3:] = blocks
    a = random.normal(size=(1, 5, 7)).astype(np.float32)
    found = spectral.solve_isometry(jnp.asarray(a), jnp.asarray(tau @ a, jnp.float32), spectral.eigenvalue_mask(value))
    np.testing.assert_allclose(found[0], tau, atol=1e-4)
    moved = spectral.apply_isometry(found, jnp.asarray(a))
    np.testing.assert_allclose(spectral.relative_error(moved, jnp.asarray(tau @ a, jnp.float32)), 0.0, atol=1e-8)
    np.testing.assert_allclose(spectral.apply_isometry(found, moved, inverse=True), a, atol=1e-4)


def test_isometry_commutes_with_the_operator_where_eigenvalues_are_apart() -> None:
    value = jnp.asarray([0.0, 0.0, 40.0, 40.0, 40.0, 90.0])
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 6, 8))  # an unrelated pair: commuting is not the data's doing
    tau = np.asarray(spectral.solve_isometry(a, b, spectral.eigenvalue_mask(value)))
    commutator = tau * np.asarray(value)[None, None, :] - np.asarray(value)[None, :, None] * tau
    assert np.abs(commutator).max() < 1e-3
    free = np.asarray(spectral.solve_isometry(a, b, None))
    assert np.abs(free * np.asarray(value)[None, None, :] - np.asarray(value)[None, :, None] * free).max() > 1.0


def test_isometry_is_the_same_for_a_rotated_pair_of_bases() -> None:
    # τ(Ra, Rb) = R τ(a, b) Rᵀ for any R that commutes with Λ (here: all eigenvalues equal, any rotation).
    a, b = jax.random.normal(jax.random.key(1), (2, 2, 5, 9))
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0], jnp.float32)
    mask = spectral.eigenvalue_mask(jnp.ones(5))
    turned = spectral.solve_isometry(rotation @ a, rotation @ b, mask)
    np.testing.assert_allclose(turned, rotation @ spectral.solve_isometry(a, b, mask) @ rotation.T, atol=1e-4)


def test_multiplicity_against_float64() -> None:
    value = np.sort(np.random.default_rng(4).uniform(0, 3, 12))
    mask = np.exp(-np.abs(value[:, None] - value[None, :]))
    laplacian = np.diag(mask.sum(1)) - mask
    expected = np.sqrt((laplacian**2).sum() + 1e-8) / 12
    np.testing.assert_allclose(spectral.multiplicity(jnp.asarray(value, jnp.float32)), expected, rtol=1e-5)
    assert spectral.multiplicity(100.0 * jnp.arange(12.0)) < 1e-4 < spectral.multiplicity(jnp.zeros(12))
    assert np.all(np.isfinite(jax.grad(spectral.multiplicity)(100.0 * jnp.arange(12.0))))
