"""The oracle: every operation written as its definition, in fp32, without regard to speed.

Shapes: B batch, Hq query heads, H KV heads, G = Hq / H, T queries, S keys, D head dim.
Query head h reads KV head h // G.  See METHOD in the book's chapter on delayed eviction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS, TINY = 127.0, 1e-30  # codes are whole numbers in -127..127; below 1e-30 a number counts as none


def quantise(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (..., D) as int8 codes (..., D), and the largest magnitude in each of the two, (..., 2) in bf16.

    A number is code * largest / 127.  The magnitude is what is rounded to bf16, not the quotient, and codes are of the
    rounded one: what was read, in any dtype, has the same codes when it is stored again.
    """
    pair = torch.stack([k, v], -2).float()  # (..., 2, D)
    largest = pair.abs().amax(-1).bfloat16()
    top = largest.float().clamp_min(TINY)[..., None]
    codes = (pair * (torch.full_like(top, LEVELS) / top)).round().to(torch.int8)  # 127 / top would be of 1 / top
    return *codes.unbind(-2), largest


def dequantise(keys: Tensor, values: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values that ``quantise`` made codes of, in ``dtype``."""
    units = (largest.float() / LEVELS)[..., None].unbind(-2)
    return tuple((codes * unit).to(dtype) for codes, unit in zip((keys, values), units, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Softmax attention with an additive bias; a query that sees no key gets 0.

    q (B, Hq, T, D), k and v (B, H, S, D), bias broadcastable to (B, H, T, S) with -inf for "not visible".
    sinks (Hq,): in each head the logit of one more key, whose value is 0.
    """
    group = q.shape[1] // k.shape[1]
    k, v, bias = (x.float().repeat_interleave(group, dim=1) for x in (k, v, bias))  # (B, Hq, ., .)
    scores = q.float() @ k.transpose(-1, -2) * scale + bias
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    if sinks is not None:
        top = torch.maximum(top, sinks.float()[:, None, None])
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[:, None, None] - top)
    return ((weights / torch.where(total > 0, total, 1.0)) @ v).to(q.dtype)


def train_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    window: int,
    segment_ids: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention in which key j costs ``log_keep[j]`` once it is more than ``window`` behind the query.

    log_keep (B, H, T) is <= 0, -inf for a hard eviction.  segment_ids (B, T): tokens see only their own segment.
    """
    position = torch.arange(q.shape[2], device=q.device)
    behind = position[:, None] - position[None, :]  # (T, S)
    bias = torch.where(behind > window, log_keep.float()[:, :, None, :], 0.0)  # (B, H, T, S)
    allowed = (behind >= 0)[None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return attend(q, k, v, bias.masked_fill(~allowed[:, None], float("-inf")), scale, sinks)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    window: int,
    past,
    lengths: Tensor,
    scale: float,
    slack: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard decisions after a past (shapes in the facade).  Returns out and the keys that remain, bool (B, H, S),
    with keys numbered as [past.k, past.recent_k, k].
    """
    seen = torch.zeros_like(lengths) if past is None else past.seen
    position = seen[:, None] + torch.arange(q.shape[2], device=q.device)  # (B, T)
    at = position
    evict, outside = evict.clone(), q.new_zeros(*k.shape[:2], 0, dtype=torch.bool)
    if past is not None:
        at = seen[:, None] + torch.arange(-window - 1 - slack, q.shape[2], device=q.device)
        outside = torch.arange(past.k.shape[2], device=q.device) < past.count[..., None]
        k, v = torch.cat([past.k, past.recent_k, k], 2), torch.cat([past.v, past.recent_v, v], 2)
    behind = position[:, :, None] - at[:, None, :]  # (B, T, R + T)
    there = (at >= 0) & (at < (seen + lengths)[:, None])
    seen_by = there[:, None, None] & (behind >= 0)[:, None] & ((behind <= window)[:, None] | ~evict[:, :, None])
    visible = torch.cat([outside[:, :, None].expand(-1, -1, q.shape[2], -1), seen_by], 3)
    bias = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, float("-inf"))
    out = attend(q, k, v, bias, scale, sinks)
    since = (seen + lengths - 1)[:, None] - at  # as the last token sees it
    stays = there[:, None] & ((since <= window + slack)[:, None] | ~evict)
    return out, torch.cat([outside, stays], 2)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """One query token a row over ragged, paged rows.

    q (B, Hq, 1, D); keys and values (pages, page, D); table (B * H, columns) page numbers of each row in
    order; lengths (B * H,) live tokens of each row, which fill its pages from the first slot on.  largest
    (pages, page, 2): keys and values are codes of ``quantise``.
    """
    if largest is not None:
        keys, values = dequantise(keys, values, largest, torch.float32)
    batch, heads = q.shape[0], q.shape[1]
    k, v = (pool[table].flatten(1, 2).unflatten(0, (batch, -1)) for pool in (keys, values))  # (B, H, S, D)
    live = torch.arange(k.shape[2], device=q.device) < lengths.view(batch, -1, 1)  # (B, H, S)
    bias = torch.zeros(live.shape, device=q.device).masked_fill(~live, float("-inf"))[:, :, None, :]
    assert heads % k.shape[1] == 0
    return attend(q, k, v, bias, scale, sinks)


def gate_logits(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, scale: float, offset: float) -> Tensor:
    """See the facade."""
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], norm, eps)
    return (scale * F.linear(normed, weight) - offset).transpose(1, 2)
