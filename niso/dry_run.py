"""`--dry_run`: what a run would be, without its data: every array and where it lives, and the train step compiled ahead of time.

With `--topology v5e:16x16` the step is compiled for a TPU pod that is not there, by the compiler that libtpu brings along.
"""

import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from niso import cost, hardware, scaling, sharding, tree
from niso.config import Experiment
from niso.errors import UserError
from niso.step import Program

# What libtpu reads where there is no TPU to ask; the last: another process may have loaded it too.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def run(experiment: Experiment, topology: str | None) -> int:
    """Prints all of it; returns the exit code.

    Raises:
      UserError: libtpu is missing, there is no such topology, or what the run itself would say; the step needs more memory than a
        chip has.
    """
    devices = pod(topology) if topology else None
    mesh = sharding.make_mesh(experiment.mesh, devices)
    program = Program(experiment, mesh, experiment.data.batch_shapes(experiment.batch))
    kind = mesh.devices.flat[0].device_kind
    where = f"{topology}: " if topology else ""
    print(
        f"{experiment.experiment}:{experiment.variant}: {tree.count(program.parameter_shapes):,} parameters "
        f"on {where}{mesh.size} device(s) ({kind}), mesh data {mesh.shape['data']} x space {mesh.shape['space']}"
    )
    _print_arrays(program)
    start = time.monotonic()
    traced = program.train.trace(program.state_shapes, program.batch_shapes)
    compiled = cost.compiled(traced)
    print(f"\ntrain step compiled in {time.monotonic() - start:.1f} s")
    chip = hardware.find(kind)
    _print_cost(program, traced, compiled, chip)
    crossing = cost.collectives(compiled.as_text() or "", mesh)
    if crossing:
        _print_table([["collective", "axes", "number", "bytes", "largest", "its first result"], *map(_described, crossing)])
    else:
        print("no collectives: nothing crosses devices")
    if chip and topology:
        dtype, examples = getattr(program.task, "dtype", "float32"), experiment.batch * experiment.seeds
        full = cost.operations(traced, "tpu").full / mesh.size
        work = scaling.Work.of(cost.analysed(compiled), full, crossing)
        share = f"{100 * scaling.EFFICIENCY:.0f} % of the peak"
        print(f"\nmodel of weak scaling (niso/scaling.py): {share}, nothing overlaps, the same work for every chip")
        _print_table(scaling.table(work, chip, dtype, mesh.size, examples))
    return 0


def pod(topology: str) -> Sequence[Any]:
    """The devices of a TPU pod slice that need not be there, such as v5e:16x16.

    Raises:
      UserError: libtpu is missing or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology {topology}: the TPU compiler is not installed: pip install -e ".[tpu]" (libtpu, 700 MB; no TPU needed)'
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # this process's own platform: libtpu only compiles
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--topology {topology}: {reason}; give a kind and chips along each axis, as in v5e:16x16") from None


def _print_arrays(program: Program) -> None:
    """Parameters, batch, and what the whole state takes."""
    shapes, places = program.parameter_shapes, program.parameter_sharding
    rows = [[*_array(name, shapes[name], places[name]), *_moments(program, name)] for name in shapes]
    _print_table([["parameter", "shape", "sharding", "bytes per device", "its moments", "bytes per device"], *rows])
    shapes, places = program.batch_shapes, program.batch_sharding
    rows = [_array(name, shapes[name], places[name]) for name in shapes]
    _print_table([["batch", "shape", "sharding", "bytes per device"], *rows])
    state, where = program.state_shapes, program.state_sharding
    parts = {"parameters": (state.params | state.frozen, where.params | where.frozen)}
    parts["optimiser state"] = state.opt_state, where.opt_state
    sizes = {name: sum(map(_bytes, jax.tree.leaves(of), jax.tree.leaves(at))) for name, (of, at) in parts.items()}
    print("\n" + ", ".join(f"{name} {readable(size)}" for name, size in sizes.items()) + " on each device")


def _array(name: str, shape: jax.ShapeDtypeStruct, place: NamedSharding) -> list[str]:
    spec = ", ".join("-" if axis is None else str(axis) for axis in place.spec) or "whole"
    return [name, f"{shape.dtype.name}[{', '.join(map(str, shape.shape))}]", spec, readable(_bytes(shape, place))]


def _moments(program: Program, name: str) -> list[str]:
    """How many arrays the optimiser has for a parameter, of its shape, how they are sharded, and their bytes."""
    leaves = jax.tree_util.tree_flatten_with_path(program.state_shapes.opt_state)[0]
    places = jax.tree.leaves(program.state_sharding.opt_state)
    found = [(leaf, place) for (path, leaf), place in zip(leaves, places, strict=True) if tree.leaf_name(path) == name]
    if not found:
        return ["-", "0 B"]
    shardings = sorted({_array("", leaf, place)[2] for leaf, place in found})
    return [f"{len(found)} x {' or '.join(shardings)}", readable(sum(_bytes(leaf, place) for leaf, place in found))]


def _bytes(shape: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
    """Bytes of an array on one device."""
    size = shape.dtype.itemsize
    for edge in place.shard_shape(shape.shape):
        size *= edge
    return size


def _print_cost(
    program: Program, traced: jax.stages.Traced, compiled: jax.stages.Compiled, chip: hardware.Chip | None
) -> None:  # fmt: skip
    mesh: Mesh = program.mesh
    examples = program.experiment.batch * program.experiment.seeds
    memory = cost.memory(compiled)
    parts = {"arguments": memory.arguments, "results": memory.results, "temporaries": memory.temporaries, "peak": memory.peak}
    of = f" of {readable(chip.memory)} ({100 * memory.peak / chip.memory:.0f} %)" if chip else ""
    print("memory of each device: " + ", ".join(f"{name} {readable(size)}" for name, size in parts.items()) + of)
    counted, (flops, moved) = cost.operations(traced, mesh.devices.flat[0].platform), cost.analysed(compiled)
    each, full = counted.total / examples / 1e9, 100 * counted.full / max(counted.total, 1)
    print(
        f"products and convolutions of a step: {counted.total / 1e9:,.1f} GFLOP, {each:,.2f} per example, "
        f"{full:.1f} % of them in full float32"
    )
    each = flops * mesh.size / examples / 1e9
    print(f"the compiler's own analysis: {flops / 1e9:,.1f} GFLOP per device, {each:,.2f} per example; {readable(moved)} moved")


def _described(collective: cost.Collective) -> list[str]:
    total, largest = readable(collective.bytes), readable(collective.largest)
    return [collective.kind, collective.axes, f"{collective.count:,}", total, largest, collective.shape]


def readable(size: float) -> str:
    """Bytes as "1.23 GB", in powers of ten."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if size >= scale), (1, "B"))
    return f"{size / scale:.{0 if scale == 1 else 2}f} {unit}"


def _print_table(rows: list[list[str]]) -> None:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
