"""niso: Neural Isometries, trained from one laptop CPU to a pod from the same configs.

`niso.load(run)` is a trained run as functions on frames (niso.inference).
"""

import importlib
import os
from typing import Any

# A batched SVD through a threaded OpenBLAS under jaxlib's own thread pool takes 16 ms or 1,700 ms at random;
# both read this variable when they are first loaded, so it has to be set before numpy and jax are.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not imported above: data workers and small commands import niso too, and have no use for jax.
    if name == "load":
        return importlib.import_module("niso.inference").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
