"""Reference Laplacians: every eigenpair against the operator itself, not against the formula that made it."""

import numpy as np
import pytest

from niso.geometry import laplacian, sphere

GRIDS = [(16, 16), (7, 7), (5, 8), (9, 6), (12, 12), (2, 5), (1, 4), (1, 1)]
TIGHT = 1e-12  # float64 sums of at most 256 terms of size 1; eigenvalues up to 8


def runs(eigenvalue_K: np.ndarray) -> list[int]:
    return [space.stop - space.start for space in laplacian.eigenspaces(eigenvalue_K)]


@pytest.mark.parametrize("stencil", list(laplacian.STENCILS))
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_toric_waves_are_the_eigenfunctions_of_the_stencil(height: int, width: int, stencil: str) -> None:
    matrix_NxN = laplacian.toric_stencil(height, width, stencil)
    pairs = laplacian.toric(height, width, stencil)
    basis_NxN, eigenvalue_N = pairs.basis_NxK, pairs.eigenvalue_K
    assert basis_NxN.shape == matrix_NxN.shape and basis_NxN.dtype == eigenvalue_N.dtype == np.float64
    np.testing.assert_allclose(basis_NxN.T @ (pairs.mass_N[:, None] * basis_NxN), np.eye(height * width), atol=TIGHT)
    np.testing.assert_allclose(matrix_NxN @ basis_NxN, basis_NxN * eigenvalue_N, atol=TIGHT)
    np.testing.assert_allclose(basis_NxN * eigenvalue_N @ (basis_NxN.T * pairs.mass_N), matrix_NxN, atol=TIGHT)
    assert (np.diff(eigenvalue_N) >= 0).all()
    solved_N = np.linalg.eigvalsh(matrix_NxN)
    np.testing.assert_allclose(eigenvalue_N, solved_N, atol=TIGHT)
    assert runs(eigenvalue_N) == runs(solved_N)


@pytest.mark.parametrize("stencil", list(laplacian.STENCILS))
def test_equal_eigenvalues_are_the_same_number(stencil: str) -> None:
    eigenvalue_N = laplacian.toric(16, 16, stencil).eigenvalue_K
    assert len(np.unique(eigenvalue_N)) == len(runs(eigenvalue_N))
    assert runs(eigenvalue_N)[:6] == [1, 4, 4, 4, 8, 4]


def test_toric_order_and_signs_are_those_of_the_docstring() -> None:
    """The first waves after the constant: p = 0 before p = 1, cos before sin, both positive where the wave starts."""
    basis_NxK = laplacian.toric(8, 8).basis_NxK[:, :5]
    turn_8 = 2 * np.pi * np.arange(8) / 8
    ones_8 = np.ones(8)
    waves = [
        (ones_8, ones_8),
        (ones_8, np.cos(turn_8)),
        (ones_8, np.sin(turn_8)),
        (np.cos(turn_8), ones_8),
        (np.sin(turn_8), ones_8),
    ]
    for k, (down_8, across_8) in enumerate(waves):
        wave_N = np.outer(down_8, across_8).reshape(-1)
        np.testing.assert_allclose(basis_NxK[:, k], wave_N / np.linalg.norm(wave_N), atol=TIGHT)


def test_stencils_stand_around_their_point_on_the_torus() -> None:
    five_8x8 = laplacian.toric_stencil(8, 8)[0].reshape(8, 8)
    nine_8x8 = laplacian.toric_stencil(8, 8, "nine")[0].reshape(8, 8)
    for kernel_8x8, name in ((five_8x8, "five"), (nine_8x8, "nine")):
        np.testing.assert_array_equal(np.roll(kernel_8x8, (1, 1), (0, 1))[:3, :3], laplacian.STENCILS[name])
        assert np.count_nonzero(kernel_8x8) == np.count_nonzero(laplacian.STENCILS[name])
    shifted_NxN = np.roll(laplacian.toric_stencil(4, 6).reshape(4, 6, 4, 6), (1, 2, 1, 2), (0, 1, 2, 3)).reshape(24, 24)
    np.testing.assert_array_equal(shifted_NxN, laplacian.toric_stencil(4, 6), "not the same at every point")


@pytest.mark.parametrize("size", [1, 2, 5, 6, 16])
def test_spherical_harmonics_are_orthonormal_on_their_grid(size: int) -> None:
    pairs = laplacian.spherical(size)
    degrees = (size + 1) // 2
    assert pairs.basis_NxK.shape == (size**2, degrees**2) and pairs.basis_NxK.dtype == np.float64
    np.testing.assert_allclose(pairs.basis_NxK.T @ (pairs.mass_N[:, None] * pairs.basis_NxK), np.eye(degrees**2), atol=TIGHT)
    assert pairs.mass_N.sum() == pytest.approx(4 * np.pi, rel=TIGHT) and (pairs.mass_N > 0).all()
    assert runs(pairs.eigenvalue_K) == [2 * degree + 1 for degree in range(degrees)]
    assert np.unique(pairs.eigenvalue_K).tolist() == [degree * (degree + 1) for degree in range(degrees)]


def test_eigenspaces_of_the_sphere_are_kept_by_turns_about_the_axis() -> None:
    pairs = laplacian.spherical(16)
    for space in laplacian.eigenspaces(pairs.eigenvalue_K):
        basis_NxD = pairs.basis_NxK[:, space]
        kernel_16x16x16x16 = (basis_NxD @ basis_NxD.T).reshape(16, 16, 16, 16)
        turned_16x16x16x16 = np.roll(kernel_16x16x16x16, (3, 3), (1, 3))
        np.testing.assert_allclose(turned_16x16x16x16, kernel_16x16x16x16, atol=TIGHT)
        addition_N = np.einsum("nd,nd->n", basis_NxD, basis_NxD)  # theorem: (2 l + 1) / 4 pi at every point
        np.testing.assert_allclose(addition_N, basis_NxD.shape[1] / (4 * np.pi), atol=TIGHT)


def test_spherical_eigenvalues_belong_to_their_functions() -> None:
    """-(sin f')' / sin - f'' / sin² = eigenvalue f, by finite differences on a finer grid around middle latitudes."""
    eigenvalue_K = laplacian.spherical(12).eigenvalue_K
    step = 1e-3
    theta_T, phi_T = np.array([0.7, 1.1, 1.6, 2.3]), np.array([0.2, 1.3, 2.9, 5.0])
    values = {
        (i, j): sphere.harmonics(6, theta_T + i * step, phi_T + j * step) for i, j in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    }
    down_TxK = np.sin(theta_T + step / 2)[:, None] * (values[1, 0] - values[0, 0])
    down_TxK -= np.sin(theta_T - step / 2)[:, None] * (values[0, 0] - values[-1, 0])
    around_TxK = (values[0, 1] - 2 * values[0, 0] + values[0, -1]) / np.sin(theta_T)[:, None] ** 2
    applied_TxK = -(down_TxK / np.sin(theta_T)[:, None] + around_TxK) / step**2
    # Second order: a tenth of (l / sin)⁴ step² ~ 4e-4; of float64, 1e-16 / step² is far below.
    np.testing.assert_allclose(applied_TxK, eigenvalue_K * values[0, 0], atol=1e-3)


def test_eigenspaces_are_runs_relative_to_the_largest() -> None:
    values = np.array([0.0, 1e-9, 1.0, 1.0 + 1e-7, 1.5, 2.0])
    assert runs(values) == [2, 2, 1, 1]
    assert runs(1e5 * values) == [2, 2, 1, 1] == runs(1e-5 * values)
    assert [s.stop for s in laplacian.eigenspaces(values, tolerance=0.3)] == [2, 6]
    assert laplacian.eigenspaces(np.zeros(0)) == [] and runs(np.zeros(3)) == [3] and runs(np.array([5.0])) == [1]
    covered = np.concatenate([np.arange(6)[space] for space in laplacian.eigenspaces(values)])
    assert covered.tolist() == list(range(6))


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="'seven': choose one of five, nine"):
        laplacian.toric(4, 4, "seven")
