"""Alternating measurements, and their report: a table for people, JSON for programs."""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jaxlib
import numpy as np

Name = TypeVar("Name", bound=Hashable)


def times_ms(
    functions: Mapping[Name, Callable[[], Any]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, list[float]]:
    """Milliseconds of every function in every round, each waited for until its arrays are there.

    First all are compiled and run twice; then in each round every function runs once, in turn, so that whatever else the
    machine does at a time falls on all of them. `clock` returns seconds.
    """
    for _ in range(2):
        for function in functions.values():
            jax.block_until_ready(function())
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            times[name].append(1e3 * (clock() - start))
    return times


def median_ms(
    functions: Mapping[Name, Callable[[], Any]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, float]:
    """Medians over the rounds of `times_ms`."""
    return {name: statistics.median(taken) for name, taken in times_ms(functions, rounds, clock=clock).items()}


def readable(value: Any) -> str:
    """A table's cell: three significant digits without exponents, thousands in groups, a dash for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 9)}f}"


def print_line(cells: Sequence[Any], widths: Sequence[int]) -> None:
    """One row of a table, at once: the first two columns to the left, numbers to the right."""
    texts = [readable(cell) for cell in cells]
    aligned = [
        f"{text:<{width}}" if i < 2 else f"{text:>{width}}" for i, (text, width) in enumerate(zip(texts, widths, strict=True))
    ]
    print("  ".join(aligned).rstrip(), flush=True)


def surroundings() -> dict[str, Any]:
    """What a measurement depends on beside the code: device, versions, date."""
    devices = jax.devices()
    device = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "cores": os.cpu_count()}
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {"device": device, "versions": versions, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}


def print_surroundings() -> None:
    """The first line of a benchmark's output."""
    found = surroundings()
    device, versions = found["device"], found["versions"]
    name = f"{device['kind']} x {device['count']} ({device['platform']}; host with {device['cores']} cores)"
    print(f"{name}, jax {versions['jax']}, {found['date']}", flush=True)


def json_file(text: str) -> pathlib.Path:
    """The argument of --json, refused before minutes are spent on measuring."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file in a folder that exists")
    return path


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def write(path: pathlib.Path | None, argv: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """The report as JSON: device, versions, date, argv, rows. Nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(surroundings() | {"argv": list(argv), "rows": list(rows)}, indent=1) + "\n")
