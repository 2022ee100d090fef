"""Camera conventions: PyTorch3D viewpoints, OpenCV poses, NDC and pixel intrinsics; numpy, float64.

World points X and camera points x are related by

    PyTorch3D   x = X R + T      row vectors; x axis left, y up, z forward     (CO3Dv2 annotations)
    OpenCV      x = R X + t      column vectors; x axis right, y down, z forward

Both look along +z, so D = diag(-1, -1, 1) takes one camera frame to the other.  Poses are camera-to-world 4x4 matrices
in the OpenCV frame: the columns are the camera's right, down and forward axes and its centre.  Pixel coordinates are
continuous: an image of H rows and W columns spans [0, W] x [0, H], its first pixel has its centre at (0.5, 0.5).

Sources: PyTorch3D, docs/notes/cameras.md and PerspectiveCameras (NDC with +x left, +y up); CO3Dv2,
ViewpointAnnotation.intrinsics_format in pytorch3d/implicitron/dataset/types.py.
"""

import numpy as np
from numpy.typing import ArrayLike

_PYTORCH3D_TO_OPENCV = np.array([-1.0, -1.0, 1.0])  # the diagonal of D

INTRINSICS_FORMATS = ("ndc_norm_image_bounds", "ndc_isotropic")


def camera_to_world_from_pytorch3d(r_3x3: ArrayLike, t_3: ArrayLike) -> np.ndarray:
    """The OpenCV camera-to-world pose (4, 4) of a PyTorch3D viewpoint, in the world's units.

    x_cv = D (X R + T)^T = D R^T X + D T, and its inverse is X = R D x_cv - R T for a rotation R.
    """
    r_3x3, t_3 = np.asarray(r_3x3, np.float64), np.asarray(t_3, np.float64)
    pose_4x4 = np.eye(4)
    pose_4x4[:3, :3] = r_3x3 * _PYTORCH3D_TO_OPENCV
    pose_4x4[:3, 3] = -r_3x3 @ t_3
    return pose_4x4


def pytorch3d_from_camera_to_world(pose_4x4: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """R (3, 3) and T (3,) of PyTorch3D for an OpenCV camera-to-world pose: R = (D R_cv)^T, T = D t_cv."""
    world_to_camera_4x4 = inverse_pose(pose_4x4)
    r_3x3 = (_PYTORCH3D_TO_OPENCV[:, None] * world_to_camera_4x4[:3, :3]).T
    return r_3x3, _PYTORCH3D_TO_OPENCV * world_to_camera_4x4[:3, 3]


def inverse_pose(pose_4x4: ArrayLike) -> np.ndarray:
    """The inverse (..., 4, 4) of rigid poses: [R^T | -R^T t], exact to rounding, without a general solve."""
    pose_4x4 = np.asarray(pose_4x4, np.float64)
    inverse_4x4 = np.zeros_like(pose_4x4)
    inverse_4x4[..., :3, :3] = np.swapaxes(pose_4x4[..., :3, :3], -1, -2)
    inverse_4x4[..., :3, 3:] = -inverse_4x4[..., :3, :3] @ pose_4x4[..., :3, 3:]
    inverse_4x4[..., 3, 3] = 1.0
    return inverse_4x4


def relative_pose(a_4x4: ArrayLike, b_4x4: ArrayLike) -> np.ndarray:
    """Camera b seen from camera a: a^-1 b (..., 4, 4), for camera-to-world poses of one world.

    It takes b's camera coordinates to a's, does not depend on the world's frame, and chains:
    a @ relative_pose(a, b) = b.
    """
    return inverse_pose(a_4x4) @ np.asarray(b_4x4, np.float64)


def _ndc_scale_2(height: int, width: int, intrinsics_format: str | None) -> np.ndarray:
    """Pixels per NDC unit along x and y."""
    intrinsics_format = intrinsics_format or INTRINSICS_FORMATS[0]
    if intrinsics_format == "ndc_isotropic":
        return np.full(2, min(height, width) / 2)
    if intrinsics_format == "ndc_norm_image_bounds":
        return np.array([width / 2, height / 2])
    raise ValueError(f"intrinsics_format is {intrinsics_format!r}, known are {', '.join(INTRINSICS_FORMATS)}")


def intrinsics_from_ndc(
    focal_2: ArrayLike, principal_2: ArrayLike, height: int, width: int, intrinsics_format: str | None = None
) -> np.ndarray:
    """The pixel matrix K (3, 3) of an image with NDC focal length and principal point (x, y).

    f_px = f * scale and c_px = (W, H) / 2 - p * scale, because NDC axes point left and up.  scale is min(W, H) / 2 on
    both axes for "ndc_isotropic" and (W, H) / 2 for "ndc_norm_image_bounds", the format when none is given.
    """
    scale_2 = _ndc_scale_2(height, width, intrinsics_format)
    intrinsics_3x3 = np.eye(3)
    intrinsics_3x3[[0, 1], [0, 1]] = np.asarray(focal_2, np.float64) * scale_2
    intrinsics_3x3[:2, 2] = np.array([width, height]) / 2 - np.asarray(principal_2, np.float64) * scale_2
    return intrinsics_3x3


def ndc_from_intrinsics(
    intrinsics_3x3: ArrayLike, height: int, width: int, intrinsics_format: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """NDC focal length (2,) and principal point (2,): the inverse of `intrinsics_from_ndc`."""
    intrinsics_3x3 = np.asarray(intrinsics_3x3, np.float64)
    scale_2 = _ndc_scale_2(height, width, intrinsics_format)
    return np.diag(intrinsics_3x3)[:2] / scale_2, (np.array([width, height]) / 2 - intrinsics_3x3[:2, 2]) / scale_2


def centre_square(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred square, in whole pixels; an odd rest goes right and below."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop_and_resize_intrinsics(intrinsics_3x3: ArrayLike, height: int, width: int, size: int) -> np.ndarray:
    """The pixel matrix (3, 3) after cropping to `centre_square(height, width)` and resizing that to size x size.

    With side N and crop offset o: f' = f * size / N, c' = (c - o) * size / N (continuous pixel coordinates).
    """
    left, top, right, _ = centre_square(height, width)
    resized_3x3 = np.array(intrinsics_3x3, np.float64)
    resized_3x3[:2, 2] -= (left, top)
    resized_3x3[:2] *= size / (right - left)
    return resized_3x3
