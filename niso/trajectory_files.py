"""Trajectories as the text files that other programs read: TUM and KITTI; numpy only.

Both hold camera-to-world poses, one per line:

    TUM     timestamp tx ty tz qx qy qz qw      (seconds or frame numbers; unit quaternion, real part last, not negative)
    KITTI   r11 r12 r13 tx r21 r22 r23 ty r31 r32 r33 tz
"""

import numpy as np

_DIGITS = "%.12g"


def tum(time_T: np.ndarray, pose_Tx4x4: np.ndarray) -> str:
    """The text of a TUM file."""
    return _lines(np.column_stack([time_T, pose_Tx4x4[:, :3, 3], quaternions(pose_Tx4x4[:, :3, :3])]))


def kitti(pose_Tx4x4: np.ndarray) -> str:
    """The text of a KITTI file."""
    return _lines(pose_Tx4x4[:, :3].reshape(-1, 12))


def quaternions(rotation_Nx3x3: np.ndarray) -> np.ndarray:
    """Unit quaternions x y z w (N, 4), w >= 0, of rotations.

    Four times the outer product q q^T is linear in R; its row with the largest diagonal entry, normalised, is q or -q: at least
    1 before the root, so that no angle loses digits (S. W. Shepperd, Journal of Guidance and Control 1(3), 1978).
    """
    (a, b, c), (d, e, f), (g, h, i) = np.moveaxis(np.asarray(rotation_Nx3x3, np.float64), 0, -1)
    outer_4x4xN = np.array(
        [
            [1 + a - e - i, b + d, c + g, h - f],
            [b + d, 1 - a + e - i, f + h, c - g],
            [c + g, f + h, 1 - a - e + i, d - b],
            [h - f, c - g, d - b, 1 + a + e + i],
        ]
    )
    outer_Nx4x4 = np.moveaxis(outer_4x4xN, -1, 0)
    largest_N = np.argmax(np.diagonal(outer_Nx4x4, axis1=1, axis2=2), axis=1)
    quaternion_Nx4 = outer_Nx4x4[np.arange(len(outer_Nx4x4)), largest_N]
    quaternion_Nx4 = quaternion_Nx4 / np.linalg.norm(quaternion_Nx4, axis=1, keepdims=True)
    return np.where(quaternion_Nx4[:, 3:] < 0, -quaternion_Nx4, quaternion_Nx4)


def _lines(table_TxC: np.ndarray) -> str:
    return "".join(" ".join(_DIGITS % value for value in row) + "\n" for row in table_TxC)
