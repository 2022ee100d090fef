"""Figures of what was learned: uint8 HxWx3 pages for TensorBoard and for paper. Inputs are numpy arrays; NaN is magenta."""

import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from niso import canvas
from niso.canvas import DIVERGING_257x3, SEQUENTIAL_256x3, colour_bar, diverging, grid, panel, sequential

__all__ = [
    "eigenfunctions", "grid", "isometries", "learned_operator", "masses", "operator", "predictions", "reconstructions", "save",
    "spectrum",
]  # fmt: skip


def save(path: str | os.PathLike[str], image_HxWx3: np.ndarray) -> None:
    """Writes a figure as PNG, whatever the name's ending."""
    Image.fromarray(image_HxWx3).save(path, "PNG")


def reconstructions(
    first_BxHxWxC: np.ndarray,
    second_BxHxWxC: np.ndarray,
    decoded_first_BxHxWxC: np.ndarray,
    decoded_second_BxHxWxC: np.ndarray,
    autoencoded_first_BxHxWxC: np.ndarray | None = None,
    autoencoded_second_BxHxWxC: np.ndarray | None = None,
    *,
    count: int = 6,
) -> np.ndarray:
    """Returns one row per example: T psi, its estimate D(tau E psi) and their distance, then the same for psi.

    Args:
        first, second: psi and T psi, in [-1, 1] (clipped); 1 or 2 channels are grey, of more the first three are shown.
        decoded_first, decoded_second: D(tau^-1 E T psi) and D(tau E psi).
        autoencoded_first, autoencoded_second: optional further columns, D(E psi) and D(E T psi).
        count: how many examples are shown.

    The distance is the mean over channels of the absolute difference, on one scale for the whole figure.
    """
    error_second_BxHxW = np.abs(decoded_second_BxHxWxC - second_BxHxWxC).mean(axis=-1)
    error_first_BxHxW = np.abs(decoded_first_BxHxWxC - first_BxHxWxC).mean(axis=-1)
    limit = canvas.largest(np.stack([error_first_BxHxW[:count], error_second_BxHxW[:count]]))
    there = {"input": first_BxHxWxC, "transformed": second_BxHxWxC, "mapped": decoded_second_BxHxWxC, "|error|": error_second_BxHxW}
    back = {"input": first_BxHxWxC, "mapped back": decoded_first_BxHxWxC, "|error|": error_first_BxHxW}
    if autoencoded_second_BxHxWxC is not None:
        there["autoencoded"] = autoencoded_second_BxHxWxC
    if autoencoded_first_BxHxWxC is not None:
        back["autoencoded"] = autoencoded_first_BxHxWxC
    pages = []
    for columns in (there, back):
        rows = [[image_BxHxWxC[b] for image_BxHxWxC in columns.values()] for b in range(min(count, len(first_BxHxWxC)))]
        pictures = [panel(sequential(x, limit) if x.ndim == 2 else canvas.photo(x), 128) for row in rows for x in row]
        pages.append(grid(pictures, len(columns), headings=list(columns), margin=0))
    bar = colour_bar(SEQUENTIAL_256x3, 0, limit, pictures[0].shape[0])
    space = canvas.blank(canvas.words("", canvas.HEADING).shape[0] + 1, 1)  # beside the inner headings
    pages.append(canvas.stack([space, bar, canvas.words("|error|", canvas.CAPTION)]))
    headings = ["to the transformed", "and back to the input", ""]
    return grid(pages, 3, headings=headings, title="Reconstructions through the isometry", gap=2 * canvas.GAP)


def eigenfunctions(basis_NxK: np.ndarray, eigenvalue_K: np.ndarray, height: int, width: int, *, count: int = 64) -> np.ndarray:
    """Returns the first `count` eigenfunctions as images, each on its own symmetric range, its eigenvalue below."""
    total = basis_NxK.shape[1]
    count = min(count, total)
    pictures = [panel(diverging(basis_NxK[:, k].reshape(height, width)), 104) for k in range(count)]
    captions = [f"{k}:  {eigenvalue_K[k]:.3g}" for k in range(count)]
    columns = 8 if count >= 8 else count
    title = f"Eigenfunctions, {count} of {total}" if count < total else f"Eigenfunctions, all {total}"
    return grid(pictures, columns, captions=captions, title=f"{title}  (index: eigenvalue)")


def isometries(tau_BxKxK: np.ndarray, *, count: int = 4) -> np.ndarray:
    """Returns the first `count` isometric maps tau_Omega as matrices on one symmetric colour scale."""
    shown_BxKxK = tau_BxKxK[:count]
    limit = canvas.largest(shown_BxKxK)
    pictures = [panel(diverging(tau_KxK, limit), 256) for tau_KxK in shown_BxKxK]
    bar = colour_bar(DIVERGING_257x3, -limit, limit, pictures[0].shape[0])
    headings = [f"example {b}" for b in range(len(pictures))]
    k = tau_BxKxK.shape[-1]
    return grid([*pictures, bar], len(pictures) + 1, headings=headings, title=f"Isometric maps in the eigenbasis, {k} x {k}")


def masses(mass_N: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the mass of every grid point, on a scale from zero to the largest."""
    limit = canvas.largest(mass_N)
    picture = panel(sequential(mass_N.reshape(height, width), limit), 320)
    return grid([picture, colour_bar(SEQUENTIAL_256x3, 0, limit, picture.shape[0])], 2, title="Mass of the grid points")


def operator(
    basis_NxK: np.ndarray, eigenvalue_K: np.ndarray, mass_N: np.ndarray, height: int, width: int, *, side: int = 256
) -> np.ndarray:
    """Returns the operator Omega = Phi Lambda Phi^T M as a matrix, beside some of its rows as images (what it sums there).

    A matrix of more than `side` rows is shown by the means of its blocks. These are exact and cheap: the mean of a block
    is the product of the means of the factors' rows, so the N x N matrix is never made.
    """
    left_NxK, right_NxK = basis_NxK * eigenvalue_K, mass_N[:, None] * basis_NxK
    matrix_RxR = _block_means(left_NxK, side) @ _block_means(right_NxK, side).T
    points = [(height * a // 8, width * b // 8) for a, b in ((2, 2), (2, 6), (4, 4), (6, 2), (6, 6), (0, 0))]
    rows_PxN = np.stack([left_NxK[i * width + j] for i, j in points]) @ right_NxK.T
    matrix_limit, row_limit = canvas.largest(matrix_RxR), canvas.largest(rows_PxN)
    matrix = panel(diverging(matrix_RxR, matrix_limit), side)
    deep = 2 if 2 * width < 3 * height else 3  # rows of kernels, which together are about as tall as the matrix
    kernel_side = max(matrix.shape[0] / deep - 30, 96) * max(1, width / height)
    kernels = [panel(diverging(row_N.reshape(height, width), row_limit), round(kernel_side)) for row_N in rows_PxN]
    kernels_page = grid(kernels, 6 // deep, captions=[f"row {i}, column {j}" for i, j in points], margin=0)
    bars = [colour_bar(DIVERGING_257x3, -limit, limit, matrix.shape[0]) for limit in (matrix_limit, row_limit)]
    size = f"{len(mass_N)} x {len(mass_N)}" + (", block means" if len(matrix_RxR) < len(mass_N) else "")
    headings = [f"matrix, {size}", "", "its rows at some grid points", ""]
    return grid([matrix, bars[0], kernels_page, bars[1]], 4, headings=headings, title="Operator")


def learned_operator(arrays: dict[str, np.ndarray], height: int, width: int) -> dict[str, np.ndarray]:
    """Returns the figures of one operator on a height x width grid, by title.

    Args:
        arrays: its `basis_NxK`, `eigenvalue_K` and `mass_N`, among others.
    """
    basis_NxK, eigenvalue_K, mass_N = (arrays[name] for name in ("basis_NxK", "eigenvalue_K", "mass_N"))
    return {
        "eigenfunctions": eigenfunctions(basis_NxK, eigenvalue_K, height, width),
        "masses": masses(mass_N, height, width),
        "operator": operator(basis_NxK, eigenvalue_K, mass_N, height, width),
        "spectrum": spectrum(eigenvalue_K),
    }


def predictions(image_BxHxWxC: np.ndarray, probability_BxL: np.ndarray, truth_BxL: np.ndarray, *, count: int = 32) -> np.ndarray:
    """Returns images, below each its most probable class and how probable; where that is wrong, also what it is.

    Args:
        image: in [-1, 1] (clipped).
        truth: 1 for the right class, 0 for the others.
    """
    count = min(count, len(image_BxHxWxC))
    guess_B, label_B = probability_BxL.argmax(axis=1), truth_BxL.argmax(axis=1)
    captions = [
        f"{guess_B[b]}  {100 * probability_BxL[b].max():.0f} %" + (f"  is {label_B[b]}" if guess_B[b] != label_B[b] else "")
        for b in range(count)
    ]
    pictures = [panel(canvas.photo(image_HxWxC), 104) for image_HxWxC in image_BxHxWxC[:count]]
    right = int((guess_B[:count] == label_B[:count]).sum())
    return grid(pictures, min(8, count), captions=captions, title=f"Predictions, {right} of {count} right")


def _block_means(factor_NxK: np.ndarray, most: int) -> np.ndarray:
    """Returns the means of at most `most` runs of rows, all of one length but the last."""
    start_R = np.arange(0, len(factor_NxK), -(-len(factor_NxK) // most))
    count_R = np.diff(np.append(start_R, len(factor_NxK)))
    return np.add.reduceat(factor_NxK, start_R, axis=0) / count_R[:, None]


def spectrum(eigenvalue_K: np.ndarray) -> np.ndarray:
    """Returns the eigenvalues over their index, and beside them the mask P_Lambda = exp(-|lambda_i - lambda_j|)."""
    mask_KxK = np.exp(-np.abs(eigenvalue_K[:, None] - eigenvalue_K[None, :]))
    mask = panel(sequential(mask_KxK, 1.0), 320)
    plot = step_plot(eigenvalue_K, mask.shape[0], 460)
    return grid(
        [plot, mask, colour_bar(SEQUENTIAL_256x3, 0, 1, mask.shape[0])],
        3,
        headings=["eigenvalue over index", "mask exp(-|difference|)", ""],
        title=f"Spectrum, {len(eigenvalue_K)} eigenvalues",
    )


def step_plot(value_K: np.ndarray, height: int, width: int, *, boundaries: Sequence[int] = (), label_width: int = 0) -> np.ndarray:
    """Returns values as a step function of their index, with axes whose ticks lie on round numbers.

    A value that is not finite is a magenta bar over the whole height.

    Args:
        boundaries: the indices at which a new cluster of values begins. Thin lines part the clusters; above each stands how
            many values it has, where there is room.
        label_width: the least number of pixels left of the axis: plots of one value align.
    """
    finite_F = value_K[np.isfinite(value_K)]
    low, high = min(0.0, finite_F.min(initial=0.0)), max(finite_F.max(initial=0.0), 0.0)
    high = high if high > low else low + 1
    y_ticks, x_ticks = round_numbers(low, high), [t for t in round_numbers(0, len(value_K)) if t == int(t)]
    labels = [canvas.words(f"{tick:g}", canvas.CAPTION) for tick in y_ticks]
    left, right = max(label_width, max(label.shape[1] for label in labels) + 8), width - 10
    top, bottom = 22 if boundaries else 9, height - 24
    fine = 3  # lines are drawn this many times larger, then averaged: smooth without a plotting library

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / max(len(value_K), 1), bottom - (bottom - top) * (y - low) / (high - low)

    page = Image.new("RGB", (width * fine, height * fine), canvas.PAPER)
    draw = ImageDraw.Draw(page)

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, int, int], thickness: int = fine) -> None:
        draw.line([(fine * (x + 0.5), fine * (y + 0.5)) for x, y in points], colour, thickness, joint="curve")

    for tick in y_ticks:
        line([at(0, tick), at(len(value_K), tick)], (228, 230, 234))
    for index in boundaries:
        place = round(at(index, low)[0])  # on a pixel: sharp
        line([(place, top), (place, bottom)], canvas.FAINT)
    for k in np.flatnonzero(~np.isfinite(value_K)):
        line([at(k + 0.5, low), at(k + 0.5, high)], canvas.NOT_A_NUMBER, 2 * fine)
    line([at(0, high), at(0, low), at(len(value_K), low)], canvas.INK)
    for tick in x_ticks:
        x, y = at(tick, low)
        line([(x, y), (x, y + 4)], canvas.INK)
    steps = [at(k + d, value) for k, value in enumerate(value_K) if np.isfinite(value) for d in (0, 1)]
    if steps:
        line(steps, tuple(int(c) for c in DIVERGING_257x3[30]), 2 * fine)  # type: ignore[arg-type]
    plot_HxWx3 = np.array(page.reduce(fine))
    for label, tick in zip(labels, y_ticks, strict=True):
        canvas.paste(plot_HxWx3, label, round(at(0, tick)[1]) - 8, left - label.shape[1] - 5)
    for tick in x_ticks:
        label = canvas.words(f"{tick:g}", canvas.CAPTION)
        canvas.paste(plot_HxWx3, label, bottom + 6, min(round(at(tick, low)[0]) - label.shape[1] // 2, width - label.shape[1]))
    free = 0  # the first pixel right of the last size
    for start, stop in itertools.pairwise(sorted({0, *boundaries, len(value_K)}) if boundaries else []):
        label = canvas.words(str(stop - start), canvas.CAPTION)
        place = round((at(start, low)[0] + at(stop, low)[0] - label.shape[1]) / 2) + 1
        if free <= place <= width - label.shape[1]:
            canvas.paste(plot_HxWx3, label, 0, place)
            free = place + label.shape[1]
    return plot_HxWx3


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    return [float(f"{k * step:.12g}") for k in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1)]
