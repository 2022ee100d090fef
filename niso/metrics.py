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


def by_replica(metrics: Metrics) -> list[dict[str, float]]:
    """`values` of each replica, where metrics have an axis of replicas; of the only one, where they have none."""
    fetched = jax.device_get(metrics)
    if all(mean.total.ndim == 0 for mean in fetched.values()):
        return [_values(fetched)]
    count = len(next(iter(fetched.values())).total)
    return [_values({name: Mean(m.total[index], m.count[index]) for name, m in fetched.items()}) for index in range(count)]


def values(metrics: Metrics) -> dict[str, float]:
    """Name -> mean, on the host; names that counted nothing (a frame skip that no pair has) are left out."""
    return _values(jax.device_get(metrics))


def _values(fetched: Metrics) -> dict[str, float]:
    return {name: mean.value() for name, mean in sorted(fetched.items()) if float(mean.count)}
