"""Views of one image under random homographies: what the tasks on Homography MNIST are trained and tested on."""

import jax.numpy as jnp
from jax import Array

from niso.errors import UserError
from niso.geometry import homography
from niso.tasks.base import Batch

TRANSFORMATIONS = ("given", "homography")  # views that the data has (frames of a video), or that are made of one image


def training_coefficients(batch: Batch, key: Array) -> Array:
    """Coefficients of one homography for every training image, B x 8: a function of the key only."""
    return homography.random_coefficients(key, len(batch["weight_B"]), "train")


def held_out_coefficients(batch: Batch, seed: int) -> Array:
    """Coefficients of the homographies of the test set, B x 8: each a function of (image, copy, seed), whatever the batch,
    the step, the replica or the device."""
    return homography.held_out_coefficients(batch["item_B"], batch["copy_B"], seed)


def padded(image_BxHxWxC: Array, size: int) -> Array:
    """uint8 images in the middle of zeros, B x size x size x C, float32 in [0, 1].

    Raises:
      UserError: they are larger, or cannot be in the middle.
    """
    margins = [size - edge for edge in image_BxHxWxC.shape[1:3]]
    if min(margins) < 0 or any(margin % 2 for margin in margins):
        height, width = image_BxHxWxC.shape[1:3]
        remedy = f"choose task.size={max(height, width)} or an even number more"
        raise UserError(f"images of {height} x {width} pixels cannot lie in the middle of task.size={size}: {remedy}")
    around = [(margin // 2, margin // 2) for margin in margins]
    return jnp.pad(image_BxHxWxC.astype(jnp.float32) / 255.0, ((0, 0), *around, (0, 0)))


def orbit(image_BxHxWxC: Array, size: int, coefficient_Bx8: Array, views: int) -> Array:
    """ψ, Tψ, T²ψ, ... of padded images, B x views x size x size x C, float32 in [−1, 1].

    Each view is ψ warped once: warping a warped image would interpolate twice, and lack what left it on the way.
    """
    psi_BxHxWxC = padded(image_BxHxWxC, size)
    powers = [homography.exponential(n * coefficient_Bx8) for n in range(1, views)]
    return 2.0 * jnp.stack([psi_BxHxWxC, *(homography.warp(psi_BxHxWxC, power_Bx3x3) for power_Bx3x3 in powers)], axis=1) - 1.0


def images(batch: Batch) -> Array:
    """The still images of a batch, B x H x W x C; UserError for a dataset of another kind."""
    if "images_BxHxWxC" not in batch:
        raise UserError("homographies are of still images: choose a data.dataset of these, such as mnist")
    return batch["images_BxHxWxC"]
