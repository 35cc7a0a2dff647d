"""DMC's cache: per (batch row, KV head) a growing list of entries, of which the last is open to more tokens.

Dense storage (B, H, S, D) with a count a row: a baseline, not a paged pool.  Keys are held rotated; the open entry
also as the unrotated sum over its tokens, so that the next token can be added to it before RoPE.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_core.baselines.base import DenseLayer
from dms_core.cache.base import RowCache, take, tokens_first
from dms_kernels.cpu.dense import masked_attention

GROW = 64  # entries by which storage grows


def running_average(x: Tensor, alpha: Tensor, weight: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_(t-1) + weight_t [x_t, 1] at every t, by an associative scan.

    x (B, H, T, D); alpha, weight (B, H, T); carry (B, H, D + 1): S before the first token, or None for none.
    Returns the averages S[..., :D] / S[..., D] in x's dtype, and S after the last token (B, H, D + 1) in fp32.
    """
    sums = torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float)], -1) * weight[..., None]
    share = alpha[..., None]
    if carry is not None:
        sums = torch.cat([sums[:, :, :1] + share[:, :, :1] * carry[:, :, None], sums[:, :, 1:]], 2)
    reach = 1  # sums[t] covers the tokens t - reach + 1 ... t, share[t] is the product over them
    while reach < x.shape[2]:
        taken = sums[:, :, reach:] + share[:, :, reach:] * sums[:, :, :-reach]
        sums = torch.cat([sums[:, :, :reach], taken], 2)
        share = torch.cat([share[:, :, :reach], share[:, :, reach:] * share[:, :, :-reach]], 2)
        reach *= 2
    average = sums[..., :-1] / sums[..., -1:].clamp_min(torch.finfo(torch.float).tiny)
    return average.to(x.dtype), sums[:, :, -1]


class DMCLayer(DenseLayer):
    """One layer's rows.  ``open`` is for the hooks that merge; ``attend`` stores the entries and answers queries."""

    def _allocate(self) -> None:
        super()._allocate()
        self.per_row += ["length", "open"]
        self.length = torch.zeros_like(self.reads)
        size = (self.batch, self.heads, 2, self.like.shape[-1] + 1)
        self.open = self.keys.new_zeros(size, dtype=torch.float)  # sums of the open entry: of keys, of values
        self.bound = 0  # no row has more entries; known without asking the device

    @property
    def live(self) -> Tensor:
        """Entries, (B, H)."""
        return self.length

    @property
    def lasting(self) -> Tensor:
        """Entries that no token joins any more, (B, H)."""
        return (self.length - 1).clamp_min(0)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.open.nbytes

    def trim(self) -> None:
        self.bound = int(self.length.max())
        self.keys, self.values = (x[:, :, : self.bound].clone() for x in (self.keys, self.values))

    # Storing and attending.

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, merged: Tensor, valid: Tensor, scale: float, sinks=None
    ) -> Tensor:
        """Store new entries and attend to what the queries may see.

        q (B, Hq, T, D); k, v (B, H, T, D): every token's entry as it stands after that token, rotated; merged
        (B, H, T): it takes over the entry before it; valid (B, T), False for padding and idle rows.
        """
        self.unread = False
        self.keys, self.values = self.keys.to(k.dtype), self.values.to(v.dtype)
        if q.shape[2] == 1:
            self._append(k, v, merged[:, :, 0], valid[:, :1])
            live = torch.arange(self.bound, device=q.device) < self.length[..., None].clamp_min(1)
            k, v = self.keys[:, :, : self.bound], self.values[:, :, : self.bound]
            return masked_attention(q, k, v, live[:, :, None], scale, sinks)
        return self._prefill(q, k, v, merged & valid[:, None], valid, scale, sinks)

    def _append(self, k: Tensor, v: Tensor, merged: Tensor, active: Tensor) -> None:
        """One token a row: k, v (B, H, 1, D), merged (B, H), active (B, 1)."""
        if self.bound == self.capacity:  # the one wait for the device, at most each GROW / 2 steps
            self.bound = int(self.length.max()) if self.bound else 0
            self._reserve(self.bound + GROW // 2)
        self.bound += 1
        self.length += ~merged & active
        slot = (self.length - 1).clamp_min(0)[..., None, None].expand_as(k)
        for held, new in ((self.keys, k), (self.values, v)):
            held.scatter_(2, slot, torch.where(active[..., None, None], new, held.gather(2, slot)))
        self.seen += active[:, 0]
        self._count_reads(self.length, active[:, 0])

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, merged: Tensor, valid: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        order = tokens_first(valid)[:, None]
        q, k, v = (take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
        merged, valid = merged.gather(2, order.expand_as(merged)), valid.gather(1, order[:, 0])
        tokens, held = q.shape[2], int(self.length.max())
        place = torch.arange(held, device=q.device)
        taken = (merged & (valid.cumsum(1) == 1)[:, None]).any(2, keepdim=True)  # the first token takes the open entry
        past = place < self.length[..., None] - taken.long()  # (B, H, held)
        stays = valid[:, None].expand_as(merged) & ~F.pad(merged, (0, 1))[..., 1:]
        behind = torch.arange(tokens, device=q.device)[:, None] - torch.arange(tokens, device=q.device)
        new = (behind == 0) | ((behind > 0) & stays[:, :, None])  # (B, H, T, T)
        visible = torch.cat([past[:, :, None].expand(-1, -1, tokens, -1), new], 3)
        k, v = torch.cat([self.keys[:, :, :held], k], 2), torch.cat([self.values[:, :, :held], v], 2)
        out = masked_attention(q, k, v, visible, scale, sinks)

        kept = torch.cat([past, stays], 2)
        self.length = kept.sum(2)
        self.bound = int(self.length.max())
        first = tokens_first(kept)[..., : self.bound]
        self.keys, self.values = take(k, first), take(v, first)
        self.seen = self.seen + valid.sum(1)
        return take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1))

    def _reserve(self, slots: int) -> None:
        if slots > self.capacity:
            super()._reserve(-(-slots // GROW) * GROW)

    def _copy(self, indices: Tensor, other: "DMCLayer", source: Tensor) -> None:
        super()._copy(indices, other, source)
        self.bound = max(self.bound, other.bound)


class DMCCache(RowCache):
    """A cache for a model prepared by ``attach_dmc``, with DMSCache's counters and row operations."""

    def __init__(self, config, layers: int) -> None:
        super().__init__([DMCLayer() for _ in range(layers)])
        self.config = config

    def _new(self) -> "DMCCache":
        return DMCCache(self.config, len(self.layers))
