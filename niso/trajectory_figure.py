"""Figures of camera paths: estimated over true ones, or an estimate alone; numpy and Pillow only."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from niso import canvas
from niso.geometry import trajectory
from niso.poses import Sequence

TRUE = canvas.INK
ESTIMATED = (214, 76, 40)
SIDE, BORDER = 280, 18  # pixels of a panel, and those of them that stay free at its edges
_FINE = 3  # lines are drawn this many times larger, then averaged: smooth without a plotting library
_Path = tuple[np.ndarray, tuple[int, int, int]]  # points (T, 2) and their colour
_STROKE, _DOT = 1.5, 4.5  # pixels: a line's width, the radius of the dot at the start


def draw(sequences: Iterable[Sequence], *, count: int = 6, columns: int = 3) -> np.ndarray:
    """Returns one panel per sequence (the first `count`): the true camera path, and the estimate after Sim(3) alignment.

    A panel looks along the direction in which the truth varies least, from the cameras' upper side, so that a turntable is a
    circle; both axes have one scale.  A dot marks the first pose.  Below: the name and the relative APE (`trajectory.Ape`).
    An estimate that rests is a dot in the middle; of one that is not finite there is nothing to show.
    """
    shown = [sequence for sequence in sequences if len(sequence.truth_Tx4x4)][:count]
    panels = [_panel(sequence) for sequence in shown]
    captions = [_caption(sequence) for sequence in shown]
    pages = [canvas.grid(panels, min(columns, len(panels)), captions=captions, margin=0)] if panels else []
    return canvas.grid([_legend(), *pages], 1, title="Camera paths")


def draw_path(pose_Tx4x4: np.ndarray, title: str = "Camera path") -> np.ndarray:
    """Returns one camera path without a truth, in two panels of one scale: as `draw` looks at it, and that plane from its edge.

    A dot marks the first pose. A path that rests is a dot in the middle.

    Args:
      pose_Tx4x4: Finite camera-to-world poses, at least one.
    """
    axes_2x3, position_Tx3 = _view(pose_Tx4x4), pose_Tx4x4[:, :3, 3]
    right_3, up_3 = axes_2x3
    sides = (axes_2x3, np.stack([right_3, np.cross(right_3, up_3)]))  # the third direction points up, out of the first panel
    flat = [position_Tx3 @ side_2x3.T for side_2x3 in sides]
    extent = max(np.ptp(points_Tx2, axis=0).max() for points_Tx2 in flat)
    panels = [canvas.panel(_strokes(_placed([(points_Tx2, ESTIMATED)], extent), SIDE, SIDE), SIDE) for points_Tx2 in flat]
    page = canvas.grid(panels, 2, captions=["the plane that it fills most", "that plane seen from its edge"], margin=0)
    note = canvas.words(f"{len(pose_Tx4x4)} poses; the dot is the first; the scale is arbitrary", canvas.HEADING)
    return canvas.grid([note, page], 1, title=title.encode("ascii", "replace").decode())


def _legend() -> np.ndarray:
    """What the colours and the dot mean."""
    items = []
    for colour, text in ((TRUE, "truth"), (ESTIMATED, "estimate, Sim(3) aligned")):
        items += [_strokes([(np.array([[2.0, 10], [30, 10]]), colour)], 20, 32, dots=False), canvas.words(text, canvas.HEADING)]
    items += [_strokes([(np.array([[8.0, 10]]), canvas.FAINT)], 20, 16), canvas.words("first pose", canvas.HEADING)]
    return canvas.grid(items, len(items), margin=0, gap=8)


def _caption(sequence: Sequence) -> str:
    """The end of the name, which tells sequences apart, and the relative APE."""
    if not sequence.finite:
        error = "not finite"
    elif trajectory.spread(sequence.truth_Tx4x4[:, :3, 3]) == 0:
        error = "the truth rests"
    else:
        error = f"APE {trajectory.ape(sequence.truth_Tx4x4, sequence.estimate_Tx4x4).translation_relative:.1%} of spread"
    name = sequence.name if len(sequence.name) <= 24 else f"...{sequence.name[-21:]}"
    return f"{name.encode('ascii', 'replace').decode()}:  {error}"


def _panel(sequence: Sequence) -> np.ndarray:
    """The two paths in one frame."""
    paths = [(sequence.truth_Tx4x4, TRUE)]
    if sequence.finite:
        paths.append((trajectory.align(sequence.estimate_Tx4x4, sequence.truth_Tx4x4)[0], ESTIMATED))
    axes_2x3 = _view(sequence.truth_Tx4x4)
    flat = [(pose_Tx4x4[:, :3, 3] @ axes_2x3.T, colour) for pose_Tx4x4, colour in paths]
    return canvas.panel(_strokes(_placed(flat), SIDE, SIDE), SIDE)


def _placed(flat: list[_Path], extent: float | None = None) -> list[_Path]:
    """Paths (x right, y up) as pixels of a panel: centred, `extent` (their own by default) fills it up to the border."""
    every_Px2 = np.concatenate([points_Tx2 for points_Tx2, _ in flat])
    low_2, high_2 = every_Px2.min(axis=0), every_Px2.max(axis=0)
    scale = (SIDE - 2 * BORDER) / max((high_2 - low_2).max() if extent is None else extent, 1e-300)
    return [((points_Tx2 - (low_2 + high_2) / 2) * scale * [1, -1] + SIDE / 2, colour) for points_Tx2, colour in flat]


def _view(truth_Tx4x4: np.ndarray) -> np.ndarray:
    """The directions (2, 3) that point right and up on the page: the first two principal ones of the true positions.

    The third points to the viewer; of its two signs it has the one nearer to the cameras' mean upward direction -y, so that
    nothing is mirrored.
    """
    position_Tx3 = truth_Tx4x4[:, :3, 3]
    right_3, up_3, _ = np.linalg.svd(position_Tx3 - position_Tx3.mean(axis=0))[2]
    toward_3 = np.cross(right_3, up_3)
    return np.stack([right_3, up_3 if toward_3 @ -truth_Tx4x4[:, :3, 1].mean(axis=0) >= 0 else -up_3])


def _strokes(paths: list[_Path], height: int, width: int, dots: bool = True) -> np.ndarray:
    """Paths of pixel coordinates (x right, y down) as lines, with a dot at each one's first point."""
    page = Image.new("RGB", (width * _FINE, height * _FINE), canvas.PAPER)
    pen = ImageDraw.Draw(page)
    for points_Tx2, colour in paths:
        if len(points_Tx2) > 1:
            line = [(float(x), float(y)) for x, y in _FINE * points_Tx2]
            pen.line(line, colour, round(_STROKE * _FINE), joint="curve")
    for k, (points_Tx2, colour) in enumerate(paths if dots else []):
        x, y = (float(value) for value in _FINE * points_Tx2[0])
        radius = _FINE * _DOT * (1 if k == 0 else 0.7)  # the one on top leaves the other's rim to be seen
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    return np.array(page.reduce(_FINE))
