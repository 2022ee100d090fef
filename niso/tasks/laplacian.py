"""The operator alone: which Ω do shifts of a torus, or rotations of a sphere, leave behind? Known answer: the Laplacian."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import niso.figures as figures
import niso.operator_figures as operator_figures
from niso.errors import UserError
from niso.geometry import recovery, sphere
from niso.geometry import spectrum as spectral
from niso.geometry.laplacian import Eigenbasis, eigenspaces, spherical, toric
from niso.geometry.spectrum import apply_isometry
from niso.metrics import Mean, Metrics
from niso.models.operator import Learned, Operator
from niso.tasks.base import Batch, Rules, Task
from niso.tasks.latent import OPERATOR_RULES, check_choices, check_operator, scaled

LOWEST = 25  # true eigenspaces that are looked for
ROTATIONS = 32  # random rotations that Ω should commute with


class OperatorOnly(nnx.Module):
    """Identity encoder and decoder: the operator acts on the observation itself."""

    def __init__(self, operator: Operator):
        self.operator = operator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laplacian(Task):
    """L = L_R + β L_M with identity encoder and decoder (Neural Isometries, figure 3).

    ψ: images on a size x size grid, stacked to many channels. Tψ: on the torus ψ after a random cyclic shift of both axes; on the
    sphere, whose grid is Driscoll-Healy's, ψ is band-limited to degrees below size/2 and Tψ a random rotation of that.

    Fields:
      domain: "torus" or "sphere". size, channels: of the observation.
      rank, eigenvalues, group, ridge, damping: as in tasks.latent.
      beta, beta_final: β at the start and at the end of a run, linear in between (published: constant). A large one sorts
        eigenfunctions into small eigenspaces, and splits some that the symmetry keeps together; a smaller one heals these.
      dropout: probability of spectral dropout per example (published: 1/2). dropout_law: of the index from which on coefficients
        are dropped, "uniform" (published), or "log": uniform in its logarithm, more of it among the lowest ones.
    """

    domain: str
    size: int
    channels: int
    rank: int
    eigenvalues: str
    group: str
    ridge: float
    damping: float
    beta: float
    beta_final: float
    dropout: float
    dropout_law: str

    def __post_init__(self) -> None:
        check_choices(self, domain=("torus", "sphere"), dropout_law=spectral.DROPOUT_LAWS)
        if self.size < 4 or self.size % 2 or self.channels < 1:
            raise UserError(f"task.size={self.size}, task.channels={self.channels}: an even size from 4 on, and 1 channel or more")
        if not 0 <= self.dropout <= 1:
            raise UserError(f"task.dropout={self.dropout}: a probability, from 0 to 1")
        check_operator(self, (self.size, self.size))

    def init_model(self, rngs: nnx.Rngs) -> OperatorOnly:
        return OperatorOnly(Operator(self.size**2, self.rank, self.eigenvalues, rngs=rngs))

    def rules(self) -> Rules:
        return OPERATOR_RULES

    def at(self, progress: Array) -> "Laplacian":
        beta: Any = self.beta + progress * (self.beta_final - self.beta)  # traced
        return dataclasses.replace(self, beta=beta)

    def draw(self, batch: Batch, key: Array) -> Batch:
        """ψ and Tψ as B x N x C, and which spectral coefficients are kept."""
        transform, drop = jax.random.split(key)
        image_BxHxWxC = batch["images_BxHxWxC"]
        if image_BxHxWxC.shape[1:] != (self.size, self.size, self.channels):
            raise UserError(
                f"observations are {list(image_BxHxWxC.shape[1:])}, but task.size={self.size} and task.channels="
                f"{self.channels}: make them agree (data.size, and 3 channels for each of data.stack images)"
            )
        first_BxHxWxC = scaled(image_BxHxWxC)
        if self.domain == "torus":
            by_Bx2 = jax.random.randint(transform, (len(first_BxHxWxC), 2), 0, self.size)
            second_BxHxWxC = jax.vmap(lambda z_HxWxC, by_2: jnp.roll(z_HxWxC, by_2, (0, 1)))(first_BxHxWxC, by_Bx2)
        else:
            first_BxHxWxC = sphere.band_limit(first_BxHxWxC, self.size // 2)
            second_BxHxWxC = sphere.rotate(first_BxHxWxC, sphere.random_rotation(transform, len(first_BxHxWxC)))
        shape = (len(first_BxHxWxC), self.size**2, self.channels)
        return {
            "first_BxNxC": first_BxHxWxC.reshape(shape),
            "second_BxNxC": second_BxHxWxC.reshape(shape),
            "keep_BxK": spectral.dropout(drop, len(first_BxHxWxC), self.rank, self.dropout, self.dropout_law),
            "weight_B": batch["weight_B"],
        }

    def loss(self, model: OperatorOnly, batch: Batch) -> tuple[Array, Metrics]:
        maps = model.operator.maps()
        metrics = self._losses(maps, batch, self._solve(maps, batch), batch["keep_BxK"])
        return metrics["loss"].total / metrics["loss"].count, metrics

    def evaluate(self, model: OperatorOnly, batch: Batch) -> Metrics:
        """Without dropout; also the equivariance error, and the share of ‖τ_Ω‖² within clusters of learned eigenvalues, percent."""
        maps = model.operator.maps()
        a_BxKxC, b_BxKxC, tau_BxKxK = solved = self._solve(maps, batch)
        error_B = spectral.relative_error(apply_isometry(tau_BxKxK, a_BxKxC), b_BxKxC)
        within_B = spectral.share_within_clusters(tau_BxKxK, maps.spectrum.eigenvalue_K)
        return self._losses(maps, batch, solved, jnp.ones_like(batch["keep_BxK"])) | {
            "equivariance_error": Mean.of(100.0 * error_B, batch["weight_B"]),
            "within_clusters": Mean.of(100.0 * within_B, batch["weight_B"]),
        }

    def inspect(self, model: OperatorOnly, batch: Batch) -> dict[str, Array]:
        maps = model.operator.maps()
        return {"tau_BxKxK": self._solve(maps, batch)[2]} | self.examination(model)

    def examination(self, model: OperatorOnly) -> dict[str, Array]:
        spectrum = model.operator.maps().spectrum
        return {"basis_NxK": spectrum.basis_NxK, "eigenvalue_K": spectrum.eigenvalue_K, "mass_N": spectrum.mass_N}

    def examine(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        return recovery.figures_of_merit(self._learned(arrays), self._true(), self._moves(), LOWEST)

    def figures(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        learned, true, grid = self._learned(arrays), self._true(), (self.size, self.size)
        starts = recovery.starts(learned.eigenvalue_K)
        order_K = np.argsort(recovery.rayleigh_quotients(recovery.in_true_coordinates(learned, true), true), kind="stable")
        spaces = [space.stop - space.start for space in eigenspaces(true.eigenvalue_K)]
        return {
            "eigenfunctions": operator_figures.beside(
                learned.basis_NxK[:, order_K], learned.eigenvalue_K[order_K], true.basis_NxK, true.eigenvalue_K, *grid
            ),
            "operator": operator_figures.operators(learned.matrix_NxN(), true.matrix_NxN(), *grid),
            "isometries": operator_figures.clustered_isometries(arrays["tau_BxKxK"], starts),
            "multiplicities": operator_figures.multiplicities(learned.eigenvalue_K, starts, true.eigenvalue_K, spaces),
            "masses": operator_figures.masses_beside(learned.mass_N, true.mass_N, *grid),
            "spectrum": figures.spectrum(arrays["eigenvalue_K"]),
        }

    def summary(self, metrics: dict[str, float]) -> list[str]:
        terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "reconstruction", "multiplicity"))
        lowest = " ".join(
            f"{metrics[f'energy_eigenspace_{n}']:.0f}" for n in range(recovery.LISTED) if f"energy_eigenspace_{n}" in metrics
        )
        return [
            f"{terms}  equivariance error {metrics['equivariance_error']:.2f} %",
            f"eigenspaces: {metrics['energy']:.1f} % of their energy captured, {metrics['energy_worst']:.1f} % at worst, "
            f"of the lowest {lowest} %; "
            f"{metrics['within_clusters']:.1f} % of maps within {metrics['clusters']:.0f} clusters; "
            f"commutation {metrics['commutation']:.3f}",
        ]

    def _solve(self, maps: Learned, batch: Batch) -> tuple[Array, Array, Array]:
        """E_Ω(ψ), E_Ω(Tψ) and τ_Ω."""
        a_BxKxC, b_BxKxC = maps.project(batch["first_BxNxC"]), maps.project(batch["second_BxNxC"])
        solve = lambda x: self.procrustes(x, special=self.group == "SO", ridge=self.ridge, damping=self.damping)  # noqa: E731
        return a_BxKxC, b_BxKxC, spectral.solve_isometry(a_BxKxC, b_BxKxC, maps.mask_KxK, solve)

    def _losses(self, maps: Learned, batch: Batch, solved: tuple[Array, Array, Array], keep_BxK: Array) -> Metrics:
        a_BxKxC, b_BxKxC, tau_BxKxK = solved
        forward_BxKxC = keep_BxK[..., None] * apply_isometry(tau_BxKxK, a_BxKxC)
        backward_BxKxC = keep_BxK[..., None] * apply_isometry(tau_BxKxK, b_BxKxC, inverse=True)
        reconstruction_B = jnp.mean(jnp.abs(maps.unproject(forward_BxKxC) - batch["second_BxNxC"]), axis=(1, 2))
        reconstruction_B += jnp.mean(jnp.abs(maps.unproject(backward_BxKxC) - batch["first_BxNxC"]), axis=(1, 2))
        multiplicity_B = maps.multiplicity() * jnp.ones_like(reconstruction_B)
        terms = {
            "loss": reconstruction_B + self.beta * multiplicity_B,
            "reconstruction": reconstruction_B,
            "multiplicity": multiplicity_B,
        }
        return {name: Mean.of(value_B, batch["weight_B"]) for name, value_B in terms.items()}

    def _true(self) -> Eigenbasis:
        return toric(self.size, self.size) if self.domain == "torus" else spherical(self.size)

    def _learned(self, arrays: dict[str, np.ndarray]) -> Eigenbasis:
        return Eigenbasis(*(arrays[name].astype(np.float64) for name in ("basis_NxK", "eigenvalue_K", "mass_N")))

    def _moves(self) -> Iterator[np.ndarray]:
        """The symmetry as matrices on functions of the grid: every shift, or random rotations, always the same."""
        return recovery.shifts(self.size) if self.domain == "torus" else recovery.rotations(self.size, ROTATIONS)
