"""One training step, pure and jitted: state and batch in, state and metrics out."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from niso import cost, metrics, rng, sharding, tree
from niso.errors import UserError
from niso.metrics import Mean, Metrics
from niso.replicas import Replicas

if TYPE_CHECKING:
    from niso.config import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training depends on: "step n" is the state after n updates.

    `params` are trained, `frozen` never reach the optimiser; both are flat dicts by path. `window` sums the metrics of the
    steps since the last log point, so that a resumed run logs what an unbroken one would. With several replicas every array
    but the step has them along its first axis.
    """

    step: Array
    params: dict[str, Array]
    frozen: dict[str, Array]
    opt_state: Any
    window: Metrics


# Axes of replicas in a TrainState, as in jax.vmap.
_KIND: Any = TrainState
STATE_AXES = _KIND(step=None, params=0, frozen=0, opt_state=0, window=0)


class Program:
    """The jitted functions of one experiment on one mesh, with their shardings.

    `init(warm)` -> TrainState, born sharded; `train(state, batch)` -> (state, window), state donated; `evaluate(state, batch,
    index)` -> Metrics of the split's batch `index`; `inspect(state, batch)` -> arrays for figures, `examine(state)` -> arrays
    for Task.examine, both replicated. With several replicas (`replicas`) a training batch, metrics and arrays have them along
    their first axis; a test batch is one for all. `parameter_shapes` and `parameter_sharding` are one replica's.
    """

    def __init__(self, experiment: "Experiment", mesh: Mesh, batch_shapes: dict[str, tuple[tuple[int, ...], Any]]):
        self.experiment = experiment
        self.mesh = mesh
        self.replicas = Replicas(mesh, experiment.seed, experiment.seeds)
        self.task = dataclasses.replace(experiment.task, procrustes=self.replicas.solve(experiment.task.procrustes))
        self.optimizer = experiment.optimizer.transformation(experiment.steps)
        self.replicas.check_batch(experiment.batch, experiment.optimizer.accumulate)

        model = nnx.eval_shape(partial(self._init_model, experiment.seed))
        self.graphdef, self.parameter_shapes = tree.flatten(model)
        self.example_shapes = {name: jax.ShapeDtypeStruct(*shape) for name, shape in batch_shapes.items()}
        self.batch_shapes = self.replicas.stack(self.example_shapes)
        places = sharding.batch_sharding(mesh, batch_shapes)
        self.batch_sharding, self.test_sharding = self.replicas.place(places), self.replicas.place_shared(places)
        if not tree.partition(self.parameter_shapes, self.task.trainable)[0]:
            raise UserError(f"task.trainable={self.task.trainable!r} matches no parameter: nothing would be trained")
        self.parameter_sharding = sharding.parameter_sharding(mesh, self.task.rules(), self.parameter_shapes)
        self._measured = self._measured_shapes()
        one = jax.eval_shape(self._begin, self.parameter_shapes)
        self.state_sharding = self._place(one)
        stacked = {field.name: self.replicas.stack(getattr(one, field.name)) for field in dataclasses.fields(one)}
        self.state_shapes = _KIND(**stacked | {"step": one.step})
        each = self.replicas.map
        init = each(self._init, (0,), STATE_AXES)

        whole = sharding.replicated(mesh)
        self.init = jax.jit(init, out_shardings=self.state_sharding)
        self.train = jax.jit(
            each(self._train, (STATE_AXES, 0), (STATE_AXES, 0)),
            in_shardings=(self.state_sharding, self.batch_sharding),
            out_shardings=(self.state_sharding, whole),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(
            each(self._evaluate, (STATE_AXES, None, None)),
            in_shardings=(self.state_sharding, self.test_sharding, None),
            out_shardings=whole,
        )
        self.inspect = jax.jit(
            each(self._inspect, (STATE_AXES, None)), in_shardings=(self.state_sharding, whole), out_shardings=whole
        )
        self.examine = jax.jit(each(self._examine, (STATE_AXES,)), in_shardings=(self.state_sharding,), out_shardings=whole)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's part of a training batch as global arrays."""
        leading = (self.replicas.count, self.experiment.batch)[self.replicas.count == 1 :]
        return sharding.place_batch(self.batch_sharding, batch, *leading)

    def place_test(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's rows of a test batch as global arrays."""
        return sharding.place_batch(self.test_sharding, batch, self.experiment.batch)

    def parameters(self, state: TrainState, replica: int = 0) -> dict[str, Array]:
        """The parameters of one replica by path, trained and frozen, where `parameter_sharding` has them."""
        params = state.params | state.frozen
        if self.replicas.count == 1:
            return params
        places = {name: self.parameter_sharding[name] for name in params}
        return jax.jit(lambda params: jax.tree.map(lambda leaf: leaf[replica], params), out_shardings=places)(params)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that led to `step`."""
        return self.experiment.optimizer.rate(self.experiment.steps, step - 1)

    def model_operations(self, traced: jax.stages.Traced | None = None) -> float:
        """FLOP of the matrix products and convolutions of one update, all devices together (cost.operations): what its result
        takes, without what rematerialisation and micro-batches do twice.

        Args:
          traced: `train`, where it has been traced already.
        """
        e = self.experiment
        if getattr(e.task, "remat", False) or e.optimizer.accumulate > 1:
            plain: Any = dataclasses.replace(e.task, remat=False) if hasattr(e.task, "remat") else e.task  # type: ignore[call-arg]
            e = dataclasses.replace(e, task=plain, optimizer=dataclasses.replace(e.optimizer, accumulate=1))
            shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in self.example_shapes.items()}
            return Program(e, self.mesh, shapes).model_operations()
        traced = traced or self.train.trace(self.state_shapes, self.batch_shapes)
        return cost.operations(traced, self.mesh.devices.flat[0].platform).total

    # Below, everything is of one replica: `seed` is a number, or a replica's key where several are mapped over.

    def _init_model(self, seed: int | Array) -> nnx.Module:
        return self.task.init_model(tree.initializers(rng.stream(seed, "init")))

    def _init(self, seed: int | Array, warm: dict[str, Array]) -> TrainState:
        return self._begin(tree.flatten(self._init_model(seed))[1] | warm)

    def _measured_shapes(self) -> Metrics:
        """The metrics of one step, as shapes."""
        trained, frozen = tree.partition(self.parameter_shapes, self.task.trainable)
        shapes = trained, frozen, self.example_shapes, jax.random.key(0), jnp.zeros(())
        return jax.eval_shape(lambda *arguments: self._gradients(*arguments)[1], *shapes)

    def _begin(self, params: dict[str, Array]) -> TrainState:
        """The state before the first step."""
        trained, frozen = tree.partition(params, self.task.trainable)
        window = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._measured)
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, self.optimizer.init(trained), window)

    def _place(self, one: TrainState) -> Any:
        """The state's shardings, as a TrainState of NamedShardings, from the shapes of one replica's."""
        whole = sharding.replicated(self.mesh)
        placed, put = self.parameter_sharding, self.replicas.place
        return _KIND(
            step=whole,
            params=put({name: placed[name] for name in one.params}),
            frozen=put({name: placed[name] for name in one.frozen}),
            opt_state=put(sharding.optimizer_sharding(self.mesh, placed, one.opt_state, self.experiment.mesh.zero)),
            window=jax.tree.map(lambda _: whole, one.window),
        )

    def _train(self, seed: int | Array, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        key = rng.stream(seed, "draw", state.step)
        progress = state.step.astype(jnp.float32) / self.experiment.steps
        gradients, measured = self._gradients(state.params, state.frozen, batch, key, progress)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        fresh = state.step % self.experiment.log.every == 0
        window = jax.tree.map(lambda sum_, now: jnp.where(fresh, 0.0, sum_) + now, state.window, measured)
        return TrainState(state.step + 1, params, state.frozen, opt_state, window), window

    def _gradients(
        self, params: dict[str, Array], frozen: dict[str, Array], batch: dict[str, Array], key: Array, progress: Array
    ) -> tuple[dict[str, Array], Metrics]:
        """Gradients and metrics of the whole batch, micro-batch by micro-batch where the experiment accumulates."""
        batch, task = self.task.draw(batch, key), self.task.at(progress)

        def loss(params: dict[str, Array], batch: dict[str, Array]) -> tuple[Array, Metrics]:
            return task.loss(tree.merge(self.graphdef, params | frozen), batch)

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

    def _evaluate(self, seed: int | Array, state: TrainState, batch: dict[str, Array], index: int) -> Metrics:
        batch = self.task.draw_held_out(batch, rng.stream(seed, "evaluate", index))
        return self.task.evaluate(self._model(state), batch)

    def _inspect(self, seed: int | Array, state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        batch = self.task.draw_held_out(batch, rng.stream(seed, "inspect"))
        return self.task.inspect(self._model(state), batch)

    def _examine(self, seed: int | Array, state: TrainState) -> dict[str, Array]:
        return self.task.examination(self._model(state))

    def _model(self, state: TrainState) -> nnx.Module:
        return tree.merge(self.graphdef, state.params | state.frozen)
