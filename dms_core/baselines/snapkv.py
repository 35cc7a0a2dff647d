"""SnapKV (Li et al. 2024): of the prompt, keep what its last queries attend to; of what is generated, everything.

The queries of an observation window at the prompt's end vote: their attention to each earlier token is summed, pooled
over neighbours (so that clusters stay whole), and summed over the query heads of a group.  Those with the most votes
stay, and the window.  SnapKV selects once, so its budget can only be a share of the prompt: prompt / CR tokens.  In a
long chain of thought nothing that is generated is compressed, and the ratio over the whole text tends to 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from dms_core.baselines.base import Baseline, BaselineLayer, attention
from dms_core.cache.base import take


class SnapKVLayer(BaselineLayer):
    method: "SnapKV"
    keeps_all = True

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        super()._after_dense(q, received, dense, fresh, scale)
        rows = fresh.nonzero()[:, 0]  # a later turn is not compressed
        if not len(rows):
            return
        length, keep = dense[rows], torch.minimum(self.budget[rows], dense[rows])
        slot = torch.arange(int(length.max()), device=q.device)
        window = self.method.observed(keep)
        votes = self._votes(q[rows], self.keys[rows, :, : len(slot)], length, window, scale)  # (N, H, S)
        votes = votes.masked_fill((slot >= (length - window)[:, None])[:, None], torch.inf)
        votes = votes.masked_fill((slot >= length[:, None])[:, None], -torch.inf)
        self._keep_best(rows, votes, keep)

    def _votes(self, q: Tensor, k: Tensor, length: Tensor, window: Tensor, scale: float) -> Tensor:
        """q (N, Hq, T, D), k (N, H, S, D), length and window (N,): what each token before the window got, (N, H, S)."""
        slot, turn = torch.arange(k.shape[2], device=q.device), torch.arange(int(window.max()), device=q.device)
        at = (length - window)[:, None] + turn  # (N, W): the window's positions
        queries = take(q, at.clamp_max(q.shape[2] - 1)[:, None].expand(-1, q.shape[1], -1))
        visible = (slot <= at[..., None])[:, None, None]  # (N, 1, 1, W, S)
        weights = attention(queries.unflatten(1, (self.heads, -1)), k, k, visible, scale, self.sinks)[1]
        votes = (weights * (turn < window[:, None])[:, None, None, :, None]).sum(3)  # (N, H, G, S)
        votes = votes * (slot < (length - window)[:, None])[:, None, None]
        pool: Any = {"max": max_pool1d, "avg": avg_pool1d}[self.method.pool]
        kernel = self.method.kernel
        return pool(votes.flatten(0, 1), kernel, stride=1, padding=kernel // 2).view_as(votes).sum(2)


@dataclass(frozen=True)
class SnapKV(Baseline):
    """Defaults are the paper's settings for LongBench."""

    window: int = 32  # observing queries; at most half of what a row keeps, which short prompts meet
    kernel: int = 7  # tokens pooled
    pool: str = "max"  # or "avg"

    name = "snapkv"
    layer = SnapKVLayer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect:
            raise ValueError("protect True: must be False, SnapKV compresses nothing but the prompt")
        if self.window < 1:
            raise ValueError(f"window {self.window}: must be >= 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: must be odd and >= 1")
        if self.pool not in ("max", "avg"):
            raise ValueError(f"pool {self.pool!r}: must be 'max' or 'avg'")

    def budget(self, prompt: Tensor, max_new_tokens: int) -> Tensor:
        """Tokens of the prompt that stay: (B,), at least 1."""
        return super().budget(prompt, 0)

    def observed(self, keep: Tensor) -> Tensor:
        """Queries that vote in rows that keep ``keep`` (N,) tokens."""
        return (keep // 2).clamp(1, self.window)
