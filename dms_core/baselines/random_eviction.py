"""Random eviction: once over the budget, a new token takes the slot of one that is drawn uniformly.  A floor.

The draw is a hash of (stream, position, layer, head), so it depends on nothing else in the batch.  Sampling gives
each chain a stream of its own; evictions within a prompt are those of the one prefill that its chains share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, BaselineLayer

STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64 (Steele et al. 2014), in two's complement
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


class RandomEvictionLayer(BaselineLayer):
    evicts_first = True

    def _allocate(self) -> None:
        super()._allocate()
        self.stream = self._counter(self.batch)
        self.head = torch.arange(self.heads, device=self.like.device) + (self.index << 12)
        self.per_row.append("stream")

    def _place(self) -> Tensor:
        counter = (self.seen[:, None] << 24) + self.head
        drawn = scramble(self.stream[:, None] + self.method.seed + counter * STEP) % self.budget[:, None]
        return torch.where((self.seen < self.budget)[:, None], self.seen[:, None], drawn)


def scramble(x: Tensor) -> Tensor:
    """A hash of int64 numbers, 0 .. 2^63 - 1."""
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x & ((1 << 63) - 1)


@dataclass(frozen=True)
class RandomEviction(Baseline):
    seed: int = 0

    name = "random"
    layer = RandomEvictionLayer
