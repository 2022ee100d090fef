"""Exact means over a whole split, on any number of devices and hosts."""

from collections.abc import Iterator

import jax
import numpy as np

from niso import metrics
from niso.errors import UserError
from niso.step import Program, TrainState


def evaluate(program: Program, state: TrainState, batches: Iterator[dict[str, np.ndarray]]) -> list[dict[str, float]]:
    """Of every replica: name -> mean over every example of the split, each counted once (padding has weight 0).

    Totals and counts add up on the devices and are divided once, so the result does not depend on the batch size.
    """
    total = None
    for index, batch in enumerate(batches):
        measured = program.evaluate(state, program.place_test(batch), index)
        jax.block_until_ready(total)  # at most two batches in flight
        total = measured if total is None else metrics.add(total, measured)
    if total is None:
        raise UserError("the test split is empty: nothing to evaluate")
    return metrics.by_replica(total)
