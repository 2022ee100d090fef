"""Classes read off the latents of images, whose views under unknown homographies are what they are tested on."""

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
    """Cross-entropy of one image's class; trained on images as they are, tested on warped ones (Neural Isometries, table 1).

    Fields:
      classes: their number. head: "equivariant", which no orthogonal map of E_Ω(ψ) can change, or "mlp" on all of its numbers.
      layers, head_width: of the head (models.equivariant). gram: features of the equivariant one's Gram matrix (published: 64).
      augment: train on images under random homographies instead (the plain autoencoder's head).
      warped: test on the test set's homographies, a function of (image, copy, test_seed); False: on images as they are. Images
        that come as large as task.size are taken as they are in any case.
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
            numbers = self.latent_channels * (self.rank if self.operator else self.edge**2)
            return Classifier(encoder, operator, MLPHead(numbers, *sizes, dtype=dtype, rngs=rngs))
        return Classifier(encoder, operator, EquivariantHead(self.latent_channels, *sizes, gram=self.gram, dtype=dtype, rngs=rngs))

    def rules(self) -> Rules:
        return (*self.operator_rules(), ("(encoder|head)/.*", ()))

    def draw(self, batch: Batch, key: Array) -> Batch:
        """The images, padded and in [−1, 1], with `augment` under random homographies."""
        return self._observed(batch, views.training_coefficients(batch, key) if self.augment else None)

    def draw_held_out(self, batch: Batch, key: Array) -> Batch:
        perturbed = views.images(batch).shape[1] == self.size
        return self._observed(batch, None if perturbed or not self.warped else views.held_out_coefficients(batch, self.test_seed))

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

    def _observed(self, batch: Batch, coefficient_Bx8: Array | None) -> Batch:
        """The batch with what the encoder sees of its images instead of them."""
        image_BxHxWxC = views.images(batch)
        if "label_B" not in batch:
            raise UserError("task classify needs labels: choose a data.dataset that has them, such as mnist, and data.stack=1")
        if coefficient_Bx8 is None:
            observation_BxHxWxC = 2.0 * views.padded(image_BxHxWxC, self.size) - 1.0
        else:
            observation_BxHxWxC = views.orbit(image_BxHxWxC, self.size, coefficient_Bx8, 2)[:, 1]
        return {"observation_BxHxWxC": observation_BxHxWxC, "label_B": batch["label_B"], "weight_B": batch["weight_B"]}

    def _logits(self, model: Classifier, batch: Batch) -> Array:
        return model.head(self.encode(model, model.operator.maps(), batch["observation_BxHxWxC"]))
