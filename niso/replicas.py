"""Replicas: runs of one experiment with neighbouring seeds, side by side in one program.

Every array of the state but the step has a leading axis of replicas. Replica r is the run of its own that `seed + r` would
be, to rounding: the same initialisation, the same batches, the same random choices. Where mesh axis `data` divides their
number (and `space` is 1) they are split over it, by hand: left to itself the compiler gathers the kernels of all replicas'
convolutions. Nothing crosses devices then; else every device has all of them, and its own examples.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from niso import sharding
from niso.data.stream import Batches
from niso.errors import UserError
from niso.geometry.spectrum import Procrustes

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Replicas:
    """`count` replicas with seeds `seed`, `seed + 1`, ... on a mesh."""

    mesh: Mesh
    seed: int
    count: int

    @property
    def seeds(self) -> list[int]:
        """The seed of each."""
        return [self.seed + index for index in range(self.count)]

    @property
    def axis(self) -> str | None:
        """The mesh axis that replicas are split over, if any."""
        data, space = (self.mesh.shape[axis] for axis in sharding.AXES)
        return "data" if self.count > 1 and data > 1 and space == 1 and self.count % data == 0 else None

    @property
    def written_out(self) -> bool:
        """Whether they are computed one after the other instead of mapped over: on CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def solve(self, procrustes: Procrustes) -> Procrustes:
        """κ with its batch split over the mesh; as it is where replicas are split: each device solves its own."""
        return procrustes if self.axis else sharding.sharded(procrustes, self.mesh)

    def check_batch(self, batch: int, accumulate: int) -> None:
        """Raises UserError where a (micro-)batch cannot be split evenly over the devices that share it."""
        if self.axis is None:
            sharding.check_batch(self.mesh, batch, accumulate)
        elif batch % accumulate:
            raise UserError(f"batch={batch} cannot be split into optimizer.accumulate={accumulate} parts: choose a multiple")

    def map(self, function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any = 0) -> Callable[..., Any]:
        """`function(seed, ...)` of the one replica, or of all of them with axes as in jax.vmap; `seed` is what rng.stream takes."""
        if self.count == 1:
            return partial(function, self.seed)

        mapped = (_written_out if self.written_out else jax.vmap)(function, in_axes=(0, *in_axes), out_axes=out_axes)
        if self.axis:  # gradients are taken inside, of what one device has alone: nothing to be summed
            in_specs, out_specs = self._specs((0, *in_axes)), self._specs(out_axes)
            mapped = jax.shard_map(mapped, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return lambda *arguments: mapped(jnp.stack([jax.random.key(seed) for seed in self.seeds]), *arguments)

    def _specs(self, axes: Any) -> Any:
        """Where shard_map finds what jax.vmap's `axes` say."""
        split, whole = PartitionSpec(self.axis), PartitionSpec()
        return jax.tree.map(lambda axis: whole if axis is None else split, axes, is_leaf=_is_none)

    def stack(self, shapes: Any) -> Any:
        """What has shape and dtype for one replica, for all of them."""
        if self.count == 1:
            return shapes
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.count, *leaf.shape), leaf.dtype), shapes)

    def repeat(self, leaf: Array) -> Array:
        """One array, once for every replica."""
        return jnp.broadcast_to(leaf, (self.count, *leaf.shape))

    def place(self, places: Any) -> Any:
        """Shardings of one replica's arrays as those of all: the replicas' axis in front, and used for nothing else."""
        if self.count == 1:
            return places
        return jax.tree.map(lambda place: NamedSharding(self.mesh, PartitionSpec(self.axis, *self._without_axis(place))), places)

    def place_shared(self, places: Any) -> Any:
        """Shardings of arrays that all replicas share, such as a test batch."""
        return jax.tree.map(lambda place: NamedSharding(self.mesh, PartitionSpec(*self._without_axis(place))), places)

    def _without_axis(self, place: NamedSharding) -> list[Any]:
        return [None if axis == self.axis else axis for axis in place.spec]

    def rows(self, batch: int) -> list[int]:
        """Rows of a global batch that this process's devices hold, of each of its replicas."""
        return sharding.host_rows(self.mesh, batch) if self.axis is None else list(range(batch))

    def local(self) -> list[int]:
        """The replicas, by number, of which this process reads training batches."""
        return list(range(self.count)) if self.axis is None else sharding.host_rows(self.mesh, self.count)

    def pick(self, arrays: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
        """One replica's part of what a mapped function returned."""
        return arrays if self.count == 1 else {name: array[index] for name, array in arrays.items()}

    @contextlib.contextmanager
    def train_batches(self, open_stream: Callable[..., Batches], batch: int, start: int, steps: int) -> Iterator[Iterator[Batch]]:
        """This process's part of the training batches `start` .. `steps` − 1, with a leading axis if there are several replicas."""
        options = {"batch": batch, "start": start, "steps": steps, "rows": self.rows(batch)}
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(open_stream(seed=self.seeds[index], **options)) for index in self.local()]
            yield streams[0] if self.count == 1 else map(_stacked, zip(*streams, strict=True))


def _written_out(function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any) -> Callable[..., Any]:
    """What jax.vmap does, by the function's own operations, for one replica after the other; the first argument has them all.

    For CPUs. There the convolutions of mapped kernels are grouped ones: a step of three replicas of hmnist_encode took 8.4 s, of
    one 0.5 s. In the body of a loop they were slower still. One after the other, because LAPACK calls that do not depend on
    each other can wait for each other's threads for ever.
    """

    def mapped(*arguments: Any) -> Any:
        def of(index: int) -> list[Any]:
            pick = lambda axis, part: part if axis is None else jax.tree.map(lambda leaf: leaf[index], part)  # noqa: E731
            return jax.tree.map(pick, list(in_axes), list(arguments), is_leaf=_is_none)

        results = [function(*of(0))]
        for index in range(1, len(arguments[0])):
            results.append(function(*_after(results[-1], of(index))))
        join = lambda axis, *parts: parts[0] if axis is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)  # noqa: E731
        return jax.tree.map(join, out_axes, *results, is_leaf=_is_none)

    return mapped


def _after(results: Any, arguments: Any) -> Any:
    """The arguments as they are, but known only when the results are: with an exact zero added that is computed from these.

    (CPU compilers drop optimization_barrier before they decide what may run at once.) Computed from the scalars, where there are
    any: those of a training step, its metrics with the norm of the gradient, need all that is solved in it. Sorted, because the
    compiler would otherwise repeat what they are computed from for each of the arguments.
    """
    numbers = [leaf for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not numbers:
        return arguments
    known = [leaf for leaf in numbers if leaf.ndim == 0] or numbers
    finite = [jnp.clip(jnp.nan_to_num(leaf.ravel()[:1].astype(jnp.float32)), -1, 1) for leaf in known]
    zero = 0.0 * jnp.sort(jnp.concatenate(finite))[0]
    late = lambda leaf: leaf + zero.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf  # noqa: E731
    return jax.tree.map(late, arguments)


def _is_none(axis: Any) -> bool:
    return axis is None


def _stacked(batches: Sequence[Batch]) -> Batch:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def mean_and_error(values: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of replicas' values by name: (means, standard errors of the means); no errors of a single one.

    A name that some replica counted nothing for is left out.
    """
    if len(values) == 1:
        return dict(values[0]), {}
    names = [name for name in values[0] if all(name in of_one for of_one in values)]
    table = {name: np.array([of_one[name] for of_one in values]) for name in names}
    means = {name: float(column.mean()) for name, column in table.items()}
    return means, {name: float(column.std(ddof=1) / len(column) ** 0.5) for name, column in table.items()}
