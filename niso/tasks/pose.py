"""Relative camera poses read off isometries: a head on the maps τ_Ω between neighbouring frames of posed video."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

import niso.figures as figures
from niso.errors import UserError
from niso.geometry import se3
from niso.metrics import Mean, Metrics
from niso.models.autoencoder import Encoder
from niso.models.heads import PoseHead
from niso.models.operator import NoOperator, Operator
from niso.tasks.base import Batch, Rules
from niso.tasks.latent import Latent, check_choices

REST = 1e-8  # a camera that moves less, in the world's units, rests: float64 poses leave 1e-15
FLOOR = 1e-3  # in the head's own unit; a smaller estimate is not scaled up further: a bound on the gradient


class Estimator(nnx.Module):
    """Encoder and operator, of a finished run and frozen, and the head that is trained on them."""

    def __init__(self, encoder: Encoder, operator: Operator | NoOperator, head: PoseHead):
        self.encoder = encoder
        self.operator = operator
        self.head = head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pose(Latent):
    """Regression of the P = T − 1 relative poses g_i⁻¹ g_{i+1} of windows of T frames (Neural Isometries).

    Loss: mean |R̂ − R| + mean |s t̂ − s' t|, L1 over entries and pairs, unweighted as published. The scale of a video is unknown:
    s, s' are one pair of numbers per window.

    Fields:
      layers, head_width: hidden layers of the head and their width.
      scale: "positive": both sides to unit root mean square length over the window, so the loss knows neither scale. The gradient
        runs through s: were it constant, uncertain estimates would shrink without end, because |s t̂ − s' t| is smaller for a
        smaller t̂, until the optimiser's steps are larger than they are. "published": s = tr(tᵀt̂) / ‖t̂‖², constant in
        the gradient, s' = 1. It may be negative, so that loss cannot tell t̂ from −t̂, and a head settles on either.
      strides, limit: whole test videos are estimated at every stride-th of their first `limit` frames (published: 200).
    """

    layers: int
    head_width: int
    scale: str
    strides: tuple[int, ...]
    limit: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, scale=("positive", "published"))
        if not self.strides or min(self.strides) < 1:
            raise UserError(f"task.strides={self.strides}: name one or more strides, each at least 1")
        for key, least in {"layers": 2, "head_width": 1, "limit": 3}.items():
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)}: must be at least {least}")

    def init_model(self, rngs: nnx.Rngs) -> Estimator:
        encoder, operator = self.init_encoder(rngs), self.init_operator(rngs)
        dtype = jnp.dtype(self.dtype)
        return Estimator(encoder, operator, PoseHead(self.order, self.layers, self.head_width, dtype=dtype, rngs=rngs))

    def rules(self) -> Rules:
        """The head's first kernel, k² x width and most of what is trained, by its columns: a width is a power of two where k² may
        be odd, and only the B x width activations cross devices. Over `space`, because `data` has the examples."""
        return (*self.operator_rules(), ("head/layers/0/kernel", (None, "space")), ("(encoder|head)/.*", ()))

    def relative_pose(self, model: Estimator, tau_BxKxK: Array) -> Array:
        """The relative poses that maps from a first frame to a second one stand for, B x 4 x 4: the second camera seen from
        the first, its translation in units of the head's own."""
        return se3.pose_matrix(*se3.pose_from_numbers(model.head(tau_BxKxK)))

    def loss(self, model: Estimator, batch: Batch) -> tuple[Array, Metrics]:
        if "relative_BxPx4x4" not in batch:
            raise UserError("task pose needs the poses of its frames: set data.poses=True")
        true_BxPx4x4 = batch["relative_BxPx4x4"]
        tau_BxPxKxK = self._isometries(model, batch["frames_BxTxHxWxC"])
        pose_QxPx4x4 = self.relative_pose(model, tau_BxPxKxK.reshape(-1, self.order, self.order))
        metrics = self._measure(pose_QxPx4x4.reshape(true_BxPx4x4.shape), true_BxPx4x4, batch["weight_B"])
        return metrics["loss"].total / metrics["loss"].count, metrics

    def inspect(self, model: Estimator, batch: Batch) -> dict[str, Array]:
        return {"tau_BxKxK": self._isometries(model, batch["frames_BxTxHxWxC"])[:, 0]}

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"isometries": figures.isometries(arrays["tau_BxKxK"])}

    def trajectory_strides(self) -> tuple[int, ...]:
        return self.strides

    def trajectory_limit(self) -> int:
        return self.limit

    def summary(self, metrics: dict[str, float]) -> list[str]:
        error, baseline = metrics["rotation_error"], metrics["rotation_baseline"]
        ratio = f"identity: {baseline:.2f} deg" + (f", ratio {error / baseline:.2f}" if baseline > 0 else "")
        direction = metrics.get("direction_error")
        moved = "no camera moves" if direction is None else f"translation direction {direction:.1f} deg"
        terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "rotation", "translation"))
        return [terms, f"rotation {error:.2f} deg ({ratio})   {moved}"]

    def _isometries(self, model: Estimator, frames_BxTxHxWxC: Array) -> Array:
        """τ_Ω between neighbouring frames, B x P x K x K; every frame is encoded once, though most are in two pairs."""
        examples, views = frames_BxTxHxWxC.shape[:2]
        maps = model.operator.maps()
        coefficient_FxKxC = self.encode(model, maps, frames_BxTxHxWxC.reshape(-1, *frames_BxTxHxWxC.shape[2:]))
        shape = coefficient_FxKxC.shape[1:]
        coefficient_BxTxKxC = coefficient_FxKxC.reshape(examples, views, *shape)
        first_BxPxKxC, second_BxPxKxC = coefficient_BxTxKxC[:, :-1], coefficient_BxTxKxC[:, 1:]
        tau_QxKxK = self.isometry(maps, first_BxPxKxC.reshape(-1, *shape), second_BxPxKxC.reshape(-1, *shape))
        return tau_QxKxK.reshape(examples, views - 1, self.order, self.order)

    def _measure(self, pose_BxPx4x4: Array, true_BxPx4x4: Array, weight_B: Array) -> Metrics:
        """Loss, its two terms, and errors in degrees: of rotations, of the guess that nothing turns, of directions."""
        rotation_BxPx3x3, translation_BxPx3 = pose_BxPx4x4[..., :3, :3], pose_BxPx4x4[..., :3, 3]
        true_rotation_BxPx3x3, true_translation_BxPx3 = true_BxPx4x4[..., :3, :3], true_BxPx4x4[..., :3, 3]
        rotation_B = jnp.mean(jnp.abs(rotation_BxPx3x3 - true_rotation_BxPx3x3), axis=(1, 2, 3))
        translation_B = jnp.mean(jnp.abs(self._translation_residual(translation_BxPx3, true_translation_BxPx3)), axis=(1, 2))
        error_BxP = se3.rotation_distance(rotation_BxPx3x3, true_rotation_BxPx3x3)
        angle_BxP = se3.rotation_distance(jnp.eye(3), true_rotation_BxPx3x3)
        direction_BxP = se3.direction_distance(translation_BxPx3, true_translation_BxPx3)
        moving_BxP = jnp.linalg.norm(true_translation_BxPx3, axis=-1) > REST
        return {
            "loss": Mean.of(rotation_B + translation_B, weight_B),
            "rotation": Mean.of(rotation_B, weight_B),
            "translation": Mean.of(translation_B, weight_B),
            "rotation_error": Mean.of(jnp.mean(error_BxP, axis=1), weight_B),
            "rotation_baseline": Mean.of(jnp.mean(angle_BxP, axis=1), weight_B),
            "direction_error": Mean.of(direction_BxP, weight_B[:, None] * moving_BxP),
        }

    def _translation_residual(self, estimate_BxPx3: Array, true_BxPx3: Array) -> Array:
        """s t̂ − s' t of each window, B x P x 3; 0 for a window whose camera rests: it has no direction to learn."""
        if self.scale == "published":
            product_B = jnp.sum(true_BxPx3 * estimate_BxPx3, axis=(1, 2))
            s_B = lax.stop_gradient(product_B / jnp.maximum(jnp.sum(estimate_BxPx3**2, axis=(1, 2)), FLOOR**4))
            return s_B[:, None, None] * estimate_BxPx3 - true_BxPx3
        true_B = jnp.sqrt(jnp.mean(jnp.sum(true_BxPx3**2, axis=-1), axis=1))
        moving_Bx1x1 = (true_B > REST)[:, None, None]
        unit_BxPx3 = true_BxPx3 / jnp.where(moving_Bx1x1, true_B[:, None, None], 1.0)
        size_B = jnp.sqrt(jnp.mean(jnp.sum(estimate_BxPx3**2, axis=-1), axis=1) + FLOOR**2)
        return jnp.where(moving_Bx1x1, estimate_BxPx3 / size_B[:, None, None] - unit_BxPx3, 0.0)
