"""Procedural solid textures: a colour for every point in space, band-limited to the width of a pixel.

A texture is a pattern with values in [0, 1] that mixes two linear-RGB colours, times fractal mottling, so that no two
places of a surface look alike and a point keeps its colour from every side (what an image matcher needs). Detail finer
than a pixel fades to the pattern's mean instead of aliasing (Perlin 1985; Worley 1996 for the cells).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_PERIOD = 32  # of the random lattice, in cells; a power of two so that wrapping is a bit mask
_TABLES = np.random.default_rng(20210903).random((4, _PERIOD**3), dtype=np.float32)
_VALUE_C = _TABLES[0]
_JITTER_3xC = 0.6 * (_TABLES[1:] - 0.5)


@dataclass(frozen=True)
class Material:
    """A pattern's name, its cells per scene unit, its placement in space, its two linear-RGB colours, its mottling."""

    pattern: str
    frequency: float
    turn_3x3: np.ndarray
    shift_3: np.ndarray
    colour_2x3: np.ndarray
    mottle: float


def albedo(material: Material, point_3xP: np.ndarray, footprint_P: np.ndarray) -> np.ndarray:
    """Linear-RGB reflectance in [0, 1], float32 3xP, at points in scene units; footprint: length a pixel covers."""
    texel_3xP = (material.frequency * material.turn_3x3).astype(np.float32) @ point_3xP
    texel_3xP += material.shift_3.astype(np.float32)[:, None]
    width_P = material.frequency * footprint_P
    value_P = PATTERNS[material.pattern](texel_3xP, width_P)
    mottle_P = 1 + material.mottle * (2 * fractal(1.7 * texel_3xP + 11.5, 1.7 * width_P) - 1)
    low_3x1, high_3x1 = material.colour_2x3.astype(np.float32)[:, :, None]
    return np.clip((low_3x1 + (high_3x1 - low_3x1) * value_P) * mottle_P, 0, 1)


def noise(point_3xP: np.ndarray) -> np.ndarray:
    """Value noise in [0, 1], mean 1/2: random lattice values, smoothly interpolated; features are one cell wide."""
    base_3xP = np.floor(point_3xP)
    weight_3xP = point_3xP - base_3xP
    weight_3xP *= weight_3xP * (3 - 2 * weight_3xP)
    x, y, z = (_steps(base_P.astype(np.intp), axis) for axis, base_P in enumerate(base_3xP))
    planes = []
    for x_P in x:
        rows = [_mix(_VALUE_C[x_P + y_P + z[0]], _VALUE_C[x_P + y_P + z[1]], weight_3xP[2]) for y_P in y]
        planes.append(_mix(rows[0], rows[1], weight_3xP[1]))
    return _mix(planes[0], planes[1], weight_3xP[0])


def fractal(point_3xP: np.ndarray, width_P: np.ndarray, octaves: int = 3) -> np.ndarray:
    """Sum of noise octaves with halving amplitude, stretched to [0, 1]; octaves below a pixel fade to the mean."""
    total_P = np.zeros_like(width_P)
    for octave in range(octaves):
        gain = 2.0**octave
        total_P += _fade(width_P * gain) / gain * (noise(point_3xP * gain + 5.3 * octave) - 0.5)
    return np.clip(0.5 + 1.1 * total_P, 0, 1)


def _steps(base_P: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets into the flat lattice of a cell and of its upper neighbour along one axis."""
    stride = _PERIOD**axis
    return (base_P & (_PERIOD - 1)) * stride, ((base_P + 1) & (_PERIOD - 1)) * stride


def _mix(low_P: np.ndarray | float, high_P: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    return low_P + (high_P - low_P) * weight_P


def _fade(width_P: np.ndarray) -> np.ndarray:
    """1 where a cell is several pixels wide, 0 where it is narrower than about one and a half."""
    return np.clip((0.7 - width_P) / 0.4, 0, 1)


def _edge(distance_P: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    """A step from 0 to 1 at distance 0, as soft as the pixel is wide."""
    return np.clip(0.5 + distance_P / (width_P + 0.05), 0, 1)


def _square_wave(coordinate_P: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    """-1 and +1 in turns, half a cell each, fading to 0."""
    phase_P = np.abs(coordinate_P - np.floor(coordinate_P) - 0.5) - 0.25
    return _fade(width_P) * (2 * _edge(phase_P, width_P) - 1)


def _stripes(point_3xP: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    bend_P = 0.5 * noise(0.8 * point_3xP)
    return 0.5 + 0.5 * _square_wave(0.6 * (point_3xP[0] + bend_P), width_P)


def _checker(point_3xP: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    x_P, y_P, z_P = (_square_wave(0.5 * axis_P + 0.25, width_P) for axis_P in point_3xP)
    return 0.5 + 0.5 * x_P * y_P * z_P


def _nearest_seeds(point_3xP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances (in cells) to the nearest and second nearest jittered lattice points; the nearest's random value."""
    base_3xP = np.floor(point_3xP - 0.5)
    local_3xP = point_3xP - base_3xP
    x, y, z = (_steps(base_P.astype(np.intp), axis) for axis, base_P in enumerate(base_3xP))
    first_P = np.full(point_3xP.shape[1], np.inf, np.float32)
    second_P, value_P = first_P.copy(), first_P.copy()
    for i, j, k in np.ndindex(2, 2, 2):
        cell_P = x[i] + y[j] + z[k]
        square_P = (local_3xP[0] - (i + 0.5) - _JITTER_3xC[0][cell_P]) ** 2
        square_P += (local_3xP[1] - (j + 0.5) - _JITTER_3xC[1][cell_P]) ** 2
        square_P += (local_3xP[2] - (k + 0.5) - _JITTER_3xC[2][cell_P]) ** 2
        second_P = np.minimum(second_P, np.maximum(first_P, square_P))
        value_P = np.where(square_P < first_P, _VALUE_C[cell_P], value_P)
        first_P = np.minimum(first_P, square_P)
    return np.sqrt(first_P), np.sqrt(second_P), value_P


def _blobs(point_3xP: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    distance_P, _, value_P = _nearest_seeds(point_3xP)
    return _mix(0.3, _edge(0.25 + 0.2 * value_P - distance_P, width_P), _fade(width_P))


def _cells(point_3xP: np.ndarray, width_P: np.ndarray) -> np.ndarray:
    first_P, second_P, value_P = _nearest_seeds(point_3xP)
    wall_P = np.clip((second_P - first_P) / (0.12 + 2 * width_P), 0, 1)
    return _mix(0.45, (0.15 + 0.85 * value_P) * wall_P, _fade(width_P))


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": _stripes,
    "checker": _checker,
    "blobs": _blobs,
    "cells": _cells,
    "fractal": fractal,
}
