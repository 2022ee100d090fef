"""One training step, pure and jitted: state and batch in, state and metrics out."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from niso import metrics, rng, sharding, tree
from niso.errors import UserError
from niso.metrics import Mean, Metrics

if TYPE_CHECKING:
    from niso.config import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training depends on: "step n" is the state after n updates.

    `params` are trained, `frozen` never reach the optimiser; both are flat dicts by path. `window` sums the metrics of the
    steps since the last log point, so that a resumed run logs what an unbroken one would.
    """

    step: Array
    params: dict[str, Array]
    frozen: dict[str, Array]
    opt_state: Any
    window: Metrics


class Program:
    """The jitted functions of one experiment on one mesh, with their shardings.

    `init(warm)` -> TrainState, born sharded; `train(state, batch)` -> (state, window), state donated; `evaluate(state, batch,
    index)` -> Metrics of the split's batch `index`; `inspect(state, batch)` -> arrays for figures, replicated.
    """

    def __init__(self, experiment: "Experiment", mesh: Mesh, batch_shapes: dict[str, tuple[tuple[int, ...], Any]]):
        self.experiment = experiment
        self.mesh = mesh
        self.task = dataclasses.replace(experiment.task, procrustes=sharding.sharded(experiment.task.procrustes, mesh))
        self.optimizer = experiment.optimizer.transformation(experiment.steps)
        self.schedule = experiment.optimizer.schedule(experiment.steps)
        sharding.check_batch(mesh, experiment.batch, experiment.optimizer.accumulate)

        model = nnx.eval_shape(self._init_model)
        self.graphdef, self.parameter_shapes = tree.flatten(model)
        self.batch_shapes = {name: jax.ShapeDtypeStruct(*shape) for name, shape in batch_shapes.items()}
        self.batch_sharding = sharding.batch_sharding(mesh, batch_shapes)
        if not tree.partition(self.parameter_shapes, self.task.trainable)[0]:
            raise UserError(f"task.trainable={self.task.trainable!r} matches no parameter: nothing would be trained")
        self.state_shapes = jax.eval_shape(self._init, {})
        self.parameter_sharding = sharding.parameter_sharding(mesh, self.task.rules(), self.parameter_shapes)
        self.state_sharding = self._place(self.state_shapes)

        whole = sharding.replicated(mesh)
        self.init = jax.jit(self._init, out_shardings=self.state_sharding)
        self.train = jax.jit(
            self._train,
            in_shardings=(self.state_sharding, self.batch_sharding),
            out_shardings=(self.state_sharding, whole),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(self._evaluate, in_shardings=(self.state_sharding, self.batch_sharding, None), out_shardings=whole)
        self.inspect = jax.jit(self._inspect, in_shardings=(self.state_sharding, whole), out_shardings=whole)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that led to `step`."""
        return float(self.schedule(step - 1))

    def _init_model(self) -> nnx.Module:
        return self.task.init_model(nnx.Rngs(params=rng.stream(self.experiment.seed, "init")))

    def _init(self, warm: dict[str, Array]) -> TrainState:
        params = tree.flatten(self._init_model())[1] | warm
        trained, frozen = tree.partition(params, self.task.trainable)
        shapes = jax.eval_shape(self._gradients, trained, frozen, self.batch_shapes, jax.random.key(0))
        window = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, self.optimizer.init(trained), window)

    def _place(self, state: TrainState) -> Any:
        """The state's shardings, as a TrainState of NamedShardings."""
        whole = sharding.replicated(self.mesh)
        placed = self.parameter_sharding
        kind: Any = TrainState  # of shardings instead of arrays
        return kind(
            step=whole,
            params={name: placed[name] for name in state.params},
            frozen={name: placed[name] for name in state.frozen},
            opt_state=sharding.optimizer_sharding(self.mesh, placed, state.opt_state, self.experiment.mesh.zero),
            window=jax.tree.map(lambda _: whole, state.window),
        )

    def _train(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        key = rng.stream(self.experiment.seed, "draw", state.step)
        gradients, measured = self._gradients(state.params, state.frozen, batch, key)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        fresh = state.step % self.experiment.log.every == 0
        window = jax.tree.map(lambda sum_, now: jnp.where(fresh, 0.0, sum_) + now, state.window, measured)
        return TrainState(state.step + 1, params, state.frozen, opt_state, window), window

    def _gradients(
        self, params: dict[str, Array], frozen: dict[str, Array], batch: dict[str, Array], key: Array
    ) -> tuple[dict[str, Array], Metrics]:
        """Gradients and metrics of the whole batch, micro-batch by micro-batch where the experiment accumulates."""
        batch = self.task.draw(batch, key)

        def loss(params: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, Metrics]:
            return self.task.loss(tree.merge(self.graphdef, params | frozen), batch)

        gradient = jax.grad(loss, has_aux=True)
        parts = self.experiment.optimizer.accumulate
        if parts == 1:
            gradients, measured = gradient(params, batch)
        else:
            # Example i goes to micro-batch i mod parts, so that every device keeps its own examples in each of them.
            pieces = {n: jnp.swapaxes(v.reshape(-1, parts, *v.shape[1:]), 0, 1) for n, v in batch.items()}

            def add(carry: tuple, piece: dict[str, Array]) -> tuple[tuple, None]:
                gradients, measured = gradient(params, piece)
                return (jax.tree.map(jnp.add, carry[0], gradients), metrics.add(carry[1], measured)), None

            first = jax.eval_shape(gradient, params, {n: v[0] for n, v in pieces.items()})
            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
            (gradients, measured), _ = jax.lax.scan(add, zero, pieces)
            gradients = jax.tree.map(lambda g: g / parts, gradients)
        norm = optax.global_norm(gradients)
        return gradients, measured | {"gradient_norm": Mean(norm, jnp.ones_like(norm))}

    def _evaluate(self, state: TrainState, batch: dict[str, Array], index: int) -> Metrics:
        batch = self.task.draw(batch, rng.stream(self.experiment.seed, "evaluate", index))
        return self.task.evaluate(tree.merge(self.graphdef, state.params | state.frozen), batch)

    def _inspect(self, state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        batch = self.task.draw(batch, rng.stream(self.experiment.seed, "inspect"))
        return self.task.inspect(tree.merge(self.graphdef, state.params | state.frozen), batch)
