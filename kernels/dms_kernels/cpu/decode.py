"""One query token a row over ragged, paged rows, on a CPU.

Every page is one matrix of a batched product, taken from the pool where it lies: nothing is gathered, and a row costs
what it holds.  Pages of a row are merged with the row's maximum subtracted.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dms_kernels.naive import dequantise

NEVER = float("-inf")


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
    """See naive.decode_attention.  Pages that two rows share, or a pool mostly unused, are gathered first; codes become
    numbers of the query's dtype."""
    rows, page = table.shape[0], keys.shape[1]
    queries = q.reshape(rows, -1, q.shape[-1]) * scale  # (R, G, D)
    pages, owner, ends, tail = _plan(table.numpy(), lengths.numpy(), page, len(keys))
    if pages is not None:
        keys, values = keys[pages], values[pages]
    if largest is not None:
        keys, values = dequantise(keys, values, largest if pages is None else largest[pages], q.dtype)
    scores = torch.bmm(queries[owner.clamp_max(rows - 1)], keys.transpose(1, 2)).float()  # (P, G, page)
    scores[ends] = scores[ends].masked_fill_(tail[:, None], NEVER)
    spread = owner[:, None].expand(-1, queries.shape[1])
    top = scores.new_full((rows + 1, queries.shape[1]), NEVER).scatter_reduce_(0, spread, scores.amax(-1), "amax")
    weights = scores.sub_(top[owner][..., None]).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weights.sum(-1))
    if sinks is not None:  # infinite where nothing else counts: 0 comes out
        total[:rows] += (sinks.float().view(-1, queries.shape[1]).repeat(len(q), 1) - top[:rows]).exp_()
    parts = torch.bmm(weights.to(values.dtype), values)  # (P, G, D)
    if not math.isfinite(parts[ends].sum()):  # what lies behind a row's last token may be anything
        parts[ends] = torch.bmm(weights[ends].to(values.dtype), values[ends].masked_fill(tail[..., None], 0.0))
    out = top.new_zeros(rows + 1, *parts.shape[1:]).index_add_(0, owner, parts.float())
    out = (out / torch.where(total > 0, total, 1.0)[..., None])[:rows]
    return out.view(q.shape).to(q.dtype)


def _plan(table: np.ndarray, lengths: np.ndarray, page: int, pool: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Which pages to take (None: the pool as it lies), each one's row, each row's last page and what is behind its end.

    Pages of nobody belong to a row behind the last.
    """
    rows, counts = len(table), (lengths + (page - 1)) // page
    pages = table[np.arange(table.shape[1]) < counts[:, None]]
    owner = np.repeat(np.arange(rows), counts)
    lengths, counts = lengths[counts > 0], counts[counts > 0]
    ends = counts.cumsum() - 1  # where each row's last page stands among its pages
    tail = np.arange(page) > ((lengths - 1) % page)[:, None]
    if 2 * len(pages) >= pool:
        everyone = np.full(pool, rows)
        everyone[pages] = owner
        if np.count_nonzero(everyone < rows) == len(pages):
            return None, torch.from_numpy(everyone), torch.from_numpy(pages[ends]), torch.from_numpy(tail)
    return tuple(map(torch.from_numpy, (pages, owner, ends, tail)))
