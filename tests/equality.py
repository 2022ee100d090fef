"""The same run on other devices: `nice python -m tests.equality` trains every task on many layouts, and compares all with one.

A layout such as 2x4/2 is 2 processes with 4 devices each, of which 2 share each example (mesh.space). Reported is how far losses
and parameters are from those of one device in 20 updates, in units of what rounding alone can do: at most 1.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
COMPARED = 20  # updates
DECAY = 0.9  # of Adam's first moments
ROUNDINGS = 256  # times 2**-24 of a loss: what sums in another order may do to it
JITTER = 16  # times 2**-24 of a parameter: how much each is changed, where it is asked what rounding does
AVAILABLE = 8  # devices, over all processes, where there is more than one
SHARED = {
    "batch": 8,
    "steps": 400,
    "log.every": 1,
    "optimizer.warmup": 4,
    "optimizer.peak": 1e-3,
    "data.threads": 1,
    "task.rank": 8,
}
IMAGES = {"data.size": 8, "data.stack": 10, "data.test_examples": 8}
NETWORK = {"task.widths": (4, 8), "task.latent_channels": 8}
SURFACES = {"data.size": 16, "task.size": (16, 32), "data.test_copies": 1}
HEAD: dict[str, Any] = {"task.warm_start": (), "task.head_width": 8}
# Every task, as small as it can be divided by four.
TASKS: dict[str, dict[str, Any]] = {
    "toric_laplacian": IMAGES,
    "spherical_laplacian": IMAGES,
    "hmnist_encode": NETWORK | {"task.size": 32, "data.test_examples": 8},
    "hmnist_pred": NETWORK | HEAD | {"task.size": 32, "task.gram": 8, "data.test_examples": 8, "data.test_copies": 1},
    "pose_encode": NETWORK | {"data.size": 16},
    "pose_pred": NETWORK | HEAD | {"data.size": 16, "data.views": 3},
    "cshrec11_encode": NETWORK | SURFACES,
    "cshrec11_pred": NETWORK | HEAD | SURFACES | {"task.gram": 8},
    "toric_laplacian x 2 seeds": IMAGES | {"seeds": 2},
}
REPOSITORY = pathlib.Path(__file__).parents[1]
ALONE = "1x1/1"
LAYOUTS = (
    "1x2/1", "1x2/2", "1x4/1", "1x4/2", "1x4/4", "1x8/1", "1x8/2", "1x8/4",
    "2x1/1", "2x1/2", "2x2/2", "2x4/4", "4x1/1", "4x1/2", "4x2/4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Deviation:
    """From one device, in units of bounds, so at most 1.

    Attributes:
      gradients: Of the gradients of each of 20 updates, which begin with the bits of the run on one device: |Δ| over the largest
        gradient anywhere, against what `JITTER` does to it. Reconstructions are compared by absolute values, whose derivative
        jumps: a last bit that turns the sign of a pixel can be much, and so can be one in a solve that is nearly singular. So the
        median of the 20 updates is meant, both of it and of what jitter does.
      losses: Of the losses of these updates: |Δ| over 256 · 2⁻²⁴ of the loss.
      parameters: Of the parameters after 20 updates in which differences are fed back, against what `JITTER` in each does.
      one_update_more: The same of the run on one device with one update more: below 1 that bound says little.
      allowed: Of gradients, as a share of the largest: what 1 stands for.
    """

    gradients: float
    losses: float
    parameters: float
    one_update_more: float
    allowed: float

    @property
    def largest(self) -> float:
        return float(np.max([self.gradients, self.losses, self.parameters]))  # not a number if one is not

    def __str__(self) -> str:
        return f"{self.gradients:.3f} {self.losses:.3f} {self.parameters:.2f}"


def apart(one: Arrays, other: Arrays, what: str, against: str | None = None) -> float:
    """Root mean square difference of what begins with those names, or of that and of what begins with others."""
    names = [name.removeprefix(what) for name in one if name.startswith(what)]
    differences = [one[f"{what}{name}"].astype(float) - other[f"{against or what}{name}"] for name in names]
    return float(np.sqrt(np.mean(np.concatenate([d.ravel() for d in differences]) ** 2)))


def gradients_apart(ours: Arrays, reference: Arrays) -> float:
    """The largest difference of any gradient over the largest gradient; median of the updates, which begin with the same bits."""
    names, found = [name.removeprefix("params.") for name in reference if name.startswith("params.")], []
    for n in range(COMPARED):
        before, ours_after, after = ([one[f"mu.{n + i}.{name}"].astype(float) for name in names] for one, i in
                                     ((reference, 0), (ours, 1), (reference, 1)))  # fmt: skip
        largest = max(float(np.abs(new - DECAY * old).max()) for new, old in zip(after, before, strict=True))
        found.append(max(float(np.abs(a - b).max()) for a, b in zip(ours_after, after, strict=True)) / largest)
    return float(np.median(found))


def deviation(ours: Arrays, reference: Arrays, jittered: list[Arrays]) -> Deviation:
    """Of a run from the one on one device.

    Differences grow from update to update, and jump where a pixel's sign turns; no formula says how far rounding goes. So the run
    is repeated on one device with every parameter changed by up to 16 · 2⁻²⁴ of itself before each update. Both of two runs are
    that far from exact arithmetic, hence twice as far from each other.

    Raises:
      AssertionError: frozen parameters have changed.
    """
    for name in (name for name in reference if name.startswith("frozen.")):
        assert np.array_equal(ours[name], reference[name]), name
    losses = np.abs(ours["forced losses"] - reference["losses"]) / (ROUNDINGS * 2.0**-24 * np.abs(reference["losses"]))
    steepest = 2 * max(gradients_apart(one, reference) for one in jittered)
    furthest = 2 * max(apart(reference, one, "params.") for one in jittered)
    return Deviation(
        gradients_apart(ours, reference) / steepest,
        float(losses.max()),
        apart(ours, reference, "params.") / furthest,
        apart(reference, reference, "params.", "next.") / furthest,
        steepest,
    )


def train(task: str, layout: str, folder: pathlib.Path) -> Arrays:
    """What a task comes to on a layout, on all processes: "losses" of 20 updates, "params.*" and "frozen.*" after them.

    On one device also "state.N.*" and "mu.N.*" (Adam's first moments) before update N from 0, and "next.*" after one update more;
    elsewhere "mu.N.*" and "forced losses" of updates that each begin with the state of one device.
    """
    import jax
    import optax

    from niso import metrics, sharding
    from niso.config import Experiment
    from niso.data.pipeline import open_dataset
    from niso.step import Program

    config = importlib.import_module(f"configs.{task.partition(' ')[0]}").get_config("quick")
    config.update_from_flattened_dict(SHARED | TASKS[task])
    e = Experiment.from_config(config)
    where, _, draw = layout.partition(" jitter ")
    random = np.random.default_rng(int(draw or 0))
    each, space = map(int, where.partition("x")[2].split("/"))
    per_process = len(jax.devices()) // jax.process_count()
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    some = [device for number, device in enumerate(devices) if number % per_process < each]
    dataset = open_dataset(e.data)
    mesh = sharding.make_mesh(sharding.MeshShape(-1, space, False), some)
    program = Program(e, mesh, dataset.batch_shapes(e.batch))
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    found: Arrays = {}
    unit = JITTER * 2.0**-24

    def keep(what: str, arrays: dict[str, Any]) -> None:
        found.update({f"{what}.{name}": np.asarray(array) for name, array in whole(arrays).items()})

    def run(updates: int, begin: Callable[[int, Any], Any]) -> np.ndarray:
        """The losses of some updates; `begin(n, state)` returns the state that update n shall begin with."""
        state, losses = program.init({}), []
        with program.replicas.train_batches(dataset.train_batches, e.batch, 0, updates) as batches:
            for n, batch in enumerate(batches):
                state, window = program.train(jittered(begin(n, state)), program.place(batch))
                losses.append([values["loss"] for values in metrics.by_replica(window)])
        begin(updates, state)
        return np.array(losses[:COMPARED])

    def jittered(state: Any) -> Any:
        if not draw:
            return state
        changed = {
            name: jax.device_put(np.asarray(a) * random.uniform(1 - unit, 1 + unit, a.shape).astype(np.float32), a.sharding)
            for name, a in state.params.items()
        }
        return dataclasses.replace(state, params=changed)

    def free(n: int, state: Any) -> Any:
        if layout == ALONE:
            found.update({f"state.{n}.{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))})
            keep(f"mu.{n}", optax.tree_utils.tree_get(state.opt_state, "mu"))
        if n == COMPARED:
            keep("params", state.params)
            keep("frozen", state.frozen)
        if n == COMPARED + 1:
            keep("next", state.params)
        return state

    def forced(n: int, state: Any) -> Any:
        if n:
            keep(f"mu.{n}", optax.tree_utils.tree_get(state.opt_state, "mu"))
        if n == COMPARED:
            return state
        leaves, structure = jax.tree.flatten(program.state_sharding)
        arrays = [reference[f"state.{n}.{i}"] for i in range(len(leaves))]
        return structure.unflatten(
            [jax.make_array_from_callback(a.shape, place, lambda at, a=a: a[at]) for a, place in zip(arrays, leaves, strict=True)]
        )

    found["losses"] = run(COMPARED + (layout == ALONE), free)
    if layout != ALONE:
        reference = read(folder, task, ALONE)
        found["forced losses"] = run(COMPARED, forced)
    return found


def _available(layout: str) -> tuple[int, int]:
    """(processes, devices of each): one device is alone in its process, as a laptop's is, which chooses by that (see
    niso/models/convolution.py); other layouts of as many processes share them."""
    processes = int(layout.partition("x")[0])
    return processes, 1 if layout.startswith(ALONE) else AVAILABLE // processes


def measure(tasks: list[str], layouts: list[str], folder: pathlib.Path) -> None:
    """Trains them in processes of their own, as many at a time as a layout has; then `read` finds each result in the folder."""
    for processes, devices in sorted({_available(layout) for layout in layouts}):
        some = [layout for layout in layouts if _available(layout) == (processes, devices)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NISO_CACHE": str(folder / "cache"),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }  # fmt: skip
        told = json.dumps([tasks, some, str(folder), address, processes])
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.equality", "--part", told, "--process", str(i)], cwd=REPOSITORY, env=environment
            )
            for i in range(processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"{some} of {tasks}: exit codes {codes}")


def part(told: str, me: int) -> None:
    """One process of `measure`."""
    from absl import logging

    from niso import distributed

    logging.set_verbosity(logging.FATAL)  # as niso.main does
    tasks, layouts, folder, address, processes = json.loads(told)
    with distributed.join(*((address, processes, me) if processes > 1 else (None, None, None)), False):
        for task in tasks:
            for layout in layouts:
                found = train(task, layout, pathlib.Path(folder))
                if me == 0:
                    np.savez(pathlib.Path(folder) / f"{task}-{layout.replace('/', '-')}.npz", **found)


def read(folder: pathlib.Path, task: str, layout: str) -> Arrays:
    """What `train` returned there."""
    with np.load(folder / f"{task}-{layout.replace('/', '-')}.npz") as arrays:
        return dict(arrays)


def compare(task: str, layouts: list[str], folder: pathlib.Path, draws: int = 2) -> list[Deviation]:
    """A task's deviation on each layout, from so many draws of jitter."""
    jitter = [f"{ALONE} jitter {draw}" for draw in range(draws)]
    measure([task], [ALONE, *jitter, *layouts], folder)
    reference, jittered = read(folder, task, ALONE), [read(folder, task, layout) for layout in jitter]
    return [deviation(read(folder, task, layout), reference, jittered) for layout in layouts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        part(given.part, given.process)
        return 0
    tasks, layouts, largest = given.tasks.split(","), given.layouts.split(","), 0.0
    print("deviation of gradients, of losses, and of parameters after 20 updates, in units of what rounding can do\n")
    print(f"| task | {' | '.join(layouts)} | one update more | of a gradient |\n|{' --- |' * (len(layouts) + 3)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="niso-equality-") as folder:
        for task in tasks:
            found = compare(task, layouts, pathlib.Path(folder))
            print(
                f"| {task} | {' | '.join(map(str, found))} | {found[0].one_update_more:.1f} | {found[0].allowed:.0e} |", flush=True
            )
            largest = float(np.max([largest, *(one.largest for one in found)]))
    return 0 if largest <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
