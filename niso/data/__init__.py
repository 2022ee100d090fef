"""Bytes to host batches; numpy and grain, never jax."""
