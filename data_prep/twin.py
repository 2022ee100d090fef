"""The synthetic twin's plan: which videos there are, what each films, with which cameras, and what is wrong with each.

Nothing here renders or writes. Pictures and true cameras are a function of (seed, category, sequence number); only
which sequences are the exactly posed top quarter is relative to the whole twin.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from data_prep import turntable
from data_prep.raycast import Camera, Scene

EXACT_QUANTILE = 0.75
# Weights of the kinds of primitives: what tells one category from another.
CATEGORIES: dict[str, dict[str, float]] = {
    "stilllife": {"ellipsoid": 1, "box": 1, "cylinder": 1},
    "crate": {"ellipsoid": 1, "box": 5, "cylinder": 1},
    "pebble": {"ellipsoid": 5, "box": 1, "cylinder": 1},
    "column": {"ellipsoid": 1, "box": 1, "cylinder": 5},
}
# Height and width in units of the shorter side: mostly portrait, as phones are held.
SHAPES = ((1.25, 1.0), (4 / 3, 1.0), (1.0, 1.0), (1.0, 1.25))
FORMATS = ("ndc_isotropic", "ndc_norm_image_bounds", None)


@dataclass(frozen=True)
class Size:
    """How many categories, sequences in each, frames in each; shorter side in pixels; rays a pixel on each axis."""

    categories: int
    sequences: int
    frames: int
    pixels: int
    antialias: int


SIZES = {
    "tiny": Size(2, 3, 16, 96, 1),
    "small": Size(4, 12, 60, 192, 2),
    "full": Size(4, 60, 150, 256, 2),
}


@dataclass(frozen=True)
class Sequence:
    """One video before it is rendered.

    suffix_T numbers the files. Frames in no_image are annotated but have no file, frames in no_annotation have a file
    but are not annotated, frames in no_viewpoint have `viewpoint` null. pose_noise is in degrees; 0 means exact.
    """

    category: str
    index: int
    name: str
    seed: int
    height: int
    width: int
    antialias: int
    intrinsics_format: str | None
    suffix_T: tuple[int, ...]
    no_image: frozenset[int]
    no_annotation: frozenset[int]
    no_viewpoint: frozenset[int]
    quality: float | None
    pose_noise: float

    @property
    def frames(self) -> int:
        return len(self.suffix_T)

    @property
    def folder(self) -> str:
        """Its folder relative to the twin's root."""
        return f"{self.category}/{self.name}"

    @property
    def image_numbers(self) -> list[int]:
        """The frames that have a file."""
        return [t for t in range(self.frames) if t not in self.no_image]

    def rng(self, purpose: str) -> np.random.Generator:
        """The random stream of one purpose: a function of (seed, category, index, purpose) alone."""
        return _stream(self.seed, self.category, self.index, purpose)

    def image_path(self, frame: int) -> str:
        """The frame's file relative to the twin's root."""
        return f"{self.folder}/images/frame{self.suffix_T[frame]:06d}.jpg"


def _stream(seed: int, category: str, index: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(category.encode()), index, zlib.crc32(purpose.encode())])


def plan(size: Size, seed: int) -> list[Sequence]:
    """Every sequence of the twin, category by category; nothing is rendered.

    The pose noise is 0 at and above the 75 % quantile of the finite quality scores (where the paper's split cuts) and
    grows with the logarithm of the score's ratio to it below.
    """
    categories = list(CATEGORIES)[: size.categories]
    drawn = [_draw_sequence(size, seed, category, index) for category in categories for index in range(size.sequences)]
    finite = [sequence.quality for sequence in drawn if sequence.quality is not None]
    cut = float(np.quantile(finite, EXACT_QUANTILE))
    return [replace(sequence, pose_noise=_pose_noise(sequence.quality, cut)) for sequence in drawn]


def _pose_noise(quality: float | None, cut: float) -> float:
    """Standard deviation in degrees of the annotated rotation about each axis; an unscored sequence is a bad one."""
    return 1.0 if quality is None else 0.4 * max(0.0, float(np.log(cut / quality)))


def _draw_sequence(size: Size, seed: int, category: str, index: int) -> Sequence:
    rng = _stream(seed, category, index, "plan")
    video, camera_id, person = 100 + index // 4, int(rng.integers(1, 10_000)), int(rng.integers(1, 10_000))
    shape = SHAPES[int(rng.choice(len(SHAPES), p=[0.4, 0.25, 0.2, 0.15]))]
    quality = float(np.exp(rng.normal(0, 0.8)))
    absent_T = rng.random(size.frames) < 0.02
    unannotated_T = rng.random(size.frames) < 0.5
    # In the second sequence of the first category the files were numbered before frames were thrown away.
    renumbered = (category, index) == ("stilllife", 1)
    null_case = (category, index) == ("crate", 2) and size.categories > 2
    last_case = (category, index) == (list(CATEGORIES)[size.categories - 1], size.sequences - 1) and size.categories > 2
    return Sequence(
        category=category,
        index=index,
        name=f"{video}_{camera_id:04d}_{person:04d}",
        seed=seed,
        height=round(shape[0] * size.pixels),
        width=round(shape[1] * size.pixels),
        antialias=size.antialias,
        intrinsics_format=FORMATS[index % 3],
        suffix_T=tuple(7 + 2 * t if renumbered else t + 1 for t in range(size.frames)),
        no_image=frozenset(np.flatnonzero(absent_T & ~unannotated_T).tolist()),
        no_annotation=frozenset(np.flatnonzero(absent_T & unannotated_T).tolist()),
        no_viewpoint=frozenset(rng.choice(size.frames, 3, replace=False).tolist() if null_case else ()),
        quality=None if last_case else quality,
        pose_noise=0.0,
    )


def scene(sequence: Sequence) -> Scene:
    """The still life that the sequence films."""
    return turntable.random_scene(sequence.rng("scene"), CATEGORIES[sequence.category])


def cameras(sequence: Sequence) -> list[Camera]:
    """The cameras that render the frames, in scene coordinates, whatever their annotations say."""
    rng = sequence.rng("camera")
    # 2.0-2.4 half widths: 45 to 53 degrees across the shorter side, a phone's main camera.
    focal_2 = rng.uniform(2.0, 2.4) * min(sequence.height, sequence.width) / 2 * (1 + rng.normal(0, 0.002, 2))
    half_2 = np.array([sequence.width, sequence.height]) / 2
    principal_2 = half_2 * (1 + rng.uniform(-0.02, 0.02, 2))
    rotation_Tx3x3, centre_Tx3 = turntable.path(sequence.rng("path"), sequence.frames)
    return [
        Camera(rotation_3x3, centre_3, focal_2, principal_2, sequence.height, sequence.width)
        for rotation_3x3, centre_3 in zip(rotation_Tx3x3, centre_Tx3, strict=True)
    ]


def annotated_cameras(sequence: Sequence) -> list[Camera]:
    """The cameras as annotated, in scene coordinates: the true ones plus pose noise, independent from frame to frame.

    Noise of one degree in rotation goes with 1 % of the distance to the objects in position.
    """
    rng = sequence.rng("noise")
    noise_Tx2x3 = sequence.pose_noise * rng.standard_normal((sequence.frames, 2, 3))
    return [
        replace(
            camera,
            rotation_3x3=turntable.rotation_from_vector(np.radians(turn_3)) @ camera.rotation_3x3,
            centre_3=camera.centre_3 + 0.01 * np.linalg.norm(camera.centre_3) * move_3,
        )
        if sequence.pose_noise
        else camera
        for camera, (turn_3, move_3) in zip(cameras(sequence), noise_Tx2x3, strict=True)
    ]
