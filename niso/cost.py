"""What a program costs, read off it before it runs: operations, memory, and what its devices send each other."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from niso.errors import UserError

KINDS = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations of matrix products and convolutions, all devices together, and how many of them are in full
    float32 (precision="highest")."""

    total: float
    full: float


def operations(traced: jax.stages.Traced, platform: str = "") -> Operations:
    """The operations of a program as it was traced, 2 for a multiplication and an addition, on devices of a platform ("cpu",
    "gpu", "tpu"), where it is another program on others.

    Not from the compiler's own analysis, which counts a loop's body once, and on GPUs leaves out what cuBLAS and cuDNN do (jax
    issues 16008, 22249). Loops count as often as they run (those without a known length once), a choice by its dearest branch,
    what is rematerialised twice. LAPACK's work and all that is done element by element is left out.
    """
    counted = _count(traced.jaxpr.jaxpr, platform)
    return Operations(counted["default"] + counted["full"], counted["full"])


def _count(jaxpr: Any, platform: str) -> Counter[str]:
    counted: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            counted[_precision(equation)] += _products(equation)
            continue
        inner = [_count(body, platform) for body in _bodies(equation)]
        if equation.primitive.name == "cond":
            meant = [names is None or platform in names for names in equation.params.get("branches_platforms") or ()]
            inner = [inner[meant.index(True)] if platform and any(meant) else max(inner, key=lambda branch: branch.total())]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "shard_map":  # its body is what one device does
            times = equation.params["mesh"].size
        for body in inner:
            counted.update({name: times * value for name, value in body.items()})
    return counted


def _bodies(equation: Any) -> Iterator[Any]:
    """The programs inside an operation, but for rules of derivatives that nobody has asked for."""
    for name, value in equation.params.items():
        if name.startswith(("fwd", "bwd", "jvp")):
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _precision(equation: Any) -> str:
    precision = equation.params.get("precision")
    one = precision[0] if isinstance(precision, tuple) else precision
    return "full" if one == jax.lax.Precision.HIGHEST else "default"


def _products(equation: Any) -> int:
    """2 x the size of the result x the terms that each of its entries sums."""
    result = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * result * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    spread = math.prod(equation.params["lhs_dilation"])  # zeros put between the inputs are no work
    return 2 * result * math.prod(kernel) // kernel[numbers.rhs_spec[0]] // spread


def compiled(traced: jax.stages.Traced) -> jax.stages.Compiled:
    """A traced train step, compiled.

    Raises:
      UserError: it needs more memory than its devices have.
    """
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise overflow(str(error)) or error from None


def overflow(text: str) -> UserError | None:
    """What a compiler's refusal for want of memory means to a user; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    used = re.search(r"[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text)
    amount = f"{used[1]}iB where each device has {used[2]}iB" if used else text.splitlines()[0][:200]
    remedy = "raise mesh.space, set task.remat=True or optimizer.accumulate, or lower batch"
    return UserError(f"the train step needs more device memory than there is: {amount}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: arguments (state and batch), results that are no donated arguments, what lies beside them at times."""

    arguments: int
    results: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.results + self.temporaries


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler has planned for one device."""
    found = compiled.memory_analysis()
    assert found is not None
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, max(results, 0), found.temp_size_in_bytes)


def analysed(compiled: jax.stages.Compiled) -> tuple[float, float]:
    """(operations, bytes moved between memory and cores) of one device by the compiler's own analysis; loops' bodies once."""
    found = compiled.cost_analysis() or {}
    return float(found.get("flops", 0.0)), float(found.get("bytes accessed", 0.0))


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind between devices that differ along the same mesh axes, in one execution of a program.

    Fields:
      kind: one of KINDS. axes: "data", "space", "data+space", or "?" where the compiler's groups are no axes of the mesh.
      count: how many. bytes: of all their results on one device. largest: bytes of the largest one, and `shape`, its first result.
    """

    kind: str
    axes: str
    count: int
    bytes: int
    largest: int
    shape: str

    def with_others(self, more: "Collective") -> "Collective":
        """Both together."""
        most = max(self, more, key=lambda one: one.largest)
        return dataclasses.replace(most, count=self.count + more.count, bytes=self.bytes + more.bytes)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The exchanges of a compiled program, from its text; those in loops as often as these run, where their length is known.

    TPU compilers carry one exchange on through many fusions, to compute meanwhile, and write it down in each, with the same channel
    and the same operation of the program: it counts once.
    """
    found: dict[tuple[str, str], Collective] = {}
    computations, entry = _computations(text)
    times: Counter[str] = Counter()
    _visit(entry, 1, computations, times)
    carried_on: set[tuple[str, tuple[str, ...]]] = set()
    for name, lines in computations.items():
        for line in lines if times[name] else []:
            match = re.search(rf" ({'|'.join(KINDS)})(-start)?\(", line)
            if match:
                key = tuple(re.findall(r'channel_id=\d+|op_name="[^"]*"|replica_groups=\S+', line))
                if "async_collective_fusion_config" in line and (match[1], key) in carried_on:
                    continue
                carried_on.add((match[1], key))
                shapes = _results(line[line.index(" = ") : match.start()], match[1], bool(match[2]))
                kind, axes, one = match[1], _axes(line, mesh), sum(map(_size, shapes))
                now = Collective(kind, axes, times[name], times[name] * one, one, "{}[{}]".format(*shapes[0]))
                found[kind, axes] = found[kind, axes].with_others(now) if (kind, axes) in found else now
    return [found[key] for key in sorted(found)]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _visit(name: str, weight: int, computations: dict[str, list[str]], times: Counter[str]) -> None:
    """Adds to `times` how often each computation runs when `name` runs `weight` times."""
    times[name] += weight
    for line in computations.get(name, []):
        called = re.findall(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", line)
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        called += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        length = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        for inner in called:
            _visit(inner, weight * int(length[1]) if length else weight, computations, times)


def _results(types: str, kind: str, started: bool) -> list[tuple[str, str]]:
    """(type, dimensions) of what an exchange makes; where it is only begun there, its operands stand before them."""
    shapes = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", types)
    if started and kind != "all-reduce":
        arrays = [shape for shape in shapes if shape[1]]  # without counters
        return arrays[len(arrays) // 2 :]
    return shapes


def _size(shape: tuple[str, str]) -> int:
    bits = {"pred": 8, "bf16": 16}.get(shape[0]) or int(re.findall(r"\d+", shape[0])[0])
    return math.prod(int(size) for size in shape[1].split(",") if size) * bits // 8


def _axes(line: str, mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ."""
    groups = _groups(line, mesh.size)
    if groups is None:
        return "?"
    place = np.stack(np.unravel_index(groups, mesh.devices.shape))  # axes x groups x members
    differ = np.any(place != place[..., :1], axis=(1, 2))
    return "+".join(axis for axis, is_one in zip(mesh.axis_names, differ, strict=True) if is_one) or "none"


def _groups(line: str, devices: int) -> np.ndarray | None:
    """Numbers of the devices that take part together, groups x members: listed, in pairs, as a permutation of a range, or as axes
    of the compiler's own mesh."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", line):
        rows = [[int(n) for n in row.split(",")] for row in listed[1].split("},{")]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else None
    if ranged := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dimensions, order = map(_numbers, ranged.groups())
        assert shape is not None and dimensions is not None
        return _permuted(dimensions, order).reshape(shape)
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", line
    ):
        groups = _along(re.findall(r"'(\w+)'=(\d+)", named[1]), re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[4]))
        dimensions, order = (_numbers(part) for part in named.group(2, 3))
        return groups if dimensions is None else _permuted(dimensions, order).ravel()[groups]
    return np.arange(devices)[None] if "replica_groups={}" in line else None


def _numbers(text: str | None) -> list[int] | None:
    return [int(n) for n in text.split(",")] if text else None


def _permuted(dimensions: list[int], order: list[int] | None) -> np.ndarray:
    """0, 1, 2, ... as an array of these dimensions, its axes in another order."""
    return np.arange(math.prod(dimensions)).reshape(dimensions).transpose(order)


def _along(axes: list[tuple[str, str]], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups of a mesh with these (axis, size) along some of its axes, or along a part (before, size) of one."""
    sizes: list[int] = []
    member: list[bool] = []
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in chosen}
    for name, text in axes:
        before, size = parts.get(name, (1, 1))
        size = size or int(text)
        sizes += [before, size, int(text) // before // size]
        member += [False, name in parts, False]
    order = np.argsort(member, kind="stable")
    count = math.prod(size for size, is_one in zip(sizes, member, strict=True) if is_one)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, count)
