"""Neural Isometries: an autoencoder whose latent space turns the change between two views into an isometry."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import niso.figures as figures
from niso.errors import UserError
from niso.geometry import spectrum as spectral
from niso.metrics import Mean, Metrics
from niso.models.autoencoder import Decoder, Encoder
from niso.models.operator import Learned, NoOperator, Operator
from niso.tasks import views
from niso.tasks.base import Batch, Rules
from niso.tasks.latent import Latent, check_choices, scaled
from niso.tasks.regimes import VIEWS, Views, compared


class Autoencoder(nnx.Module):
    """Encoder, decoder and operator: the parameters that a head is later trained on."""

    def __init__(self, encoder: Encoder, decoder: Decoder, operator: Operator | NoOperator):
        self.encoder = encoder
        self.decoder = decoder
        self.operator = operator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencode(Latent):
    """L = L_R + α L_E + β L_M (Neural Isometries), every term a mean of absolute values.

    Which latents are decoded and compared depends on the regime (tasks.regimes); of a plain autoencoder L = L_R.

    Fields:
      regime: "pairs", "triplets" or "reconstruction".
      transformation: "given", views are frames of a video; "homography", ψ is an image and T is drawn; "moebius", ψ and Tψ are
        a function on the sphere under two drawn Möbius maps.
      test_seed: of the maps of held-out images or surfaces.
      alpha, beta: α, β. equivariance: L_E is "absolute" (paper), or "relative" to the spread of the latents over the batch, which
        shrinking latents do not make smaller. both_directions: L_E of τ and of τ⁻¹, summed (reference code); False: of τ (paper).
      dropout: probability of spectral dropout per example, in training, after L_E and before the decoder (published: 0).
      skips: frame skips whose equivariance error is reported separately.
    """

    regime: str
    transformation: str
    test_seed: int
    alpha: float
    beta: float
    equivariance: str
    both_directions: bool
    dropout: float
    skips: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, regime=tuple(VIEWS), transformation=views.TRANSFORMATIONS, equivariance=("absolute", "relative"))
        if not 0 <= self.dropout <= 1:
            raise UserError(f"task.dropout={self.dropout}: a probability, from 0 to 1")
        if self.regime == "triplets" and self.transformation != "homography":
            lacking = "a video does not have" if self.transformation == "given" else "surfaces under two unrelated maps do not have"
            raise UserError(f"task.regime=triplets needs T²ψ, which {lacking}: set task.transformation=homography, or regime=pairs")
        if self.regime == "reconstruction" and self.operator:
            raise UserError("task.regime=reconstruction has no maps for an operator to commute with: set task.operator=False")

    def check_data(self, data: Any) -> None:
        if getattr(data, "test_records", ""):
            raise UserError(
                f"data.test_records={data.test_records}: its images are warped already, and would be once more: leave it empty"
            )

    def init_model(self, rngs: nnx.Rngs) -> Autoencoder:
        operator = self.init_operator(rngs)
        return Autoencoder(self.init_encoder(rngs), self.init_decoder(rngs), operator)

    def rules(self) -> Rules:
        return (*self.operator_rules(), ("(encoder|decoder)/.*", ()))

    def draw(self, batch: Batch, key: Array) -> Batch:
        """The views, and which spectral coefficients are kept."""
        transform, drop = jax.random.split(key)
        if self.transformation != "given":
            made = views.training(self.transformation, batch, transform, self.shape, VIEWS[self.regime])
            batch = _with_views(batch, made)
        if self.dropout:
            batch = batch | {"keep_BxK": spectral.dropout(drop, len(batch["weight_B"]), self.order, self.dropout)}
        return batch

    def draw_held_out(self, batch: Batch, key: Array) -> Batch:
        if self.transformation == "given":
            return batch
        made = views.held_out(self.transformation, batch, self.test_seed, self.shape, VIEWS[self.regime])
        return _with_views(batch, made)

    def loss(self, model: Autoencoder, batch: Batch) -> tuple[Array, Metrics]:
        metrics = self._losses(model, batch, self._encode(model, batch))
        return metrics["loss"].total / metrics["loss"].count, metrics

    def evaluate(self, model: Autoencoder, batch: Batch) -> Metrics:
        seen = self._encode(model, batch)
        metrics = self._losses(model, batch, seen)
        if self.regime == "reconstruction":
            return metrics
        error_B = 100.0 * spectral.relative_error(seen.moved(0, by=0), seen.coefficient_BxTxKxC[:, 1])
        metrics["equivariance_error"] = Mean.of(error_B, batch["weight_B"])
        for skip in self.skips:
            chosen_B = batch["weight_B"] * (batch["skip_B"] == skip)
            metrics[f"equivariance_error_skip_{skip}"] = Mean.of(error_B, chosen_B)
        return metrics

    def inspect(self, model: Autoencoder, batch: Batch) -> dict[str, Array]:
        seen = self._encode(model, batch)
        first_BxKxC, second_BxKxC = seen.coefficient_BxTxKxC[:, 0], seen.coefficient_BxTxKxC[:, 1]
        arrays = {"first_BxHxWxC": seen.frames_BxTxHxWxC[:, 0], "second_BxHxWxC": seen.frames_BxTxHxWxC[:, 1]}
        if self.regime == "reconstruction":
            there_BxHxWxC, back_BxHxWxC = self.decode(model, seen.maps, [second_BxKxC, first_BxKxC])
        else:
            moved = [seen.moved(0, by=0), seen.moved(1, by=0, inverse=True), first_BxKxC]
            there_BxHxWxC, back_BxHxWxC, arrays["decoded_first_BxHxWxC"] = self.decode(model, seen.maps, moved)
            arrays["tau_BxKxK"] = seen.tau_BxPxKxK[:, 0]
        arrays |= {"transported_first_BxHxWxC": back_BxHxWxC, "transported_second_BxHxWxC": there_BxHxWxC}
        if isinstance(seen.maps, Learned):
            spectrum = seen.maps.spectrum
            arrays |= {"basis_NxK": spectrum.basis_NxK, "eigenvalue_K": spectrum.eigenvalue_K, "mass_N": spectrum.mass_N}
        return arrays

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        drawn = {
            "reconstructions": figures.reconstructions(
                arrays["first_BxHxWxC"], arrays["second_BxHxWxC"],
                arrays["transported_first_BxHxWxC"], arrays["transported_second_BxHxWxC"], arrays.get("decoded_first_BxHxWxC"),
            ),
        }  # fmt: skip
        if "tau_BxKxK" in arrays:
            drawn["isometries"] = figures.isometries(arrays["tau_BxKxK"])
        return drawn | (figures.learned_operator(arrays, *self.grid) if self.operator else {})

    def summary(self, metrics: dict[str, float]) -> list[str]:
        terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "reconstruction", "equivariance", "multiplicity"))
        if "equivariance_error" not in metrics:
            return [terms]
        skips = [(skip, metrics.get(f"equivariance_error_skip_{skip}")) for skip in self.skips]
        by_skip = "  ".join(f"skip {skip}: {error:.2f} %" for skip, error in skips if error is not None)
        return [terms, f"equivariance error {metrics['equivariance_error']:.2f} %" + (f"  ({by_skip})" if by_skip else "")]

    def _encode(self, model: Autoencoder, batch: Batch) -> Views:
        if "frames_BxTxHxWxC" not in batch:
            remedy = f"choose a data.dataset of these, or {views.kind(batch)}"
            raise UserError(f"task.transformation=given needs frames of videos: {remedy}")
        frames_BxTxHxWxC = batch["frames_BxTxHxWxC"]
        if frames_BxTxHxWxC.dtype == jnp.uint8:
            frames_BxTxHxWxC = scaled(frames_BxTxHxWxC)
        examples, count = frames_BxTxHxWxC.shape[:2]
        if count != VIEWS[self.regime]:
            raise UserError(f"task.regime={self.regime} takes {VIEWS[self.regime]} frames, not {count}: set data.views to that")
        maps = model.operator.maps()
        coefficient_QxKxC = self.encode(model, maps, frames_BxTxHxWxC.reshape(-1, *frames_BxTxHxWxC.shape[2:]))
        coefficient_BxTxKxC = coefficient_QxKxC.reshape(examples, count, *coefficient_QxKxC.shape[1:])
        tau_BxPxKxK = jnp.zeros((examples, 0, self.order, self.order))
        if self.regime != "reconstruction":
            ends = coefficient_BxTxKxC[:, :-1], coefficient_BxTxKxC[:, 1:]
            tau_QxKxK = self.isometry(maps, *(end_BxPxKxC.reshape(-1, *end_BxPxKxC.shape[2:]) for end_BxPxKxC in ends))
            tau_BxPxKxK = tau_QxKxK.reshape(examples, count - 1, *tau_QxKxK.shape[1:])
        return Views(frames_BxTxHxWxC, maps, coefficient_BxTxKxC, tau_BxPxKxK)

    def _losses(self, model: Autoencoder, batch: Batch, seen: Views) -> Metrics:
        weight_B, pairs = batch["weight_B"], compared(seen, self.regime)
        keep_BxKx1 = batch["keep_BxK"][..., None] if "keep_BxK" in batch else 1.0
        decoded = self.decode(model, seen.maps, [keep_BxKx1 * moved_BxKxC for moved_BxKxC, _ in pairs])
        targets = [seen.frames_BxTxHxWxC[:, view] for _, view in pairs]
        reconstruction_B = _summed(zip(decoded, targets, strict=True))
        in_latents = pairs[:1] if self.regime == "pairs" and not self.both_directions else pairs
        latents = [(moved_BxKxC, seen.coefficient_BxTxKxC[:, view]) for moved_BxKxC, view in in_latents]
        if self.equivariance == "relative":
            latents = [_relative(*pair, weight_B) for pair in latents]
        equivariance_B = _summed(latents)
        multiplicity_B = seen.maps.multiplicity() * jnp.ones_like(weight_B)
        terms = {
            "loss": reconstruction_B + self.alpha * equivariance_B + self.beta * multiplicity_B,
            "reconstruction": reconstruction_B,
            "equivariance": equivariance_B,
            "multiplicity": multiplicity_B,
        }
        return {name: Mean.of(value_B, weight_B) for name, value_B in terms.items()}


def _with_views(batch: Batch, frames_BxTxHxWxC: Array) -> Batch:
    """The batch with views of its images or surfaces instead of them."""
    others = {name: value for name, value in batch.items() if name not in ("images_BxHxWxC", "signal_BxHxWxC")}
    return others | {"frames_BxTxHxWxC": frames_BxTxHxWxC}


def _relative(moved_BxKxC: Array, wanted_BxKxC: Array, weight_B: Array) -> tuple[Array, Array]:
    """Both in units of the latents' spread: the mean absolute deviation of the second from its mean over the examples that count.

    Raises:
      UserError: there is only one example.
    """
    if len(weight_B) == 1:
        raise UserError("task.equivariance=relative compares examples: raise batch (or lower optimizer.accumulate)")
    share_B = weight_B / jnp.sum(weight_B)
    mean_KxC = jnp.tensordot(share_B, wanted_BxKxC, 1)
    spread = share_B @ jnp.mean(jnp.abs(wanted_BxKxC - mean_KxC), axis=(1, 2))
    spread = jnp.maximum(spread, 1e-12)  # of equal examples: 0 is no unit
    return moved_BxKxC / spread, wanted_BxKxC / spread


def _summed(pairs: Iterable[tuple[Array, Array]]) -> Array:
    """The sum over pairs of the mean absolute difference of each example, B."""
    differences = [found - wanted for found, wanted in pairs]
    return jnp.sum(jnp.stack([jnp.mean(jnp.abs(d), axis=tuple(range(1, d.ndim))) for d in differences]), axis=0)
