"""Short sequences on a CPU: the whole batch in a few large products, cheaper there than lists."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = float("-inf")
BLOCK = 64  # queries taken together in training


class _TrainAttention(torch.autograd.Function):
    """Query blocks against the keys up to their end; backward from the saved probabilities of each block."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep, window, segment_ids, scale, sinks=None):
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, H, G, T, D)
        saved, outs = [], []
        for start in range(0, q.shape[2], BLOCK):
            rows = slice(start, min(start + BLOCK, q.shape[2]))
            bias = _block_bias(log_keep, rows, window, segment_ids)  # (B, H, t, S)
            scores = torch.matmul(grouped[:, :, :, rows].flatten(2, 3), k[:, :, : rows.stop].transpose(-1, -2))
            scores = scores.mul_(scale).unflatten(2, (grouped.shape[2], -1)).add_(bias[:, :, None])
            if sinks is not None:  # one more key, whose value is 0
                more = sinks.to(scores.dtype).view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
                scores = torch.cat([scores, more], -1)
            saved.append(scores.softmax(-1))  # (B, H, G, t, S), or S + 1 with a sink
            weights = saved[-1][..., : rows.stop].flatten(2, 3)
            outs.append(torch.matmul(weights, v[:, :, : rows.stop]).unflatten(2, scores.shape[2:4]))
        out = torch.cat(outs, 3)
        ctx.save_for_backward(grouped, k, v, out, sinks, *saved)
        ctx.window, ctx.scale = window, scale
        ctx.autocast = torch.is_autocast_enabled(q.device.type), torch.get_autocast_dtype(q.device.type)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        enabled, dtype = ctx.autocast
        with torch.autocast(grad.device.type, dtype, enabled):
            return _TrainAttention._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        q, k, v, out, sinks, *saved = ctx.saved_tensors
        grad = grad.unflatten(1, q.shape[1:3])
        shift = (grad * out).sum(-1, keepdim=True)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_keep = k.new_zeros(k.shape[:3])
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float)
        for number, weights in enumerate(saved):
            start, stop = number * BLOCK, min((number + 1) * BLOCK, q.shape[3])
            if sinks is not None:
                weights, sunk = weights[..., :-1], weights[..., -1:]
                d_sinks -= (shift[:, :, :, start:stop] * sunk).sum((0, 3, 4), dtype=torch.float).flatten()
            g = grad[:, :, :, start:stop].flatten(2, 3)  # (B, H, G * t, D)
            d_scores = torch.matmul(g, v[:, :, :stop].transpose(-1, -2)).unflatten(2, weights.shape[2:4])
            d_scores.sub_(shift[:, :, :, start:stop]).mul_(weights)
            if ctx.needs_input_grad[3]:
                far = _behind(slice(start, stop), g.device) > ctx.window
                d_keep[:, :, :stop] += (d_scores.sum(2) * far).sum(2)
            d_scores = d_scores.flatten(2, 3).mul_(ctx.scale)
            d_q[:, :, :, start:stop] = torch.matmul(d_scores, k[:, :, :stop]).unflatten(2, weights.shape[2:4])
            d_k[:, :, :stop] += torch.matmul(d_scores.transpose(-1, -2), q[:, :, :, start:stop].flatten(2, 3))
            d_v[:, :, :stop] += torch.matmul(weights.flatten(2, 3).transpose(-1, -2), g)
        d_sinks = None if sinks is None else d_sinks.to(sinks.dtype)
        return d_q.flatten(1, 2), d_k, d_v, d_keep, None, None, None, d_sinks


def _behind(rows: slice, device) -> Tensor:
    """i - j for the queries of a block and all keys up to its end: (t, S)."""
    return torch.arange(rows.start, rows.stop, device=device)[:, None] - torch.arange(rows.stop, device=device)


def _block_bias(log_keep: Tensor, rows: slice, window: int, segment_ids: Tensor | None) -> Tensor:
    """The additive bias of one block of queries: (B, H, t, S)."""
    behind = _behind(rows, log_keep.device)
    bias = torch.where(behind > window, log_keep[:, :, None, : rows.stop], 0.0)
    hidden = (behind < 0)[None]
    if segment_ids is not None:
        hidden = hidden | (segment_ids[:, rows, None] != segment_ids[:, None, : rows.stop])
    return bias.masked_fill_(hidden[:, None], NEVER)


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
    """See naive.train_attention.  Memory O(B * Hq * T * T / 2) for the backward pass."""
    return _TrainAttention.apply(q, k, v, log_keep.to(q.dtype), window, segment_ids, scale, sinks)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """q (B, Hq, T, D), k and v (B, H, S, D), visible (B, H or 1, T, S), at least one key a query; sinks (Hq,)."""
    group = q.shape[1] // k.shape[1]
    mask = visible if visible.shape[1] == 1 else visible.repeat_interleave(group, 1)
    if sinks is not None:  # a key and value of zeros, with the sink as its bias
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, NEVER).expand(-1, q.shape[1], -1, -1)
        mask = torch.cat([bias, sinks.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)], 3)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)
