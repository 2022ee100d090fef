"""Checkpoints: resume, save, preemption. The only file that writes into the checkpoint folder.

A checkpoint is the TrainState and the resolved config; its step is the position in the data stream. It is written
asynchronously under a temporary name and renamed when complete, so a kill at any moment leaves only whole checkpoints. Where a
disk has damaged one nevertheless, the run goes on from the one before.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import args as ocp_args

from niso import __version__, checkpoint_files, config, folders
from niso.checkpoint_files import FOLDER, DamagedError
from niso.errors import LostError, UserError
from niso.step import Program, TrainState

UNREADABLE = "unreadable_checkpoints"  # beside the folder of the others
# Seconds for what is being written, where an error is on its way: by several processes, or by one into a bucket.
LONGEST, LONGEST_REMOTE = 20.0, 300.0
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, in `workdir`/checkpoints.

    Args:
      for_good: From `close` on SIGTERM is ignored: for a program that has nothing left to do then but to end as it was about to.

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(self, workdir: str, keep: int, *, for_good: bool = False):
        self.folder = folders.absolute(folders.named(workdir, "workdir")) / FOLDER
        self._made: list[Path] = []
        self._saving: int | None = None
        try:
            self._open_folder()
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        except folders.failures() as error:
            told = f"cannot write the run's folder {workdir}"
            raise folders.complaint(self.folder, error, told, "choose another with --workdir") from None
        checkpoint_files.hush()
        self._terminated = False
        self._previous_handler: Any = None
        if jax.process_count() == 1:  # with several, jax has a handler of its own and all agree on the step
            previous = signal.signal(signal.SIGTERM, self._on_sigterm)
            self._previous_handler = signal.SIG_IGN if for_good else previous

    def _open_folder(self) -> None:
        """Makes the folder, and sees that it can be written."""
        if folders.remote(self.folder):
            folders.probe(self.folder.parent)
            return
        self._made = [folder for folder in (self.folder, self.folder.parent) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(f"no permission to write in {self.folder}")

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none: what process 0 sees is so for all, who have to ask together."""
        return max(self._steps(), default=None)

    def newest(self) -> str:
        """The same, for a person who has to go on from there."""
        step = self.manager.latest_step()
        return "there is no checkpoint yet" if step is None else f"the newest checkpoint is step {step}"

    def check_config(self, resolved: dict[str, Any], accept_changes: bool) -> None:
        """Raises UserError, with the differences, where the newest checkpoint was made under another config."""
        if accept_changes or self.latest() is None:
            return
        changes = config.difference(self._first_sound(checkpoint_files.saved_config), resolved)
        if changes:
            raise UserError(
                f"{self.folder.parent} holds a run with another config ({'; '.join(changes)}): choose another --workdir, "
                "or resume under the new config with --accept_config_changes"
            )

    def restore(self, program: Program) -> TrainState:
        """The newest sound checkpoint's state, on the program's mesh whatever mesh it was saved from, bit for bit."""
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            program.state_shapes, program.state_sharding,
        )  # fmt: skip
        return self._first_sound(lambda path: checkpoint_files.state(path, wanted))

    def save(self, step: int, state: TrainState, resolved: dict[str, Any]) -> None:
        """Starts writing the state after `step` updates; returns once it is copied from the devices."""
        self._saving = step
        meta = checkpoint_files.write_meta(resolved, __version__, state)
        try:
            self.manager.save(
                step, args=ocp_args.Composite(state=ocp_args.StandardSave(state), meta=ocp_args.JsonSave(meta)), force=True
            )
        except folders.failures(ValueError) as error:
            raise self._failed(error) from error

    def preempted(self, step: int) -> bool:
        """Whether the machine is being taken away: true on all hosts at one agreed step."""
        if jax.process_count() > 1:
            return self.manager.reached_preemption(step)
        return self._terminated

    def close(self, failed: bool = False) -> None:
        """Waits for what is being written.

        Args:
          failed: the run ends by an error. Then one of several processes waits a while only: what it writes may in turn wait for
            others, which know nothing of the error before this one has left; and so does one that writes into a bucket, which may
            say nothing any more. Folders made here, and still empty, are removed.
        """
        try:
            if failed and (jax.process_count() > 1 or folders.remote(self.folder)):
                closing = threading.Thread(target=self._close_quietly, name="closing checkpoints", daemon=True)
                closing.start()
                alone = jax.process_count() == 1
                closing.join(LONGEST_REMOTE if alone else LONGEST)
                if alone and closing.is_alive() and self._saving is not None:
                    told = f"checkpoint {self._saving} was still being written {LONGEST_REMOTE:.0f} s after the error"
                    print(f"niso: {told}, and may be lost", file=sys.stderr, flush=True)
                return
            try:
                self.manager.wait_until_finished()
            except folders.failures(ValueError) as error:
                raise self._failed(error) from error
            finally:
                self.manager.close()
        finally:
            if self._previous_handler is not None:
                signal.signal(signal.SIGTERM, self._previous_handler)
                self._previous_handler = None
            for folder in self._made if failed else ():
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _close_quietly(self) -> None:
        with contextlib.suppress(Exception):  # the error that is on its way says more
            self.manager.close()

    def _steps(self) -> list[int]:
        """Steps of the checkpoints; in several processes those that the first one sees."""
        steps = list(self.manager.all_steps())
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            steps = multihost_utils.broadcast_one_to_all(np.resize(np.asarray(steps, np.int32), count)).tolist() if count else []
        return steps

    def _first_sound(self, read: Callable[[Path], T]) -> T:
        """What `read` makes of the newest checkpoint that it can; newer ones are moved aside, which is said.

        Raises:
          UserError: there is no such checkpoint; nothing has been moved.
        """
        damaged: list[tuple[int, str]] = []
        for step in sorted(self._steps(), reverse=True):
            try:
                found = read(self.folder / str(step))
            except DamagedError as error:
                damaged.append((step, error.reason))
                continue
            if damaged:
                self._set_aside(damaged, step)
            return found
        listed = "; ".join(f"{step}: {reason}" for step, reason in damaged)
        raise UserError(
            f"no checkpoint in {self.folder} can be used ({listed}): put a copy in its place, or choose another --workdir to "
            "train from scratch"
        )

    def _set_aside(self, damaged: list[tuple[int, str]], sound: int) -> None:
        # orbax skips steps that it has already; and a run that finds nothing to go on from must not start from scratch, so this
        # is done only once there is something, and the newest goes first.
        if jax.process_index() == 0:
            for step, reason in damaged:
                aside = self.folder.parent / UNREADABLE
                print(
                    f"niso: checkpoint {step} cannot be used ({reason}); going on from {sound}, and it goes to {aside}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                try:
                    if not folders.remote(aside):  # where every name may have slashes
                        aside.mkdir(exist_ok=True)
                    there = aside.iterdir() if aside.exists() else ()
                    taken = sum(path.name.partition(".")[0] == str(step) for path in there)
                    folders.move(self.folder / str(step), aside / (f"{step}.{taken}" if taken else str(step)))
                except folders.failures() as error:
                    told = f"cannot move {self.folder}/{step} to {aside}"
                    raise folders.complaint(aside, error, told, "move it by hand") from None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.manager.reload()

    def _failed(self, error: Exception) -> UserError:
        remedy = "run" if folders.remote(self.folder) else "free disk space and run"
        told = f"cannot write a checkpoint in {self.folder}: {folders.reason(error)}"
        told += f"; {self.newest()}: {remedy} the same command again to go on from there"
        return LostError(told) if folders.remote(self.folder) else UserError(told)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends a run that hangs


def write_config(workdir: str, resolved: dict[str, Any]) -> None:
    """The resolved config as `workdir`/config.json, replaced in one move."""
    path = folders.named(workdir) / "config.json"
    temporary = path if folders.remote(path) else path.with_suffix(".tmp")  # objects of a bucket appear whole
    try:
        temporary.write_text(json.dumps(checkpoint_files.jsonable(resolved), indent=2) + "\n")
        if temporary != path:
            temporary.replace(path)
    except folders.failures() as error:
        remedy = "make room there, then run the same command again"
        raise folders.complaint(path, error, f"cannot write {path}", remedy) from None
