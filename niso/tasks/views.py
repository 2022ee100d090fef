"""Views of one image or surface under random maps: what the tasks on Homography MNIST and on conformal shapes are trained and
tested on."""

import jax
import jax.numpy as jnp
from jax import Array

from niso import rng
from niso.errors import UserError
from niso.geometry import homography, latlong, moebius
from niso.tasks.base import Batch

# Views that the data has (frames of a video), or that are made: of one image, or of one surface's function on the sphere.
TRANSFORMATIONS = ("given", "homography", "moebius")
# The largest |c| of the random Möbius maps; published is that there is a bound, not which. With 1/2 lengths grow up to 3 times on
# one side of the sphere and shrink to 1/3 on the other, where a half of it may come to lie within 37° of a point: that is 5 points
# of the published latent grid across, whose points are 15° apart. (3/4 would leave 16°, two points.)
SHIFT = 0.5


def training(transformation: str, batch: Batch, key: Array, shape: tuple[int, int], views: int) -> Array:
    """Views of every training example, B x views x height x width x C, float32 in [−1, 1]: random functions of the key only.

    "homography": `orbit` under one homography. "moebius": each under a Möbius map of its own, any one of those that came with the
    surface where the batch has them (data.stored_maps).

    Raises:
      UserError: the dataset has examples of another kind, or images that do not fit.
    """
    if transformation == "moebius":
        if "map_BxKxXxY" in batch:
            number_BxT = jax.random.randint(key, (len(batch["weight_B"]), views), 0, batch["map_BxKxXxY"].shape[1])
            return mapped(batch, _stored(batch, number_BxT), shape)
        map_QxXxY = moebius.random(key, len(batch["weight_B"]) * views, SHIFT)
        return mapped(batch, map_QxXxY.reshape(-1, views, 4, 4), shape)
    return orbit(images(batch), shape, training_coefficients(batch, key), views)


def held_out(transformation: str, batch: Batch, seed: int, shape: tuple[int, int], views: int) -> Array:
    """`training` for the test set: functions of each example's number, the copy and the seed, whatever the batch, the step, the
    replica or the device; the last view is the one that classifiers are tested on. Of maps that came with a surface copy n has
    number n there, and the other view another one."""
    if transformation == "moebius":
        key_B = rng.held_out(seed, "moebius", surfaces(batch)["item_B"], batch["copy_B"])
        if "map_BxKxXxY" in batch:
            count = batch["map_BxKxXxY"].shape[1]
            further_BxT = jax.vmap(lambda key: jax.random.randint(key, (views,), 1, max(count, 2)))(key_B).at[:, -1].set(0)
            return mapped(batch, _stored(batch, (batch["copy_B"][:, None] + further_BxT) % count), shape)
        return mapped(batch, jax.vmap(lambda key: moebius.random(key, views, SHIFT))(key_B), shape)
    return orbit(images(batch), shape, held_out_coefficients(batch, seed), views)


def _stored(batch: Batch, number_BxT: Array) -> Array:
    """The maps with these numbers of those that came with each surface, B x T x 4 x 4."""
    return jnp.take_along_axis(batch["map_BxKxXxY"], number_BxT[:, :, None, None], axis=1)


def unmapped(batch: Batch, shape: tuple[int, int]) -> Array:
    """Images in the middle of zeros, or surfaces as they lie on the sphere, B x height x width x C, float32 in [−1, 1]."""
    if kind(batch) == "moebius":
        identity_BxTxXxY = jnp.broadcast_to(jnp.eye(4, dtype=jnp.float32), (len(batch["weight_B"]), 1, 4, 4))
        return mapped(batch, identity_BxTxXxY, shape)[:, 0]
    return 2.0 * padded(images(batch), shape) - 1.0


def kind(batch: Batch) -> str:
    """The transformation that the examples of a batch can be under: "moebius" for surfaces, else "homography"."""
    return "moebius" if "signal_BxHxWxC" in batch else "homography"


def training_coefficients(batch: Batch, key: Array) -> Array:
    """Coefficients of one homography for every training image, B x 8: a function of the key only."""
    return homography.random_coefficients(key, len(batch["weight_B"]), "train")


def held_out_coefficients(batch: Batch, seed: int) -> Array:
    """Coefficients of the homographies of the test set, B x 8: each a function of (image, copy, seed), whatever the batch,
    the step, the replica or the device."""
    return homography.held_out_coefficients(batch["item_B"], batch["copy_B"], seed)


def padded(image_BxHxWxC: Array, shape: tuple[int, int]) -> Array:
    """uint8 images in the middle of zeros, B x height x width x C, float32 in [0, 1].

    Raises:
      UserError: they are larger, or cannot be in the middle.
    """
    height, width = image_BxHxWxC.shape[1:3]
    margins = [shape[0] - height, shape[1] - width]
    if min(margins) < 0 or any(margin % 2 for margin in margins):
        size = shape[0] if shape[0] == shape[1] else shape
        remedy = f"choose task.size={max(height, width)} or an even number more"
        raise UserError(f"images of {height} x {width} pixels cannot lie in the middle of task.size={size}: {remedy}")
    around = [(margin // 2, margin // 2) for margin in margins]
    return jnp.pad(image_BxHxWxC.astype(jnp.float32) / 255.0, ((0, 0), *around, (0, 0)))


def orbit(image_BxHxWxC: Array, shape: tuple[int, int], coefficient_Bx8: Array, views: int) -> Array:
    """ψ, Tψ, T²ψ, ... of padded images, B x views x height x width x C, float32 in [−1, 1].

    Each view is ψ warped once: warping a warped image would interpolate twice, and lack what left it on the way.
    """
    psi_BxHxWxC = padded(image_BxHxWxC, shape)
    powers = [homography.exponential(n * coefficient_Bx8) for n in range(1, views)]
    return 2.0 * jnp.stack([psi_BxHxWxC, *(homography.warp(psi_BxHxWxC, power_Bx3x3) for power_Bx3x3 in powers)], axis=1) - 1.0


def mapped(batch: Batch, map_BxTxXxY: Array, shape: tuple[int, int]) -> Array:
    """Surfaces' functions under Möbius maps, B x T x 4 x 4, sampled on a grid of latitudes and longitudes of this shape: B x T x
    height x width x C, float32 in [−1, 1], standardised and clipped (data/surfaces.py) after that.

    No view is made of another one: that would interpolate twice.
    """
    signal_BxHxWxC = surfaces(batch)["signal_BxHxWxC"]
    low_Bx1x1xC, step_Bx1x1xC = (batch[name][:, None, None] for name in ("low_BxC", "step_BxC"))
    pulled = [latlong.pull_back(signal_BxHxWxC, map_BxTxXxY[:, view], *shape) for view in range(map_BxTxXxY.shape[1])]
    return jnp.stack([jnp.clip(low_Bx1x1xC + step_Bx1x1xC * view_BxHxWxC, -1.0, 1.0) for view_BxHxWxC in pulled], axis=1)


def images(batch: Batch) -> Array:
    """The still images of a batch, B x H x W x C; UserError for a dataset of another kind."""
    if "images_BxHxWxC" not in batch:
        raise UserError("homographies are of still images: choose a data.dataset of these, such as mnist")
    return batch["images_BxHxWxC"]


def surfaces(batch: Batch) -> Batch:
    """The batch, if it is one of surfaces; UserError for a dataset of another kind."""
    if "signal_BxHxWxC" not in batch:
        raise UserError("Möbius maps are of functions on the sphere: choose a data.dataset of these, such as shapes")
    return batch
