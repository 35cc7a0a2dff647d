"""What one forward pass of a prepared model knows: tokens, documents and cache, from the decoder's arguments."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dms_core.cache.base import RowCache


@dataclass
class Step:
    """One forward pass: the cache or the documents, and what the gates said so far."""

    cache: RowCache | None
    valid: Tensor  # (B, T): not padding
    segment_ids: Tensor | None  # (B, T): packed documents, padding -1; None for one document a row
    soft: bool  # sampled decisions with gradients (training), or hard ones
    full: bool = False  # a prefill without padding: checked once, so that layers need not synchronise
    cache_unspecified: bool = False  # use_cache was not given, and no cache is kept
    logits: dict[int, Tensor] = field(default_factory=dict)  # layer -> z (B, H, T)
    evicted: dict[int, Tensor] = field(default_factory=dict)  # layer -> decisions about each token (B, H, T)


class Watch:
    """Notes on the device whether something was wrong, and raises when it is time to look."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.seen: dict[torch.device, Tensor] = {}  # (1,) bool

    def note(self, found: Tensor) -> None:
        """A bool of one forward pass.  Does not wait."""
        if found.device not in self.seen:
            with torch.inference_mode(False):  # so that it can be changed in any mode
                self.seen[found.device] = torch.zeros(1, dtype=torch.bool, device=found.device)
        self.seen[found.device].logical_or_(found)  # in place, as a captured step does it

    def forget(self) -> None:
        for seen in self.seen.values():
            seen.zero_()

    def look(self) -> None:
        """Raises ValueError if something was wrong since the last look; waits for the device."""
        for seen in self.seen.values():
            if seen:
                seen.zero_()
                raise ValueError(self.message)


class Uncached(Cache):
    """What a forward pass returns that was not asked for a cache: to go on from it is an error."""

    def __init__(self) -> None:
        super().__init__(layers=[])


def padding_mask(mask, outer: tuple | None, inputs: Tensor) -> tuple[Tensor, bool]:
    """The padding mask (B, S) bool of a call, and whether one was given.

    ``outer``: the one that the model around the decoder got, in a tuple, or None; a multimodal model hands its decoder
    a dict of masks by kind of layer.  Raises ValueError for anything else.
    """
    if isinstance(mask, dict) and outer is not None:
        mask = outer[0]
    if mask is None:
        return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device), False
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        given = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(f"attention_mask of {given}: DMS needs the (batch, tokens) padding mask")
    return mask if mask.dtype == torch.bool else mask.bool(), True


def documents(valid: Tensor, position_ids: Tensor | None, padded: bool) -> Tensor | None:
    """Documents packed in a row, told by positions that start over: (B, T) numbers, padding -1; None for one a row."""
    segments = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
    if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]  # the text's; the others are places in an image
    if position_ids is not None and position_ids.shape == (1, valid.shape[1]):
        position_ids = position_ids.expand_as(valid)
    if position_ids is not None and position_ids.shape == valid.shape:
        jump = position_ids[:, 1:] != position_ids[:, :-1] + 1
        begins = valid[:, 1:] & jump & (valid[:, :-1] | (position_ids[:, 1:] == 0))  # padding may have any position
        segments[:, 1:] = begins.long().cumsum(1)
    elif not padded:
        return None
    return segments.masked_fill(~valid, -1)


def several(segments: Tensor) -> bool:
    """Whether some row of ``documents`` holds more than one; waits for the device."""
    return bool((segments.amax(1) > torch.where(segments < 0, segments.shape[1], segments).amin(1)).any())


def chunks(segments: Tensor | None, like: Tensor, tokens: int) -> Tensor:
    """Numbers (B, T) of the chunks of ``tokens`` in each document, unlike their neighbours; like (B, ..., T, D)."""
    place = torch.arange(like.shape[-2], device=like.device)
    if segments is None:
        return (place // tokens).expand(len(like), -1)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    return segments * len(place) + (place - start) // tokens


def given_cache(past, new_cache) -> RowCache | None:
    """The cache of a call that was given ``past``.  An empty cache of transformers becomes a DMSCache where it lies.

    So a loop that holds on to the cache it made, and never takes the one returned, goes on from the right one.
    Raises ValueError for a cache that DMS cannot fill.
    """
    if past is None or isinstance(past, RowCache):
        return past
    if isinstance(past, Uncached):
        raise ValueError("past_key_values of a call that kept none: pass use_cache=True to the call that returned it")
    known = type(past).__module__.startswith("transformers.")  # another class has what would be lost
    if not known or not isinstance(past, Cache) or past.get_seq_length() != 0:
        kinds = "a DMSCache, or an empty cache of transformers' own"
        raise ValueError(f"past_key_values of type {type(past).__name__}: must be {kinds}")
    past.__class__, past.__dict__ = type(made := new_cache()), made.__dict__
    return past
