"""Figures of a learned operator beside the true one: uint8 HxWx3 pages. Inputs are numpy arrays; NaN is magenta."""

from collections.abc import Sequence

import numpy as np

from niso import canvas
from niso.canvas import DIVERGING_257x3, SEQUENTIAL_256x3, colour_bar, diverging, grid, panel, sequential
from niso.figures import step_plot

SIDES = ("learned operator", "Laplacian")
LINE = (222, 224, 229)  # lighter than a frame: with 40 clusters it would hide what it parts
APART = 2 * canvas.MARGIN  # pixels between what is learned and what is true


def beside(
    learned_NxK: np.ndarray,
    learned_eigenvalue_K: np.ndarray,
    true_NxK: np.ndarray,
    true_eigenvalue_K: np.ndarray,
    height: int,
    width: int,
    *,
    count: int = 64,
) -> np.ndarray:
    """Returns the first `count` learned eigenfunctions (left) beside the first true ones, eight in a row.

    Each is on its own symmetric range, its eigenvalue below it. The two may differ in how many there are. The caller gives both
    in the order of the true spectrum: the symmetry does not fix that of the learned one.
    """
    sheets = []
    for basis_NxK, eigenvalue_K in ((learned_NxK, learned_eigenvalue_K), (true_NxK, true_eigenvalue_K)):
        pictures = [panel(diverging(function_N.reshape(height, width)), 64) for function_N in basis_NxK.T[:count]]
        captions = [f"{eigenvalue:.3g}" for eigenvalue in eigenvalue_K[:count]]
        sheets.append(grid(pictures, min(8, len(pictures)), captions=captions, margin=0, gap=6))
    return grid(sheets, 2, headings=SIDES, title="Eigenfunctions in the order of the Laplacian  (eigenvalue)", gap=APART)


def operators(learned_NxN: np.ndarray, true_NxN: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the learned operator Omega (left) beside the Laplacian: its matrix, and below it its row at the grid's centre.

    The row is the kernel Omega(x0, .) with which the operator sums over the grid, as an image. Each picture has its own
    symmetric scale. One pixel per entry is the least: a matrix of more than 384 rows makes a larger page.
    """
    row, column = height // 2, width // 2
    captions = ["matrix", "", f"its row at grid point ({row}, {column})", ""]
    pages = []
    for name, matrix_NxN in zip(SIDES, (learned_NxN, true_NxN), strict=True):
        kernel_HxW = matrix_NxN[row * width + column].reshape(height, width)
        cells = [cell for values in (matrix_NxN, kernel_HxW) for cell in _with_bar(values, 256)]
        pages.append(grid(cells, 2, headings=[name, ""], captions=captions, margin=0))
    return grid(pages, 2, title=f"Operators, {len(learned_NxN)} x {len(learned_NxN)}", gap=APART)


def clustered_isometries(tau_BxKxK: np.ndarray, boundaries: Sequence[int], *, count: int = 4) -> np.ndarray:
    """Returns the first `count` isometric maps tau_Omega, and below each its first 36 rows and columns enlarged.

    One symmetric colour scale for the page. Thin lines between the entries part the clusters of eigenvalues: where the maps
    commute with the operator, they are zero outside the blocks on the diagonal.

    Args:
        boundaries: the indices at which a new cluster begins; 0 may be among them.
    """
    shown_BxKxK, k = tau_BxKxK[:count], tau_BxKxK.shape[-1]
    limit = canvas.largest(shown_BxKxK)
    cells, side = [], 256
    for size in (k, 36) if k > 36 else (k,):
        parts = [_ruled(diverging(tau_KxK[:size, :size], limit), boundaries, side) for tau_KxK in shown_BxKxK]
        side = len(parts[0])
        cells += [*parts, colour_bar(DIVERGING_257x3, -limit, limit, side)]
    headings = [*(f"example {b}" for b in range(len(shown_BxKxK))), ""]
    title = f"Isometric maps in the eigenbasis, {k} x {k}" + (", and their first 36 x 36" if k > 36 else "")
    return grid(cells, len(headings), headings=headings, title=title)


def multiplicities(
    learned_eigenvalue_K: np.ndarray, boundaries: Sequence[int], true_eigenvalue_K: np.ndarray, true_sizes: Sequence[int]
) -> np.ndarray:
    """Returns the learned eigenvalues over their index with the clusters that were found, above the true ones with theirs.

    Args:
        boundaries: the indices at which a new cluster of learned eigenvalues begins; 0 may be among them.
        true_sizes: the multiplicities of the true eigenvalues, in order; of the last there may be fewer in `true_eigenvalue_K`.

    The number above a cluster is how many eigenvalues it has; where there is no room for it, it is left out.
    """
    true_boundaries = np.cumsum(true_sizes).tolist()
    plots = [_step_plot(learned_eigenvalue_K, boundaries), _step_plot(true_eigenvalue_K, true_boundaries)]
    headed = [canvas.stack([canvas.words(name, canvas.HEADING), plot], 6) for name, plot in zip(SIDES, plots, strict=True)]
    return grid(headed, 1, title="Eigenvalues over their index  (multiplicity)", gap=canvas.MARGIN)


def masses_beside(mass_N: np.ndarray, true_mass_N: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the learned masses (left) beside the true ones, each divided by its mean, on one scale from zero."""
    relative = [_over_mean(values_N).reshape(height, width) for values_N in (mass_N, true_mass_N)]
    limit = canvas.largest(np.stack(relative))
    pictures = [panel(sequential(values_HxW, limit), 320) for values_HxW in relative]
    bar = colour_bar(SEQUENTIAL_256x3, 0, limit, pictures[0].shape[0])
    return grid([*pictures, bar], 3, headings=["learned", "true", ""], title="Mass of the grid points over its mean")


def _with_bar(values_HxW: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture of the values on their own symmetric scale, and the bar of that scale."""
    limit = canvas.largest(values_HxW)
    picture = panel(diverging(values_HxW, limit), side)
    return picture, colour_bar(DIVERGING_257x3, -limit, limit, picture.shape[0])


def _ruled(picture_KxKx3: np.ndarray, boundaries: Sequence[int], side: int) -> np.ndarray:
    """A framed picture, about `side` pixels large, with one line before each of these rows and columns. Nothing is covered."""
    size = len(picture_KxKx3)
    inner = [b for b in sorted(set(boundaries)) if 0 < b < size]
    factor = max(1, round((side - len(inner)) / size))
    lines = [factor * b for b in inner]
    picture_KxKx3 = picture_KxKx3.repeat(factor, axis=0).repeat(factor, axis=1)
    for axis in (0, 1):
        picture_KxKx3 = np.insert(picture_KxKx3, lines, np.array(LINE, np.uint8), axis=axis)
    return panel(picture_KxKx3, 1)


def _step_plot(eigenvalue_K: np.ndarray, boundaries: Sequence[int]) -> np.ndarray:
    starts = [0, *(int(b) for b in boundaries if 0 < b < len(eigenvalue_K))]
    return step_plot(eigenvalue_K, 230, 1000, boundaries=starts, label_width=48)


def _over_mean(values_N: np.ndarray) -> np.ndarray:
    finite_F = values_N[np.isfinite(values_N)]
    mean = finite_F.mean() if finite_F.size else 0.0
    return values_N / (mean if mean > 0 else 1.0)
