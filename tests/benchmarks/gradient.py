"""Does the exact gradient of the isometric solve matter? The same training, step for step, with different derivatives.

  python -m tests.benchmarks.gradient torus --steps 1500 --seeds 3 --json torus.json
  python -m tests.benchmarks.gradient pose --steps 1000 --seeds 1

`torus`: the operator experiment in small (identity encoder, 258 channels on a 16 x 16 torus, full rank, random shifts, spectral
dropout), on crops of the two photographs in scikit-learn. `pose`: configs/pose_encode.py:small. Arms:
  reference      SVD derivative damped by an absolute 1e-8 (tests/reference_solve.py); that of Φ stays exact
  exact          niso's: exact, onto O(k)
  ridge          exact, X + 1e-4 ‖X‖ I
  special        exact, onto SO(k)
Everything but the arm is equal: initialisation, data, order. Printed: loss over the last tenth of the steps, held-out
equivariance error, seconds a step.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import configs.pose_encode
from niso import evaluate, metrics, rng, sharding, tree
from niso.config import Experiment
from niso.data.pipeline import open_dataset
from niso.geometry import spectrum as spectral
from niso.geometry.polar import polar_factor
from niso.models.operator import Operator
from niso.step import Program
from tests import reference_solve
from tests.benchmarks import timing

ARMS: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "reference": (reference_solve.polar_factor, {}),
    "exact": (polar_factor, {}),
    "ridge": (polar_factor, {"ridge": 1e-4}),
    "special": (polar_factor, {"group": "SO"}),
}
EDGE, IMAGES = 16, 86


def torus(arm: str, seed: int, steps: int) -> dict[str, float]:
    """Loss, held-out equivariance error in percent and seconds a step of one toric training."""
    solve, options = ARMS[arm]
    keywords = {"special": options.get("group") == "SO", "ridge": options.get("ridge", 0.0)}
    graphdef, params = tree.flatten(Operator(EDGE**2, EDGE**2, "cumulative", rngs=nnx.Rngs(params=rng.stream(seed, "init"))))
    banks = image_banks()
    optimizer = optax.adamw(5e-4, weight_decay=1e-4)

    def pairs(key: Array, bank_PxHxWx3: Array, batch: int) -> tuple[Array, Array]:
        crop, shift = jax.random.split(key)
        z_BxHxWxC = stacks(bank_PxHxWx3, crop, batch)
        by_Bx2 = jax.random.randint(shift, (batch, 2), 0, EDGE)
        moved_BxHxWxC = jax.vmap(lambda z_HxWxC, by_2: jnp.roll(z_HxWxC, by_2, (0, 1)))(z_BxHxWxC, by_Bx2)
        return z_BxHxWxC.reshape(batch, EDGE**2, -1), moved_BxHxWxC.reshape(batch, EDGE**2, -1)

    def loss(params: dict[str, Array], key: Array, batch: int, drop: bool) -> tuple[Array, Array]:
        data, dropout = jax.random.split(key)
        first_BxNxC, second_BxNxC = pairs(data, banks[0 if drop else 1], batch)
        maps = tree.merge(graphdef, params).maps()
        a_BxKxC, b_BxKxC = maps.project(first_BxNxC), maps.project(second_BxNxC)
        tau_BxKxK = spectral.solve_isometry(a_BxKxC, b_BxKxC, maps.mask_KxK, lambda x: solve(x, **keywords))
        keep_BxKx1 = spectral_dropout(dropout, batch, EDGE**2) if drop else 1.0
        forward_BxNxC = maps.unproject(keep_BxKx1 * spectral.apply_isometry(tau_BxKxK, a_BxKxC))
        backward_BxNxC = maps.unproject(keep_BxKx1 * spectral.apply_isometry(tau_BxKxK, b_BxKxC, inverse=True))
        value = jnp.mean(jnp.abs(forward_BxNxC - second_BxNxC)) + jnp.mean(jnp.abs(backward_BxNxC - first_BxNxC))
        error_B = spectral.relative_error(spectral.apply_isometry(tau_BxKxK, a_BxKxC), b_BxKxC)
        return value + 0.1 * maps.multiplicity(), 100.0 * jnp.mean(error_B)

    @jax.jit
    def step(params: dict[str, Array], state: Any, index: Array) -> tuple[dict[str, Array], Any, Array]:
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, rng.stream(seed, "draw", index), 4, True)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values, start = optimizer.init(params), [], 0.0
    for index in range(steps):
        params, state, value = step(params, state, index)
        values.append(value)
        if index == 0:
            jax.block_until_ready(value)
            start = time.perf_counter()
    jax.block_until_ready(params)
    seconds = (time.perf_counter() - start) / max(steps - 1, 1)
    held_out = jax.jit(lambda params, key: loss(params, key, 8, False))
    errors = [float(held_out(params, rng.stream(seed, "evaluate", i))[1]) for i in range(8)]
    tail = np.asarray(values[-max(steps // 10, 1) :])
    return {"loss": float(tail.mean()), "equivariance_error_%": statistics.mean(errors), "step_s": seconds}


def spectral_dropout(key: Array, batch: int, rank: int) -> Array:
    """1 below a random index and 0 from it on, for half of the examples (METHOD.md §1), batch x rank x 1."""
    coin, at = jax.random.split(key)
    index_B = jax.random.randint(at, (batch,), 1, rank)
    drop_B = jax.random.bernoulli(coin, 0.5, (batch,))
    return jnp.where(drop_B[:, None, None] & (jnp.arange(rank)[:, None] >= index_B[:, None, None]), 0.0, 1.0)


def image_banks() -> tuple[Array, Array]:
    """Two times 20,000 random crops, EDGE x EDGE x 3, uint8, of scikit-learn's photographs at three sizes: to train on from
    their left halves, to test on from their right halves."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    banks = []
    for part in (slice(None, 320), slice(320, None)):
        bank_PxHxWx3 = np.empty((20_000, EDGE, EDGE, 3), np.uint8)
        sized = [
            np.asarray(Image.fromarray(picture[:, part]).resize((width, width * 427 // 320), Image.Resampling.BOX))
            for picture in load_sample_images().images
            for width in (320, 160, 80)
        ]
        for index in range(len(bank_PxHxWx3)):
            image = sized[random.integers(len(sized))]
            row, column = random.integers(image.shape[0] - EDGE + 1), random.integers(image.shape[1] - EDGE + 1)
            bank_PxHxWx3[index] = image[row : row + EDGE, column : column + EDGE]
        banks.append(jnp.asarray(bank_PxHxWx3))
    return banks[0], banks[1]


def stacks(bank_PxHxWx3: Array, key: Array, batch: int) -> Array:
    """86 images of a bank, drawn anew, stacked along the channels, in [−1, 1]: batch x EDGE x EDGE x 258."""
    chosen_BxIxHxWx3 = bank_PxHxWx3[jax.random.randint(key, (batch, IMAGES), 0, len(bank_PxHxWx3))]
    z_BxHxWxC = jnp.moveaxis(chosen_BxIxHxWx3, 1, 3).reshape(batch, EDGE, EDGE, IMAGES * 3)
    return z_BxHxWxC.astype(jnp.float32) / 127.5 - 1.0


def pose(arm: str, seed: int, steps: int) -> dict[str, float]:
    """The same of configs/pose_encode.py:small."""
    solve, options = ARMS[arm]
    config = configs.pose_encode.get_config("small")
    config.seed, config.steps = seed, steps
    config.task.update(options)
    experiment = Experiment.from_config(config)
    experiment = dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, procrustes=solve))
    dataset = open_dataset(experiment.data)
    program = Program(experiment, sharding.make_mesh(experiment.mesh), dataset.batch_shapes(experiment.batch))
    rows = sharding.host_rows(program.mesh, experiment.batch)
    state, values, start = program.init({}), [], 0.0
    with dataset.train_batches(batch=experiment.batch, seed=seed, start=0, steps=steps, rows=rows) as batches:
        for index, batch in enumerate(batches):
            state, window = program.train(state, program.place(batch))
            if (index + 1) % experiment.log.every == 0:
                values.append(metrics.values(window)["loss"])
            if index == 0:
                jax.block_until_ready(window)
                start = time.perf_counter()
    seconds = (time.perf_counter() - start) / max(steps - 1, 1)
    with dataset.test_batches(batch=experiment.batch, rows=rows) as batches:
        found = evaluate.evaluate(program, state, batches)[0]
    return {
        "loss": statistics.mean(values[-max(len(values) // 10, 1) :]), "equivariance_error_%": found["equivariance_error"],
        "test_loss": found["loss"], "test_reconstruction": found["reconstruction"], "step_s": seconds,
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Trains every arm with every seed, prints a line for each and the table of means; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("torus", "pose"))
    parser.add_argument("--steps", type=timing.positive, default=1000)
    parser.add_argument("--seeds", type=timing.positive, default=1)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--json", type=timing.json_file)
    options = parser.parse_args(argv)
    timing.print_surroundings()
    train = {"torus": torus, "pose": pose}[options.experiment]
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for arm in options.arms:
            rows.append({"arm": arm, "seed": seed} | train(arm, seed, options.steps))
            print("  ".join(f"{key} {timing.readable(value)}" for key, value in rows[-1].items()), flush=True)
    of = f"mean over {options.seeds} seeds ± standard error" if options.seeds > 1 else "one seed"
    print(f"\n{of}, {options.steps} steps")
    for arm in options.arms:
        cells = []
        for key in rows[0].keys() - {"arm", "seed"}:
            values = [row[key] for row in rows if row["arm"] == arm]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
            cells.append(f"{key} {statistics.mean(values):.4g}{error}")
        print(f"{arm:<10}", "  ".join(sorted(cells)))
    timing.write(options.json, argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
