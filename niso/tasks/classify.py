"""Classes read off the latents of images or surfaces, whose views under unknown maps are what they are tested on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import niso.figures as figures
from niso.errors import UserError
from niso.metrics import Mean, Metrics
from niso.models.autoencoder import Encoder
from niso.models.equivariant import EquivariantHead, MLPHead
from niso.models.operator import NoOperator, Operator
from niso.tasks import views
from niso.tasks.base import Batch, Rules
from niso.tasks.latent import Latent, check_choices


class Classifier(nnx.Module):
    """Encoder and operator, of a finished run and frozen or not, and the head that is trained on them."""

    def __init__(self, encoder: Encoder, operator: Operator | NoOperator, head: EquivariantHead | MLPHead):
        self.encoder = encoder
        self.operator = operator
        self.head = head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Latent):
    """Cross-entropy of one example's class (Neural Isometries, tables 1 and 2).

    Examples are images, whose maps are homographies, or surfaces on the sphere, whose maps are Möbius maps (tasks.views).

    Fields:
      classes: their number. head: "equivariant", which no orthogonal map of E_Ω(ψ) can change, or "mlp" on all of its numbers.
      layers, head_width: of the head (models.equivariant). gram: features of the equivariant one's Gram matrix (published: 64).
      augment: train on examples under random maps (of digits the plain autoencoder's head, of surfaces every one).
      warped: test on the test set's maps, a function of (example, copy, test_seed); False: on examples as they are. Images that
        come as large as task.size are taken as they are in any case.
    """

    classes: int
    head: str
    layers: int
    head_width: int
    gram: int
    augment: bool
    warped: bool
    test_seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, head=("equivariant", "mlp"))
        for key, least in {"classes": 2, "layers": 1, "head_width": 1, "gram": 1}.items():
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)}: must be at least {least}")
        if self.head == "equivariant" and not self.operator:
            raise UserError("task.head=equivariant is invariant to maps of E_Ω, which needs an operator: set task.head=mlp")

    def init_model(self, rngs: nnx.Rngs) -> Classifier:
        encoder, operator = self.init_encoder(rngs), self.init_operator(rngs)
        sizes, dtype = (self.layers, self.head_width, self.classes), jnp.dtype(self.dtype)
        if self.head == "mlp":
            numbers = self.latent_channels * (self.rank if self.operator else self.points)
            return Classifier(encoder, operator, MLPHead(numbers, *sizes, dtype=dtype, rngs=rngs))
        return Classifier(encoder, operator, EquivariantHead(self.latent_channels, *sizes, gram=self.gram, dtype=dtype, rngs=rngs))

    def rules(self) -> Rules:
        return (*self.operator_rules(), ("(encoder|head)/.*", ()))

    def draw(self, batch: Batch, key: Array) -> Batch:
        """What the encoder sees, in [−1, 1], with `augment` under random maps."""
        if not self.augment:
            return _observed(batch, views.unmapped(batch, self.shape))
        return _observed(batch, views.training(views.kind(batch), batch, key, self.shape, 2)[:, 1])

    def draw_held_out(self, batch: Batch, key: Array) -> Batch:
        perturbed = views.kind(batch) == "homography" and views.images(batch).shape[1:3] == self.shape
        if perturbed or not self.warped:
            return _observed(batch, views.unmapped(batch, self.shape))
        return _observed(batch, views.held_out(views.kind(batch), batch, self.test_seed, self.shape, 2)[:, 1])

    def loss(self, model: Classifier, batch: Batch) -> tuple[Array, Metrics]:
        logit_BxL, label_B = self._logits(model, batch), batch["label_B"]
        if label_B.shape != logit_BxL.shape[:1]:  # (B, 1) would broadcast to B x B comparisons
            raise UserError(f"labels have the shape {label_B.shape}, expected ({len(logit_BxL)},): one number per image")
        entropy_B = -jnp.take_along_axis(jax.nn.log_softmax(logit_BxL), label_B[:, None], axis=1)[:, 0]
        right_B = jnp.argmax(logit_BxL, axis=1) == label_B
        metrics = {"loss": Mean.of(entropy_B, batch["weight_B"]), "accuracy": Mean.of(100.0 * right_B, batch["weight_B"])}
        return metrics["loss"].total / metrics["loss"].count, metrics

    def inspect(self, model: Classifier, batch: Batch) -> dict[str, Array]:
        logit_BxL = self._logits(model, batch)
        truth_BxL = jax.nn.one_hot(batch["label_B"], self.classes)
        return {"image_BxHxWxC": batch["observation_BxHxWxC"], "probability_BxL": jax.nn.softmax(logit_BxL), "truth_BxL": truth_BxL}

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"predictions": figures.predictions(arrays["image_BxHxWxC"], arrays["probability_BxL"], arrays["truth_BxL"])}

    def summary(self, metrics: dict[str, float]) -> list[str]:
        return [f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.2f} %"]

    def _logits(self, model: Classifier, batch: Batch) -> Array:
        return model.head(self.encode(model, model.operator.maps(), batch["observation_BxHxWxC"]))


def _observed(batch: Batch, observation_BxHxWxC: Array) -> Batch:
    """The batch with what the encoder sees of its images or surfaces instead of them."""
    if "label_B" not in batch:
        raise UserError("task classify needs labels: choose a data.dataset that has them, such as mnist, and data.stack=1")
    return {"observation_BxHxWxC": observation_BxHxWxC, "label_B": batch["label_B"], "weight_B": batch["weight_B"]}
