"""The Laplacian of the sphere, from rotated images alone: as toric_laplacian, on a Driscoll-Healy grid.

Claim (Neural Isometries, figure 3): the learned eigenfunctions are the spherical harmonics, and the maps between the images'
coefficients have one block of 2l + 1 for every degree l.
Expected: no number is published; see the README's table for what this config reaches.
Cost: the paper reports 6 hours on one A6000 for 100,000 steps.

  python -m niso.main --config=configs/spherical_laplacian.py

Images as in toric_laplacian. They are band-limited to degrees below 8, which is all that the 16 x 16 grid determines: 64
harmonics, as many as the operator has eigenfunctions. `fast`: the same in fewer steps. Quick: 8 x 8, 16 harmonics.

  python -m niso.main --config=configs/spherical_laplacian.py:fast --config.seeds=3
  python -m niso.main --config=configs/spherical_laplacian.py:quick
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import toric_laplacian
from niso.errors import UserError

VARIANTS = toric_laplacian.VARIANTS


def get_config(variant: str = "paper") -> ConfigDict:
    """`paper`: the published sizes and steps. `fast`: the sizes. `quick`: neither."""
    if variant not in VARIANTS:
        raise UserError(f"spherical_laplacian has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    return toric_laplacian.operator_config("spherical_laplacian", "sphere", variant)


def sweep() -> Iterator[dict[str, Any]]:
    """Overrides of the paper's five seeds."""
    yield {"seeds": 5}
