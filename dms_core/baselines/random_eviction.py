"""Random eviction: once over the budget, a new token takes the slot of one that is drawn uniformly.  A floor.

With a protected prompt this is Random Attention (Wang et al., arXiv 2609.03430), by its abstract: the prompt is kept,
and each head evicts of what was generated uniformly at random.  Here one token goes at each step, so one that is n
steps old is still there with probability (1 - 1 / room)^n, room being what the prompt leaves of the budget.

The draw is a hash of (stream, position, layer, head), so it depends on nothing else in the batch.  Sampling gives
each chain a stream of its own; evictions within a prompt are those of the one prefill that its chains share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, BaselineLayer
from dms_core.noise import GOLDEN, splitmix64


class RandomEvictionLayer(BaselineLayer):
    method: "RandomEviction"
    evicts_first = True

    def _allocate(self) -> None:
        super()._allocate()
        first = self.split.rank % self.split.parts * self.heads  # of this process
        self.head = torch.arange(self.heads, device=self.like.device) + first + (self.index << 12)

    def _place(self) -> Tensor:
        counter = (self.seen[:, None] << 24) + self.head
        drawn = splitmix64(self.stream + self.method.seed + counter * GOLDEN) & (2**63 - 1)
        drawn = self.pinned[:, None] + drawn % (self.budget - self.pinned)[:, None]
        return torch.where((self.seen < self.budget)[:, None], self.seen[:, None], drawn)


@dataclass(frozen=True)
class RandomEviction(Baseline):
    seed: int = 0

    name = "random"
    layer = RandomEvictionLayer
