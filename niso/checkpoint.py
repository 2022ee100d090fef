"""Checkpoints: resume, warm start, save, preemption. The only file that touches the checkpoint folder, and orbax.

A checkpoint is the TrainState and the resolved config; its step is the position in the data stream. It is written
asynchronously under a temporary name and renamed when complete, so a kill at any moment leaves only whole checkpoints.
"""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Sharding
from orbax.checkpoint import args as ocp_args

from niso import __version__, config, tree
from niso.errors import UserError
from niso.step import Program, TrainState
from niso.tasks.base import Task

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, in `workdir`/checkpoints.

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(self, workdir: str, keep: int):
        self.folder = Path(workdir).absolute() / FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(f"no permission to write in {self.folder}")
        except OSError as error:
            raise UserError(f"cannot write the run's folder {workdir}: {error}; choose another with --workdir") from None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        # Without handlers named here, a manager that has saved nothing yet cannot tell the shapes of what is there.
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        self._terminated = False
        self._previous_handler: Any = None
        if jax.process_count() == 1:  # with several, jax has a handler of its own and all agree on the step
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self.manager.latest_step()

    def newest(self) -> str:
        """The same, for a person who has to go on from there."""
        step = self.latest()
        return "there is no checkpoint yet" if step is None else f"the newest checkpoint is step {step}"

    def check_config(self, resolved: dict[str, Any], accept_changes: bool) -> None:
        """Raises UserError, with the differences, where the newest checkpoint was made under another config."""
        step = self.latest()
        if step is None or accept_changes:
            return
        meta = self.manager.restore(step, args=ocp_args.Composite(meta=ocp_args.JsonRestore()))["meta"]
        changes = config.difference(meta["config"], resolved)
        if changes:
            raise UserError(
                f"{self.folder.parent} holds a run with another config ({'; '.join(changes)}): choose another --workdir, "
                "or resume under the new config with --accept_config_changes"
            )

    def restore(self, program: Program) -> TrainState:
        """The newest checkpoint's state, on the program's mesh whatever mesh it was saved from, bit for bit."""
        step = self.latest()
        wanted = _structs(program)
        saved = self.manager.item_metadata(step)["state"]
        here, there = _shapes(wanted), _shapes(saved.tree if hasattr(saved, "tree") else saved)
        _check_shapes(here, there, f"{self.folder}/{step}", sorted(there.keys() - here.keys()))
        restored = self.manager.restore(step, args=ocp_args.Composite(state=ocp_args.StandardRestore(wanted)))
        return restored["state"]

    def save(self, step: int, state: TrainState, resolved: dict[str, Any]) -> None:
        """Starts writing the state after `step` updates; returns once it is copied from the devices."""
        meta = {"config": _jsonable(resolved), "niso": __version__}
        try:
            self.manager.save(
                step, args=ocp_args.Composite(state=ocp_args.StandardSave(state), meta=ocp_args.JsonSave(meta)), force=True
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def preempted(self, step: int) -> bool:
        """Whether the machine is being taken away: true on all hosts at one agreed step."""
        if jax.process_count() > 1:
            return self.manager.reached_preemption(step)
        return self._terminated

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        finally:
            self.manager.close()
            if self._previous_handler is not None:
                signal.signal(signal.SIGTERM, self._previous_handler)
                self._previous_handler = None

    def _failed(self, error: Exception) -> UserError:
        # Its many other writers failed in the same way; asyncio would print each of them when it is collected.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = str(error).splitlines()[0][:300]
        return UserError(
            f"cannot write a checkpoint in {self.folder}: {reason}; {self.newest()}: free disk space and run "
            "the same command again to go on from there"
        )

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends a run that hangs


def warm_start(spec: tuple[tuple[str, str], ...], program: Program) -> dict[str, Array]:
    """Parameters by path that finished runs provide: for each (pattern, run directory), those whose path matches.

    Raises:
      UserError: no checkpoint there, a pattern that matches nothing, a parameter of another shape or meaning.
    """
    taken: dict[str, Array] = {}
    replicas = program.replicas
    for (pattern, run), path in zip(spec, check_sources(spec), strict=True):
        wanted = {name: shape for name, shape in program.parameter_shapes.items() if tree.match(pattern, name)}
        if not wanted:
            raise UserError(f"task.warm_start: {pattern!r} matches no parameter of this model")
        place = {name: program.parameter_sharding[name] for name in wanted}
        saved = saved_config(path)
        there = replicas_of(saved)
        if there not in (1, replicas.count):
            raise UserError(
                f"task.warm_start: {run} has seeds={there} replicas, here there are {replicas.count}; set --config.seeds={there}"
            )
        if there == replicas.count:
            taken |= parameters(path, replicas.stack(wanted), replicas.place(place))
        else:  # of one run for every replica
            one = parameters(path, wanted, place)
            taken |= jax.jit(partial(jax.tree.map, replicas.repeat), out_shardings=replicas.place(place))(one)
        _check_agreement(run, saved["task"], program.task)
    return taken


def replicas_of(saved: dict[str, Any]) -> int:
    """How many replicas a run with this saved config has; their arrays have a leading axis where it is more than one."""
    return saved.get("seeds", 1)


def check_sources(spec: tuple[tuple[str, str], ...]) -> list[Path]:
    """The checkpoints that a warm start takes from, looked for before anything slow is done.

    Raises:
      UserError: a run has none.
    """
    try:
        return [find(run) for _, run in spec]
    except UserError as error:
        raise UserError(f"task.warm_start: {error}") from None


def _check_agreement(run: str, saved: dict[str, Any], task: Task) -> None:
    """Raises UserError where keys that give parameters their meaning, though not their shapes, differ from the run's."""
    now = json.loads(json.dumps({key: getattr(task, key) for key in task.inherited()}))  # tuples as lists, as in the saved ones
    for key, value in now.items():
        if key in saved and saved[key] != value:
            raise UserError(
                f"task.warm_start: {run} was trained with task.{key}={saved[key]}, here it is {value}; "
                f"set --config.task.{key}={saved[key]}, or start from another run"
            )


def find(run: str | os.PathLike[str], step: int | None = None) -> Path:
    """The folder of a run's checkpoint: of its newest one, or of that after `step` updates.

    Raises:
      UserError: there is none.
    """
    folder = Path(run).absolute() / FOLDER
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise UserError(f"no checkpoint in {folder}; train that run first")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def saved_config(path: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was made under; tuples have become lists.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(path / "meta")["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the config of the checkpoint {path} cannot be read ({str(error).splitlines()[0][:200]})") from error


def parameters(path: Path, wanted: dict[str, Any], place: Mapping[str, Sharding]) -> dict[str, Array]:
    """Some of a checkpoint's parameters by path, trained or frozen there, and nothing else of it, where `place` wants them.

    Args:
      wanted: path -> what has the parameter's shape and dtype.

    Raises:
      UserError: one is absent there, or of another shape.
    """
    path = path / "state"
    # Not PyTreeCheckpointer().metadata: that warns, on the terminal, of a file that a manager keeps one folder further up.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = _flat_params(reader.metadata(path).tree)
        _check_shapes({n: s.shape for n, s in wanted.items()}, {n: tuple(s.shape) for n, (s, _) in saved.items()}, str(path))
        item: dict[str, dict] = {}
        for name, leaf in wanted.items():
            struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place[name])
            item.setdefault(saved[name][1], {})[name] = struct
        args = ocp_args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
        restored = reader.restore(path, args=args)
    return {name: leaf for part in restored.values() for name, leaf in part.items()}


def write_config(workdir: str, resolved: dict[str, Any]) -> None:
    """The resolved config as `workdir`/config.json, replaced in one move."""
    path = Path(workdir) / "config.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(_jsonable(resolved), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there, then run the same command again") from None


def _jsonable(resolved: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(resolved))


def _structs(program: Program) -> TrainState:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        program.state_shapes, program.state_sharding,
    )  # fmt: skip


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _flat_params(saved: Any) -> dict[str, tuple[Any, str]]:
    """Path -> (metadata, "params" or "frozen")."""
    return {name: (leaf, part) for part in ("params", "frozen") for name, leaf in (saved.get(part) or {}).items()}


def _check_shapes(wanted: dict[str, tuple], saved: dict[str, tuple], where: str, surplus: Sequence[str] = ()) -> None:
    """Raises UserError naming the first leaf that differs: orbax itself would print a thousand lines."""
    for name in (*wanted, *surplus):
        here, there = wanted.get(name, "absent"), saved.get(name, "absent")
        if here != there:
            raise UserError(
                f"{where} does not fit this model: {name} is {there} there and {here} here; use the config that it was made with"
            )
