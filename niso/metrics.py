"""Reductions as (total, count) pairs: they add over examples, batches, devices and hosts, and are divided once."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean not yet taken: the weighted sum of a quantity and the sum of the weights, both scalars, float32."""

    total: Array
    count: Array

    @staticmethod
    def of(value_B: Array, weight_B: Array) -> "Mean":
        """The weighted mean of one value per example; examples of weight 0 (padding) count for nothing, NaN included."""
        counted_B = jnp.where(weight_B > 0, value_B * weight_B, 0.0)
        return Mean(jnp.sum(counted_B, dtype=jnp.float32), jnp.sum(weight_B, dtype=jnp.float32))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """The mean, NaN for an empty one."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


Metrics = dict[str, Mean]


def add(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of both sets of examples together; both have the same names."""
    return {name: a[name] + b[name] for name in a}


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Metrics on their way to the host, in one array: fetching each by itself took half of what a log point costs.

    The copy begins behind what the devices have been given so far, and waits for nothing that they are given later.
    """

    names: tuple[str, ...]
    sums_MxPxR: Array  # total and count of every metric, in the order of their names; no axis R where there are no replicas

    @staticmethod
    def of(metrics: Metrics) -> "Fetch":
        """Begins to fetch, and returns what `by_replica` then waits for."""
        sums_MxPxR = _packed(metrics)
        sums_MxPxR.copy_to_host_async()
        return Fetch(tuple(sorted(metrics)), sums_MxPxR)

    def by_replica(self) -> list[dict[str, float]]:
        """`values` of each replica, of the only one where metrics have no axis of replicas; waits until they are there."""
        found_MxPxR = jax.device_get(self.sums_MxPxR)
        found_MxPxR = found_MxPxR.reshape(*found_MxPxR.shape[:2], -1)
        return [
            values({name: Mean(*pair) for name, pair in zip(self.names, found_MxP, strict=True)})
            for found_MxP in found_MxPxR.transpose(2, 0, 1)
        ]


def by_replica(metrics: Metrics) -> list[dict[str, float]]:
    """`values` of each replica, where metrics have an axis of replicas; of the only one, where they have none."""
    return Fetch.of(metrics).by_replica()


def values(metrics: Metrics) -> dict[str, float]:
    """Name -> mean; names that counted nothing (a frame skip that no pair has) are left out."""
    return {name: mean.value() for name, mean in sorted(metrics.items()) if float(mean.count)}


@jax.jit
def _packed(metrics: Metrics) -> Array:
    """Totals and counts in the order of their names, M x 2, or M x 2 x replicas."""
    return jnp.stack([jnp.stack([mean.total, mean.count]) for _, mean in sorted(metrics.items())])
