"""The learned operator Ω = Φ Λ Φᵀ M through its spectrum, and isometries that commute with it.

Mitchel, Taylor, Sitzmann, Neural Isometries (NeurIPS 2024). Everything here is float32 whatever the networks compute in.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from niso.geometry.polar import polar_factor

Procrustes = Callable[..., Array]
DROPOUT_LAWS = ("uniform", "log")
HALF = math.log(2.0)  # eigenvalues this far apart have the mask exp(−gap) = 1/2: clusters end at wider gaps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Ω on a grid of N points: eigenfunctions Φ (mass-orthonormal, ΦᵀMΦ = I), eigenvalues Λ (ascending), masses M."""

    basis_NxK: Array
    eigenvalue_K: Array
    mass_N: Array


def mass_orthonormal(free_NxK: Array, mass_N: Array) -> Array:
    """Φ = M^{-1/2} polar(M^{1/2} U): the mass-orthonormal basis nearest to the free matrix U, N x K."""
    root_Nx1 = jnp.sqrt(mass_N)[:, None]
    return polar_factor(root_Nx1 * free_NxK) / root_Nx1


def project(spectrum: Spectrum, z_BxNxC: Array) -> Array:
    """Spectral coefficients E_Ω = Φᵀ M z, B x K x C, accumulated in float32."""
    weighted_NxK = spectrum.mass_N[:, None] * spectrum.basis_NxK
    return jnp.einsum("nk,bnc->bkc", weighted_NxK, z_BxNxC.astype(jnp.float32), precision="highest")


def unproject(spectrum: Spectrum, coefficient_BxKxC: Array) -> Array:
    """The latent function Φ c on the grid, B x N x C."""
    return jnp.einsum("nk,bkc->bnc", spectrum.basis_NxK, coefficient_BxKxC, precision="highest")


def eigenvalue_mask(eigenvalue_K: Array) -> Array:
    """P_Λ = exp(−|λ_i − λ_j|), K x K, in (0, 1] (eq. 8): 1 within an eigenspace, fading between eigenspaces.

    The hard mask of distinct eigenvalues gives the exact solution block by block; the fuzzy one lets gradients reach Λ.
    """
    return jnp.exp(-jnp.abs(eigenvalue_K[:, None] - eigenvalue_K[None, :]))


def solve_isometry(a_BxKxC: Array, b_BxKxC: Array, mask_KxK: Array | None, solve: Procrustes = polar_factor) -> Array:
    """The orthogonal map τ_Ω with τ_Ω a ≈ b that commutes with Λ, B x K x K: κ(P_Λ ⊙ b aᵀ) (eq. 8).

    `mask_KxK` None leaves out the commutation (no operator). `solve` is κ: `polar_factor`, or the same split over a mesh.
    """
    product_BxKxK = jnp.einsum("bic,bjc->bij", b_BxKxC, a_BxKxC, precision="highest")
    return solve(product_BxKxK if mask_KxK is None else mask_KxK * product_BxKxK)


def apply_isometry(tau_BxKxK: Array, coefficient_BxKxC: Array, inverse: bool = False) -> Array:
    """τ_Ω c, or τ_Ωᵀ c = τ_Ω⁻¹ c for `inverse`, B x K x C."""
    letters = "bji,bjc->bic" if inverse else "bij,bjc->bic"
    return jnp.einsum(letters, tau_BxKxK, coefficient_BxKxC, precision="highest")


def dropout(key: Array, batch: int, rank: int, probability: float, law: str = "uniform") -> Array:
    """Spectral dropout: 1 for coefficients that are kept, 0 for all from an index i on, B x K.

    With `probability` an example's index i is drawn from 1 <= i < K (counted from 0, so the first coefficient always stays):
    "uniform" (Neural Isometries), or with "log" density 1/i. It makes the learned spectrum ordered.
    """
    coin, place = jax.random.split(key)
    if law == "uniform":
        index_B = jax.random.randint(place, (batch,), 1, max(rank, 2))
    else:
        index_B = jnp.floor(jnp.exp(jax.random.uniform(place, (batch,)) * jnp.log(rank))).astype(jnp.int32)
    dropped_B = jax.random.bernoulli(coin, probability, (batch,))
    return jnp.where(dropped_B[:, None] & (jnp.arange(rank) >= index_B[:, None]), 0.0, 1.0)


def cluster_labels(eigenvalue_K: Array, gap: float = HALF) -> Array:
    """Label of each ascending eigenvalue's cluster, 0, 0, 1, ..., K int32: a new one begins after a gap larger than `gap`."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.diff(eigenvalue_K) > gap)])


def share_within_clusters(tau_BxKxK: Array, eigenvalue_K: Array, gap: float = HALF) -> Array:
    """Share of ‖τ_Ω‖² on the blocks of clusters of eigenvalues, B, in [0, 1]; 1 for a map that keeps every cluster to itself."""
    label_K = cluster_labels(eigenvalue_K, gap)
    square_BxKxK = tau_BxKxK**2
    inside_B = jnp.sum(jnp.where(label_K[:, None] == label_K[None, :], square_BxKxK, 0.0), axis=(1, 2))
    return inside_B / jnp.sum(square_BxKxK, axis=(1, 2))


def multiplicity(eigenvalue_K: Array) -> Array:
    """L_M = ‖Δ_P‖_F / K with Δ_P = diag(P_Λ 1) − P_Λ, the graph Laplacian of the mask; a scalar >= 1e-4 / K that is
    small where eigenspaces are small (the 1e-8 under the root keeps the derivative finite where all eigenvalues are far apart)."""
    mask_KxK = eigenvalue_mask(eigenvalue_K)
    laplacian_KxK = jnp.diag(jnp.sum(mask_KxK, axis=1)) - mask_KxK
    return jnp.sqrt(jnp.sum(laplacian_KxK**2) + 1e-8) / eigenvalue_K.shape[0]


def relative_error(estimate_BxKxC: Array, target_BxKxC: Array) -> Array:
    """‖estimate − target‖² / ‖target‖² per example, B (1 where the target vanishes and the estimate does not)."""
    error_B = jnp.sum((estimate_BxKxC - target_BxKxC) ** 2, axis=(1, 2))
    target_B = jnp.sum(target_BxKxC**2, axis=(1, 2))
    return error_B / jnp.maximum(target_B, jnp.finfo(jnp.float32).tiny)
