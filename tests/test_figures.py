"""Figures: what colour is where. Whether they are good to look at is for eyes."""

import numpy as np
import pytest
from PIL import Image

from niso import canvas, figures

WHITE, MAGENTA = (255, 255, 255), canvas.NOT_A_NUMBER


def ring_laplacian(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues, eigenvectors and matrix of the five-point Laplacian of a torus."""
    shift = [np.roll(np.eye(n), 1, axis=0) for n in (height, width)]
    one = [2 * np.eye(len(s)) - s - s.T for s in shift]
    matrix_NxN = np.kron(one[0], np.eye(width)) + np.kron(np.eye(height), one[1])
    eigenvalue_N, basis_NxN = np.linalg.eigh(matrix_NxN)
    return eigenvalue_N, basis_NxN, matrix_NxN


def positions(page_HxWx3: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Rows and columns (Px2) of the pixels of exactly this colour."""
    return np.argwhere((page_HxWx3 == np.array(colour)).all(axis=-1))


def every_figure() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    eigenvalue_N, basis_NxN, _ = ring_laplacian(6, 8)
    image_BxHxWxC = rng.uniform(-1.5, 1.5, (2, 10, 12, 3))
    return {
        "reconstructions": figures.reconstructions(image_BxHxWxC, -image_BxHxWxC, 0.9 * image_BxHxWxC, -0.8 * image_BxHxWxC),
        "eigenfunctions": figures.eigenfunctions(basis_NxN, eigenvalue_N, 6, 8, count=20),
        "isometries": figures.isometries(np.linalg.qr(rng.normal(size=(3, 9, 9)))[0]),
        "masses": figures.masses(np.linspace(0.5, 2, 48), 6, 8),
        "operator": figures.operator(basis_NxN[:, :20], eigenvalue_N[:20], np.ones(48), 6, 8),
        "spectrum": figures.spectrum(eigenvalue_N),
        "grid": figures.grid([np.zeros((5, 7, 3), np.uint8)] * 5, 3, title="title", captions=list("abcde"), headings=list("xyz")),
    }


def test_every_figure_is_a_page_of_pixels_and_always_the_same() -> None:
    again = every_figure()
    for name, page_HxWx3 in every_figure().items():
        assert page_HxWx3.dtype == np.uint8 and page_HxWx3.ndim == 3 and page_HxWx3.shape[2] == 3, name
        assert np.array_equal(page_HxWx3, again[name]), name
        edge = canvas.MARGIN - 2
        frame = [page_HxWx3[:edge], page_HxWx3[-edge:], page_HxWx3[:, :edge], page_HxWx3[:, -edge:]]
        assert all((part == 255).all() for part in frame), f"{name}: something is drawn in the margin"
        assert len(np.unique(page_HxWx3.reshape(-1, 3), axis=0)) > 5, f"{name}: nothing is drawn"


def test_diverging_shows_the_sign() -> None:
    colours = canvas.diverging(np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 9.0]), limit=2.0).astype(int)
    assert tuple(colours[2]) == WHITE
    assert all(colours[k, 2] > colours[k, 0] + 60 for k in (0, 1)), "negative is blue"
    assert all(colours[k, 0] > colours[k, 2] + 60 for k in (3, 4)), "positive is red"
    assert colours[0].sum() < colours[1].sum() and colours[4].sum() < colours[3].sum(), "further from zero is darker"
    assert np.array_equal(colours[4], colours[5]), "beyond the limit is the limit"


@pytest.mark.parametrize("table_Tx3", [canvas.SEQUENTIAL_256x3, canvas.DIVERGING_257x3[128:], canvas.DIVERGING_257x3[128::-1]])
def test_tables_darken_steadily_from_white(table_Tx3: np.ndarray) -> None:
    grey_T = table_Tx3 @ np.array([0.2126, 0.7152, 0.0722])
    assert tuple(table_Tx3[0]) == WHITE
    assert np.diff(grey_T).max() <= 0.5 and grey_T[-1] < 80  # half a level: rounding to 8 bits
    assert np.abs(np.diff(table_Tx3.astype(int), axis=0)).max() <= 12, "a visible edge in the table"


def test_nan_is_magenta_and_harms_nothing_else() -> None:
    values = np.array([[np.nan, 1.0], [0.0, -1.0]])
    for colour in (canvas.diverging, canvas.sequential):
        marked, plain = colour(values), colour(np.nan_to_num(values))
        assert tuple(marked[0, 0]) == MAGENTA
        assert np.array_equal(marked[1], plain[1]) and np.array_equal(marked[0, 1], plain[0, 1])
    assert tuple(canvas.photo(np.full((1, 1, 3), [0.0, np.nan, 0.0]))[0, 0]) == MAGENTA
    eigenvalue_N, basis_NxN, _ = ring_laplacian(4, 4)
    basis_NxN[3, 1] = eigenvalue_N[2] = np.nan
    tau_BxKxK = np.full((1, 4, 4), np.nan)
    image_BxHxWxC = np.full((1, 4, 4, 1), np.nan)
    pages = [
        figures.eigenfunctions(basis_NxN, eigenvalue_N, 4, 4),
        figures.spectrum(eigenvalue_N),
        figures.operator(basis_NxN, eigenvalue_N, np.ones(16), 4, 4),
        figures.isometries(tau_BxKxK),
        figures.masses(np.array([1.0, np.nan]), 1, 2),
        figures.reconstructions(image_BxHxWxC, image_BxHxWxC, image_BxHxWxC, image_BxHxWxC),
    ]
    assert all(len(positions(page, MAGENTA)) for page in pages)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, np.inf])
def test_constant_input_has_a_range(value: float) -> None:
    constant = np.full((16, 16), value)
    with np.errstate(all="raise", invalid="ignore"):  # inf - inf, in the mask
        figures.eigenfunctions(constant, constant[0], 4, 4)
        figures.isometries(constant[None])
        figures.masses(constant[0], 4, 4)
        figures.spectrum(constant[0])
    assert (canvas.diverging(np.zeros(3)) == 255).all()
    assert (canvas.sequential(np.zeros(3)) == 255).all()


def test_photo_maps_the_range_and_clips() -> None:
    image_HxWxC = np.array([[[-1.0, 0.0, 1.0], [-7.0, 7.0, 0.5]]])
    assert canvas.photo(image_HxWxC).tolist() == [[[0, 128, 255], [0, 255, 191]]]
    assert canvas.photo(np.array([[[1.0]]])).tolist() == [[[255, 255, 255]]]
    many_HxWxC = np.concatenate([image_HxWxC, np.ones((1, 2, 5))], axis=-1)
    assert np.array_equal(canvas.photo(many_HxWxC), canvas.photo(image_HxWxC))


def test_panel_blows_up_by_a_whole_number() -> None:
    picture_HxWx3 = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8)
    large_HxWx3 = canvas.panel(picture_HxWx3, 52)
    assert large_HxWx3.shape == (32, 52, 3)
    assert np.array_equal(large_HxWx3[1:-1:10, 1:-1:10], picture_HxWx3)
    assert tuple(large_HxWx3[0, 0]) == canvas.FAINT
    assert canvas.panel(np.zeros((200, 100, 3), np.uint8), 64).shape == (202, 102, 3), "never made smaller"


def test_grid_places_images_by_row_and_column() -> None:
    colours = [(10 * k + 5, 0, 99) for k in range(5)]
    page_HxWx3 = figures.grid(
        [np.full((6, 8, 3), colour, np.uint8) for colour in colours], 3, headings=["a wide heading", "b", "c"]
    )
    places = [positions(page_HxWx3, colour) for colour in colours]
    assert [len(place) for place in places] == [48] * 5, "nothing overlaps"
    middles = np.array([place.mean(axis=0) for place in places])
    assert np.ptp(middles[:3, 0]) == 0 and (np.diff(middles[:3, 1]) > 8).all() and middles[3, 0] > middles[0, 0] + 6
    assert np.array_equal(middles[0, 1:], middles[3, 1:]), "one column, one axis"
    bare_HxWx3 = figures.grid([np.full((6, 8, 3), colour, np.uint8) for colour in colours], 3, gap=11)
    middles = np.array([positions(bare_HxWx3, colour).mean(axis=0) for colour in colours])
    assert np.diff(middles[:3, 1]).tolist() == [19, 19] and middles[3, 0] - middles[0, 0] == 17


def test_reconstructions_show_the_error_where_it_is() -> None:
    image_BxHxWxC = np.zeros((1, 8, 8, 3))
    wrong_BxHxWxC = image_BxHxWxC.copy()
    wrong_BxHxWxC[0, 2, 5] = 0.6
    dark = tuple(int(c) for c in canvas.SEQUENTIAL_256x3[-1])
    right = positions(figures.reconstructions(image_BxHxWxC, image_BxHxWxC, image_BxHxWxC, image_BxHxWxC), dark)
    first = positions(figures.reconstructions(image_BxHxWxC, image_BxHxWxC, wrong_BxHxWxC, image_BxHxWxC), dark)
    second = positions(figures.reconstructions(image_BxHxWxC, image_BxHxWxC, image_BxHxWxC, wrong_BxHxWxC), dark)
    factor = 128 // 8
    assert len(first) - len(right) == len(second) - len(right) == factor**2, "one pixel is wrong"
    # The forward error is the fourth of seven columns, the backward error the last.
    assert 3 * 128 < second[:, 1].min() < 4 * 144 + 60 < 6 * 128 < first[:, 1].min()


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_reconstructions_take_any_channels_and_autoencoded_columns(channels: int) -> None:
    image_BxHxWxC = np.random.default_rng(0).uniform(-1, 1, (3, 6, 9, channels))
    narrow = figures.reconstructions(*[image_BxHxWxC] * 4, count=2)
    wide = figures.reconstructions(*[image_BxHxWxC] * 6, count=2)
    assert wide.shape[0] == narrow.shape[0] and wide.shape[1] > narrow.shape[1] + 200


def test_operator_rows_are_the_stencil_times_the_mass_of_what_is_summed() -> None:
    """Omega = Phi Lambda Phi^T M of the five-point Laplacian: 4 at the point and -1 around it, where there is mass."""
    eigenvalue_N, basis_NxN, _ = ring_laplacian(8, 8)
    mass_N = np.tile(np.arange(8) >= 5.0, 8)  # none in the columns 0 to 4
    page_HxWx3 = figures.operator(basis_NxN, eigenvalue_N, mass_N, 8, 8)
    for value, count in ((4.0, 2), (-1.0, 4 + 4 + 1 + 1)):  # rows at columns 6, 6, 4 and (around the ring) 0 see it
        place = positions(page_HxWx3, tuple(canvas.diverging(np.array(value), 4.0)))
        in_kernels = (place[:, 1] > 340).sum()  # right of the matrix and its bar
        assert in_kernels // 12**2 == count, "8 grid points are 96 pixels; the colour bar adds less than one grid point"


def test_block_means_of_the_factors_are_those_of_the_matrix() -> None:
    eigenvalue_N, basis_NxN, matrix_NxN = ring_laplacian(8, 8)
    rng = np.random.default_rng(0)
    mass_N = rng.uniform(0.5, 2, 64)
    means_RxR = figures._block_means(basis_NxN * eigenvalue_N, 10) @ figures._block_means(mass_N[:, None] * basis_NxN, 10).T
    whole_NxN = matrix_NxN * mass_N
    blocks = [slice(start, start + 7) for start in range(0, 64, 7)]
    expected = [[whole_NxN[rows, columns].mean() for columns in blocks] for rows in blocks]
    np.testing.assert_allclose(means_RxR, expected, atol=1e-12)  # float64 sums of 64 terms of size 4


def test_spectrum_rises_to_the_right() -> None:
    plot_HxWx3 = figures.step_plot(np.array([0.0, 1.0, 1.0, 4.0]), 200, 300)
    line = positions(plot_HxWx3, tuple(int(c) for c in canvas.DIVERGING_257x3[30]))
    left, right = line[line[:, 1] < 60, 0], line[line[:, 1] > 270, 0]
    assert left.min() > 150 and right.max() < 20


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 8, [0, 2, 4, 6, 8]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3e-5, 5e-5, [-2e-5, 0, 2e-5, 4e-5]),
        (0, 256, [0, 50, 100, 150, 200, 250]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert figures.round_numbers(low, high) == expected


def test_save_writes_a_png(tmp_path) -> None:
    page_HxWx3 = figures.masses(np.ones(4), 2, 2)
    figures.save(tmp_path / "masses.png", page_HxWx3)
    with Image.open(tmp_path / "masses.png") as image:
        assert image.format == "PNG" and np.array_equal(np.array(image), page_HxWx3)
