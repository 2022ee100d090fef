"""Products X = P_Λ ⊙ b aᵀ, the solve's input, of a real training run: python -m tests.isometric_products makes the file anew.

tests/isometric_products.npz: of configs/pose_encode.py:small, seed 0, the first four test pairs at steps 0, 100 and 1000 (k = 32),
and of the paper's network at initialisation on two of the same pairs, doubled in size until they fit it (k = 128).
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")


def read() -> dict[str, np.ndarray]:
    """Name -> matrices, batch x K x K, float32."""
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def main() -> None:
    """Trains, and writes the file (a few minutes on a CPU, once the small twin is made)."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from configs.pose_encode import get_config
    from niso import rng, sharding, tree
    from niso.config import Experiment
    from niso.data.pipeline import open_dataset
    from niso.step import Program

    seen: list[np.ndarray] = []

    def watching(x_BxKxK: jax.Array, **options: object) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_BxKxK)
        return x_BxKxK

    def products(experiment: Experiment, model: nnx.Module, frames: np.ndarray) -> np.ndarray:
        task = dataclasses.replace(experiment.task, procrustes=watching)
        task._encode(model, {"frames_BxTxHxWxC": jnp.asarray(frames)})
        jax.effects_barrier()
        return seen.pop()

    config = get_config("small")
    config.steps = 2_000  # the published length of the variant: its learning rates
    experiment = Experiment.from_config(config)
    dataset = open_dataset(experiment.data)
    program = Program(experiment, sharding.make_mesh(experiment.mesh), dataset.batch_shapes(experiment.batch))
    frames = dataset.figure_batch(4)["frames_BxTxHxWxC"]
    state, found = program.init({}), {}
    rows = sharding.host_rows(program.mesh, experiment.batch)
    with dataset.train_batches(batch=experiment.batch, seed=0, start=0, steps=1_001, rows=rows) as batches:
        for step, batch in enumerate(batches):
            if step in (0, 100, 1000):
                model = tree.merge(program.graphdef, state.params)
                found[f"step_{step}"] = products(experiment, model, frames)
            state, _ = program.train(state, program.place(batch))
    paper = Experiment.from_config(get_config("paper"))
    large = np.repeat(np.repeat(frames[:2], 5, axis=2), 5, axis=3)[:, :, :144, :144]
    model = paper.task.init_model(nnx.Rngs(params=rng.stream(0, "init")))
    found["paper_step_0"] = products(paper, model, large)
    np.savez_compressed(FILE, **{name: x.astype(np.float32) for name, x in found.items()})
    for name, x in found.items():
        print(name, x.shape, "condition numbers", np.linalg.cond(x.astype(np.float64)).round())


if __name__ == "__main__":
    main()
