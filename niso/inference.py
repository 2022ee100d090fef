"""A trained run as functions on frames: coefficients, isometries between them, and camera poses where the run has a pose head.

    model = niso.load("runs/pose_pred-paper")
    coefficient_TxKxC = model.encode(frames_TxHxWxC)
    tau_PxKxK = model.isometry(coefficient_TxKxC[:-1], coefficient_TxKxC[1:])
    relative_Px4x4 = model.relative_poses(coefficient_TxKxC, [1])[1]

Everything takes and returns numpy arrays of any number of rows; inside, rows go to the devices in chunks, the last one filled up
to a power of two, so that each function is compiled for a few sizes only and a single frame is not as slow as thirty.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from niso import checkpoint_files, config, folders, sharding, tree
from niso.errors import UserError
from niso.tasks.base import Task
from niso.tasks.latent import Latent

CHUNK = 32


class Model:
    """An encoder and an operator with their parameters; `relative_pose` and `relative_poses` where the task has a pose head.

    The operator's spectrum is computed once, here. Parameters are not copied: those of a TrainState are gone with the next
    training step, which donates them.
    """

    def __init__(
        self, task: Task, graphdef: nnx.GraphDef, params: tree.Params, mesh: Mesh | None = None, chunk: int = CHUNK
    ) -> None:
        """A run's model, `Model(program.task, program.graphdef, state.params | state.frozen, program.mesh)` in training.

        Args:
          task: On a mesh the Program's own, whose solve is split over it.
          graphdef, params: As `tree.flatten` returns them.
          mesh: Where the parameters live, if they are split: batches are split over it too, results are replicated. All of its
            processes call the same methods with the same arrays.
          chunk: Rows that go to the devices at a time, at most.

        Raises:
          UserError: the task has no isometries, or the mesh does not divide the chunk.
        """
        if not isinstance(task, Latent):
            raise UserError(
                f"the task {type(task).__name__.lower()} has no latent isometries: choose a run of pose_encode or pose_pred"
            )
        if chunk < 1 or (mesh and chunk % mesh.shape["data"]):
            parts = mesh.shape["data"] if mesh else 1
            raise UserError(f"chunk={chunk}: choose a positive multiple of {parts}, the devices that share it (mesh.data)")
        self.task, self.chunk = task, chunk
        self._mesh, self._functions = mesh, _compile(task, graphdef, mesh)
        self._bind(params)

    def with_params(self, params: tree.Params) -> "Model":
        """The same model with other parameters, for instance those of a later step: nothing is compiled again."""
        other = copy.copy(self)
        other._bind(params)
        return other

    @property
    def size(self) -> int:
        """Height of the frames, pixels, and their width, where `task.size` is one number: those of a video are square."""
        return self.task.shape[0]

    @property
    def channels(self) -> int:
        """Channels of the frames."""
        return self.task.channels

    @property
    def has_pose_head(self) -> bool:
        """Whether `relative_pose`, `pose_of` and `relative_poses` can be asked."""
        return hasattr(self.task, "relative_pose")

    def encode(self, image_BxHxWxC: np.ndarray) -> np.ndarray:
        """Spectral coefficients of frames, B x K x C, float32.

        Args:
          image_BxHxWxC: Frames of `size` x `size` pixels, or of the two numbers of `task.size`: uint8 in 0..255, or floats in
            [−1, 1] (−1 black, 1 white), as `image / 127.5 - 1`. Floats in [0, 1] cannot be told from them, they look pale.

        Raises:
          UserError: another shape, another type, or floats outside of [−1, 1].
        """
        image_BxHxWxC = np.asarray(image_BxHxWxC)
        self._check_shape("frames", image_BxHxWxC, (*self.task.shape, self.channels))
        if image_BxHxWxC.dtype != np.uint8:
            image_BxHxWxC = _unit_floats(image_BxHxWxC)
        return self._by_chunks(self._functions.encode, image_BxHxWxC=image_BxHxWxC)

    def isometry(self, a_BxKxC: np.ndarray, b_BxKxC: np.ndarray) -> np.ndarray:
        """τ_Ω with τ_Ω a ≈ b, orthogonal, B x K x K, float32 (eq. 8).

        Raises:
          UserError: these are not as many coefficients of this model.
        """
        return self._by_chunks(self._functions.isometry, **self._pairs(a_BxKxC, b_BxKxC))

    def relative_pose(self, a_BxKxC: np.ndarray, b_BxKxC: np.ndarray) -> np.ndarray:
        """Camera b in camera a's frame from the coefficients of both, B x 4 x 4, float32: it takes b's camera points to a's.

        Axes are OpenCV's (x right, y down, z forward). The unit of translations is the head's own: the same for all pairs of
        one sequence, as far as the head keeps to it, and unrelated to metres.

        Raises:
          UserError: these are not as many coefficients of this model, or the run has no pose head.
        """
        self._check_head()
        return self._by_chunks(self._functions.relative_pose, **self._pairs(a_BxKxC, b_BxKxC))

    def pose_of(self, tau_BxKxK: np.ndarray) -> np.ndarray:
        """`relative_pose` of the pairs whose `isometry` is already known, B x 4 x 4, float32: nothing is solved again.

        Raises:
          UserError: these are not maps of this model, or the run has no pose head.
        """
        self._check_head()
        tau_BxKxK = np.asarray(tau_BxKxK, np.float32)
        self._check_shape("maps", tau_BxKxK, (self.task.order, self.task.order))
        return self._by_chunks(self._functions.pose_of, tau_BxKxK=tau_BxKxK)

    def relative_poses(self, coefficient_TxKxC: np.ndarray, strides: Iterable[int]) -> dict[int, np.ndarray]:
        """The relative poses along a sequence's frames 0, b, 2b, ... for every stride b, from the coefficients of all frames.

        Returns:
          stride -> (n − 1) x 4 x 4, where n = ceil(T / b) is the number of frames at that stride; entry i is
          `relative_pose` of the frames i b and (i + 1) b. `geometry.trajectory.compose` chains them.

        Raises:
          UserError: as `relative_pose`, or a stride below 1.
        """
        coefficient_TxKxC, pairs = np.asarray(coefficient_TxKxC), {}
        for stride in strides:
            if stride < 1:
                raise UserError(f"a stride is {stride}, it must be at least 1")
            frames_N = np.arange(0, len(coefficient_TxKxC), stride)
            pairs[stride] = np.stack([frames_N[:-1], frames_N[1:]])
        first_P, second_P = np.concatenate([np.zeros((2, 0), int), *pairs.values()], axis=1)
        relative_Px4x4 = self.relative_pose(coefficient_TxKxC[first_P], coefficient_TxKxC[second_P])
        ends = np.cumsum([pair_2xP.shape[1] for pair_2xP in pairs.values()])
        return dict(zip(pairs, np.split(relative_Px4x4, ends), strict=False))  # nothing is left after the last end

    def _bind(self, params: tree.Params) -> None:
        self._params, self._maps = params, self._functions.maps(params)

    def _pairs(self, a_BxKxC: np.ndarray, b_BxKxC: np.ndarray) -> dict[str, np.ndarray]:
        pairs = {"a_BxKxC": np.asarray(a_BxKxC, np.float32), "b_BxKxC": np.asarray(b_BxKxC, np.float32)}
        width = self.task.latent_channels if self.task.operator else self.task.points
        for array in pairs.values():
            self._check_shape("coefficients", array, (self.task.order, width))
        if len(a_BxKxC) != len(b_BxKxC):
            raise UserError(f"coefficients of {len(a_BxKxC)} first and {len(b_BxKxC)} second frames: a pair has one of each")
        return pairs

    def _check_head(self) -> None:
        if not self.has_pose_head:
            name = type(self.task).__name__.lower()
            raise UserError(f"this run (task {name}) has no pose head: run niso.main --config=configs/pose_pred.py first")

    def _check_shape(self, what: str, array: np.ndarray, row: tuple[int, ...]) -> None:
        if array.ndim != len(row) + 1 or array.shape[1:] != row:
            expected = ", ".join(map(str, ("any number", *row)))
            raise UserError(f"{what} have the shape {array.shape}, this run's are ({expected})")

    def _by_chunks(self, function: Callable[..., Array], **rows: np.ndarray) -> np.ndarray:
        """`function` of the parameters, the maps and all rows, chunk by chunk; read one late, so that the device has work."""
        done: list[np.ndarray] = []
        running: Array | None = None
        for part in self._chunks(rows):
            previous, running = running, function(self._params, self._maps, *part.values())
            done += [] if previous is None else [np.asarray(previous)]
        if running is None:
            one = [jax.ShapeDtypeStruct((self.chunk, *array.shape[1:]), array.dtype) for array in rows.values()]
            result = jax.eval_shape(function, self._params, self._maps, *one)
            return np.zeros((0, *result.shape[1:]), result.dtype)
        return np.concatenate([*done, np.asarray(running)])[: len(next(iter(rows.values())))]

    def _size(self, rows: int) -> int:
        """How many rows go to the devices for these: the fewest of the mesh's share times 1, 2, 4, ... that hold them, or all."""
        size = self._mesh.shape["data"] if self._mesh else 1
        while size < rows:
            size *= 2
        return min(size, self.chunk)

    def _chunks(self, rows: dict[str, np.ndarray]) -> Iterator[dict[str, Array]]:
        """The rows, `chunk` at a time and placed; the last ones are filled up with zeros to one of a few sizes."""
        places = sharding.batch_sharding(self._mesh, rows) if self._mesh else {}
        count = len(next(iter(rows.values())))
        for start in range(0, count, self.chunk):
            size = self._size(count - start)
            part = {name: _filled(array[start : start + self.chunk], size) for name, array in rows.items()}
            yield {name: _placed(array, places.get(name)) for name, array in part.items()}


def load(run: str | os.PathLike[str], step: int | None = None, replica: int = 0) -> Model:
    """The model of a run, finished or still running, on the default device: parameters only, no optimiser state.

    Args:
      run: The run's folder, --workdir in training.
      step: Which of its checkpoints; the newest by default.
      replica: Which of its replicas, where it was trained with several seeds.

    Raises:
      UserError: no such run, checkpoint or replica, or one of another version of niso, whose parameters differ.
    """
    if not folders.remote(run) and not os.path.isdir(run):
        raise UserError(f"no run in {run}: there is no such folder")
    path = checkpoint_files.find(run, step)
    saved = checkpoint_files.saved_config(path)
    try:
        task = config.make_task(saved["task"])
    except UserError as error:
        raise UserError(f"{path} is of another version of niso: {error}") from error
    graphdef, shapes = tree.flatten(nnx.eval_shape(lambda: task.init_model(tree.initializers(jax.random.key(0)))))
    here, count = jnp.zeros(()).sharding, checkpoint_files.replicas_of(saved)
    if not 0 <= replica < count:
        raise UserError(f"{run} has no replica {replica}: choose one from 0 to {count - 1}")
    if count > 1:
        shapes = {name: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
    params = checkpoint_files.parameters(path, shapes, dict.fromkeys(shapes, here))
    return Model(task, graphdef, params if count == 1 else {name: leaf[replica] for name, leaf in params.items()})


class _Functions(NamedTuple):
    """Jitted; all but the first take the parameters, the maps, and then one chunk of rows."""

    maps: Callable[[tree.Params], Any]
    encode: Callable[..., Array]
    isometry: Callable[..., Array]
    relative_pose: Callable[..., Array]
    pose_of: Callable[..., Array]


def _compile(task: Any, graphdef: nnx.GraphDef, mesh: Mesh | None) -> _Functions:
    def merged(params: tree.Params) -> Any:
        return tree.merge(graphdef, params)

    def encode(params: tree.Params, maps: Any, image_BxHxWxC: Array) -> Array:
        return task.encode(merged(params), maps, image_BxHxWxC)

    def isometry(params: tree.Params, maps: Any, a_BxKxC: Array, b_BxKxC: Array) -> Array:
        return task.isometry(maps, a_BxKxC, b_BxKxC)

    def relative_pose(params: tree.Params, maps: Any, a_BxKxC: Array, b_BxKxC: Array) -> Array:
        return task.relative_pose(merged(params), task.isometry(maps, a_BxKxC, b_BxKxC))

    def pose_of(params: tree.Params, maps: Any, tau_BxKxK: Array) -> Array:
        return task.relative_pose(merged(params), tau_BxKxK)

    whole = sharding.replicated(mesh) if mesh else None
    over_rows = (jax.jit(function, out_shardings=whole) for function in (encode, isometry, relative_pose, pose_of))
    return _Functions(jax.jit(lambda params: merged(params).operator.maps()), *over_rows)


def _unit_floats(image_BxHxWxC: np.ndarray) -> np.ndarray:
    if not np.issubdtype(image_BxHxWxC.dtype, np.floating):
        raise UserError(f"frames are {image_BxHxWxC.dtype}, expected uint8 or floats in [-1, 1]")
    if image_BxHxWxC.size and not np.abs(image_BxHxWxC).max() <= 1:  # nor NaN
        low, high = image_BxHxWxC.min(), image_BxHxWxC.max()
        raise UserError(f"frames are floats from {low:.6g} to {high:.6g}, expected [-1, 1] as uint8 / 127.5 - 1, or uint8 itself")
    return image_BxHxWxC.astype(np.float32)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    return array if len(array) == rows else np.pad(array, ((0, rows - len(array)), *((0, 0) for _ in array.shape[1:])))


def _placed(array: np.ndarray, place: Any) -> Array:
    """On the default device, or where `place` says: every process of the mesh has the whole array, and hands over its part."""
    if place is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
