"""Who reads what, once decisions are known: the index that makes attention cost what is kept.

Query t reads two sets of keys, merged by log-sum-exp: a *band*, keys ``band[t] .. t + offset`` (at most window + 1 of
them), and a *prefix of the kept list*, entries ``first[t] .. last[t]`` of the keys that survived, in order of
position.  Cost O(T * (w + T / CR)) instead of O(T * T).

Keys are numbered as they lie in k (B, H, S, D); query t is key ``t + offset``, offset = S - T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What each query reads.  All integer tensors are int32; B batch, H KV heads, T queries, M kept list length."""

    window: int
    offset: int  # keys before the first query
    band: Tensor  # (B, T): first key of the query's band; the last is the query's own
    kept: Tensor  # (B, H, M): key numbers of the kept list, ascending; past ``count`` they are 0
    count: Tensor  # (B, H): length of the kept list
    first: Tensor  # (B, H, T): the query's first entry of the kept list
    last: Tensor  # (B, H, T): one past its last entry, never below ``first``


def make_plan(keep: Tensor, start: Tensor, window: int, capacity: int | None = None) -> Plan:
    """keep (B, H, S): does the key survive once it is more than ``window`` behind; start (B, T): the first key that
    query t may see at all (of its document, or of its past).  ``capacity``: length of the kept list, at least the
    longest; by default the longest itself, which costs one wait for the device.
    """
    batch, heads, keys = keep.shape
    queries = start.shape[1]
    offset = keys - queries
    device = keep.device
    upto = F.pad(torch.cumsum(keep, 2, dtype=torch.int32), (1, 0))  # kept keys before each key
    count = upto[..., -1]
    capacity = int(count.max()) if capacity is None else capacity
    kept = torch.zeros(batch, heads, capacity + 1, dtype=torch.int32, device=device)  # the last entry is a bin
    place = torch.where(keep, upto[..., :-1], capacity).long()
    kept.scatter_(2, place, torch.arange(keys, dtype=torch.int32, device=device).expand_as(place))
    own = torch.arange(offset, keys, device=device)
    band = torch.maximum(start.long(), own - window)
    first = upto.gather(2, start.long()[:, None].expand(-1, heads, -1))
    last = upto.gather(2, band[:, None].expand(-1, heads, -1))
    return Plan(window, offset, band.int(), kept[..., :capacity].contiguous(), count.contiguous(), first, last)


def document_starts(segment_ids: Tensor) -> Tensor:
    """First token of each token's document, (B, T): documents are runs of equal ids."""
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    new = torch.ones_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(new, place, 0).cummax(1).values


def training_plan(log_keep: Tensor, segment_ids: Tensor | None, window: int, threshold: float) -> Plan:
    """Keys with a bias above ``threshold`` (nats) stay in the list; the others count as evicted."""
    start = torch.zeros(1, 1, dtype=torch.long, device=log_keep.device).expand(log_keep.shape[0], log_keep.shape[2])
    if segment_ids is not None:
        start = document_starts(segment_ids)
    return make_plan(log_keep > threshold, start, window)
