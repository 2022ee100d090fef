"""A hand-held walk around a random still life: the scene, the camera path, and how CO3D would annotate it.

`path` imitates the motion between CO3D's frames: rotation 1.3-2.2 degrees a frame in the median, translation 2-3.5 % of
the distance to the objects. `viewpoint` is the one place where the OpenCV cameras become PyTorch3D annotations.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from data_prep.raycast import Camera, Primitive, Scene
from data_prep.textures import PATTERNS, Material

# PyTorch3D's camera axes (x left, y up, z forward) in OpenCV's (x right, y down, z forward), and back.
FLIP_3x3 = np.diag([-1.0, -1.0, 1.0])
_SLOWEST = 150  # frames in the longest period of the hand's drift


@dataclass(frozen=True)
class Similarity:
    """X -> scale * rotation @ X + shift: from scene coordinates to a sequence's arbitrary world frame."""

    scale: float
    rotation_3x3: np.ndarray
    shift_3: np.ndarray


def rotation_from_vector(vector_3: np.ndarray) -> np.ndarray:
    """The rotation by |vector| radians about vector, rotation_3x3 (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector_3))
    x, y, z = vector_3 / max(angle, 1e-12)
    cross_3x3 = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross_3x3 + (1 - np.cos(angle)) * cross_3x3 @ cross_3x3


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation_3x3 drawn uniformly over SO(3)."""
    q_3x3, r_3x3 = np.linalg.qr(rng.standard_normal((3, 3)))
    q_3x3 = q_3x3 * np.sign(np.diag(r_3x3))
    return q_3x3 * np.linalg.det(q_3x3)


def random_similarity(rng: np.random.Generator) -> Similarity:
    """Any rotation, a scale log-uniform in 0.2 to 20, a shift of a few scene units."""
    scale = float(np.exp(rng.uniform(np.log(0.2), np.log(20))))
    return Similarity(scale, random_rotation(rng), scale * rng.normal(0, 3, 3))


def drift(rng: np.random.Generator, frame_T: np.ndarray, amplitude: float) -> np.ndarray:
    """A random Fourier series of four slow harmonics, drift_T, with that standard deviation over time on average."""
    harmonic_K = np.arange(1, 5)
    weight_2xK = rng.standard_normal((2, 4)) / harmonic_K
    weight_2xK *= amplitude / np.sqrt(np.sum(1.0 / harmonic_K**2))
    phase_TxK = 2 * np.pi * frame_T[:, None] * harmonic_K / _SLOWEST
    return np.cos(phase_TxK) @ weight_2xK[0] + np.sin(phase_TxK) @ weight_2xK[1]


def path(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """World-to-camera rotations rotation_Tx3x3 (OpenCV axes) and camera centres centre_Tx3, in scene units.

    150 frames make 190 to 320 degrees; shorter videos turn less, because the speed is what the network sees.
    """
    frame_T = np.arange(frames, dtype=float)
    elevation = np.radians(rng.uniform(20, 43))
    # Degrees a frame such that the turn itself is 1.3-2.1 and the arc 2.1-3.2 % of the distance.
    slow, fast = np.degrees(np.array([0.021, 0.032]) / np.cos(elevation))
    speed = np.radians(rng.uniform(max(1.35, slow), min(2.05, fast))) * rng.choice([-1, 1])
    azimuth_T = rng.uniform(0, 2 * np.pi) + speed * frame_T + drift(rng, frame_T, np.radians(2.0))
    elevation_T = np.clip(elevation + drift(rng, frame_T, np.radians(2.5)), np.radians(18), np.radians(45))
    radius_T = rng.uniform(2.8, 3.4) * np.exp(np.clip(drift(rng, frame_T, 0.05), -0.15, 0.15))
    flat_T = np.cos(elevation_T)
    centre_Tx3 = radius_T[:, None] * np.stack([flat_T * np.cos(azimuth_T), flat_T * np.sin(azimuth_T), np.sin(elevation_T)], 1)
    centre_Tx3 += rng.normal(0, 0.004, (frames, 3))
    aim_Tx3 = np.array([0, 0, 0.35]) + np.stack([drift(rng, frame_T, 0.07) for _ in range(3)], 1)
    roll_T = drift(rng, frame_T, np.radians(2.0))
    turn_Tx3 = rng.normal(0, np.radians(0.1), (frames, 3))
    turn_Tx3[:, 2] += roll_T
    rotation_Tx3x3 = np.stack(
        [
            rotation_from_vector(turn_3) @ look_at(centre_3, aim_3)
            for centre_3, aim_3, turn_3 in zip(centre_Tx3, aim_Tx3, turn_Tx3, strict=True)
        ]
    )
    return rotation_Tx3x3, centre_Tx3


def look_at(centre_3: np.ndarray, aim_3: np.ndarray) -> np.ndarray:
    """World-to-camera rotation_3x3, OpenCV axes, of an upright camera at centre that looks at aim; world z is up."""
    forward_3 = (aim_3 - centre_3) / np.linalg.norm(aim_3 - centre_3)
    right_3 = np.cross(forward_3, [0.0, 0.0, 1.0])
    right_3 /= np.linalg.norm(right_3)
    return np.stack([right_3, np.cross(forward_3, right_3), forward_3])


def viewpoint(camera: Camera, similarity: Similarity, intrinsics_format: str | None) -> dict[str, object]:
    """CO3D's `viewpoint` of a camera given in scene coordinates, after the similarity.

    PyTorch3D's row vectors: X_cam = X_world R + T, axes x left, y up, z forward. R = (D R_cv)^T, T = D t_cv. A format
    of None leaves the key out, which means ndc_norm_image_bounds.
    """
    rotation_3x3 = camera.rotation_3x3 @ similarity.rotation_3x3.T
    centre_3 = similarity.scale * similarity.rotation_3x3 @ camera.centre_3 + similarity.shift_3
    half_2 = np.array([camera.width, camera.height]) / 2
    scale_2 = np.full(2, np.min(half_2)) if intrinsics_format == "ndc_isotropic" else half_2
    annotation: dict[str, object] = {
        "R": (FLIP_3x3 @ rotation_3x3).T.tolist(),
        "T": (-FLIP_3x3 @ rotation_3x3 @ centre_3).tolist(),
        "focal_length": (camera.focal_2 / scale_2).tolist(),
        "principal_point": ((half_2 - camera.principal_2) / scale_2).tolist(),
    }
    if intrinsics_format is not None:
        annotation["intrinsics_format"] = intrinsics_format
    return annotation


def random_scene(rng: np.random.Generator, kinds: dict[str, float]) -> Scene:
    """A still life of 4-8 primitives of kinds drawn with the given weights, in a textured room with a warm lamp."""
    hue = rng.random()
    count = int(rng.integers(4, 9))
    chosen = rng.choice(list(kinds), count, p=np.array(list(kinds.values())) / sum(kinds.values()))
    # Golden-ratio steps keep neighbouring objects apart in hue.
    materials = [_material(rng, hue + 0.618 * (i + 1), rng.uniform(3.0, 5.0), 0.75) for i in range(count)]
    bearing, height = rng.uniform(0, 2 * np.pi), rng.uniform(4.2, 5.2)
    reach = rng.uniform(1.5, 3.0)
    return Scene(
        primitives=tuple(_still_life(rng, chosen, materials)),
        half=float(rng.uniform(5.0, 6.5)),
        height=float(height + 0.6),
        ground=_material(rng, hue, rng.uniform(1.6, 2.6), 0.35, upright=True),
        wall=_material(rng, hue + rng.uniform(0.3, 0.7), rng.uniform(0.8, 1.3), 0.3),
        light_3=np.array([reach * np.cos(bearing), reach * np.sin(bearing), height]),
        light_colour_3=np.array([0.95, 0.88, 0.76]) * rng.uniform(0.9, 1.15),
        ambient_colour_3=np.array([0.28, 0.31, 0.36]) * rng.uniform(0.85, 1.15),
    )


def _still_life(rng: np.random.Generator, kinds: np.ndarray, materials: list[Material]) -> list[Primitive]:
    """A big primitive in the middle, one stacked on it, the others in a ring on the ground."""
    placed: list[Primitive] = []
    start = rng.uniform(0, 2 * np.pi)
    for index, (kind, material) in enumerate(zip(kinds, materials, strict=True)):
        size = rng.uniform(0.38, 0.5) if index == 0 else rng.uniform(0.2, 0.33)
        linear_3x3 = _random_linear(rng, size * rng.uniform(0.75, 1.25, 3))
        half_height = _half_height(str(kind), linear_3x3)
        if index == 1:
            # The ground is at z = 0, so the one below reaches up to twice its centre's height; the overlap hides gaps.
            centre_3 = np.array([0, 0, 1.97 * placed[0].centre_3[2] + 0.97 * half_height])
        else:
            angle = start + 2 * np.pi * index / (len(kinds) - 1) + rng.normal(0, 0.15)
            ring = 0.0 if index == 0 else rng.uniform(0.8, 1.15)
            centre_3 = np.array([ring * np.cos(angle), ring * np.sin(angle), half_height])
        placed.append(Primitive(str(kind), linear_3x3, centre_3, material))
    return placed


def _random_linear(rng: np.random.Generator, size_3: np.ndarray) -> np.ndarray:
    """Scaling, a little shear, a turn about the vertical and, now and then, a tilt."""
    shear_3x3 = np.eye(3) + np.triu(rng.normal(0, 0.08, (3, 3)), 1)
    tilt_3 = rng.normal(0, 0.4, 3) * (rng.random() < 0.3) * [1, 1, 0]
    turn_3 = np.array([0, 0, rng.uniform(0, 2 * np.pi)])
    return rotation_from_vector(tilt_3) @ rotation_from_vector(turn_3) @ shear_3x3 @ np.diag(size_3)


def _half_height(kind: str, linear_3x3: np.ndarray) -> float:
    """How far the primitive reaches above and below its centre: its support function along z."""
    up_3 = np.abs(linear_3x3[2])
    if kind == "box":
        return float(up_3.sum())
    return float(np.linalg.norm(up_3) if kind == "ellipsoid" else np.hypot(up_3[0], up_3[1]) + up_3[2])


def _material(rng: np.random.Generator, hue: float, frequency: float, saturation: float, upright: bool = False) -> Material:
    """A random pattern in two shades around a hue; upright ones keep z vertical, with the ground in mid-cell."""
    dark = colorsys.hsv_to_rgb(hue % 1, min(1.0, saturation * 1.15), rng.uniform(0.3, 0.5))
    light_hue = (hue + rng.normal(0, 0.07)) % 1
    bright = colorsys.hsv_to_rgb(light_hue, saturation * rng.uniform(0.3, 0.8), rng.uniform(0.8, 0.97))
    turn_3x3 = rotation_from_vector(np.array([0, 0, rng.uniform(0, 2 * np.pi)])) if upright else random_rotation(rng)
    shift_3 = rng.uniform(0, 32, 3)
    if upright:
        shift_3[2] = np.floor(shift_3[2]) + 0.5
    return Material(
        pattern=str(rng.choice(list(PATTERNS))),
        frequency=float(frequency),
        turn_3x3=turn_3x3,
        shift_3=shift_3,
        colour_2x3=np.array([dark, bright]) ** 2.2,
        mottle=float(rng.uniform(0.35, 0.6)),
    )
