"""A number for every array that another one of its bits would change: what is restored is compared with what was saved.

It is taken of what the devices hold, not of files: it does not depend on how arrays are divided among devices and hosts or laid
out on disk, costs one pass over the state where it lies, and is written as a part of the checkpoint that it is about.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Checksums = dict[str, list[Any]]  # path -> [shape, checksum], as JSON has them


def of(tree: Any) -> Checksums:
    """Checksums of all arrays of a tree, whose paths are joined by dots. All processes that hold parts of them have to call it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    numbers = _checksums([leaf for _, leaf in leaves]).tolist()
    return {name: [list(np.shape(leaf)), number] for name, (_, leaf), number in zip(names, leaves, numbers, strict=True)}


@jax.jit
def _checksums(arrays: list[Array]) -> Array:
    """Of all arrays, by one program: the sums over devices of many small ones at once would wait for each other on a CPU."""
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(array: Array) -> Array:
    """Sum over the entries, modulo 2³², of their bits scrambled with their position (row-major).

    Whole numbers add to the same sum in any order. The scrambling is one to one for each position (xor, and the last step of
    MurmurHash3), so any change within one 32-bit word changes the sum, and other changes leave it with probability 2⁻³².
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    bits = lax.bitcast_convert_type(array, word).astype(jnp.uint32)  # of eight bytes: two words along another axis
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        position += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride)
    mixed = bits ^ (position * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
