"""A transformers cache that frees what is evicted (paper section 3.2).

Rows are (batch, KV head), ragged and paged.  Two rings of window + 1 cells remember, for the tokens still in
the window, their slot and what their gate said.  When a token leaves the window marked, the new token takes its
slot; otherwise the row grows by one.  Keys are cached after RoPE, so order inside a row does not matter.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dms_core.config import DMSConfig
from dms_core.pages import PagedRows
from dms_kernels import Past, cache_append, decode_attention, prefill_attention


class DMSLayer(CacheLayerMixin):
    """One layer's rows.  ``attend`` stores the new tokens and answers their queries."""

    def __init__(self, config: DMSConfig, page: int) -> None:
        super().__init__()
        self.config, self.page = config, page
        self.cells = config.window + 1
        self.columns = 0  # columns of the padded batch seen so far, what generate() calls the length
        self.unread = False  # update() was called, attend() not yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads = key_states.shape[:2]
        device = key_states.device
        self.batch, self.heads = batch, heads
        self.rows = PagedRows.new(batch * heads, key_states, self.page, self.config.window)
        self.reads = torch.zeros(batch, heads, dtype=torch.long, device=device)
        self.peak = torch.zeros_like(self.reads)  # most live tokens before the last prefill
        self.is_initialized = True

    @property
    def count(self) -> Tensor:
        """Tokens that each batch row has taken in, padding excluded: (B,)."""
        return self.rows.seen.view(self.batch, self.heads)[:, 0].long()

    # What transformers asks of a layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on to the ``dms`` attention function, which calls attend()."""
        if self.unread:
            raise ValueError("a DMSCache was given to a model that dms_core.attach has not prepared")
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if (self.batch, self.heads) != tuple(key_states.shape[:2]):
            raise ValueError(
                f"keys of {tuple(key_states.shape[:2])} (batch, KV heads): this cache holds {(self.batch, self.heads)}"
            )
        self.unread = True
        self.columns += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        self.columns, self.unread, self.is_initialized = 0, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch, device=self.count.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        indices = indices.to(self.count.device)
        self.rows = self.rows.select(self.row_numbers(indices))
        self.reads, self.peak = self.reads[indices], self.peak[indices]
        self.batch = len(indices)

    # Storing and attending.

    def row_numbers(self, batch_rows: Tensor) -> Tensor:
        """Numbers of the (batch, head) rows of some batch rows, in order."""
        return (batch_rows[:, None] * self.heads + torch.arange(self.heads, device=batch_rows.device)).flatten()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor, scale: float) -> Tensor:
        """Store new tokens and attend to what they may see.

        q (B, Hq, T, D); k, v (B, H, T, D); evict (B, H, T): what each new token's gate says, about the token
        ``lag`` before it; valid (B, T), False for padding and idle rows.  Returns (B, Hq, T, D).
        """
        self.unread = False
        if q.shape[2] == 1:
            self._append(k[:, :, 0], v[:, :, 0], evict[:, :, 0], valid[:, 0])
            rows = self.rows
            return decode_attention(q, rows.keys, rows.values, rows.table, rows.length, scale)
        return self._prefill(q, k, v, evict, valid, scale)

    def _append(self, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor) -> None:
        """One token a row: k, v (B, H, D), evict (B, H), valid (B,)."""
        active = valid[:, None].expand(-1, self.heads)
        self.rows.make_room()
        new = [x.flatten(0, 1) for x in (k, v, evict, active)]
        cache_append(self.rows, *new, self.config.lag)
        self.reads += self.rows.length.view_as(self.reads) * active

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor, scale: float) -> Tensor:
        """Many tokens a row, after any past: attend, then hold what stays."""
        padded = not bool(valid.all())
        if padded:  # tokens first, padding behind them
            order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, None]
            q, k, v = (_take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
            evict = evict.gather(2, order.expand(-1, self.heads, -1))
        lengths = valid.sum(1)
        says = torch.cat([self._ring(self.rows.ring_evict), evict], 2)  # what the window's and the new tokens say
        past = self._past()
        about = self._decisions(says, lengths)
        if past is None:
            about = about[..., self.cells :]
        out, kept = prefill_attention(q, k, v, about, self.config.window, past, lengths, scale)

        self.peak = torch.maximum(self.peak, self.rows.length.view_as(self.peak))
        count = self.count + lengths
        self.rows.load(self._every_row(), kept.k.flatten(0, 1), kept.v.flatten(0, 1), kept.length.flatten())
        self.rows.seen.copy_(count.repeat_interleave(self.heads))
        steps = torch.arange(self.cells, device=k.device)
        cell = ((count[:, None] + steps) % self.cells)[:, None].expand(-1, self.heads, -1)  # oldest first
        slots = (kept.length[..., None] - self.cells + steps).clamp_min(0)
        said = says.gather(2, (lengths[:, None] + steps)[:, None].expand_as(cell))
        for ring, values in ((self.rows.ring_slot, slots.int()), (self.rows.ring_evict, said)):
            ring.view_as(cell).scatter_(2, cell, values)
        return _take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1)) if padded else out

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
        k, v = (x.unflatten(0, (self.batch, self.heads)) for x in self.rows.read(self._every_row()))
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
        order = torch.argsort((~outside).to(torch.int8), dim=2, stable=True)[..., : int(count.max())]
        return Past(_take(k, order), _take(v, order), count, _take(k, slot), _take(v, slot), self.count)

    def _every_row(self) -> Tensor:
        return torch.arange(self.rows.count, device=self.count.device)

    # Rows one by one.

    def put(self, indices: Tensor, other: "DMSLayer", source: Tensor) -> None:
        """Batch rows ``indices`` become copies of rows ``source`` of another layer of the same shape."""
        self.rows.copy_rows(self.row_numbers(indices), other.rows, other.row_numbers(source))
        self.reads[indices], self.peak[indices] = other.reads[source], other.peak[source]

    def clear(self, indices: Tensor) -> None:
        """Empty batch rows ``indices``; their pages go back to the pool."""
        self.rows.release(self.row_numbers(indices))
        for counter in (self.reads, self.peak):
            counter[indices] = 0


class DMSCache(Cache):
    """A cache for a model prepared by ``dms_core.attach``.  Works with ``model.generate`` and by hand.

    Gates off (``dms.disabled()``), it is a dense cache with the same counters.
    """

    def __init__(self, config: DMSConfig, layers: int, page: int = 16, sliding: Sequence[int | None] = ()) -> None:
        """``sliding``: per layer the tokens of its sliding window, or None; such a layer holds just these."""
        if layers < 1 or page < 1:
            raise ValueError(f"layers {layers}, page {page}: both must be >= 1")
        sliding = list(sliding) or [None] * layers
        if len(sliding) != layers:
            raise ValueError(f"sliding windows of {len(sliding)} layers: must be {layers}")
        configs = [config if n is None else replace(config, window=n - 1, eviction="delayed") for n in sliding]
        super().__init__(layers=[DMSLayer(each, page) for each in configs])
        self.config, self.sliding = config, sliding

    @classmethod
    def for_model(cls, model, page: int = 16) -> "DMSCache":
        """An empty cache for a model that ``attach`` has prepared."""
        if getattr(model, "dms", None) is None:
            raise ValueError(f"{type(model).__name__} has no DMS gates: call dms_core.attach(model, config) first")
        return model.dms.cache_class(model.dms.config, model.dms.layers, page, model.dms.sliding)

    def empty_like(self, batch: int) -> "DMSCache":
        """An empty cache of ``batch`` rows with this one's settings, heads, dtype and device."""
        other = DMSCache(self.config, len(self.layers), self.layers[0].page, self.sliding)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.lazy_initialization(mine.rows.keys.new_empty(batch, mine.heads, 0, mine.rows.keys.shape[-1]))
        return other

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch

    def live_tokens(self) -> Tensor:
        """Live tokens now, (layers, B, H)."""
        return torch.stack([x.rows.length.view(x.batch, x.heads) for x in self.layers])

    def tokens_seen(self) -> Tensor:
        """Tokens each batch row has taken in, padding excluded: (B,)."""
        return self.layers[0].count

    def kv_reads(self) -> Tensor:
        """Items attended to, summed over decode steps, (layers, B, H); prefill does not count (section 5.1)."""
        return torch.stack([x.reads for x in self.layers])

    def peak_tokens(self) -> Tensor:
        """Most live items after any step so far, (layers, B, H).  Rows only shrink when more is prefilled."""
        return torch.maximum(self.live_tokens(), torch.stack([x.peak for x in self.layers]))

    def bytes_held(self) -> int:
        """Bytes of all key and value tensors, free pages of the pools included."""
        return sum(x.rows.nbytes for x in self.layers if x.is_initialized)

    def trim(self) -> None:
        """Give the pools' free pages back to the allocator."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.rows.trim()

    def fork(self, chains: int) -> None:
        """Repeat every row ``chains`` times, neighbours together: one prompt, many chains."""
        if chains < 1:
            raise ValueError(f"chains {chains}: must be >= 1")
        self.batch_repeat_interleave(chains)

    def put_rows(self, indices: Tensor, other: "DMSCache", source: Tensor) -> None:
        """Rows ``indices`` become copies of rows ``source`` of ``other``: how a finished chain's row is refilled."""
        if other.config != self.config or len(other.layers) != len(self.layers):
            raise ValueError(f"rows of a cache with {other.config}: this one has {self.config}; both must be the same")
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.put(indices, theirs, source)

    def reset_rows(self, indices: Tensor) -> None:
        """Empty single rows."""
        for layer in self.layers:
            layer.clear(indices)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, S, D), index (B, H, N): (B, H, N, D)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
