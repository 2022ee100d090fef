"""What finished checkpoints hold, read without the run that made them: exactly what was saved, or an error.

A checkpoint is a folder with the arrays of a TrainState in `state` and, in `meta`, the resolved config, a checksum of every
array and one of all this. Those of an older niso have no checksums, and are read without.
"""

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import args as ocp_args

from niso import checksums, folders
from niso.errors import LostError, UserError

FOLDER = "checkpoints"
Shapes = dict[str, tuple[int, ...]]  # by path
LOST = "lost: "  # what processes tell each other of a bucket that cannot be asked
UNREACHABLE = re.compile(
    r"UNAVAILABLE|PERMISSION_DENIED|DEADLINE_EXCEEDED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|CURL error|Bad Request: |"
    r"HTTP response code: (?!404|412|416)[45]\d\d"  # those: there is no such object, or not with so many bytes
)
NAMES = re.compile(r'"[^"]*"|\w+://\S+')  # in which such words may stand too
T = TypeVar("T")


class DamagedError(UserError):
    """A checkpoint that cannot be read, or not as it was saved; `reason` says why."""

    def __init__(self, path: Path, reason: str):
        self.reason = reason
        super().__init__(
            f"the checkpoint {path} cannot be used ({reason}): move it away, then run the training command again or take an "
            "older checkpoint"
        )


def find(run: str | os.PathLike[str], step: int | None = None) -> Path:
    """The folder of a run's checkpoint: of its newest one, or of that after `step` updates.

    Raises:
      UserError: there is none.
    """
    folder = folders.absolute(folders.named(run, "the run")) / FOLDER
    try:
        steps = sorted(ocp.utils.checkpoint_steps(folder)) if folders.kind(folder) == "folder" else []
    except folders.failures() as error:
        raise folders.complaint(folder, error, f"cannot read {folder}") from None
    if not steps:
        raise UserError(f"no checkpoint in {folder}; train that run first")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def write_meta(resolved: dict[str, Any], version: str, state: Any) -> dict[str, Any]:
    """What `meta` holds for a state made under the resolved config; all processes have to call it."""
    meta = {"config": jsonable(resolved), "niso": version, "arrays": checksums.of(state)}
    return meta | {"checksum": _checksum(meta)}


def read_meta(path: Path) -> dict[str, Any]:
    """What `meta` holds: "config", and in checkpoints with checksums "arrays", {path: [shape, checksum]}. Tuples are lists.

    Raises:
      DamagedError: it cannot be read.
    """

    def read() -> dict[str, Any]:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(path / "meta", args=ocp_args.JsonRestore())
        if not isinstance(meta["config"], dict):
            raise ValueError("no config in it")
        if ("arrays" in meta or "checksum" in meta) and meta.pop("checksum") != _checksum(meta):
            raise ValueError("meta is not as it was saved")
        return meta

    return _together(path, read)


def saved_config(path: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was made under; tuples have become lists.

    Raises:
      DamagedError: it cannot be read.
    """
    return read_meta(path)["config"]


def replicas_of(saved: dict[str, Any]) -> int:
    """How many replicas a run with this saved config has; their arrays have a leading axis where it is more than one."""
    return saved.get("seeds", 1)


def state(path: Path, wanted: T) -> T:
    """The whole state, in the shapes, types and shardings of `wanted`, whatever devices it was saved from.

    Raises:
      UserError: it has other arrays, or of other shapes.
      DamagedError: it cannot be read, or is not what was saved.
    """
    there = _shapes_there(path)
    check_shapes(_shapes(wanted), there, str(path), sorted(there.keys() - _shapes(wanted).keys()))
    return _restore(path, ocp.StandardCheckpointHandler, ocp_args.StandardRestore(wanted))


def parameters(path: Path, wanted: dict[str, Any], place: Mapping[str, Sharding]) -> dict[str, Array]:
    """Some of a checkpoint's parameters by path, trained or frozen there, and nothing else of it, where `place` wants them.

    Args:
      wanted: path -> what has the parameter's shape and dtype.

    Raises:
      UserError: one is absent there, or of another shape.
      DamagedError: it cannot be read, or is not what was saved.
    """
    there = _shapes_there(path)
    parts = {name: part for part in ("params", "frozen") for name in wanted if f"{part}.{name}" in there}
    found = {name: there[f"{part}.{name}"] for name, part in parts.items()}
    check_shapes({name: leaf.shape for name, leaf in wanted.items()}, found, str(path))
    item: dict[str, dict] = {}
    for name, leaf in wanted.items():
        item.setdefault(parts[name], {})[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place[name])
    args = ocp_args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
    restored = _restore(path, ocp.PyTreeCheckpointHandler, args)
    return {name: leaf for part in restored.values() for name, leaf in part.items()}


def jsonable(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as JSON gives it back."""
    return json.loads(json.dumps(resolved))


def check_shapes(wanted: Shapes, saved: Shapes, where: str, surplus: Sequence[str] = ()) -> None:
    """Raises UserError naming the first leaf that differs: orbax itself would print a thousand lines."""
    for name in (*wanted, *surplus):
        here, there = wanted.get(name, "absent"), saved.get(name, "absent")
        if here != there:
            raise UserError(
                f"{where} does not fit this model: {name} is {there} there and {here} here; use the config that it was made with"
            )


def _shapes_there(path: Path) -> Shapes:
    """Shapes of a checkpoint's arrays by path."""
    arrays = read_meta(path).get("arrays")
    if arrays is not None:
        return {name: tuple(shape) for name, (shape, _) in arrays.items()}

    def read() -> Shapes:
        # Not PyTreeCheckpointer().metadata: that warns, on the terminal, of a file that a manager keeps one folder further up.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            return _shapes(reader.metadata(path / "state").tree)

    return _together(path, read)


def _shapes(tree: Any) -> Shapes:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _restore(path: Path, handler: Callable[[], Any], args: Any) -> Any:
    """The arrays that `args` ask for, compared with their checksums."""

    def read() -> Any:
        with contextlib.closing(handler()) as reader:
            return reader.restore(path / "state", args=args)

    restored = _together(path, read)
    arrays = read_meta(path).get("arrays")
    if arrays is not None:
        changed = [name for name, found in checksums.of(restored).items() if found != arrays.get(name)]
        if changed:
            raise DamagedError(path, f"{changed[0]} is not as it was saved")
    return restored


def _together(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; where it fails in one process of the run, all raise the same.

    Each process reads its own parts of the arrays, and would wait for ever for one that goes on with another checkpoint.

    Raises:
      DamagedError: `read` failed, and not for want of memory, nor because the bucket could not be asked.
      LostError: it could not: that says nothing of the checkpoint.
    """
    found, reason = None, ""
    try:
        found = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # damaged bytes make orbax, zarr and JSON raise whatever they stumble over
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = (LOST if folders.remote(path) and _unreachable(error) else "") + _reason(error)
        hush()
    if jax.process_count() > 1:
        mine = np.frombuffer(reason.encode()[:400].ljust(400), np.uint8)
        said = [bytes(row).decode(errors="replace").strip() for row in multihost_utils.process_allgather(mine)]
        reason = max(said, key=lambda one: (one.startswith(LOST), bool(one)))
    if reason.startswith(LOST):
        raise LostError(f"cannot read the checkpoint {path} ({reason.removeprefix(LOST)}); run the same command again")
    if reason:
        raise DamagedError(path, reason)
    return found  # type: ignore[return-value]


def _unreachable(error: BaseException | None) -> bool:
    """Whether a bucket could not be asked, by an error or its causes: fsspec's, or tensorstore's, which are told by their words."""
    while error is not None:
        if isinstance(error, folders.failures()) and not isinstance(error, FileNotFoundError | FileExistsError):
            return True
        if UNREACHABLE.search(NAMES.sub("", str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    """The first cause, without tensorstore's specification of the array."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).partition(" [")[0].partition(" See full TensorStore")[0]
    return f"{type(error).__name__}: {text}"[:300]


@functools.cache
def hush() -> None:
    """From here on only the first of the many readers or writers that fail together is told of, by what is raised.

    It ends the loop that the others report to: asyncio, or Python, would print each of them.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    default = sys.unraisablehook

    def hook(seen: "sys.UnraisableHookArgs") -> None:
        if not inspect.iscoroutine(seen.object) and "Event loop is closed" not in str(seen.exc_value):
            default(seen)

    sys.unraisablehook = hook


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
