"""niso: Neural Isometries, trained from one laptop CPU to a pod from the same configs."""

import os

# A batched SVD through a threaded OpenBLAS under jaxlib's own thread pool takes 16 ms or 1,700 ms at random;
# both read this variable when they are first loaded, so it has to be set before numpy and jax are.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
