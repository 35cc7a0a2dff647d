"""TOVA (Oren et al. 2024): drop the token to which the current query attends least, argmin_j of sum_h a_h(t)_j.

The sum is over all query heads of a layer, so its KV heads keep the same tokens (the paper's layer-wise form, in which
its results are).  Any token may go, the newest included.  A step attends to budget + 1 items and leaves budget.
"""

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, BaselineLayer


class EvictLater(BaselineLayer):
    """A layer that evicts after a step, by what was attended to; ``free`` (B, H) is the slot of the next token."""

    def _allocate(self) -> None:
        super()._allocate()
        self.free = self._counter(self.batch, self.heads)
        self.per_row.append("free")

    def _place(self) -> Tensor:
        return self.free

    def _evict(self, worth: Tensor, count: Tensor, active: Tensor) -> None:
        """Rows with ``count`` (B,) beyond their budget lose the token of least ``worth``, (B, H or 1, width)."""
        slot = torch.arange(self.width, device=count.device)
        stays = (slot >= count[:, None]) | (slot < self.pinned[:, None])
        worth = worth.masked_fill(stays[:, None], torch.inf)
        free = torch.where((count > self.budget)[:, None], worth.argmin(-1), count[:, None])
        self.free = torch.where(active[:, None], free, self.free)

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        super()._after_dense(q, received, dense, fresh, scale)
        self.free = torch.where((dense > 0)[:, None], self.held[:, None], self.free)


class TOVALayer(EvictLater):
    def _observe(self, weights: Tensor, count: Tensor, active: Tensor) -> None:
        self._evict(self.split.sum(weights.sum((1, 2)))[:, None], count, active)


class TOVA(Baseline):
    name = "tova"
    layer = TOVALayer
