"""Prefill with hard decisions, after any past: attention by a plan, then what the cache keeps, packed.

Keys lie as [kept tokens from before the window, the window's tokens, new tokens]; the first part is visible to every
query, the rest follows its decisions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dms_kernels
from dms_kernels.cpu import dense
from dms_kernels.plan import Plan, make_plan
from dms_kernels.sinks import absorb

DENSE = 1 << 19  # queries times keys up to which, on a CPU, one masked call over the batch is faster


@dataclass(frozen=True)
class Past:
    """What a cache holds before a prefill.  R = window + 1 + slack."""

    k: Tensor  # (B, H, F, D): kept tokens from before the last R, in any order; the first ``count`` are live
    v: Tensor
    count: Tensor  # (B, H)
    recent_k: Tensor  # (B, H, R, D): the last R tokens in order; where fewer have been seen, the first are garbage
    recent_v: Tensor
    seen: Tensor  # (B,): tokens taken in so far


@dataclass(frozen=True)
class Kept:
    """What a cache holds after a prefill: the last R tokens at the end, in order."""

    k: Tensor  # (B, H, M, D); past ``length`` it is garbage
    v: Tensor
    length: Tensor  # (B, H)


def prefill_and_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    window: int,
    past: Past | None,
    lengths: Tensor,
    scale: float,
    slack: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Kept]:
    """See the facade's prefill_attention."""
    if past is None and sinks is None and _is_causal(evict, lengths):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
        return out, Kept(k, v, lengths[:, None].expand(-1, k.shape[1]))
    before, recents = 0, window + 1 + slack
    seen = torch.zeros_like(lengths)
    keep = ~evict
    new = keep[..., keep.shape[2] - q.shape[2] :]
    new &= (torch.arange(q.shape[2], device=q.device) < lengths[:, None])[:, None]
    if past is not None:
        seen, outside = past.seen, past.k.shape[2]
        keep[..., :recents] &= (torch.arange(recents, device=q.device) >= recents - seen[:, None])[:, None]
        live = torch.arange(outside, device=q.device) < past.count[..., None]
        keep = torch.cat([live, keep], 2)
        k, v = torch.cat([past.k, past.recent_k, k], 2), torch.cat([past.v, past.recent_v, v], 2)
        before = outside + recents
    start = torch.where(seen <= window, before - seen, 0)  # (B,): the first key that exists, or the first of all
    last = before + lengths - 1
    band = torch.maximum(before - seen, last - window - slack)[
        :, None, None
    ]  # (B, 1, 1): where the last R tokens begin
    outside = (keep & (torch.arange(keep.shape[2], device=q.device) < band)).sum(2)  # (B, H): kept before it
    length = outside + (last[:, None] - band[..., 0] + 1).clamp_min(0)
    capacity, longest = torch.stack([keep.sum(2).max(), length.max()]).tolist()  # the one wait for the device
    plan = make_plan(keep, start[:, None].expand(-1, q.shape[2]), window, capacity)
    if not dms_kernels.by_list(q.device, q.shape[2] * k.shape[2] > DENSE):
        out = dense.masked_attention(q, k, v, visible(plan, keep, start), scale, sinks)
    else:
        out, lse = dms_kernels.on(q.device, "forward").forward(q, k, v, plan, None, scale)
        if sinks is not None:
            out = absorb(out, lse, sinks)[0]
    return out, Kept(*_pack(plan, k, v, band, outside, longest), length)


def _is_causal(evict: Tensor, lengths: Tensor) -> bool:
    """Whether every token sees all before it, without padding: stock attention then.  Asked of a CPU alone, since a
    device would have to be waited for."""
    return evict.device.type == "cpu" and bool((lengths == evict.shape[2]).all()) and not bool(evict.any())


def _pack(plan: Plan, k: Tensor, v: Tensor, band: Tensor, outside: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The first ``outside`` (B, H) keys of the kept list, then all from ``band`` (B, 1, 1) on: (B, H, longest, D)."""
    place = torch.arange(longest, device=k.device) - outside[..., None]  # from the band's start
    index = band + place
    if entries := plan.kept.shape[2]:
        listed = plan.kept.gather(2, (place + outside[..., None]).clamp_max(entries - 1))
        index = torch.where(place < 0, listed.long(), index)
    index = index.clamp_max(k.shape[2] - 1)[..., None].expand(-1, -1, -1, k.shape[3])
    return k.gather(2, index), v.gather(2, index)


def visible(plan: Plan, keep: Tensor, start: Tensor) -> Tensor:
    """The plan as a boolean matrix (B, H, T, S), or (B, 1, T, S) where all heads keep all, which only a CPU is asked;
    keep (B, H, S); start (B,): the first key that exists.
    """
    key = torch.arange(keep.shape[2], device=keep.device)
    exists = key >= start[:, None, None]
    whole = keep.device.type == "cpu" and bool((keep | ~exists).all())
    listed = exists if whole else keep & exists
    own = torch.arange(plan.band.shape[1], device=keep.device)[:, None] + plan.offset
    return (listed[:, :, None] | (key >= plan.band[:, None, :, None])) & (key <= own)
