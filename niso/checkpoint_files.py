"""What finished checkpoints hold, read without the run that made them."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Sharding
from orbax.checkpoint import args as ocp_args

from niso.errors import UserError

FOLDER = "checkpoints"


def replicas_of(saved: dict[str, Any]) -> int:
    """How many replicas a run with this saved config has; their arrays have a leading axis where it is more than one."""
    return saved.get("seeds", 1)


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
        check_shapes({n: s.shape for n, s in wanted.items()}, {n: tuple(s.shape) for n, (s, _) in saved.items()}, str(path))
        item: dict[str, dict] = {}
        for name, leaf in wanted.items():
            struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place[name])
            item.setdefault(saved[name][1], {})[name] = struct
        args = ocp_args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
        restored = reader.restore(path, args=args)
    return {name: leaf for part in restored.values() for name, leaf in part.items()}


def _flat_params(saved: Any) -> dict[str, tuple[Any, str]]:
    """Path -> (metadata, "params" or "frozen")."""
    return {name: (leaf, part) for part in ("params", "frozen") for name, leaf in (saved.get(part) or {}).items()}


def check_shapes(wanted: dict[str, tuple], saved: dict[str, tuple], where: str, surplus: Sequence[str] = ()) -> None:
    """Raises UserError naming the first leaf that differs: orbax itself would print a thousand lines."""
    for name in (*wanted, *surplus):
        here, there = wanted.get(name, "absent"), saved.get(name, "absent")
        if here != there:
            raise UserError(
                f"{where} does not fit this model: {name} is {there} there and {here} here; use the config that it was made with"
            )
