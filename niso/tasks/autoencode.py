"""Neural Isometries from pairs: an autoencoder whose latent space turns the change between two views into an isometry."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import niso.figures as figures
from niso.errors import UserError
from niso.geometry import spectrum as spectral
from niso.geometry.spectrum import apply_isometry
from niso.metrics import Mean, Metrics
from niso.models.autoencoder import Decoder, Encoder
from niso.models.operator import LatentMaps, Learned, NoOperator, Operator
from niso.tasks.base import Batch, Rules
from niso.tasks.latent import Latent, scaled


class Autoencoder(nnx.Module):
    """Encoder, decoder and operator: the parameters that a head is later trained on."""

    def __init__(self, encoder: Encoder, decoder: Decoder, operator: Operator | NoOperator):
        self.encoder = encoder
        self.decoder = decoder
        self.operator = operator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencode(Latent):
    """Pairwise regime: L = L_R + α L_E + β L_M (Neural Isometries), every term a mean of absolute values.

    Fields:
      alpha, beta: α, β. both_directions: L_E of τ and of τ⁻¹, summed (reference code); False: of τ (paper).
      skips: frame skips whose equivariance error is reported separately.
    """

    alpha: float
    beta: float
    both_directions: bool
    skips: tuple[int, ...]

    def init_model(self, rngs: nnx.Rngs) -> Autoencoder:
        operator = self.init_operator(rngs)
        return Autoencoder(self.init_encoder(rngs), self.init_decoder(rngs), operator)

    def rules(self) -> Rules:
        return (*self.operator_rules(), ("(encoder|decoder)/.*", ()))

    def loss(self, model: Autoencoder, batch: Batch) -> tuple[Array, Metrics]:
        pair = self._encode(model, batch)
        metrics = self._losses(model, batch, pair)
        return metrics["loss"].total / metrics["loss"].count, metrics

    def evaluate(self, model: Autoencoder, batch: Batch) -> Metrics:
        pair = self._encode(model, batch)
        metrics = self._losses(model, batch, pair)
        error_B = 100.0 * spectral.relative_error(apply_isometry(pair.tau_BxKxK, pair.first_BxKxC), pair.second_BxKxC)
        metrics["equivariance_error"] = Mean.of(error_B, batch["weight_B"])
        for skip in self.skips:
            chosen_B = batch["weight_B"] * (batch["skip_B"] == skip)
            metrics[f"equivariance_error_skip_{skip}"] = Mean.of(error_B, chosen_B)
        return metrics

    def inspect(self, model: Autoencoder, batch: Batch) -> dict[str, Array]:
        pair = self._encode(model, batch)
        forward_BxHxWxC, backward_BxHxWxC = self._transport(model, pair)
        arrays = {
            "first_BxHxWxC": pair.frames_BxTxHxWxC[:, 0],
            "second_BxHxWxC": pair.frames_BxTxHxWxC[:, 1],
            "transported_first_BxHxWxC": backward_BxHxWxC,
            "transported_second_BxHxWxC": forward_BxHxWxC,
            "decoded_first_BxHxWxC": self._decode(model, pair.maps, pair.first_BxKxC),
            "tau_BxKxK": pair.tau_BxKxK,
        }
        if isinstance(pair.maps, Learned):
            spectrum = pair.maps.spectrum
            arrays |= {"basis_NxK": spectrum.basis_NxK, "eigenvalue_K": spectrum.eigenvalue_K, "mass_N": spectrum.mass_N}
        return arrays

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        drawn = {
            "reconstructions": figures.reconstructions(
                arrays["first_BxHxWxC"], arrays["second_BxHxWxC"],
                arrays["transported_first_BxHxWxC"], arrays["transported_second_BxHxWxC"],
                arrays["decoded_first_BxHxWxC"],
            ),
            "isometries": figures.isometries(arrays["tau_BxKxK"]),
        }  # fmt: skip
        if self.operator:
            basis_NxK, eigenvalue_K, mass_N = (arrays[name] for name in ("basis_NxK", "eigenvalue_K", "mass_N"))
            grid = (self.edge, self.edge)
            drawn |= {
                "eigenfunctions": figures.eigenfunctions(basis_NxK, eigenvalue_K, *grid),
                "masses": figures.masses(mass_N, *grid),
                "operator": figures.operator(basis_NxK, eigenvalue_K, mass_N, *grid),
                "spectrum": figures.spectrum(eigenvalue_K),
            }
        return drawn

    def summary(self, metrics: dict[str, float]) -> list[str]:
        terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "reconstruction", "equivariance", "multiplicity"))
        skips = [(skip, metrics.get(f"equivariance_error_skip_{skip}")) for skip in self.skips]
        by_skip = "  ".join(f"skip {skip}: {error:.2f} %" for skip, error in skips if error is not None)
        return [terms, f"equivariance error {metrics['equivariance_error']:.2f} %  ({by_skip})"]

    def _encode(self, model: Autoencoder, batch: Batch) -> "_Pair":
        frames_BxTxHxWxC = batch["frames_BxTxHxWxC"]
        if frames_BxTxHxWxC.dtype == jnp.uint8:
            frames_BxTxHxWxC = scaled(frames_BxTxHxWxC)
        examples, views = frames_BxTxHxWxC.shape[:2]
        if views != 2:
            raise UserError(f"task autoencode takes pairs of frames, not {views}: set data.views=2")
        maps = model.operator.maps()
        coefficient_PxKxC = self.encode(model, maps, frames_BxTxHxWxC.reshape(-1, *frames_BxTxHxWxC.shape[2:]))
        coefficient_BxTxKxC = coefficient_PxKxC.reshape(examples, views, *coefficient_PxKxC.shape[1:])
        first_BxKxC, second_BxKxC = coefficient_BxTxKxC[:, 0], coefficient_BxTxKxC[:, 1]
        return _Pair(frames_BxTxHxWxC, maps, first_BxKxC, second_BxKxC, self.isometry(maps, first_BxKxC, second_BxKxC))

    def _decode(self, model: Autoencoder, maps: LatentMaps, coefficient_BxKxC: Array) -> Array:
        z_BxNxC = maps.unproject(coefficient_BxKxC)
        return model.decoder(z_BxNxC.reshape(z_BxNxC.shape[0], self.edge, self.edge, -1))

    def _transport(self, model: Autoencoder, pair: "_Pair") -> tuple[Array, Array]:
        """D(τ E(ψ)) and D(τ⁻¹ E(Tψ)): the two decodes that the loss needs."""
        moved = (apply_isometry(pair.tau_BxKxK, pair.first_BxKxC),
                 apply_isometry(pair.tau_BxKxK, pair.second_BxKxC, inverse=True))  # fmt: skip
        both_BxTxKxC = jnp.stack(moved, axis=1)
        decoded_PxHxWxC = self._decode(model, pair.maps, both_BxTxKxC.reshape(-1, *both_BxTxKxC.shape[2:]))
        decoded_BxTxHxWxC = decoded_PxHxWxC.reshape(pair.frames_BxTxHxWxC.shape)
        return decoded_BxTxHxWxC[:, 0], decoded_BxTxHxWxC[:, 1]

    def _losses(self, model: Autoencoder, batch: Batch, pair: "_Pair") -> Metrics:
        weight_B = batch["weight_B"]
        forward_BxHxWxC, backward_BxHxWxC = self._transport(model, pair)
        reconstruction_B = _absolute(forward_BxHxWxC - pair.frames_BxTxHxWxC[:, 1]) + _absolute(
            backward_BxHxWxC - pair.frames_BxTxHxWxC[:, 0]
        )
        equivariance_B = _absolute(apply_isometry(pair.tau_BxKxK, pair.first_BxKxC) - pair.second_BxKxC)
        if self.both_directions:
            equivariance_B += _absolute(apply_isometry(pair.tau_BxKxK, pair.second_BxKxC, inverse=True) - pair.first_BxKxC)
        multiplicity_B = pair.maps.multiplicity() * jnp.ones_like(weight_B)
        loss_B = reconstruction_B + self.alpha * equivariance_B + self.beta * multiplicity_B
        terms = {
            "loss": loss_B,
            "reconstruction": reconstruction_B,
            "equivariance": equivariance_B,
            "multiplicity": multiplicity_B,
        }
        return {name: Mean.of(value_B, weight_B) for name, value_B in terms.items()}


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One encoded batch: the frames in [−1, 1], their coefficients and the map between them."""

    frames_BxTxHxWxC: Array
    maps: LatentMaps
    first_BxKxC: Array
    second_BxKxC: Array
    tau_BxKxK: Array


def _absolute(difference: Array) -> Array:
    """Mean absolute value per example, B."""
    return jnp.mean(jnp.abs(difference), axis=tuple(range(1, difference.ndim)))
