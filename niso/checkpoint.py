"""Checkpoints: resume, save, preemption. The only file that writes into the checkpoint folder.

A checkpoint is the TrainState and the resolved config; its step is the position in the data stream. It is written
asynchronously under a temporary name and renamed when complete, so a kill at any moment leaves only whole checkpoints.
"""

import json
import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from niso import __version__, config
from niso.checkpoint_files import FOLDER, check_shapes
from niso.errors import UserError
from niso.step import Program, TrainState


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
        check_shapes(here, there, f"{self.folder}/{step}", sorted(there.keys() - here.keys()))
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
