"""R-KV (Cai et al. 2025, arXiv 2505.24133): keep what the latest queries attend to and what no other key resembles.

Generated tokens fill a buffer.  When a row is full, each KV head keeps the ``window`` newest tokens, whose queries
observe, and of the others those with the largest ``mix`` * importance - (1 - ``mix``) * redundancy:

- importance: per KV head the largest logit of its group's query heads, softmax over the tokens that may go, mean over
  the observing queries, largest of ``kernel`` neighbours in the cache;
- redundancy: cosine similarity of the held keys, nothing with itself.  Of the keys more similar to a key than
  ``threshold`` the latest is let off: that similarity counts 0.  Mean over all keys, softmax over all.

Where the paper leaves room, this follows the authors' code: the group's largest logit, a softmax over the tokens that
may go alone, keys after RoPE, one latest key let off.  There a key like no other lets off the first token; here none.
The budget is all that a row may hold, the full buffer included, where the paper counts the buffer on top; a short
budget gives at most half of itself to the buffer.  The prompt may go unless protected; then it takes part in the
scores and stays whatever they say.  A row makes room just before the token that would not fit, in a long prompt too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from dms_core.baselines.base import Baseline, BaselineLayer


class RKVLayer(BaselineLayer):
    method: "RKV"

    def _allocate(self) -> None:
        super()._allocate()
        # The latest queries (B, window, Hq, D), the newest last; how many heads ask is known with the first.
        self.queries = self.like.new_zeros(self.batch, self.method.window, 0, self.like.shape[-1])
        self.per_row.append("queries")

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.queries.nbytes

    def _copy(self, indices: Tensor, other: "RKVLayer", source: Tensor) -> None:
        self._widen(other.queries.shape[2])
        other._widen(self.queries.shape[2])  # where it has had no token yet
        super()._copy(indices, other, source)

    def _widen(self, heads: int) -> None:
        if heads > self.queries.shape[2]:
            self.queries = self.queries.new_zeros(*self.queries.shape[:2], heads, self.queries.shape[3])

    def _step(self, q: Tensor, k: Tensor, v: Tensor, active: Tensor, scale: float, counts: bool) -> Tensor:
        rows = (active & (self.seen > 0) & (self.held >= self.budget)).nonzero()[:, 0]  # waits for the device
        if len(rows):
            self._compress(rows, scale)
        self._remember(q, active.long())
        return super()._step(q, k, v, active, scale, counts)

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        super()._after_dense(q, received, dense, fresh, scale)
        self._remember(q, dense)

    def _remember(self, q: Tensor, count: Tensor) -> None:
        """Each row's first ``count`` (B,) of the queries q (B, Hq, T, D) are its latest."""
        self._widen(q.shape[1])
        both = torch.cat([self.queries, q.transpose(1, 2)], 1)
        at = count[:, None] + torch.arange(self.method.window, device=q.device)
        self.queries = both.gather(1, at[..., None, None].expand_as(self.queries))

    def _compress(self, rows: Tensor, scale: float) -> None:
        """``rows`` (N,), which are full, go down to what stays while the buffer fills."""
        self.peak[rows] = torch.maximum(self.peak[rows], self.live[rows])
        held, pinned = self.held[rows], self.pinned[rows]
        keep, window = self.method.sizes(held - pinned)
        keys = self.keys[rows, :, : self.width]
        slot = torch.arange(keys.shape[2], device=keys.device)
        there, stays = slot < held[:, None], slot < pinned[:, None]  # (N, S)
        stays = stays | (slot >= (held - window)[:, None])
        worth = self.method.mix * self._importance(self.queries[rows], keys, there & ~stays, window, scale)
        worth -= (1 - self.method.mix) * redundancy(keys, there, self.method.threshold)
        worth = worth.masked_fill(stays[:, None], torch.inf).masked_fill(~there[:, None], -torch.inf)
        self._keep_best(rows, worth, pinned + keep)
        self._measure()

    def _importance(self, q: Tensor, k: Tensor, may_go: Tensor, window: Tensor, scale: float) -> Tensor:
        """q (N, W, Hq, D), k (N, H, S, D), may_go (N, S), window (N,) <= W latest queries: (N, H, S)."""
        grouped = (q.transpose(1, 2) * scale).unflatten(1, (k.shape[1], -1))  # (N, H, G, W, D)
        logits = torch.matmul(grouped, k[:, :, None].transpose(-1, -2)).float().amax(2)  # (N, H, W, S)
        weights = logits.masked_fill(~may_go[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
        observes = torch.arange(q.shape[1], device=q.device) >= q.shape[1] - window[:, None]
        mean = (weights * observes[:, None, :, None]).sum(2) / window.clamp_min(1)[:, None, None]
        return max_pool1d(mean, self.method.kernel, stride=1, padding=self.method.kernel // 2)


def redundancy(keys: Tensor, there: Tensor, threshold: float) -> Tensor:
    """How much each of the keys (N, H, S, D) that are ``there`` (N, S) resembles the others: (N, H, S), of sum 1."""
    unit = normalize(keys.float(), dim=-1)
    slot = torch.arange(keys.shape[2], device=keys.device)
    pair = there[:, None, :, None] & there[:, None, None] & (slot[:, None] != slot)
    alike = torch.matmul(unit, unit.transpose(-1, -2)).masked_fill(~pair, 0)  # (N, H, S, S)
    latest = torch.where((alike > threshold) & pair, slot, -1).amax(-1, keepdim=True)  # -1: like no other
    mean = alike.masked_fill(slot == latest, 0).sum(2) / there.sum(1)[:, None, None]
    return mean.masked_fill(~there[:, None], -torch.inf).softmax(-1)


@dataclass(frozen=True)
class RKV(Baseline):
    """Defaults are the authors', kernel and threshold from their code; short budgets want a smaller buffer."""

    buffer: int = 128  # generated tokens between two compressions; at most half of what the prompt leaves
    window: int = 8  # observing queries; at most what stays
    kernel: int = 7  # neighbours pooled
    mix: float = 0.1  # the weight of importance, lambda in the paper
    threshold: float = 0.5  # cosine similarity from which two keys say the same

    name = "rkv"
    layer = RKVLayer

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("buffer", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: must be odd and >= 1")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix {self.mix}: must be in 0..1")

    def sizes(self, room: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``room`` (N,) tokens beside a protected prompt, how many a compression keeps, and how many observe."""
        keep = room - (room // 2).clamp(1, self.buffer)
        return keep, keep.clamp_max(self.window)
