"""A model of weak scaling: how long a step takes on more chips of one kind, each with the same work, from one compiled program.

  step = max(operations / (peak x EFFICIENCY), bytes moved / memory bandwidth) + exchanges

Pessimistic in that nothing overlaps: neither exchanges with the work nor, within an all-reduce, links with network. What is
summed over `data` takes bytes x 2 (n − 1) / n / link on the n chips that links join; beyond these every chip exchanges its part,
1/n of the bytes, with its equals in the other domains over the data center network. What is exchanged along `space` alone stays
between neighbours and takes bytes / link, on however many chips. Optimistic in that every chip is as fast as the next, and data
are always there.
"""

import dataclasses

from niso.cost import Collective
from niso.hardware import Chip

EFFICIENCY = 0.5  # assumed share of the peak that products and convolutions reach
MOST = 4096


@dataclasses.dataclass(frozen=True)
class Work:
    """One step of one chip: operations, those of them in full float32, bytes moved in its memory, bytes exchanged."""

    operations: float
    full: float
    moved: float
    summed: float
    exchanged: float

    @staticmethod
    def of(analysed: tuple[float, float], full: float, crossing: list[Collective]) -> "Work":
        """From `cost.analysed`, one chip's share of `cost.operations`'s full ones, and `cost.collectives`."""
        beyond = [c for c in crossing if c.axes != "space"]
        near = [c for c in crossing if c.axes == "space"]
        return Work(analysed[0], full, analysed[1], sum(c.bytes for c in beyond), sum(c.bytes for c in near))


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What one step takes on `chips` chips."""

    chips: int
    computing: float
    moving: float
    summing: float
    exchanging: float

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.computing, self.moving) + self.summing + self.exchanging


def predict(work: Work, chip: Chip, dtype: str, chips: int) -> Seconds:
    """A step on that many chips."""
    computing = ((work.operations - work.full) / chip.peak(dtype) + work.full / chip.full) / EFFICIENCY
    near = min(chips, chip.domain)
    summing = work.summed * 2 * (near - 1) / near / chip.link
    domains = -(-chips // near)
    if domains > 1:
        summing += work.summed / near * 2 * (domains - 1) / domains / chip.network
    return Seconds(chips, computing, work.moved / chip.bandwidth, summing, work.exchanged / chip.link)


def table(work: Work, chip: Chip, dtype: str, chips: int, batch: int) -> list[list[str]]:
    """Cells of a table with one row for `chips`, twice as many, and so on up to MOST; `batch` is that of the first row."""
    rows = [["chips", "batch", "computing ms", "memory ms", "all-reduce ms", "space ms", "step ms", "examples/s", "efficiency %"]]
    count = chips
    while count <= MOST:
        taken = predict(work, chip, dtype, count)
        alone = max(taken.computing, taken.moving) + taken.exchanging
        milliseconds = (taken.computing, taken.moving, taken.summing, taken.exchanging, taken.step)
        examples = batch * (count // chips)
        cells = [f"{1e3 * seconds:,.2f}" for seconds in milliseconds]
        rows.append([f"{count:,}", f"{examples:,}", *cells, f"{examples / taken.step:,.0f}", f"{100 * alone / taken.step:.1f}"])
        count *= 2
    return rows
