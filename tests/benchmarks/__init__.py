"""Benchmarks: `python -m tests.benchmarks.solve` and `python -m tests.benchmarks.train_step`, on whatever device jax finds."""

import niso  # noqa: F401  (sets OPENBLAS_NUM_THREADS, which has to be set before jax is imported)
