"""Which latents are carried where, decoded and compared: pairs and triplets of views, and the plain autoencoder."""

import dataclasses

from jax import Array

from niso.geometry.spectrum import apply_isometry
from niso.models.operator import LatentMaps

VIEWS = {"pairs": 2, "triplets": 3, "reconstruction": 2}  # regime -> T


@dataclasses.dataclass(frozen=True)
class Views:
    """One encoded batch: T frames in [−1, 1], their coefficients, and the P = T − 1 maps between neighbours."""

    frames_BxTxHxWxC: Array
    maps: LatentMaps
    coefficient_BxTxKxC: Array
    tau_BxPxKxK: Array

    def moved(self, view: int, by: int, inverse: bool = False) -> Array:
        """A view's coefficients under one of the maps, or under its inverse, B x K x C."""
        return apply_isometry(self.tau_BxPxKxK[:, by], self.coefficient_BxTxKxC[:, view], inverse=inverse)


def compared(seen: Views, regime: str) -> list[tuple[Array, int]]:
    """The two latents that are decoded, B x K x C, each with the view that it should be (Neural Isometries).

    With τ from (ψ, Tψ) and σ from (Tψ, T²ψ):
      pairs: τ E(ψ) should be Tψ, and τ⁻¹ E(Tψ) should be ψ;
      triplets: each map is applied to the other pair, so it has to be of T and not of the image: σ E(ψ) should be Tψ, and
        τ E(Tψ) should be T²ψ;
      reconstruction, without maps: E(ψ) should be ψ, and E(Tψ) should be Tψ.
    """
    if regime == "pairs":
        return [(seen.moved(0, by=0), 1), (seen.moved(1, by=0, inverse=True), 0)]
    if regime == "triplets":
        return [(seen.moved(0, by=1), 1), (seen.moved(1, by=0), 2)]
    return [(seen.coefficient_BxTxKxC[:, view], view) for view in (0, 1)]
