"""Camera conventions: a world point lands on the same pixel whichever way it is written; wrong variants do not."""

import numpy as np
import pytest

from niso.geometry import camera


def _viewpoint(seed: int = 0):
    rng = np.random.default_rng(seed)
    r_3x3, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return r_3x3 * np.sign(np.linalg.det(r_3x3)), rng.normal(size=3), rng


def _project_pytorch3d(x_3, r_3x3, t_3, focal, principal, height, width, isotropic):
    """Pixel of a world point by PyTorch3D's own words: NDC has +x left and +y up, pixels +x right and +y down."""
    view = [sum(x_3[i] * r_3x3[i][j] for i in range(3)) + t_3[j] for j in range(3)]
    ndc = [focal[k] * view[k] / view[2] + principal[k] for k in range(2)]
    half_x, half_y = (min(height, width) / 2,) * 2 if isotropic else (width / 2, height / 2)
    return np.array([width / 2 - ndc[0] * half_x, height / 2 - ndc[1] * half_y])


def _project_opencv(x_3, pose_4x4, k_3x3):
    homogeneous = k_3x3 @ (np.linalg.inv(pose_4x4) @ np.append(x_3, 1))[:3]
    return homogeneous[:2] / homogeneous[2]


@pytest.mark.parametrize("height, width", [(190, 100), (100, 190), (64, 64)])
@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds", None])
def test_a_point_projects_to_the_same_pixel_in_both_conventions(height, width, kind):
    r_3x3, t_3, rng = _viewpoint()
    focal, principal = rng.uniform(1, 3, 2), rng.uniform(-0.1, 0.1, 2)
    pose_4x4 = camera.camera_to_world_from_pytorch3d(r_3x3, t_3)
    k_3x3 = camera.intrinsics_from_ndc(focal, principal, height, width, kind)
    for _ in range(5):
        view_3 = np.append(rng.normal(size=2), rng.uniform(1, 4))  # in front of the camera
        x_3 = (view_3 - t_3) @ r_3x3.T
        want = _project_pytorch3d(x_3, r_3x3, t_3, focal, principal, height, width, kind == "ndc_isotropic")
        np.testing.assert_allclose(_project_opencv(x_3, pose_4x4, k_3x3), want, rtol=1e-10, atol=1e-9)
        for wrong_4x4 in (
            camera.camera_to_world_from_pytorch3d(r_3x3.T, t_3),
            pose_4x4 @ np.diag([1.0, -1, -1, 1]),
            pose_4x4 @ np.diag([-1.0, -1, 1, 1]),
            np.linalg.inv(pose_4x4),
        ):
            assert np.abs(_project_opencv(x_3, wrong_4x4, k_3x3) - want).max() > 1
        if height != width:
            other = "ndc_isotropic" if kind != "ndc_isotropic" else None
            wrong_3x3 = camera.intrinsics_from_ndc(focal, principal, height, width, other)
            assert np.abs(_project_opencv(x_3, pose_4x4, wrong_3x3) - want).max() > 1e-2
    back = camera.ndc_from_intrinsics(k_3x3, height, width, kind)
    np.testing.assert_allclose(back, (focal, principal), rtol=1e-12)
    with pytest.raises(ValueError, match="known are"):
        camera.intrinsics_from_ndc(focal, principal, height, width, "screen")


def test_poses_go_back_and_chain():
    r_3x3, t_3, _ = _viewpoint(1)
    a_4x4 = camera.camera_to_world_from_pytorch3d(r_3x3, t_3)
    assert np.linalg.det(a_4x4[:3, :3]) == pytest.approx(1)
    # The camera's centre is seen at the origin, and a point in front of the lens has positive depth in both frames.
    np.testing.assert_allclose(a_4x4[:3, 3] @ r_3x3 + t_3, 0, atol=1e-14)
    ahead_3, right_3, down_3 = (a_4x4[:3, 3] + a_4x4[:3, axis] for axis in (2, 0, 1))
    np.testing.assert_allclose([x @ r_3x3 + t_3 for x in (ahead_3, right_3, down_3)], np.diag([-1, -1, 1])[[2, 0, 1]], atol=1e-14)
    for got, want in zip(camera.pytorch3d_from_camera_to_world(a_4x4), (r_3x3, t_3), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-14)
    r_3x3, t_3, _ = _viewpoint(2)
    b_4x4 = camera.camera_to_world_from_pytorch3d(r_3x3, t_3)
    relative_4x4 = camera.relative_pose(a_4x4, b_4x4)
    np.testing.assert_allclose(relative_4x4, np.linalg.inv(a_4x4) @ b_4x4, atol=1e-14)
    np.testing.assert_allclose(a_4x4 @ relative_4x4, b_4x4, atol=1e-14)
    assert np.abs(b_4x4 @ camera.inverse_pose(a_4x4) - relative_4x4).max() > 0.1
    stacked = camera.relative_pose(np.stack([a_4x4, b_4x4]), b_4x4)
    np.testing.assert_allclose(stacked, [relative_4x4, np.eye(4)], atol=1e-14)


@pytest.mark.parametrize("height, width", [(191, 100), (100, 191), (50, 50)])
def test_cropped_and_resized_intrinsics_follow_the_pixels(height, width):
    k_3x3 = np.array([[120.0, 0, 47], [0, 130, 52], [0, 0, 1]])
    left, top, right, bottom = camera.centre_square(height, width)
    assert right - left == bottom - top == min(height, width)
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    resized_3x3 = camera.crop_and_resize_intrinsics(k_3x3, height, width, 32)
    x_3 = np.array([0.3, -0.2, 2.0])
    pixel, small = (k @ x_3 / x_3[2] for k in (k_3x3, resized_3x3))
    np.testing.assert_allclose(small[:2], (pixel[:2] - [left, top]) * 32 / (right - left), rtol=1e-12)
