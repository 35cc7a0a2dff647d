"""Stock torch operations arranged for a CPU: the GQA group folded into rows, in-place softmax, one saved matrix."""

import torch
from torch import Tensor

NEVER = float("-inf")


def fold(q: Tensor, heads: int) -> Tensor:
    """(B, Hq, T, D) to (B, H, G * T, D): the queries of a KV head side by side, so that its keys are read once."""
    return q.unflatten(1, (heads, -1)).flatten(2, 3)


def masked_softmax_(scores: Tensor, live: Tensor) -> Tensor:
    """Softmax over the last dimension of the keys that are ``live``; rows without any get 0."""
    weights = scores.masked_fill_(~live, NEVER).softmax(-1)
    return torch.nan_to_num_(weights, nan=0.0)


class _TrainAttention(torch.autograd.Function):
    """Backward from the saved probabilities; gradients for q, k, v and log_keep."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep, window, segment_ids, scale):
        tokens = q.shape[2]
        position = torch.arange(tokens, device=q.device)
        behind = position[:, None] - position[None, :]
        far = behind > window
        hidden = (behind < 0)[None]
        if segment_ids is not None:
            hidden = hidden | (segment_ids[:, :, None] != segment_ids[:, None, :])
        bias = (log_keep[:, :, None, :] * far).nan_to_num_(nan=0.0, neginf=NEVER)  # -inf * 0 is nan: not far
        bias = bias.masked_fill_(hidden[:, None], NEVER)  # (B, H, T, T)
        folded = fold(q, k.shape[1])
        scores = torch.matmul(folded, k.transpose(-1, -2)).mul_(scale)
        scores.unflatten(2, (-1, tokens)).add_(bias[:, :, None])
        weights = scores.softmax(-1)
        out = torch.matmul(weights, v)
        ctx.save_for_backward(folded, k, v, weights, out, far)
        ctx.scale, ctx.tokens = scale, tokens
        return out.unflatten(2, (-1, tokens)).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights, out, far = ctx.saved_tensors
        grad = fold(grad, k.shape[1])
        d_scores = torch.matmul(grad, v.transpose(-1, -2))
        d_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
        d_keep = None
        if ctx.needs_input_grad[3]:
            d_keep = (d_scores.unflatten(2, (-1, ctx.tokens)).sum(2) * far).sum(2)
        d_q = torch.matmul(d_scores, k).mul_(ctx.scale)
        d_k = torch.matmul(d_scores.transpose(-1, -2), q).mul_(ctx.scale)
        d_v = torch.matmul(weights.transpose(-1, -2), grad)
        return d_q.unflatten(2, (-1, ctx.tokens)).flatten(1, 2), d_k, d_v, d_keep, None, None, None


def train_attention(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int, segment_ids: Tensor | None, scale: float
) -> Tensor:
    """See naive.train_attention.  Memory O(B * Hq * T * T)."""
    return _TrainAttention.apply(q, k, v, log_keep.to(q.dtype), window, segment_ids, scale)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, q_position: Tensor, k_position: Tensor, k_expiry: Tensor, scale: float
) -> Tensor:
    """See naive.prefill_attention."""
    tokens, heads = q.shape[2], k.shape[1]
    i = q_position[:, None, :, None]
    visible = (k_position[:, :, None, :] <= i) & (i < k_expiry[:, :, None, :])  # (B, H, T, S)
    scores = torch.matmul(fold(q, heads), k.transpose(-1, -2)).mul_(scale).unflatten(2, (-1, tokens))
    out = torch.matmul(masked_softmax_(scores, visible[:, :, None]).flatten(2, 3), v)
    return out.unflatten(2, (-1, tokens)).flatten(1, 2)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See naive.decode_attention.  Rows are taken in groups of similar length, so that padding stays small."""
    batch, page = q.shape[0], keys.shape[1]
    folded = q.unflatten(1, (table.shape[0] // batch, -1)).flatten(0, 1).squeeze(2)  # (R, G, D)
    out = torch.empty_like(folded)
    order = torch.argsort(lengths)
    pages = (lengths[order] + page - 1) // page
    for group in _similar(pages.tolist()):
        rows = order[group]
        columns = int(pages[group.stop - 1])
        if columns == 0:
            out[rows] = 0
            continue
        k, v = (pool[table[rows, :columns]].flatten(1, 2) for pool in (keys, values))  # (r, S, D)
        live = torch.arange(columns * page, device=q.device) < lengths[rows, None]
        scores = torch.matmul(folded[rows], k.transpose(-1, -2)).mul_(scale)
        out[rows] = torch.matmul(masked_softmax_(scores, live[:, None]), v)
    return out.unflatten(0, (batch, -1)).flatten(1, 2).unsqueeze(2)


def _similar(sizes: list[int], spread: float = 2.0) -> list[slice]:
    """Cut an ascending list into slices whose largest entry is at most ``spread`` times the smallest."""
    cuts = [0]
    for i, size in enumerate(sizes):
        if size > spread * max(sizes[cuts[-1]], 1) or (size > 0 and sizes[cuts[-1]] == 0):
            cuts.append(i)
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]
