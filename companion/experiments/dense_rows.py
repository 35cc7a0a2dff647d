"""The dense model with transformers' own cache and attention, behind the continuous batching that DMS is sampled with.

A DynamicCache is a rectangle: rows end together, at the present column, and begin where their prompts do.  A finished
row is refilled with a prefilled prompt that ends at the present column; columns that no row needs are cut off.
"""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from dms_core.sampling import Chain, SamplingConfig, sample_chains


def sample_dense(
    model, tokenizer, prompts: Sequence[Sequence[int]], jobs: Sequence[tuple[int, int]], config: SamplingConfig
) -> Iterator[Chain]:
    """``sample_chains`` of the original of ``model``, which has gates, by its own attention and in a DynamicCache.

    Raises ValueError for a model with layers whose cache is not one of keys and values of all tokens.
    """
    layout = model.dms.layout
    if any(layout.sliding) or any(layout.chunks) or layout.states:
        raise ValueError(f"{type(model).__name__}: must have full attention in all layers")
    hook = model.register_forward_pre_hook(_give_whole_mask, with_kwargs=True)
    try:
        with model.dms.disabled():
            yield from sample_chains(model, tokenizer, prompts, jobs, config, lambda *_: DenseRows())
    finally:
        hook.remove()


def _give_whole_mask(module, args, kwargs):
    """Before the model runs: transformers' mask covers the past."""
    if isinstance(cache := kwargs.get("past_key_values"), DenseRows):
        kwargs["attention_mask"] = cache.whole_mask(kwargs["attention_mask"])
    return args, kwargs


class DenseRows(DynamicCache):
    """A DynamicCache whose rows come and go: what ``sample_chains`` asks of a cache."""

    static = False  # shapes change with every step
    moves = columns = 0  # sample_chains sets columns; here they are those of the tensors

    def whole_mask(self, valid: Tensor) -> Tensor:
        """Which columns each row sees, given which of its new tokens are some (B, T): (B, past + T)."""
        past, new = self.get_seq_length(), valid.sum(1)
        if past == 0:
            self.seen, self.reads = new, torch.zeros_like(new)
            return valid
        self.seen = self.seen + new
        self.reads = self.reads + self.seen * new
        first = torch.where(valid[:, 0], past + 1 - self.seen, past)  # an idle row sees its newest column alone
        return torch.arange(past + 1, device=valid.device) >= first[:, None]

    def empty_like(self, batch: int) -> Self:
        other = type(self)()
        for mine in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(mine.keys, mine.values)
            layer.keys, layer.values = (x.new_zeros(batch, x.shape[1], 0, x.shape[3]) for x in (mine.keys, mine.values))
            other.layers.append(layer)
        other.seen, other.reads = self.seen.new_zeros(batch), self.reads.new_zeros(batch)
        return other

    def put_rows(self, indices: Tensor, other: Self, source: Tensor) -> None:
        """Rows ``indices`` become copies of rows ``source`` of ``other``, a prefilled cache."""
        prompt = other.get_seq_length()
        self._fit(prompt)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys[indices, :, -prompt:] = theirs.keys[source]
            mine.values[indices, :, -prompt:] = theirs.values[source]
        self.seen[indices], self.reads[indices] = other.seen[source], other.reads[source]

    def reset_rows(self, indices: Tensor) -> None:
        self.seen[indices] = self.reads[indices] = 0
        self._fit()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.seen, self.reads = self.seen[indices], self.reads[indices]

    def _fit(self, least: int = 0) -> None:
        """Have as many columns as the longest row needs, at least ``least``.  Waits for the device."""
        change = max(int(self.seen.max()), least) - self.layers[0].keys.shape[2]
        for layer in self.layers if change else ():
            layer.keys, layer.values = (pad(x, (0, 0, change, 0)) for x in (layer.keys, layer.values))

    def peak_tokens(self) -> Tensor:
        """Most tokens held so far, (1, B, 1): rows only grow, and all layers and heads hold the same."""
        return self.seen[None, :, None]

    lasting_tokens = peak_tokens  # all of them stay

    def kv_reads(self) -> Tensor:
        """Items attended to, summed over decode steps, (1, B, 1)."""
        return self.reads[None, :, None]

    def make_room(self) -> bool:
        return False

    def count_step(self, steps: int) -> None:
        """Steps are never replayed."""

    def name_streams(self, indices: Tensor, streams: Tensor) -> None:
        """Nothing is drawn."""
