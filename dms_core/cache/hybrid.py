"""Layers of hybrid models: attention in chunks (Llama 4), and attention with a state beside it (Falcon-H1).

In chunks, a token sees those before it in its own chunk of ``chunk`` tokens.  Nothing is ever marked; where a chunk
begins, the row starts again at its first slot, in the pages that it has.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from dms_core.cache.base import take, tokens_first
from dms_core.cache.dms import DMSLayer, sliding_layer
from dms_core.config import DMSConfig
from dms_core.probe import Layout
from dms_kernels.cpu.dense import masked_attention


class ChunkedLayer(DMSLayer):
    """One layer's rows; they hold the chunk under way."""

    def __init__(self, config: DMSConfig, chunk: int, page: int, kv_cache_dtype: str = "auto") -> None:
        super().__init__(config, page, kv_cache_dtype=kv_cache_dtype)
        self.chunk = chunk

    @property
    def lasting(self) -> Tensor:
        """None: the next chunk begins without them, (B, H)."""
        return torch.zeros_like(self.live)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor | None, valid: Tensor | None, scale: float, sinks=None
    ) -> Tensor:
        """As in DMSLayer; ``evict`` is not looked at."""
        if q.shape[2] == 1:
            torch.maximum(self.peak, self.live, out=self.peak)  # in place, as a captured step does it
            begins = self.rows.seen % self.chunk == 0
            if valid is not None:
                begins &= valid.expand(-1, self.heads).flatten()
            self.rows.length.masked_fill_(begins, 0)
        return super().attend(q, k, v, None, valid, scale, sinks)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, scale: float, sinks=None
    ) -> Tensor:
        self.peak = torch.maximum(self.peak, self.live)
        valid = torch.ones_like(evict[:, 0]) if valid is None else valid
        order = tokens_first(valid)[:, None]
        q, k, v = (take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
        lengths, before = valid.sum(1), self.seen
        past_k, past_v = (x.unflatten(0, (self.batch, self.heads)) for x in self.rows.read())
        held, columns = self.live[:, 0].long(), past_k.shape[2]  # the same in all heads
        query = before[:, None] + torch.arange(q.shape[2], device=q.device)  # positions (B, T)
        past = (before - held)[:, None] + torch.arange(columns, device=q.device)
        key = torch.cat([torch.where(past < before[:, None], past, -1), query], 1)  # (B, S + T), -1: garbage
        chunk = (query // self.chunk)[:, :, None] == (key // self.chunk)[:, None]
        visible = chunk & (key[:, None] <= query[:, :, None]) & (key >= 0)[:, None]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = masked_attention(q, k, v, visible[:, None].expand(-1, self.heads, -1, -1), scale, sinks)

        seen = before + lengths
        start = (seen - 1).clamp_min(0) // self.chunk * self.chunk  # of the last token's chunk
        stays = (key >= start[:, None]) & (key < seen[:, None])
        kept = tokens_first(stays)[:, None, : min(self.chunk, stays.shape[1])].expand(-1, self.heads, -1)
        length = stays.sum(1)[:, None].expand(-1, self.heads)
        self.rows.load(take(k, kept).flatten(0, 1), take(v, kept).flatten(0, 1), length.flatten())
        self.rows.seen.copy_(seen.repeat_interleave(self.heads))
        return take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1))

    # Rows do not share pages: a row writes over its first one when a chunk begins, which no step foresees.

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        self._part()

    def _copy(self, indices: Tensor, other: DMSLayer, source: Tensor) -> None:
        super()._copy(indices, other, source)
        self._part()

    def _part(self) -> None:
        self.rows.load(*self.rows.read(), self.rows.length.clone())


class StatefulLayer(LinearAttentionLayer, DMSLayer):
    """A layer's rows with gates, and its states."""

    is_compileable = False

    def __init__(self, config: DMSConfig, page: int, number_of_states: int, kv_cache_dtype: str = "auto") -> None:
        DMSLayer.__init__(self, config, page, kv_cache_dtype=kv_cache_dtype)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args, **kwargs) -> None:
        kind = DMSLayer if args else LinearAttentionLayer  # as each calls it
        kind.lazy_initialization(self, *args, **kwargs)

    reset = DMSLayer.reset  # the states: see RowCache.reset


def other_layers(
    layout: Layout, config: DMSConfig, page: int = 16, slack: int = 0, kv_cache_dtype: str = "auto"
) -> dict[int, Callable]:
    """How to make the cache layers of the layers that are not plain full attention, by number."""
    made: dict[int, Callable] = {}
    for index, attention in enumerate(layout.attention):
        state = layout.states.get(index)
        if attention is None:
            made[index] = partial(copy.deepcopy, state)
        elif attention.sliding:
            made[index] = partial(sliding_layer, config, attention.sliding, page, slack, kv_cache_dtype)
        elif attention.chunk:
            made[index] = partial(ChunkedLayer, config, attention.chunk, page, kv_cache_dtype)
        elif state:
            made[index] = partial(StatefulLayer, config, page, state.number_of_states, kv_cache_dtype)
    return made
