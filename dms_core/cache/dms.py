"""A transformers cache that frees what is evicted (paper section 3.2).

Rows are (batch, KV head), ragged and paged.  Two rings of window + 1 cells remember, for the tokens still in
the window, their slot and what their gate said.  When a token leaves the window marked, the new token takes its
slot; otherwise the row grows by one.  Keys are cached after RoPE, so order inside a row does not matter.

With slack s the rings have s cells more, and what left the window is overwritten s tokens later: until then the tokens
since can be taken back.  Marked tokens outside the window are held, but not visible.

Pages hold keys and values in the model's dtype, or in 8 bits (``dms_kernels.naive.quantise``).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dms_core.cache.base import RowCache, RowLayer, prepared, take, tokens_first
from dms_core.cache.pages import PagedRows, make_room
from dms_core.config import DMSConfig
from dms_kernels import Past, cache_append, cache_step, prefill_attention
from dms_kernels.cpu.dense import masked_attention

KV_CACHE_DTYPES = ("auto", "int8")


def check_kv_cache_dtype(name: str) -> None:
    """Raises ValueError for what pages cannot hold."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype {name!r}: must be one of {', '.join(KV_CACHE_DTYPES)}")


class DMSLayer(RowLayer):
    """One layer's rows.  ``attend`` stores the new tokens and answers their queries."""

    counters = ("peak", "stream")
    rows: PagedRows  # from the first token on
    gated: bool  # whether tokens had a gate

    def __init__(self, config: DMSConfig, page: int, slack: int = 0, kv_cache_dtype: str = "auto") -> None:
        super().__init__()
        self.config, self.page, self.slack, self.kv_cache_dtype = config, page, slack, kv_cache_dtype
        self.cells = config.window + 1 + slack

    def _allocate(self) -> None:
        int8 = self.kv_cache_dtype == "int8"
        self.rows = PagedRows.new(self.batch * self.heads, self.like, self.page, self.cells - 1, int8)
        self.spare, self.gated = 0, False  # columns that can be taken back now; no token has had a gate
        self.taken = torch.zeros(self.batch, self.slack, device=self.like.device).bool()  # tokens in the last columns

    @property
    def seen(self) -> Tensor:
        """Tokens that each batch row has taken in, padding excluded: (B,)."""
        return self.rows.seen.view(self.batch, self.heads)[:, 0].long()

    @property
    def live(self) -> Tensor:
        """Live tokens, (B, H)."""
        return self.rows.length.view(self.batch, self.heads)

    @property
    def lasting(self) -> Tensor:
        """Live tokens that no token to come can evict, (B, H): without the marked ones and those not yet decided on."""
        leaves = self._decisions(self._ring(self.rows.ring_evict), torch.zeros_like(self.seen))
        leaves[..., self.cells - self.config.lag * self.gated :] = True
        return self.live - (leaves & self._there()).sum(2)

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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor | None, valid: Tensor | None, scale: float, sinks=None
    ) -> Tensor:
        """Store new tokens and attend to what they may see.

        q (B, Hq, T, D); k, v (B, H, T, D); evict (B, H, T): what each new token's gate says, about the token
        ``lag`` before it, None: there is no gate, or it is off; valid (B, T), False for padding and idle rows, None:
        all are tokens; sinks (Hq,): logits that take part in the normaliser, or None.  Returns (B, Hq, T, D).
        """
        self.unread = False
        self.gated |= evict is not None
        evict = torch.zeros_like(k[..., 0], dtype=torch.bool) if evict is None else evict
        if self.slack:
            valid = torch.ones_like(evict[:, 0]) if valid is None else valid
            self.taken = torch.cat([self.taken, valid], 1)[:, -self.slack :]
            self.spare = min(self.spare + q.shape[2], self.slack)
            if q.shape[2] <= self.slack + 1:
                return self._verify(q, k, v, evict, valid, scale, sinks)
        if q.shape[2] > 1:
            return self._prefill(q, k, v, evict, valid, scale, sinks)
        if not self.rows.credit:
            make_room([self.rows])
        self.rows.credit -= 1
        valid = torch.ones_like(evict[:, 0]) if valid is None else valid
        return cache_step(self.rows, q, k, v, evict, valid, self.config.lag, scale, sinks)

    def _verify(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """At most slack + 1 tokens a row, all stored first: none of them overwrites what the first may see.

        After a past they count the reads of one step, which is how often keys are read.
        """
        reads, goes_on = self.rows.reads.clone(), self.rows.seen > 0
        for t in range(q.shape[2]):
            if not self.rows.credit:
                make_room([self.rows])
            self.rows.credit -= 1
            column = slice(t, t + 1)
            cache_append(
                self.rows, k[:, :, column], v[:, :, column], evict[:, :, column], valid[:, column], self.config.lag
            )
        goes_on &= valid.any(1).repeat_interleave(self.heads)
        self.rows.reads.copy_(reads + torch.where(goes_on, self.rows.length, 0))
        k, v = (x.unflatten(0, (self.batch, self.heads)) for x in self.rows.read())
        return masked_attention(q, k, v, self._visible(valid, k.shape[2]), scale, sinks)

    def _visible(self, valid: Tensor, slots: int) -> Tensor:
        """Which slots each of the newest tokens ``valid`` (B, T) sees: (B, H, T, slots)."""
        slot, position = self._ring(self.rows.ring_slot).long(), self._positions()
        marked = self._decisions(self._ring(self.rows.ring_evict), torch.zeros_like(self.seen))
        query = (self.seen - valid.sum(1))[:, None] + valid.cumsum(1) - 1
        behind = query[:, :, None] - position[:, None]  # (B, T, cells)
        sees = (behind >= 0)[:, None] & ((behind <= self.config.window)[:, None] | ~marked[:, :, None])
        there = self._there()
        held = torch.arange(slots + 1, device=slot.device) < self.live[..., None]
        visible = held[:, :, None].repeat(1, 1, valid.shape[1], 1)
        visible.scatter_(3, torch.where(there, slot, slots)[:, :, None].expand_as(sees), sees)
        visible = visible[..., :slots]
        visible[..., 0] |= ~visible.any(-1)  # finite garbage for rows without a token
        return visible

    def crop(self, tokens: int) -> None:
        """Take back the last ``tokens`` columns, at most ``spare``; reads and peak stay."""
        self.peak = torch.maximum(self.peak, self.live)
        taken = self.taken[:, self.slack - tokens :].sum(1).repeat_interleave(self.heads)
        self.rows.take_back(taken, tokens, self.config.lag)
        self.taken = torch.nn.functional.pad(self.taken[:, : self.slack - tokens], (tokens, 0))
        self.spare, self.columns = self.spare - tokens, self.columns - tokens

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, scale: float, sinks=None
    ) -> Tensor:
        """Many tokens a row, after any past: attend, then hold what stays."""
        lengths = torch.full_like(self.seen, q.shape[2]) if valid is None else valid.sum(1)
        if valid is not None:  # tokens first, padding behind them
            order = tokens_first(valid)[:, None]
            q, k, v = (take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
            evict = evict.gather(2, order.expand(-1, self.heads, -1))
        bits = torch.cat([self._ring(self.rows.ring_evict), evict], 2)  # of the window's and the new tokens' gates
        if self.slack:  # the slot of a token taken back was reused, so the ring's entry of the token before it is stale
            lost = self._ring(self.rows.ring_slot) >= self.live[..., None]
            lost &= (self._positions() >= 0)[:, None]
            bits[..., self.config.lag : self.cells] |= lost[..., : self.cells - self.config.lag]
        past = self._past()
        evicted = self._decisions(bits, lengths)  # by the token that the decision is about
        if past is None:
            evicted = evicted[..., self.cells :]
        out, kept = prefill_attention(q, k, v, evicted, self.config.window, past, lengths, scale, self.slack, sinks)

        self.peak = torch.maximum(self.peak, self.rows.length.view_as(self.peak))
        seen = self.seen + lengths
        self.rows.load(kept.k.flatten(0, 1), kept.v.flatten(0, 1), kept.length.flatten())
        self.rows.seen.copy_(seen.repeat_interleave(self.heads))
        steps = torch.arange(self.cells, device=k.device)
        cell = ((seen[:, None] + steps) % self.cells)[:, None].expand(-1, self.heads, -1)  # oldest first
        slots = (kept.length[..., None] - self.cells + steps).clamp_min(0)
        newest = bits.gather(2, (lengths[:, None] + steps)[:, None].expand_as(cell))
        for ring, values in ((self.rows.ring_slot, slots.int()), (self.rows.ring_evict, newest)):
            ring.view_as(cell).scatter_(2, cell, values)
        return take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1)) if valid is not None else out

    def _ring(self, ring: Tensor) -> Tensor:
        """A ring's cells in order of position, oldest first: (B, H, cells)."""
        steps = torch.arange(self.cells, device=ring.device)
        cell = ((self.seen[:, None] + steps) % self.cells)[:, None].expand(-1, self.heads, -1)
        return ring.view(self.batch, self.heads, -1).gather(2, cell)

    def _positions(self) -> Tensor:
        """Positions of a ring's cells in that order, negative where there is no token: (B, cells)."""
        return self.seen[:, None] + torch.arange(-self.cells, 0, device=self.rows.seen.device)

    def _there(self) -> Tensor:
        """Which of a ring's cells, in that order, stand for a token that is held: (B, H, cells)."""
        return (self._positions() >= 0)[:, None] & (self._ring(self.rows.ring_slot) < self.live[..., None])

    def _decisions(self, bits: Tensor, lengths: Tensor) -> Tensor:
        """bits (B, H, T) of deciding tokens, moved to the tokens they decide on, ``lag`` before; False: undecided."""
        there = torch.arange(bits.shape[2], device=bits.device) < self.cells + lengths[:, None]
        lag = min(self.config.lag, bits.shape[2])
        evicted = torch.zeros_like(bits)
        evicted[..., : bits.shape[2] - lag] = (bits & there[:, None])[..., lag:]
        return evicted

    def _past(self) -> Past | None:
        """What is held, the last tokens apart."""
        k, v = (x.unflatten(0, (self.batch, self.heads)) for x in self.rows.read())
        held = k.shape[2]
        if held == 0:
            return None
        slot = self._ring(self.rows.ring_slot).long()
        exists = self._there()
        outside = torch.arange(held + 1, device=slot.device) < self.rows.length.view(self.batch, self.heads, 1)
        outside.scatter_(2, torch.where(exists, slot, held), False)
        slot = slot.clamp_max(held - 1)
        outside = outside[..., :held]
        count = outside.sum(2)
        order = tokens_first(outside)  # their number is not asked for: that would wait for the device
        return Past(take(k, order), take(v, order), count, take(k, slot), take(v, slot), self.seen)

    # Rows one by one.

    def _select(self, indices: Tensor) -> None:
        self.taken = self.taken[indices]
        self.rows = self.rows.select(self.row_numbers(indices))

    def _copy(self, indices: Tensor, other: "DMSLayer", source: Tensor) -> None:
        if other.slack != self.slack:
            raise ValueError(f"rows of a cache with slack {other.slack}: this one has {self.slack}")
        self.spare = 0
        self.gated |= other.gated
        self.rows.copy_rows(self.row_numbers(indices), other.rows, other.row_numbers(source))

    def _empty(self, indices: Tensor) -> None:
        self.taken[indices] = False
        self.rows.release(self.row_numbers(indices))


def sliding_layer(config: DMSConfig, tokens: int, *how) -> DMSLayer:
    """A layer with sliding-window attention over ``tokens``: a window that everything leaves marked."""
    return DMSLayer(replace(config, window=tokens - 1, eviction="delayed"), *how)


class DMSCache(RowCache):
    """A cache for a model with gates, which frees what they evict (paper section 3.2); for ``generate`` and by hand.

    Gates off (``model.dms.disabled()``), it is a dense cache with the same counters, all in tokens a KV head.
    Raises ValueError for settings out of range and for a model without gates.

    With ``slack`` s the last s tokens can be taken back (``crop``), as prompt look-up and assisted decoding do with up
    to ``prompt_lookup_num_tokens``, or the assistant's ``num_assistant_tokens`` (20 by default).  A head then holds at
    most s tokens more, which live tokens, reads and bytes count; a forward of up to s + 1 tokens after a past counts
    the reads of one step, and is slower than a decode step without slack: rows are gathered and masked.

    ``kv_cache_dtype`` "int8" stores each key and value of a head in 8 bits and 16 for its largest magnitude, rounded
    when it is stored (vLLM's int8_per_token_head): D + 2 bytes instead of 2 D in bf16.  Tokens of one prefill see each
    other unrounded.

    >>> cache = DMSCache.for_model(attach(model, DMSConfig(window=16)))
    >>> said = model.generate(torch.ones(1, 8, dtype=torch.long), past_key_values=cache, max_new_tokens=4)
    >>> cache.live_tokens()[:, 0].tolist(), cache.kv_reads()[:, 0].tolist()  # (layers, B, H)
    ([[11, 11], [11, 11]], [[30, 30], [30, 30]])
    """

    def __init__(
        self,
        config: DMSConfig,
        layers: int,
        page: int = 16,
        slack: int = 0,
        others: Mapping[int, Callable] | None = None,
        kv_cache_dtype: str = "auto",
    ) -> None:
        """``others``: how to make the cache layers of the model's layers without gates, by number."""
        if layers < 1 or page < 1 or slack < 0:
            raise ValueError(f"layers {layers}, page {page}: both must be >= 1; slack {slack}: >= 0")
        check_kv_cache_dtype(kv_cache_dtype)
        self.static = slack == 0
        self.config, self.page, self.slack, self.others = config, page, slack, dict(others or {})
        self.kv_cache_dtype = kv_cache_dtype
        plain = partial(DMSLayer, config, page, slack, kv_cache_dtype)
        super().__init__([self.others.get(i, plain)() for i in range(layers)])

    @classmethod
    def for_model(cls, model, page: int | None = None, slack: int = 0, kv_cache_dtype: str = "auto") -> RowCache:
        """An empty cache for a model with gates, of the class that its method needs."""
        return prepared(model).new_cache(page, slack, kv_cache_dtype)

    def _new(self) -> "DMSCache":
        return type(self)(self.config, len(self.layers), self.page, self.slack, self.others, self.kv_cache_dtype)
