"""The mesh, and where every array lives on it.

Axes: `data` (examples) and `space` (rows of images, of latent grids and of the eigenfunctions). Axis types are Auto: the compiler
propagates shardings from the inputs; only batched solves are split by hand, because TPU compilers gather their batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from niso import tree
from niso.errors import UserError
from niso.tasks.base import Rules

AXES = ("data", "space")
# Mesh axis of the dimensions that an array's name announces: frames_BxTxHxWxC is split by examples and by image rows.
AXIS_OF_DIMENSION = {"B": "data", "H": "space"}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """`data` x `space` devices; data −1 takes all that are left. `zero`: optimiser state is split over `data` too."""

    data: int
    space: int
    zero: bool


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all hosts, or over those given (a pod's that is not there): neighbours on the mesh are close to
    each other, and where there are several TPU slices, `space` stays within one.

    Raises:
      UserError: the axes do not multiply to the number of devices, or slices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // max(shape.space, 1) if shape.data == -1 else shape.data
    if data * shape.space != len(devices):
        raise UserError(
            f"mesh.data={shape.data} x mesh.space={shape.space} does not cover the {len(devices)} device(s) here; "
            "leave mesh.data=-1 and choose a mesh.space that divides them"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if data % slices:
        raise UserError(f"mesh.space={shape.space} does not fit into one of the {slices} slices here: choose one that divides it")
    # jax.make_mesh would not split a side of a slice over both axes, but for v5e: space = 4 of 16 x 16 v6e chips needs that.
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, shape.space), devices, allow_split_physical_axes=True)
    else:
        inner, outer = (data // slices, shape.space), (slices, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(mesh: Mesh, batch: int, accumulate: int) -> None:
    """Raises UserError where a (micro-)batch cannot be split evenly over `data`."""
    parts = mesh.shape["data"] * accumulate
    if batch % parts:
        raise UserError(
            f"batch={batch} cannot be split over mesh.data={mesh.shape['data']} x optimizer.accumulate={accumulate}; "
            f"choose a multiple of {parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, names: dict[str, Any]) -> dict[str, NamedSharding]:
    """One sharding per batch array, read off the shape suffix of its name."""
    specs = {name: PartitionSpec(*map(AXIS_OF_DIMENSION.get, name.rpartition("_")[2].split("x"))) for name in names}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def parameter_sharding(mesh: Mesh, rules: Rules, params: dict[str, Any]) -> dict[str, NamedSharding]:
    """One sharding per parameter: the first rule whose pattern matches its path.

    Raises:
      UserError: a parameter without a rule, a rule without a parameter, a dimension that its axis does not divide.
    """
    chosen = {name: next((rule for rule in rules if tree.match(rule[0], name)), None) for name in params}
    bare = [name for name, rule in chosen.items() if rule is None]
    idle = [rule[0] for rule in rules if rule not in chosen.values()]
    if bare or idle:
        raise UserError(
            f"sharding rules: no rule for {', '.join(bare) or 'none'}; no parameter for {', '.join(idle) or 'none'}; "
            "edit the task's rules()"
        )
    shardings = {}
    for name, rule in chosen.items():
        assert rule is not None
        spec = PartitionSpec(*rule[1])
        for size, axis in zip(params[name].shape, rule[1], strict=False):
            if axis is not None and size % mesh.shape[axis]:
                shape = " x ".join(map(str, params[name].shape))
                raise UserError(
                    f"{name} is {shape}, and mesh.{axis}={mesh.shape[axis]} does not divide its {size}: "
                    f"choose a mesh.{axis} that does, or another size"
                )
        shardings[name] = NamedSharding(mesh, spec)
    return shardings


def optimizer_sharding(mesh: Mesh, params: dict[str, NamedSharding], opt_state: Any, zero: bool) -> Any:
    """Moments live where their parameter does, or, with `zero`, additionally split over `data` along the first dimension
    that it divides; scalars are replicated."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        sharding = params.get(tree.leaf_name(path))
        if sharding is None or not leaf.shape:
            return replicated(mesh)
        spec = list(sharding.spec) + [None] * (len(leaf.shape) - len(sharding.spec))
        if zero:
            free = [i for i, axis in enumerate(spec) if axis is None and leaf.shape[i] % mesh.shape["data"] == 0]
            if free:
                spec[free[0]] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, opt_state)


def sharded(solve: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    """`solve` on a batch of matrices, the batch split over all mesh axes; it returns matrices of the same shape.

    A batch that the mesh does not divide (the few examples of a figure, fewer large frames than devices) is filled up with zero
    matrices, whose results are dropped: without the split every device would solve all of it. Each part along `data` is filled up
    by itself, so that none of its matrices moves to another. Kept to the solve itself, with gradients taken outside:
    inside a larger shard_map some combinations of replicated and split values are silently wrong by the size of an axis.
    Before and after, and for gradients too, the batch is held where examples are: the compiler would else carry the split over
    `space` on into the networks, where rows have that axis, and gather whole batches of activations between the two.
    """
    data, space = mesh.shape["data"], mesh.shape["space"]
    examples = NamedSharding(mesh, PartitionSpec("data"))
    hold = (lambda x: jax.lax.with_sharding_constraint(x, examples)) if space > 1 else lambda x: x

    def split(x_BxRxK: Array, **options: Any) -> Array:
        batch, *matrix = x_BxRxK.shape
        part = -(-batch // data)
        filled = part + -part % space  # of each part along `data`, a multiple of `space`
        whole_DxPxRxK = jnp.pad(x_BxRxK, ((0, data * part - batch), (0, 0), (0, 0))).reshape(data, part, *matrix)
        filled_DxFxRxK = jnp.pad(whole_DxPxRxK, ((0, 0), (0, filled - part), (0, 0), (0, 0)))
        spec = PartitionSpec(AXES)
        run = jax.shard_map(lambda x_BxRxK: solve(x_BxRxK, **options), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        solved = hold(run(hold(filled_DxFxRxK.reshape(data * filled, *matrix))))
        return solved.reshape(data, filled, *matrix)[:, :part].reshape(data * part, *matrix)[:batch]

    return split


def host_rows(mesh: Mesh, batch: int) -> list[int]:
    """Rows of the global batch that this process's devices hold, ascending."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    return sorted({row for index in indices if index is not None for row in range(batch)[index[0]]})


def place_batch(shardings: dict[str, NamedSharding], batch: dict[str, np.ndarray], *leading: int) -> dict[str, Array]:
    """This host's part of a batch as global arrays whose first axes have the lengths `leading`: (replicas and) examples."""
    return {
        name: jax.make_array_from_process_local_data(shardings[name], value, (*leading, *value.shape[len(leading) :]))
        for name, value in batch.items()
    }
