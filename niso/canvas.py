"""Pixels: numbers to colours, and images and words onto one page. numpy and Pillow only; everything returns uint8 HxWx3.

The built-in font of Pillow has no Greek letters and no typographic minus: words are ASCII.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (32, 32, 36)
FAINT = (196, 198, 204)
NOT_A_NUMBER = (255, 0, 255)  # magenta: in neither colour table

MARGIN, GAP = 20, 14
TITLE, HEADING, CAPTION = 20, 15, 13  # font sizes, pixels


def _from_oklch(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Returns the uint8 sRGB colours (Nx3) of the OKLCh coordinates (hue in degrees), clipped to what a screen shows.

    OKLab (B. Ottosson, "A perceptual color space for image processing", 2020): equal steps look equal.
    """
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    to_lms = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]])
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear_Nx3 = np.clip((np.stack([lightness, a, b], axis=-1) @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    srgb_Nx3 = np.where(linear_Nx3 <= 0.0031308, 12.92 * linear_Nx3, 1.055 * linear_Nx3 ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb_Nx3).astype(np.uint8)


def _diverging_table() -> np.ndarray:
    """257 colours, blue - white - red: lightness falls linearly from the exactly white middle to both ends."""
    t = np.linspace(-1, 1, 257)
    size = np.abs(t)
    table_257x3 = _from_oklch(1 - 0.64 * size, 0.145 * np.sin(np.pi * size**0.9 * 0.72), np.where(t < 0, 252, 27))
    table_257x3[128] = PAPER
    return table_257x3


def _sequential_table() -> np.ndarray:
    """256 colours, white - yellow - green - dark blue: lightness falls linearly."""
    t = np.linspace(0, 1, 256)
    return _from_oklch(1 - 0.74 * t, 0.105 * np.sin(np.pi * 0.8 * t), 105 + 160 * t)


DIVERGING_257x3 = _diverging_table()
SEQUENTIAL_256x3 = _sequential_table()


def largest(values: np.ndarray) -> float:
    """Returns the largest finite |value|, or 1 where there is none or all are zero: a range that can be divided by."""
    finite_N = np.abs(values[np.isfinite(values)])
    return float(finite_N.max()) if finite_N.size and finite_N.max() > 0 else 1.0


def diverging(values: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Returns uint8 colours, one axis of 3 more than `values`: -limit blue, 0 white, limit red, NaN magenta.

    Values beyond the limit get the colour of the limit. `limit` defaults to the largest finite |value|.
    """
    values = np.asarray(values, np.float64)
    scaled = np.clip(values / (largest(values) if limit is None else limit), -1, 1)
    return _look_up(DIVERGING_257x3, 128 * (scaled + 1))


def sequential(values: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Returns uint8 colours, one axis of 3 more than `values`: 0 (and below) white, limit dark blue, NaN magenta.

    `limit` defaults to the largest finite |value|.
    """
    values = np.asarray(values, np.float64)
    scaled = np.clip(values / (largest(values) if limit is None else limit), 0, 1)
    return _look_up(SEQUENTIAL_256x3, 255 * scaled)


def _look_up(table_Tx3: np.ndarray, index: np.ndarray) -> np.ndarray:
    bad = np.isnan(index)
    colours = table_Tx3[np.round(np.where(bad, 0, index)).astype(int)]
    colours[bad] = NOT_A_NUMBER
    return colours


def photo(image_HxWxC: np.ndarray) -> np.ndarray:
    """Returns the uint8 HxWx3 picture of an image in [-1, 1] (clipped): 1 or 2 channels as grey, else the first three."""
    image_HxWxC = np.asarray(image_HxWxC, np.float64)
    shown_HxWx3 = image_HxWxC[..., :3] if image_HxWxC.shape[-1] >= 3 else np.repeat(image_HxWxC[..., :1], 3, axis=-1)
    bad_HxW = np.isnan(shown_HxWx3).any(axis=-1)
    scaled_HxWx3 = np.where(bad_HxW[..., None], 0, np.clip(shown_HxWx3, -1, 1))
    picture_HxWx3 = np.round(127.5 * (scaled_HxWx3 + 1)).astype(np.uint8)
    picture_HxWx3[bad_HxW] = NOT_A_NUMBER
    return picture_HxWx3


def panel(picture_HxWx3: np.ndarray, side: int) -> np.ndarray:
    """Returns the picture, its pixels blown up by the integer that brings its longer side nearest to `side`, thinly framed."""
    factor = max(1, round(side / max(picture_HxWx3.shape[:2])))
    large_HxWx3 = picture_HxWx3.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.stack([np.pad(large_HxWx3[..., c], 1, constant_values=FAINT[c]) for c in range(3)], axis=-1)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at `size` pixels."""
    return ImageFont.load_default(size=size)


def words(text: str, size: int, colour: tuple[int, int, int] = INK) -> np.ndarray:
    """Returns `text` on paper, as wide as it is and always of the same height for a size."""
    width = int(np.ceil(font(size).getlength(text))) + 2
    page = Image.new("RGB", (max(width, 1), round(1.4 * size)), PAPER)
    ImageDraw.Draw(page).text((1, 0), text, fill=colour, font=font(size))
    return np.array(page)


def colour_bar(table_Tx3: np.ndarray, low: float, high: float, height: int) -> np.ndarray:
    """Returns an upright bar of the colour table with its lowest, middle and highest value beside it."""
    row_H = np.round(np.linspace(len(table_Tx3) - 1, 0, height - 2)).astype(int)
    strip_HxWx3 = panel(np.repeat(table_Tx3[row_H][:, None], 14, axis=1), 1)
    labels = [words(f"{value:.3g}", CAPTION) for value in (high, (low + high) / 2, low)]
    width = strip_HxWx3.shape[1] + 6 + max(label.shape[1] for label in labels)
    page_HxWx3 = blank(height, width)
    paste(page_HxWx3, strip_HxWx3, 0, 0)
    for k, label_HxWx3 in enumerate(labels):
        place = (height - label_HxWx3.shape[0]) * k // 2
        paste(page_HxWx3, label_HxWx3, place, strip_HxWx3.shape[1] + 6)
    return page_HxWx3


def blank(height: int, width: int) -> np.ndarray:
    """An empty page, height x width x 3 uint8."""
    return np.full((height, width, 3), PAPER, np.uint8)


def paste(page_HxWx3: np.ndarray, picture_HxWx3: np.ndarray, top: int, left: int) -> None:
    """Puts a picture on the page, in place."""
    height, width = picture_HxWx3.shape[:2]
    page_HxWx3[top : top + height, left : left + width] = picture_HxWx3


def stack(pictures: Sequence[np.ndarray], gap: int = 3) -> np.ndarray:
    """Returns the pictures one below the other, each centred."""
    width = max(picture.shape[1] for picture in pictures)
    page_HxWx3 = blank(sum(picture.shape[0] for picture in pictures) + gap * (len(pictures) - 1), width)
    top = 0
    for picture in pictures:
        paste(page_HxWx3, picture, top, (width - picture.shape[1]) // 2)
        top += picture.shape[0] + gap
    return page_HxWx3


def grid(
    images: Sequence[np.ndarray],
    columns: int,
    *,
    title: str = "",
    headings: Sequence[str] = (),
    captions: Sequence[str] = (),
    margin: int = MARGIN,
    gap: int = GAP,
) -> np.ndarray:
    """Returns one page with the images row by row, each centred in its column, columns as wide as what they hold.

    Args:
        images: uint8 HxWx3 of any sizes. captions: under each of them. headings: above each column. title: above all.
        margin, gap: pixels around the page and between its columns and rows.
    """
    if captions:
        images = [stack([image, words(text, CAPTION)]) for image, text in zip(images, captions, strict=True)]
    heads = [words(text, HEADING) for text in headings]
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    cells = [*([heads] if heads else []), *rows]
    widths = [max(row[k].shape[1] for row in cells if k < len(row)) for k in range(max(map(len, cells)))]
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    gaps = [4 if heads and k == 0 else gap for k in range(len(heights))]
    name = words(title, TITLE) if title else blank(0, 0)
    top = margin + name.shape[0] + (8 if title else 0)
    width = max(sum(widths) + gap * (len(widths) - 1), name.shape[1]) + 2 * margin
    page_HxWx3 = blank(top + sum(heights) + sum(gaps[:-1]) + margin, width)
    paste(page_HxWx3, name, margin, margin)
    for row, height, below in zip(cells, heights, gaps, strict=True):
        left = margin
        for cell, cell_width in zip(row, widths, strict=False):
            paste(page_HxWx3, cell, top, left + (cell_width - cell.shape[1]) // 2)
            left += cell_width + gap
        top += height + below
    return page_HxWx3
