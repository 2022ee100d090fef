"""Which items are in which batch: {"item_BxS": the S items of every example, "weight_B"}, by the number of the batch."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

Address = dict[str, np.ndarray]


def train_addresses(stack: int, items: Sequence[int] | np.ndarray) -> Address:
    """The address of a batch of training examples, `stack` items each."""
    item_BxS = np.asarray(items).reshape(-1, stack)
    return {"item_BxS": item_BxS, "weight_B": np.ones(len(item_BxS))}


@dataclasses.dataclass(frozen=True)
class ListedAddresses:
    """Addresses of the training batches, from epochs that are listed."""

    items: int
    stack: int
    batch: int
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, n: int) -> Address:
        each = self.batch * self.stack
        epoch_N, place_N = np.divmod(np.arange(n * each, (n + 1) * each), self.items)
        parts = [_epoch(self.items, self.seed, epoch)[place_N[epoch_N == epoch]] for epoch in np.unique(epoch_N).tolist()]
        return train_addresses(self.stack, np.concatenate(parts))


@functools.lru_cache(maxsize=3)  # threads that read ahead are in two at once
def _epoch(items: int, seed: int, epoch: int) -> np.ndarray:
    """item_N: the order of all items in that epoch, an independent one for every (seed, epoch)."""
    # Of numpy's generators, the one whose numbers are promised not to change with its version.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch)))).permutation(items)


@dataclasses.dataclass(frozen=True)
class HeldOutAddresses:
    """Addresses of the test batches: every evaluated example once, in order; copies of the last one at weight 0 fill up."""

    evaluated: Sequence | np.ndarray
    batch: int

    def __len__(self) -> int:
        return -(-len(self.evaluated) // self.batch)

    def __getitem__(self, n: int) -> Address:
        position_B, size = n * self.batch + np.arange(self.batch), len(self.evaluated)
        item_BxS = np.array([self.evaluated[int(position)] for position in np.minimum(position_B, size - 1)])
        return {"item_BxS": item_BxS.reshape(self.batch, -1), "weight_B": position_B < size}
