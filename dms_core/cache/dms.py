"""A transformers cache that frees what is evicted (paper section 3.2).

Rows are (batch, KV head), ragged and paged.  Two rings of window + 1 cells remember, for the tokens still in
the window, their slot and what their gate said.  When a token leaves the window marked, the new token takes its
slot; otherwise the row grows by one.  Keys are cached after RoPE, so order inside a row does not matter.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dms_core.cache.base import RowCache, RowLayer, prepared, take, tokens_first
from dms_core.cache.pages import PagedRows, make_room
from dms_core.config import DMSConfig
from dms_kernels import Past, cache_step, prefill_attention


class DMSLayer(RowLayer):
    """One layer's rows.  ``attend`` stores the new tokens and answers their queries."""

    counters = ("peak",)

    def __init__(self, config: DMSConfig, page: int) -> None:
        super().__init__()
        self.config, self.page = config, page
        self.cells = config.window + 1

    def _allocate(self) -> None:
        self.rows = PagedRows.new(self.batch * self.heads, self.like, self.page, self.config.window)

    @property
    def count(self) -> Tensor:
        """Tokens that each batch row has taken in, padding excluded: (B,)."""
        return self.rows.seen.view(self.batch, self.heads)[:, 0].long()

    @property
    def live(self) -> Tensor:
        """Live tokens, (B, H)."""
        return self.rows.length.view(self.batch, self.heads)

    @property
    def reads(self) -> Tensor:
        """KV reads so far, (B, H)."""
        return self.rows.reads.view(self.batch, self.heads)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def trim(self) -> None:
        self.rows.trim()

    # Storing and attending.

    def row_numbers(self, batch_rows: Tensor) -> Tensor:
        """Numbers of the (batch, head) rows of some batch rows, in order."""
        return (batch_rows[:, None] * self.heads + torch.arange(self.heads, device=batch_rows.device)).flatten()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Store new tokens and attend to what they may see.

        q (B, Hq, T, D); k, v (B, H, T, D); evict (B, H, T): what each new token's gate says, about the token
        ``lag`` before it; valid (B, T), False for padding and idle rows, None: all are tokens.  Returns (B, Hq, T, D).
        """
        self.unread = False
        if q.shape[2] > 1:
            return self._prefill(q, k, v, evict, valid, scale)
        if not self.rows.credit:
            make_room([self.rows])
        self.rows.credit -= 1
        valid = torch.ones_like(evict[:, 0]) if valid is None else valid
        return cache_step(self.rows, q, k, v, evict, valid, self.config.lag, scale)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Many tokens a row, after any past: attend, then hold what stays."""
        lengths = torch.full_like(self.count, q.shape[2]) if valid is None else valid.sum(1)
        if valid is not None:  # tokens first, padding behind them
            order = tokens_first(valid)[:, None]
            q, k, v = (take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
            evict = evict.gather(2, order.expand(-1, self.heads, -1))
        says = torch.cat([self._ring(self.rows.ring_evict), evict], 2)  # what the window's and the new tokens say
        past = self._past()
        about = self._decisions(says, lengths)
        if past is None:
            about = about[..., self.cells :]
        out, kept = prefill_attention(q, k, v, about, self.config.window, past, lengths, scale)

        self.peak = torch.maximum(self.peak, self.rows.length.view_as(self.peak))
        count = self.count + lengths
        self.rows.load(kept.k.flatten(0, 1), kept.v.flatten(0, 1), kept.length.flatten())
        self.rows.seen.copy_(count.repeat_interleave(self.heads))
        steps = torch.arange(self.cells, device=k.device)
        cell = ((count[:, None] + steps) % self.cells)[:, None].expand(-1, self.heads, -1)  # oldest first
        slots = (kept.length[..., None] - self.cells + steps).clamp_min(0)
        said = says.gather(2, (lengths[:, None] + steps)[:, None].expand_as(cell))
        for ring, values in ((self.rows.ring_slot, slots.int()), (self.rows.ring_evict, said)):
            ring.view_as(cell).scatter_(2, cell, values)
        return take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1)) if valid is not None else out

    def _ring(self, ring: Tensor) -> Tensor:
        """A ring's cells in order of position, oldest first: (B, H, cells)."""
        steps = torch.arange(self.cells, device=ring.device)
        cell = ((self.count[:, None] + steps) % self.cells)[:, None].expand(-1, self.heads, -1)
        return ring.view(self.batch, self.heads, -1).gather(2, cell)

    def _decisions(self, says: Tensor, lengths: Tensor) -> Tensor:
        """At each token, what the token ``lag`` after it says about it; False while there is none."""
        there = torch.arange(says.shape[2], device=says.device) < self.cells + lengths[:, None]
        lag = min(self.config.lag, says.shape[2])
        about = torch.zeros_like(says)
        about[..., : says.shape[2] - lag] = (says & there[:, None])[..., lag:]
        return about

    def _past(self) -> Past | None:
        """What is held, the window's tokens apart."""
        k, v = (x.unflatten(0, (self.batch, self.heads)) for x in self.rows.read())
        held = k.shape[2]
        if held == 0:
            return None
        slot = self._ring(self.rows.ring_slot).long().clamp_max(held - 1)
        age = torch.arange(self.cells, 0, -1, device=slot.device)
        exists = (age <= self.count[:, None])[:, None].expand_as(slot)
        outside = torch.arange(held + 1, device=slot.device) < self.rows.length.view(self.batch, self.heads, 1)
        outside.scatter_(2, torch.where(exists, slot, held), False)
        outside = outside[..., :held]
        count = outside.sum(2)
        order = tokens_first(outside)  # their number is not asked for: that would wait for the device
        return Past(take(k, order), take(v, order), count, take(k, slot), take(v, slot), self.count)

    # Rows one by one.

    def _select(self, indices: Tensor) -> None:
        self.rows = self.rows.select(self.row_numbers(indices))

    def _copy(self, indices: Tensor, other: "DMSLayer", source: Tensor) -> None:
        self.rows.copy_rows(self.row_numbers(indices), other.rows, other.row_numbers(source))

    def _empty(self, indices: Tensor) -> None:
        self.rows.release(self.row_numbers(indices))


def sliding_layer(config: DMSConfig, tokens: int, page: int) -> DMSLayer:
    """A layer with sliding-window attention over ``tokens``: a window that everything leaves marked."""
    return DMSLayer(replace(config, window=tokens - 1, eviction="delayed"), page)


class DMSCache(RowCache):
    """A cache for a model with gates, which frees what they evict (paper section 3.2); for ``generate`` and by hand.

    Gates off (``model.dms.disabled()``), it is a dense cache with the same counters, all in tokens a KV head.
    Raises ValueError for settings out of range and for a model without gates.

    >>> cache = DMSCache.for_model(attach(model, DMSConfig(window=16)))
    >>> said = model.generate(torch.ones(1, 8, dtype=torch.long), past_key_values=cache, max_new_tokens=4)
    >>> cache.live_tokens()[:, 0].tolist(), cache.kv_reads()[:, 0].tolist()  # (layers, B, H)
    ([[11, 11], [11, 11]], [[30, 30], [30, 30]])
    """

    static = True

    def __init__(self, config: DMSConfig, layers: int, page: int = 16, sliding: Sequence[int | None] = ()) -> None:
        """``sliding``: per layer the tokens of its sliding window, or None; such a layer holds just these."""
        if layers < 1 or page < 1:
            raise ValueError(f"layers {layers}, page {page}: both must be >= 1")
        sliding = list(sliding) or [None] * layers
        if len(sliding) != layers:
            raise ValueError(f"sliding windows of {len(sliding)} layers: must be {layers}")
        super().__init__([DMSLayer(config, page) if n is None else sliding_layer(config, n, page) for n in sliding])
        self.config, self.sliding, self.page = config, sliding, page

    @classmethod
    def for_model(cls, model, page: int | None = None) -> RowCache:
        """An empty cache for a model with gates, of the class that its method needs."""
        return prepared(model).new_cache(page)

    def _new(self) -> "DMSCache":
        return type(self)(self.config, len(self.layers), self.page, self.sliding)
