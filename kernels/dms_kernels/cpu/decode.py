"""One query token a row over ragged, paged rows, on a CPU.

Every page is one matrix of a batched product, taken from the pool where it lies: nothing is gathered, and a row costs
what it holds.  Pages of a row are merged with the row's maximum subtracted.
"""

import torch
from torch import Tensor

NEVER = float("-inf")


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See naive.decode_attention.  Pages that two rows share, or a pool mostly unused, are gathered first."""
    batch, page, rows = q.shape[0], keys.shape[1], table.shape[0]
    queries = q.unflatten(1, (rows // batch, -1)).flatten(0, 1).squeeze(2) * scale  # (R, G, D)
    counts = (lengths + page - 1) // page
    held = torch.arange(table.shape[1]) < counts[:, None]
    pages, owner = table[held].long(), torch.repeat_interleave(torch.arange(rows), counts)  # (P,)
    ends = counts.cumsum(0)[counts > 0] - 1  # where each row's last page stands among its pages
    if 2 * len(pages) >= len(keys) and torch.bincount(pages, minlength=1).max() <= 1:
        everyone = torch.full((len(keys),), rows)  # pages of nobody go to a bin behind the last row
        everyone[pages] = owner
        owner, ends = everyone, pages[ends]
    else:
        keys, values = keys[pages], values[pages]
    last = (lengths[counts > 0] - 1) % page  # slot of each row's last token
    tail = torch.arange(page) > last[:, None]
    queries = torch.cat([queries, torch.zeros_like(queries[:1])])
    scores = torch.bmm(queries[owner], keys.transpose(1, 2)).float()  # (P, G, page)
    scores[ends] = scores[ends].masked_fill(tail[:, None], NEVER)
    spread = owner[:, None].expand(-1, queries.shape[1])
    top = scores.new_full(queries.shape[:2], NEVER).scatter_reduce_(0, spread, scores.amax(-1), "amax")
    weights = scores.sub_(top[owner][..., None]).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weights.sum(-1))
    parts = torch.bmm(weights.to(values.dtype), values)  # (P, G, D)
    parts[ends] = torch.bmm(weights[ends].to(values.dtype), values[ends].masked_fill(tail[..., None], 0.0))
    out = top.new_zeros(queries.shape).index_add_(0, owner, parts.float())
    out = (out / torch.where(total > 0, total, 1.0)[..., None])[:rows].to(q.dtype)
    return out.unflatten(0, (batch, -1)).flatten(1, 2).unsqueeze(2)
