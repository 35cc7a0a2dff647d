"""H2O (Zhang et al. 2023): half the budget for the most recent tokens, half for heavy hitters.

A heavy hitter has received much attention so far, summed over the queries since it came, per KV head (over the query
heads of its group).  A step attends to budget + 1 items, the newest included, and drops the least among the others.
With a protected prompt both halves are of what it leaves of the budget.
"""

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, put_at
from dms_core.baselines.tova import EvictLater


class H2OLayer(EvictLater):
    scored = True

    def _allocate(self) -> None:
        super()._allocate()
        self.scores = torch.zeros(self.batch, self.heads, 0, device=self.like.device)
        self.position = self._counter(self.batch, self.heads, 0)
        self.per_slot += ["scores", "position"]

    def _write(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        super()._write(slot, k, v)
        put_at(self.scores, slot, self.scores.new_zeros(slot.shape))
        put_at(self.position, slot, self.seen[:, None].expand_as(slot))

    def _observe(self, weights: Tensor, count: Tensor, active: Tensor) -> None:
        scores, position = self.scores[:, :, : self.width], self.position[:, :, : self.width]
        scores += weights.sum(2) * active[:, None, None]
        room = self.budget - self.pinned
        recent = position > (self.seen - (room + 1) // 2)[:, None, None]  # the newest is at ``seen``
        self._evict(scores.masked_fill(recent, torch.inf), count, active)

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        past = received.shape[2] - q.shape[2]
        self.scores[:, :, :past] += received[:, :, :past]
        row, at = (torch.arange(q.shape[2], device=q.device) < dense[:, None]).nonzero(as_tuple=True)
        slot = self.held[row] + at
        self.scores[row, :, slot] = received[row, :, past + at]
        self.position[row, :, slot] = (self.seen[row] + at)[:, None]
        super()._after_dense(q, received, dense, fresh, scale)


class H2O(Baseline):
    name = "h2o"
    layer = H2OLayer
