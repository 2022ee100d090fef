"""The synthetic CO3D twin's pictures are those of its annotated cameras, by CO3D's definition written a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_prep import synthetic_co3d, turntable, twin
from data_prep.raycast import Camera, depth, render

TINY = twin.plan(twin.SIZES["tiny"], 0)


def decode(view: dict[str, Any], size: list[int], wrong: str) -> tuple[np.ndarray, ...]:
    """(world-to-camera [R_cv | t_cv], focal_2, centre_2 in pixels), written from CO3D's definition, or wrong on purpose."""
    half_2 = np.array([size[1], size[0]]) / 2
    isotropic = view.get("intrinsics_format") == "ndc_isotropic"
    if wrong == "format":
        isotropic = not isotropic
    scale_2 = np.full(2, half_2.min()) if isotropic else half_2
    flip_3x3 = np.eye(3) if wrong == "no flip" else np.diag([-1.0, -1.0, 1.0])
    r_3x3 = np.array(view["R"])
    rotation_3x3 = flip_3x3 @ (r_3x3 if wrong == "transposed" else r_3x3.T)
    principal_2 = np.array(view["principal_point"]) * (-1 if wrong == "principal point" else 1)
    return rotation_3x3, flip_3x3 @ view["T"], view["focal_length"] * scale_2, half_2 - principal_2 * scale_2


def annotation(sequence: twin.Sequence, t: int) -> Any:
    return next(frame for frame in synthetic_co3d.frame_annotations(sequence) if frame["frame_number"] == t)


def surface_points(sequence: twin.Sequence, t: int, wrong: str) -> np.ndarray:
    """World points behind frame t's pixel centres, Px3 in row-major order, from the true depth and the annotation."""
    scale = turntable.random_similarity(sequence.rng("world")).scale
    depth_HxW = scale * depth(twin.scene(sequence), twin.cameras(sequence)[t]).astype(float)
    frame = annotation(sequence, t)
    rotation_3x3, t_3, focal_2, centre_2 = decode(frame["viewpoint"], frame["image"]["size"], wrong)
    v_P, u_P = (axis.ravel() + (0.0 if wrong == "pixel corners" else 0.5) for axis in np.indices(depth_HxW.shape))
    ray_Px3 = np.stack([(u_P - centre_2[0]) / focal_2[0], (v_P - centre_2[1]) / focal_2[1], np.ones_like(u_P)], 1)
    return (ray_Px3 * depth_HxW.reshape(-1, 1) - t_3) @ rotation_3x3


def transfer_error(sequence: twin.Sequence, i: int, j: int, wrong: str = "") -> tuple[float, float, float]:
    """How well frame i's surface points, projected into frame j through the annotations, agree with frame j.

    The medians of |colour difference| (0 to 255) and of the relative depth difference, and the share of the points
    that land in frame j with that depth.
    """
    film, still_life, frame = twin.cameras(sequence), twin.scene(sequence), annotation(sequence, j)
    height, width = frame["image"]["size"]
    rotation_3x3, t_3, focal_2, centre_2 = decode(frame["viewpoint"], [height, width], wrong)
    seen_Px3 = surface_points(sequence, i, wrong) @ rotation_3x3.T + t_3
    with np.errstate(divide="ignore", invalid="ignore"):
        pixel_Px2 = np.floor(seen_Px3[:, :2] / seen_Px3[:, 2:] * focal_2 + centre_2)
    inside_P = (seen_Px3[:, 2] > 0) & (pixel_Px2 >= 0).all(1) & (pixel_Px2 < [width, height]).all(1)
    if inside_P.mean() < 0.05:
        return np.inf, np.inf, 0.0
    x_Q, y_Q = pixel_Px2[inside_P].astype(int).T
    depth_Q = turntable.random_similarity(sequence.rng("world")).scale * depth(still_life, film[j])[y_Q, x_Q]
    gap_Q = np.abs(seen_Px3[inside_P, 2] - depth_Q) / depth_Q
    before_Qx3, after_HxWx3 = (render(still_life, film[t], 2).astype(float) for t in (i, j))
    colour_Qx3 = np.abs(after_HxWx3[y_Q, x_Q] - before_Qx3.reshape(-1, 3)[inside_P])
    return float(np.median(colour_Qx3)), float(np.median(gap_Q)), float((gap_Q < 0.02).sum() / inside_P.size)


def exact_sequences() -> list[twin.Sequence]:
    """A portrait sequence made exact, once for each way to write intrinsics."""
    portrait = next(sequence for sequence in TINY if sequence.height > sequence.width)
    return [replace(portrait, pose_noise=0.0, intrinsics_format=name) for name in twin.FORMATS]


@pytest.mark.parametrize("sequence", exact_sequences(), ids=lambda sequence: str(sequence.intrinsics_format))
def test_frames_agree_through_the_annotated_cameras(sequence: twin.Sequence) -> None:
    colour, gap, agreeing = transfer_error(sequence, 0, 8)
    # Landing on the nearest pixel costs half a pixel: colours move by a few levels, depths by parts in a thousand.
    assert colour < 6 and gap < 0.004 and agreeing > 0.6
    # The wrong format is a focal length a third off on one axis: it shows less than a wrong axis, but it shows.
    for wrong, factor, most in (("no flip", 10, 0.3), ("transposed", 10, 0.3), ("format", 3, 0.9)):
        bad_colour, bad_gap, bad_agreeing = transfer_error(sequence, 0, 8, wrong)
        assert bad_colour > factor * colour and bad_gap > factor * gap, (wrong, bad_colour, bad_gap)
        assert bad_agreeing < most * agreeing, (wrong, bad_agreeing)


@pytest.mark.parametrize("sequence", exact_sequences(), ids=lambda sequence: str(sequence.intrinsics_format))
def test_the_ground_lies_on_its_plane(sequence: twin.Sequence) -> None:
    """Half a pixel is enough to miss the plane by 0.01 scene units: what two similar views cannot tell, this can."""
    world = turntable.random_similarity(sequence.rng("world"))

    def share_on_the_ground(wrong: str) -> float:
        scene_Px3 = (surface_points(sequence, 3, wrong) - world.shift_3) @ world.rotation_3x3 / world.scale
        return float((np.abs(scene_Px3[:, 2]) < 5e-4).mean())

    assert share_on_the_ground("") > 0.25
    for wrong in ("no flip", "transposed", "format", "principal point", "pixel corners"):
        assert share_on_the_ground(wrong) < 0.05, wrong


def test_viewpoint_projects_a_hand_computed_point() -> None:
    """A camera at the origin that looks along +z, OpenCV axes equal to the world's: (1, 2, 10) lands 10 right, 20 down."""
    camera = Camera(np.eye(3), np.zeros(3), np.array([100.0, 100.0]), np.array([50.0, 64.0]), 120, 96)
    view = turntable.viewpoint(camera, turntable.Similarity(1.0, np.eye(3), np.zeros(3)), "ndc_isotropic")
    x, y, z = np.array([1, 2, 10]) @ np.array(view["R"]) + view["T"]
    assert (x, y, z) == (-1, -2, 10)
    ndc_2 = np.array(view["focal_length"]) * [x / z, y / z] + view["principal_point"]
    # In PyTorch3D's NDC +1 is the left and the upper edge of the shorter side: pixel = half - 48 ndc.
    np.testing.assert_allclose([48 - 48 * ndc_2[0], 60 - 48 * ndc_2[1]], [60, 84])
