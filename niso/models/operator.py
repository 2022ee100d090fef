"""The learned operator Ω, and the absence of one, as modules with one face: `maps()` -> a LatentMaps."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from niso.geometry import spectrum as spectral
from niso.geometry.spectrum import Spectrum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """Latent functions through an operator's spectrum: coefficients are K x C, maps K x K."""

    spectrum: Spectrum

    @property
    def mask_KxK(self) -> Array:  # noqa: N802  (shape suffix)
        return spectral.eigenvalue_mask(self.spectrum.eigenvalue_K)

    def project(self, z_BxNxC: Array) -> Array:
        return spectral.project(self.spectrum, z_BxNxC)

    def unproject(self, coefficient_BxKxC: Array) -> Array:
        return spectral.unproject(self.spectrum, coefficient_BxKxC)

    def multiplicity(self) -> Array:
        return spectral.multiplicity(self.spectrum.eigenvalue_K)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """No operator: the raw latents are their own coefficients, channels first, and nothing has to be commuted with.

    The orthogonal map of the ablation without Ω acts on the channels (C x C, the size of τ_Ω in every published
    configuration, K = C); on the N grid points it would be N x N with a product of rank C < N.
    """

    mask_KxK = None

    def project(self, z_BxNxC: Array) -> Array:
        return jnp.swapaxes(z_BxNxC, 1, 2).astype(jnp.float32)

    def unproject(self, coefficient_BxKxC: Array) -> Array:
        return jnp.swapaxes(coefficient_BxKxC, 1, 2)

    def multiplicity(self) -> Array:
        return jnp.zeros(())


LatentMaps = Learned | Unconstrained


class Operator(nnx.Module):
    """Ω = Φ Λ Φᵀ M on N grid points with K eigenfunctions, all float32.

    Free parameters: m (M = m² + 1e-8, from 1), U (Φ from it by mass-orthonormalisation, from N(0, 0.01²)) and l. Eigenvalues
    are `cumulative`: Λ = cumsum(l²), l ~ N(0, 1/K²); or `clustered`: Λ = sort(l²), l ~ N(0, 1), Φ's columns with it.
    """

    def __init__(self, points: int, rank: int, eigenvalues: str, *, rngs: nnx.Rngs):
        deviation = 1.0 / rank if eigenvalues == "cumulative" else 1.0
        self.eigenvalues = eigenvalues
        self.basis = nnx.Param(0.01 * jax.random.normal(rngs.params(), (points, rank)))
        self.mass = nnx.Param(jnp.ones((points,)))
        self.eigenvalue = nnx.Param(deviation * jax.random.normal(rngs.params(), (rank,)))

    def maps(self) -> Learned:
        mass_N = self.mass[...] ** 2 + 1e-8
        basis_NxK = spectral.mass_orthonormal(self.basis[...], mass_N)
        eigenvalue_K = self.eigenvalue[...] ** 2
        if self.eigenvalues == "cumulative":
            # An offset of all eigenvalues changes nothing: its gradient would be rounding, which Adam scales to full steps.
            eigenvalue_K = jnp.concatenate([jax.lax.stop_gradient(eigenvalue_K[:1]), eigenvalue_K[1:]])
            return Learned(Spectrum(basis_NxK, jnp.cumsum(eigenvalue_K), mass_N))
        order_K = jnp.argsort(eigenvalue_K)
        return Learned(Spectrum(basis_NxK[:, order_K], eigenvalue_K[order_K], mass_N))


class NoOperator(nnx.Module):
    """The ablation without Ω: no parameters."""

    def maps(self) -> Unconstrained:
        return Unconstrained()
