"""Figures of a learned operator beside the true one: what is where. Whether they are good to look at is for eyes."""

import numpy as np
import pytest

from niso import canvas, figures, operator_figures
from niso.geometry import laplacian

MAGENTA = canvas.NOT_A_NUMBER


def positions(page_HxWx3: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Rows and columns (Px2) of the pixels of exactly this colour."""
    return np.argwhere((page_HxWx3 == np.array(colour)).all(axis=-1))


def mixed(pairs: laplacian.Eigenbasis, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What a perfect training may find: each eigenspace's functions in any rotation; and the block matrix that rotates them."""
    tau_KxK = np.zeros((len(pairs.eigenvalue_K),) * 2)
    for space in laplacian.eigenspaces(pairs.eigenvalue_K):
        tau_KxK[space, space] = np.linalg.qr(rng.normal(size=(space.stop - space.start,) * 2))[0]
    return pairs.basis_NxK @ tau_KxK, tau_KxK


def every_figure(height: int = 6, width: int = 8) -> dict[str, np.ndarray]:
    pairs = laplacian.toric(height, width)
    learned_NxK, tau_KxK = mixed(pairs, np.random.default_rng(0))
    values_K = pairs.eigenvalue_K
    spaces = laplacian.eigenspaces(values_K)
    starts, sizes = [space.start for space in spaces], [space.stop - space.start for space in spaces]
    operator_NxN = learned_NxK * values_K @ learned_NxK.T
    true_NxN = laplacian.toric_stencil(height, width)
    mass_N = np.linspace(0.5, 2, height * width)
    return {
        "beside": operator_figures.beside(learned_NxK, values_K / 3, pairs.basis_NxK, values_K, height, width, count=20),
        "operators": operator_figures.operators(operator_NxN / 3, true_NxN, height, width),
        "isometries": operator_figures.clustered_isometries(np.stack([tau_KxK] * 2), starts),
        "multiplicities": operator_figures.multiplicities(values_K / 3, starts, values_K, sizes),
        "masses": operator_figures.masses_beside(mass_N, pairs.mass_N, height, width),
    }


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 3), (1, 5)])
def test_every_figure_is_a_page_of_pixels_and_always_the_same(height: int, width: int) -> None:
    again = every_figure(height, width)
    for name, page_HxWx3 in every_figure(height, width).items():
        assert page_HxWx3.dtype == np.uint8 and page_HxWx3.ndim == 3 and page_HxWx3.shape[2] == 3, name
        assert np.array_equal(page_HxWx3, again[name]), name
        edge = canvas.MARGIN - 2
        frame = [page_HxWx3[:edge], page_HxWx3[-edge:], page_HxWx3[:, :edge], page_HxWx3[:, -edge:]]
        assert all((part == 255).all() for part in frame), f"{name}: something is drawn in the margin"
        assert len(np.unique(page_HxWx3.reshape(-1, 3), axis=0)) > 5, f"{name}: nothing is drawn"


def test_nan_is_magenta_wherever_it_comes_from() -> None:
    pairs = laplacian.toric(4, 4)
    bad_NxK, bad_K, bad_N = pairs.basis_NxK.copy(), pairs.eigenvalue_K.copy(), np.ones(16)
    bad_NxK[3, 1] = bad_K[2] = bad_N[5] = np.nan
    bad_16x16 = np.full((16, 16), np.nan)
    true_16x16 = laplacian.toric_stencil(4, 4)
    pages = [
        operator_figures.beside(bad_NxK, bad_K, pairs.basis_NxK, pairs.eigenvalue_K, 4, 4),
        operator_figures.beside(pairs.basis_NxK, pairs.eigenvalue_K, bad_NxK, bad_K, 4, 4),
        operator_figures.operators(bad_16x16, true_16x16, 4, 4),
        operator_figures.clustered_isometries(bad_16x16[None], [1, 5]),
        operator_figures.multiplicities(bad_K, [1, 5], pairs.eigenvalue_K, [1, 4, 6, 4, 1]),
        operator_figures.masses_beside(bad_N, np.ones(16), 4, 4),
        operator_figures.masses_beside(np.full(16, np.nan), np.ones(16), 4, 4),
    ]
    assert all(len(positions(page, MAGENTA)) for page in pages)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, np.inf])
def test_constant_input_has_a_range(value: float) -> None:
    constant_16x16 = np.full((16, 16), value)
    constant_16 = constant_16x16[0]
    with np.errstate(all="raise"):
        operator_figures.beside(constant_16x16, constant_16, constant_16x16, constant_16, 4, 4)
        operator_figures.operators(constant_16x16, constant_16x16, 4, 4)
        operator_figures.clustered_isometries(constant_16x16[None], [])
        operator_figures.multiplicities(constant_16, [], constant_16, [16])
        operator_figures.masses_beside(constant_16, constant_16, 4, 4)


def test_beside_shows_as_many_as_there_are_on_either_side() -> None:
    pairs = laplacian.toric(16, 16)
    basis_NxK, values_K = pairs.basis_NxK, pairs.eigenvalue_K
    whole = operator_figures.beside(basis_NxK, values_K, basis_NxK, values_K, 16, 16)
    assert whole.shape[1] <= 1400, "wider than a README's picture"
    fewer = operator_figures.beside(basis_NxK[:, :5], values_K[:5], basis_NxK, values_K, 16, 16)
    assert fewer.shape[0] == whole.shape[0] and whole.shape[1] - 3 * 90 < fewer.shape[1] < whole.shape[1] - 3 * 60
    assert operator_figures.beside(basis_NxK, values_K, basis_NxK, values_K, 16, 16, count=9).shape[0] < whole.shape[0] / 2
    # The constant is the first: a square of the darkest red at the upper left of either half.
    dark = positions(whole, tuple(canvas.DIVERGING_257x3[-1]))
    for left in (canvas.MARGIN, whole.shape[1] // 2 + canvas.MARGIN):
        inside = (dark[:, 0] < 150) & (dark[:, 1] >= left) & (dark[:, 1] < left + 66)
        assert inside.sum() == 64**2


def test_operators_have_their_kernels_in_the_middle_and_scales_of_their_own() -> None:
    true_NxN = laplacian.toric_stencil(9, 9)
    page_HxWx3 = operator_figures.operators(0.01 * true_NxN, true_NxN, 9, 9)
    factor = round(256 / 9)
    centres = positions(page_HxWx3, tuple(canvas.DIVERGING_257x3[-1]))
    centres = centres[centres[:, 0] > page_HxWx3.shape[0] // 2 + 50]  # below the matrices and their bars
    for half in (centres[:, 1] < page_HxWx3.shape[1] // 2, centres[:, 1] >= page_HxWx3.shape[1] // 2):
        rows, columns = np.unique(centres[half][:, 0], return_counts=True)
        assert (columns >= factor).sum() == factor, "one grid point is the largest"
        square = centres[half][np.isin(centres[half][:, 0], rows[columns >= factor])]
        around = page_HxWx3[square[:, 0].min() - 5, square[:, 1].min() + 5]
        assert around.tolist() == canvas.diverging(np.array(-0.25), 1.0).tolist(), "the stencil's -1 beside its 4"


def test_lines_part_the_clusters_and_cover_no_entry() -> None:
    tau_KxK = np.ones((40, 40))
    bare, ruled = (operator_figures.clustered_isometries(tau_KxK[None], starts) for starts in ([], [0, 1, 4, 9, 16, 25]))
    dark = tuple(canvas.DIVERGING_257x3[-1])
    assert operator_figures._ruled(np.zeros((4, 4, 3), np.uint8), [0, 1, 3, 4, 9], 42).shape == (44, 44, 3)  # 4 * 10 + 2, framed
    for size, starts in ((40, [1, 4]), (36, [0, 7, 7, 40])):
        picture_HxWx3 = operator_figures._ruled(canvas.diverging(np.ones((size, size)), 1.0), starts, 256)
        inner = [start for start in set(starts) if 0 < start < size]
        factor = (len(picture_HxWx3) - 2 - len(inner)) // size
        assert len(positions(picture_HxWx3, dark)) == (factor * size) ** 2
        lines = np.flatnonzero((picture_HxWx3[5] == operator_figures.LINE).all(axis=-1)) - 1
        assert lines.tolist() == [factor * start + k for k, start in enumerate(sorted(inner))]
    assert len(positions(ruled, operator_figures.LINE)) > 0 == len(positions(bare, operator_figures.LINE))


def test_only_large_maps_have_their_corner_enlarged() -> None:
    heights = [operator_figures.clustered_isometries(np.eye(k)[None], [1, 4]).shape[0] for k in (9, 36, 37, 256)]
    assert max(heights[:2]) < 400 and min(heights[2:]) > 550


def test_a_step_plot_without_clusters_is_as_it_was_and_with_them_has_lines_and_sizes() -> None:
    values_K = np.array([0.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0])
    plain, ruled = figures.step_plot(values_K, 200, 400), figures.step_plot(values_K, 200, 400, boundaries=[1, 4])
    assert plain.shape == ruled.shape == (200, 400, 3)
    assert (plain[:6, 40:] == 255).all() and not (ruled[:6, 40:] == 255).all(), "sizes stand above"
    faint = positions(ruled, canvas.FAINT)
    assert len(np.unique(faint[:, 1])) == 2 and np.ptp(faint[:, 0]) > 100
    assert len(positions(plain, canvas.FAINT)) == 0
    wide = figures.step_plot(values_K, 200, 400, label_width=60)
    assert (wide[30, 60] == canvas.INK).all() and not (plain[30, 60] == canvas.INK).any(), "the axis is further right"


def test_the_learned_and_the_true_multiplicities_are_above_each_other() -> None:
    values_K = np.array([0.0] + [1.0] * 3 + [1.5] * 5)
    page_HxWx3 = operator_figures.multiplicities(values_K / 100, [1, 4], values_K, [1, 3, 5])
    middle = page_HxWx3.shape[0] // 2
    faint = positions(page_HxWx3, canvas.FAINT)
    above, below = (np.unique(faint[part, 1]).tolist() for part in (faint[:, 0] < middle, faint[:, 0] >= middle))
    assert len(above) == 2 and above == below


def test_masses_are_compared_over_their_means() -> None:
    mass_N = np.linspace(1, 2, 12)
    page_HxWx3 = operator_figures.masses_beside(100 * mass_N, mass_N, 3, 4)
    pixels = (
        page_HxWx3[90 : 90 + 230, canvas.MARGIN : canvas.MARGIN + 322],
        page_HxWx3[90 : 90 + 230, canvas.MARGIN + 336 :][:, :322],
    )
    assert np.array_equal(*pixels) and len(np.unique(pixels[0].reshape(-1, 3), axis=0)) >= 12
