"""Parameters by path: a model's parameters as a flat dict {"encoder/levels/0/blocks/1/conv/kernel": array}.

One flat dict is what rules, masks, freezing and checkpoints all speak of; nnx is met only here.
"""

import re
from typing import Any, cast

import jax
from flax import nnx
from jax import Array

Params = dict[str, Any]


def initializers(key: Array) -> nnx.Rngs:
    """What flax's layers take their keys from: those of nnx.Rngs(params=key), one after the other."""
    return cast(nnx.Rngs, _Keys(key))


class _Keys:
    """nnx.Rngs counts its keys in a traced array, which takes a quarter of the time in which programs are traced."""

    def __init__(self, key: Array):
        self._key, self._drawn = key, 0

    def params(self) -> Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


def flatten(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The model's structure and its parameters by path, sorted."""
    graphdef, state = nnx.split(model, nnx.Param)
    named = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return graphdef, dict(sorted(named.items()))


def merge(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """The model with these parameters: the inverse of `flatten`."""
    split = {tuple(int(part) if part.isdigit() else part for part in name.split("/")): leaf for name, leaf in params.items()}
    return nnx.merge(graphdef, _nest(split))


def _nest(flat: dict[tuple, Any]) -> dict:
    nested: dict = {}
    for path, leaf in flat.items():
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return nested


def match(pattern: str, name: str) -> bool:
    """Whether the regular expression matches the whole path."""
    return re.fullmatch(pattern, name) is not None


def partition(params: Params, pattern: str) -> tuple[Params, Params]:
    """(parameters whose path matches, the others)."""
    chosen = {name: leaf for name, leaf in params.items() if match(pattern, name)}
    return chosen, {name: leaf for name, leaf in params.items() if name not in chosen}


def leaf_name(path: tuple) -> str:
    """The last dict key on a jax key path: the parameter that an optimiser's leaf belongs to; "" where there is none."""
    keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    return keys[-1] if keys else ""


def count(params: Params) -> int:
    """Number of scalars."""
    return sum(leaf.size for leaf in params.values())
