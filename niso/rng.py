"""Every random number's address: (seed, name, step). Nothing random is stored, so nothing random has to be restored."""

import zlib

import jax
from jax import Array


def stream(seed: int | Array, name: str, step: int | Array = 0) -> Array:
    """The key of stream `name` at `step`: a typed PRNG key, the same on every host and in every process.

    `seed` is a number, or what jax.random.key makes of it (that of a replica among others).
    """
    is_key = isinstance(seed, Array) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key)
    root = seed if is_key else jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def held_out(seed: int, name: str, item_B: Array, copy_B: Array) -> Array:
    """A key for every example of a test set that is the same for every run, B: each a function of (item, copy, seed) and `name`."""
    return jax.vmap(lambda item, copy: jax.random.fold_in(stream(seed, name, item), copy))(item_B, copy_B)
