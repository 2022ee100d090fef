"""Warm start: parameters taken from finished runs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array

from niso import tree
from niso.checkpoint_files import find, parameters, replicas_of, saved_config
from niso.errors import LostError, UserError
from niso.step import Program
from niso.tasks.base import Task


def take(spec: tuple[tuple[str, str], ...], program: Program) -> dict[str, Array]:
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


def check_sources(spec: tuple[tuple[str, str], ...]) -> list[Path]:
    """The checkpoints that a warm start takes from, looked for before anything slow is done.

    Raises:
      UserError: a run has none.
    """
    try:
        return [find(run) for _, run in spec]
    except UserError as error:
        kind = LostError if isinstance(error, LostError) else UserError
        raise kind(f"task.warm_start: {error}") from None


def _check_agreement(run: str, saved: dict[str, Any], task: Task) -> None:
    """Raises UserError where keys that give parameters their meaning, though not their shapes, differ from the run's."""
    now = json.loads(json.dumps({key: getattr(task, key) for key in task.inherited()}))  # tuples as lists, as in the saved ones
    for key, value in now.items():
        if key in saved and saved[key] != value:
            raise UserError(
                f"task.warm_start: {run} was trained with task.{key}={saved[key]}, here it is {value}; "
                f"set --config.task.{key}={saved[key]}, or start from another run"
            )
