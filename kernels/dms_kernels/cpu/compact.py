"""Attention that costs what is kept, on a CPU: torch's own flash kernel on the band and on the kept list.

The band of all queries is one batched call over overlapping blocks of keys.  The kept list is gathered once per
(batch, KV head); a block of queries reads the part that all of them see without a mask, the ragged rest with one.
The parts are merged by log-sum-exp.  Backward: torch's kernel on the band, given the merged result; recomputed
probabilities on the kept list, where the bias has a gradient, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_kernels.cpu.pool import run
from dms_kernels.plan import Plan

BAND_BLOCK = 32  # queries that share a block of band keys
LIST_BLOCK = 1024  # queries that read the kept list together
LIST_CHUNK = 256  # entries of the kept list whose scores are held at once in the backward pass
SLAB = 1 << 21  # largest band mask, in entries

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, log_keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, T, D); k, v (B, H, S, D); log_keep (B, H, S) or None.  Returns out as q, lse (B, Hq, T) fp32."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    bands = [_Band(plan, b, k.shape[2]) for b in range(q.shape[0])]
    rows = [(b, h) for b in range(q.shape[0]) for h in range(k.shape[1])]

    def prepare(b: int, h: int) -> tuple:
        return bands[b].keys(k[b, h], 1), bands[b].keys(v[b, h], 1), _gather(plan, b, h, k, v, log_keep)

    ready = dict(zip(rows, run(prepare, rows), strict=True))

    def attend(b: int, h: int, block: tuple) -> None:
        keys, values, kept = ready[b, h]
        queries, *seen = block
        at = b, slice(h * group, (h + 1) * group), queries
        out[at], lse[at] = bands[b].attend(q[at], keys, values, queries, scale)
        _list_forward(kept, q[at], out[at], lse[at], queries, seen, scale)

    pieces = [(b, h, block) for b, h in rows for block in ready[b, h][2].blocks]
    run(attend, sorted(pieces, key=lambda piece: -piece[2][-1]))  # the longest first
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, log_keep: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and log_keep (None without one)."""
    group = q.shape[1] // k.shape[1]
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    d_keep = None if log_keep is None else torch.zeros_like(log_keep)
    delta = (grad.float() * out.float()).sum(-1)  # (B, Hq, T)
    for b in range(q.shape[0]):
        band = _Band(plan, b, k.shape[2])
        for h in range(k.shape[1]):
            at = b, slice(h * group, (h + 1) * group)
            d_q[at], d_k[b, h], d_v[b, h] = _band_backward(
                band, grad[at], q[at], k[b, h], v[b, h], out[at], lse[at], scale
            )
            kept = _gather(plan, b, h, k, v, log_keep)
            parts = _list_backward(kept, grad[at], q[at], lse[at], delta[at], d_q[at], scale)
            for total, part in zip((d_k[b, h], d_v[b, h]), parts, strict=False):
                total.index_add_(0, kept.index, part.to(total.dtype))
            if d_keep is not None:
                d_keep[b, h].index_copy_(0, kept.index, parts[2].to(d_keep.dtype))
    return d_q, d_k, d_v, d_keep


# The band.


class _Band:
    """Where the blocks of one batch row lie: BAND_BLOCK queries each, and their keys, ``width`` more to the left."""

    def __init__(self, plan: Plan, b: int, keys: int) -> None:
        self.queries = plan.band.shape[1]
        self.width = min(plan.window, keys - 1)
        self.span = BAND_BLOCK + self.width  # keys of a block
        self.blocks = -(-self.queries // BAND_BLOCK)
        self.before = max(self.width - plan.offset, 0)  # zeros put before the first key
        self.skip = max(plan.offset - self.width, 0)  # keys that no band reaches
        self.after = self.blocks * BAND_BLOCK - self.queries
        self.offset = plan.offset
        self.first = F.pad(plan.band[b].long(), (0, self.after), value=self.queries + self.offset).view(-1, BAND_BLOCK)
        self.query, self.key = torch.arange(BAND_BLOCK), torch.arange(self.span)
        self.causal = self.key > self.query[:, None] + self.width
        self.inner = self.causal | (self.key < self.query[:, None])

    def slabs(self, blocks: range) -> Iterator[tuple[slice, Tensor]]:
        """Runs of ``blocks`` and what their queries do not see, (blocks, 1, BAND_BLOCK, span), or (1, 1, ...)."""
        step = max(SLAB // (BAND_BLOCK * self.span), 1)
        for start in range(blocks.start, blocks.stop, step):
            number = torch.arange(start, min(start + step, blocks.stop))
            earliest = self.first[number] - (number * BAND_BLOCK + self.offset - self.width)[:, None]
            if (earliest == self.query).all():  # no document, padding or edge within reach
                hidden = self.inner[None]
            else:
                hidden = self.causal | (self.key < earliest[..., None])  # (blocks, BAND_BLOCK, span)
            yield slice(start, start + len(number)), hidden[:, None]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, queries: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Out (G, t, D) and lse (G, t) of the ``queries`` q (G, t, D), which begin with a block."""
        first, count = queries.start // BAND_BLOCK, -(-q.shape[1] // BAND_BLOCK)
        rows = _blocked(q, count)  # (blocks, G, BAND_BLOCK, D)
        keys, values = (x.expand(-1, len(q), -1, -1) for x in (keys, values))
        parts = []
        for blocks, hidden in self.slabs(range(first, first + count)):
            mine = rows[blocks.start - first : blocks.stop - first]
            mask = _additive(hidden, q)
            parts.append(_flash(mine, keys[blocks], values[blocks], 0.0, False, attn_mask=mask, scale=scale))
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
        return _unblocked(out, q.shape[1]), _unblocked(lse, q.shape[1])

    def keys(self, x: Tensor, group: int) -> Tensor:
        """(S, D) to overlapping blocks (blocks, G, span, D), a view of a padded copy."""
        x = F.pad(x[self.skip :], (0, 0, self.before, self.after)).contiguous()
        step, row = BAND_BLOCK * x.shape[1], x.shape[1]
        return x.as_strided((self.blocks, group, self.span, row), (step, 0, row, 1))

    def unkeys(self, x: Tensor, keys: int) -> Tensor:
        """Gradients of overlapping blocks (blocks, span, D) added up to (S, D)."""
        pieces = -(-self.span // BAND_BLOCK)
        total = x.new_zeros(self.blocks + pieces, BAND_BLOCK, x.shape[-1])
        for piece in range(pieces):
            part = x[:, piece * BAND_BLOCK : (piece + 1) * BAND_BLOCK]
            total[piece : piece + self.blocks, : part.shape[1]] += part
        inner = total.flatten(0, 1)[self.before : self.before + keys - self.skip]
        return F.pad(inner, (0, 0, self.skip, 0))


def _additive(hidden: Tensor, like: Tensor) -> Tensor:
    """A finite floor where hidden, so that a row without any key gives a vanishing weight and not NaN."""
    floor = -6e4 if like.dtype == torch.float16 else -1e30
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, floor)


def _blocked(x: Tensor, blocks: int) -> Tensor:
    """(G, T, ...) to (blocks, G, BAND_BLOCK, ...), padded with zeros."""
    if after := blocks * BAND_BLOCK - x.shape[1]:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, after))
    return x.unflatten(1, (blocks, BAND_BLOCK)).transpose(0, 1)


def _unblocked(x: Tensor, tokens: int) -> Tensor:
    """The inverse of ``_blocked``."""
    return x.transpose(0, 1).flatten(1, 2)[:, :tokens]


def _band_backward(band, grad, q, k, v, out, lse, scale) -> tuple[Tensor, Tensor, Tensor]:
    """(G, T, D), (S, D), (S, D): the part of the gradients that flows through the band."""
    keys, values = band.keys(k, len(q)), band.keys(v, len(q))
    tokens = q.shape[1]
    grad, rows, out, lse = (_blocked(x.contiguous(), band.blocks) for x in (grad, q, out, lse))
    parts = []
    for blocks, hidden in band.slabs(range(band.blocks)):
        mask = _additive(hidden, q)
        at = [x[blocks] for x in (grad, rows, keys, values, out, lse)]
        d_q, d_k, d_v = _flash_backward(*at, 0.0, False, attn_mask=mask, scale=scale)
        parts.append((d_q, d_k.sum(1), d_v.sum(1)))
    d_q, d_k, d_v = (torch.cat(x) for x in zip(*parts, strict=True))
    return _unblocked(d_q, tokens), band.unkeys(d_k, len(k)), band.unkeys(d_v, len(v))


# The kept list.


@dataclass
class _Kept:
    """The kept list of one (batch, KV head), gathered; ``blocks``: (queries, first, from, to, last) entries.

    All queries of a block see entries from .. to; the others in first .. last only some.
    """

    index: Tensor  # (N,)
    k: Tensor  # (N, D)
    v: Tensor  # (N, D)
    bias: Tensor | None  # (N,)
    first: Tensor  # (T,)
    last: Tensor  # (T,)
    blocks: list[tuple[slice, int, int, int, int]]

    def hidden(self, rows: slice, entry: Tensor) -> Tensor:
        """Which of the numbered entries each query of a block does not see: (t, entries)."""
        return (entry < self.first[rows, None]) | (entry >= self.last[rows, None])


def _gather(plan: Plan, b: int, h: int, k: Tensor, v: Tensor, log_keep: Tensor | None) -> _Kept:
    index = plan.kept[b, h, : int(plan.count[b, h])].long()
    first, last = plan.first[b, h], plan.last[b, h]
    starts = list(range(0, len(first), LIST_BLOCK))
    ends = [min(start + LIST_BLOCK, len(first)) - 1 for start in starts]
    edges = zip(first[starts].tolist(), first[ends].tolist(), last[starts].tolist(), last[ends].tolist(), strict=True)
    blocks = []
    for start, end, (lowest, seen_from, seen_to, highest) in zip(starts, ends, edges, strict=True):
        if seen_from >= seen_to:  # no entry that all of them see
            seen_from = seen_to = lowest
        blocks.append((slice(start, end + 1), lowest, seen_from, seen_to, highest))
    bias = None if log_keep is None else log_keep[b, h].index_select(0, index)
    return _Kept(index, k[b, h].index_select(0, index), v[b, h].index_select(0, index), bias, first, last, blocks)


def _list_forward(
    kept: _Kept, q: Tensor, out: Tensor, lse: Tensor, rows: slice, seen: Sequence[int], scale: float
) -> None:
    """Merge what the kept list gives into out (G, t, D) and lse (G, t) of the queries ``rows``."""
    lowest, seen_from, seen_to, highest = seen
    parts = []
    if seen_to > seen_from:
        k, v = kept.k[seen_from:seen_to], kept.v[seen_from:seen_to]
        bias = None if kept.bias is None else kept.bias[None, None, None, seen_from:seen_to].to(q.dtype)
        parts.append(_flash(q.reshape(1, 1, -1, q.shape[-1]), k[None, None], v[None, None], 0.0, False, attn_mask=bias,
                            scale=scale))  # fmt: skip
    if (entry := _edges(lowest, seen_from, seen_to, highest)) is not None:
        mask = _additive(kept.hidden(rows, entry), q)
        if kept.bias is not None:
            mask += kept.bias[entry].to(q.dtype)
        k, v = (x[entry][None, None].expand(1, len(q), -1, -1) for x in (kept.k, kept.v))
        parts.append(_flash(q[None], k, v, 0.0, False, attn_mask=mask[None, None], scale=scale))
    for more, more_lse in parts:
        _merge(out, lse, more.view(out.shape), more_lse.view(lse.shape))


def _edges(lowest: int, seen_from: int, seen_to: int, highest: int) -> Tensor | None:
    """Numbers of the entries that only some queries of a block see."""
    edge = torch.cat([torch.arange(lowest, seen_from), torch.arange(seen_to, highest)])
    return edge if len(edge) else None


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Softmax over the union of two sets of keys, in place."""
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None].to(out.dtype))
    lse.copy_(torch.logaddexp(lse, more_lse))


def _list_backward(kept, grad, q, lse, delta, d_q, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Adds to d_q (G, T, D); returns the gradients of the gathered keys, values and biases, fp32."""
    k, v = kept.k.float(), kept.v.float()
    d_k, d_v, d_bias = torch.zeros_like(k), torch.zeros_like(v), k.new_zeros(len(k))
    for rows, lowest, seen_from, seen_to, highest in kept.blocks:
        flat = [x[:, rows].float().flatten(0, 1) for x in (q, grad)]  # (G * t, D)
        queries, g = flat[0] * scale, flat[1]
        norm, shift = (x[:, rows].reshape(-1, 1).neg() for x in (lse, delta))
        d_rows = torch.zeros_like(queries)
        for start in range(lowest, highest, LIST_CHUNK):
            part = slice(start, min(start + LIST_CHUNK, highest))
            bias = norm if kept.bias is None else norm + kept.bias[part].float()
            if part.start < seen_from or part.stop > seen_to:
                hidden = kept.hidden(rows, torch.arange(part.start, part.stop)).repeat(len(q), 1)
                bias = bias.expand(hidden.shape).masked_fill(hidden, float("-inf"))
            weights = torch.addmm(bias, queries, k[part].T).exp_()  # (G * t, entries)
            d_v[part].addmm_(weights.T, g)
            d_scores = torch.addmm(shift, g, v[part].T).mul_(weights)
            d_bias[part] += d_scores.sum(0)
            d_k[part].addmm_(d_scores.T, queries)
            d_rows.addmm_(d_scores, k[part], alpha=scale)
        d_q[:, rows] += d_rows.unflatten(0, (len(q), -1)).to(d_q.dtype)
    return d_k, d_v, d_bias
