"""How long the train step of every config takes to compile and to run, what it holds, and how far it is from the machine's peak.

  python -m tests.benchmarks.train_step --batch 8 --dtype bfloat16 --json step.json
  python -m tests.benchmarks.train_step --configs pose_encode --set task.ridge=1e-4 task.group=SO
  python -m tests.benchmarks.train_step --configs pose_encode --as_published

The `paper` variant on random frames: no records are read. Memory and TFLOP/s are those of one device; GFLOP is the whole step's
mathematics, without what rematerialisation does twice. MFU is TFLOP/s over a peak: that of a matmul in the network's dtype,
measured in the same run, and the one that its vendor publishes (niso/hardware.py). The persistent compilation cache, if it is
on, makes compile_s the time to read it. With --as_published a second row is the published step (published_step.py), which takes
turns with niso's own; its `ratio` is the median over the rounds of its time over that of niso's, `ratios` has all of them.
"""

import argparse
import ast
import difflib
import functools
import importlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

import configs
from niso import hardware, sharding
from niso.config import Experiment, flat
from niso.errors import UserError
from niso.step import Program, TrainState
from tests.benchmarks import published_step, timing

# Products in a row between two looks at the clock, and the edges of the matmuls whose fastest is the measured peak.
PEAK_ON_CPU = (1, (1024, 2048))
PEAK_ELSEWHERE = (10, (2048, 4096, 8192))
COLUMNS = {
    "config": 12, "dtype": 8, "batch": 5, "compile_s": 9, "step_ms": 8, "temporary_mb": 12, "argument_mb": 11, "gflop": 7,
    "tflops": 6, "peak": 6, "mfu_%": 5, "nominal": 7, "mfu_nominal_%": 13,
}  # fmt: skip


def names() -> list[str]:
    """The experiments that there are: one file each in configs/."""
    folder = pathlib.Path(configs.__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def experiment(name: str, settings: Sequence[str]) -> Experiment:
    """The paper variant of a config, with `key=value` overrides.

    Raises:
      UserError: no such config, no such key, a value of another type, or a combination that cannot be.
    """
    if name not in names():
        raise UserError(f"--configs {name}: there is no configs/{name}.py; there are {', '.join(names())}")
    config = importlib.import_module(f"configs.{name}").get_config("paper")
    known = flat(config.to_dict())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: settings are written key=value, as in task.ridge=1e-4")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"--set {setting}: the config {name} has no key {key}; {hint}")
        try:
            config.update_from_flattened_dict({key: text if isinstance(known[key], str) else _literal(text)})
        except (TypeError, ValueError):
            raise UserError(f"--set {setting}: {key} is {known[key]!r} in the config, and keeps that type") from None
    return Experiment.from_config(config)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def program(e: Experiment, mesh: Mesh) -> Program:
    """The experiment's Program, without its records."""
    return Program(e, mesh, e.data.batch_shapes(e.batch))


def random_batch(p: Program) -> dict[str, Array]:
    """A batch of random numbers on the mesh: bytes over their whole range, other integers 0 or 1, floats around 1."""
    random = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return random.integers(0, 256 if shape.dtype == np.uint8 else 2, shape.shape, shape.dtype)
        return random.uniform(0.5, 1.5, shape.shape).astype(shape.dtype)

    host = {name: draw(shape) for name, shape in p.batch_shapes.items()}
    return p.place(host)


@functools.cache
def matmul_peak(dtype: str) -> float:
    """TFLOP/s of the fastest square matmul on the first device, at the precision that networks run at."""
    count, sizes = PEAK_ON_CPU if jax.default_backend() == "cpu" else PEAK_ELSEWHERE
    multiply = jax.jit(jnp.matmul)

    def products(x_NxN: Array) -> Array:
        y_NxN = x_NxN
        for _ in range(count):
            y_NxN = multiply(y_NxN, x_NxN)
        return y_NxN

    # Random numbers, as zeros cost less power and run faster; of variance 1/size, so that a product is as large as its factors.
    factors = {size: (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(dtype) for size in sizes}
    times = timing.times_ms({size: functools.partial(products, x_NxN) for size, x_NxN in factors.items()}, 5)
    return max(count * 2 * size**3 / min(taken) / 1e9 for size, taken in times.items())


def measure(experiments: Mapping[str, Experiment], rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each experiment; their steps take turns. All but the first have ratios of their time to its."""
    rows, steps = {}, {}
    for name, e in experiments.items():
        rows[name], steps[name] = prepare(name, e)
    times = timing.times_ms(steps, rounds)
    own, *others = experiments
    for name, e in experiments.items():
        rows[name] |= speed(e, rows[name]["gflop"] / rows[name]["devices"], statistics.median(times[name]))
    for name in others:
        ratios = [other_ms / own_ms for other_ms, own_ms in zip(times[name], times[own], strict=True)]
        rows[name] |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return list(rows.values())


def prepare(name: str, e: Experiment) -> tuple[dict[str, Any], Callable[[], Any]]:
    """(what a row says before anything has run, the compiled step on its own state and a random batch)."""
    mesh = sharding.make_mesh(e.mesh)
    p = program(e, mesh)
    start = time.perf_counter()
    lowered = p.train.lower(p.state_shapes, p.batch_shapes)
    lower_s = time.perf_counter() - start
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start - lower_s
    memory = compiled.memory_analysis()
    batch = random_batch(p)
    state: TrainState = p.init({})

    def step() -> Any:
        nonlocal state  # donated: the next step needs the one that came back
        state, window = compiled(state, batch)
        return state, window

    return {
        "config": name, "dtype": _dtype(e), "batch": e.batch, "remat": getattr(e.task, "remat", None), "devices": mesh.size,
        "lower_s": lower_s, "compile_s": compile_s,
        "temporary_bytes": memory and memory.temp_size_in_bytes, "argument_bytes": memory and memory.argument_size_in_bytes,
        "gflop": p.model_operations() / 1e9,
    }, step  # fmt: skip


def speed(e: Experiment, gflop: float, step_ms: float) -> dict[str, Any]:
    """What a row says of a step that takes `step_ms`, of which one device does `gflop`: TFLOP/s, and shares of the peaks."""
    tflops = gflop / step_ms
    peak = matmul_peak(_dtype(e))
    chip = hardware.find(jax.devices()[0].device_kind)
    nominal = chip.peak(_dtype(e)) / 1e12 if chip else None
    return {
        "step_ms": step_ms, "tflops": tflops, "peak_tflops": peak, "mfu": tflops / peak,
        "nominal_tflops": nominal, "mfu_nominal": nominal and tflops / nominal,
    }  # fmt: skip


def _dtype(e: Experiment) -> str:
    return getattr(e.task, "dtype", "float32")


def print_row(row: dict[str, Any], widths: Sequence[int]) -> None:
    """A row of `measure`, in the units of the table, and below it how its time compares."""
    shown = row | {"peak": row["peak_tflops"], "nominal": row["nominal_tflops"]}
    for column, field, scale in (
        ("temporary_mb", "temporary_bytes", 1e-6), ("argument_mb", "argument_bytes", 1e-6), ("mfu_%", "mfu", 100.0),
        ("mfu_nominal_%", "mfu_nominal", 100.0),
    ):  # fmt: skip
        shown[column] = None if row[field] is None else scale * row[field]
    timing.print_line([shown[column] for column in COLUMNS], widths)
    if "ratio" in row:
        low, ratio, high = (timing.readable(float(value)) for value in (min(row["ratios"]), row["ratio"], max(row["ratios"])))
        print(f"{row['config']}: {ratio} times the step time of niso's own ({low} to {high} over the rounds)", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code (0, or 2 for a user's mistake)."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    settings = [f"batch={arguments.batch}"]
    settings += [f"task.dtype={arguments.dtype}"] if arguments.dtype else []
    settings += ["task.remat=True"] if arguments.remat else []
    chosen = names() if arguments.configs == "all" else arguments.configs.split(",")
    try:
        runs = [{name: experiment(name, settings + arguments.set)} for name in chosen]
        if arguments.as_published:
            runs = [{n: e, f"{n}, as published": published_step.experiment(n, e)} for run in runs for n, e in run.items()]
        timing.print_surroundings()
        longest = max(len(name) for run in runs for name in run)
        widths = list((COLUMNS | {"config": max(longest, COLUMNS["config"])}).values())
        timing.print_line(list(COLUMNS), widths)
        rows = []
        for run in runs:
            found = measure(run, arguments.rounds)
            for row in found:
                print_row(row, widths)
            rows += found
    except UserError as error:
        print(f"niso: {error}", file=sys.stderr)
        return 2
    timing.write(arguments.json, given, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default="all", help="names of configs/*.py with commas between, default all")
    parser.add_argument("--batch", type=timing.positive, default=2, help="examples in a step, over all devices, default 2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the networks, default the config's")
    parser.add_argument("--remat", action="store_true", help="recompute residual blocks in the backward pass")
    parser.add_argument("--as_published", action="store_true", help="measure the published step of pairs too, in turn with niso's")
    parser.add_argument("--rounds", type=timing.positive, default=5, help="steps measured, default 5")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of config keys")
    parser.add_argument("--json", type=timing.json_file, help="file that gets the rows as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
