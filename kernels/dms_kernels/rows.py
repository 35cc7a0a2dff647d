"""Ragged, paged rows of a cache as tensors, and one decode step on them without waiting for the device.

A row is one (batch, KV head).  Its live tokens fill the slots 0 .. length - 1 of its pages.  The token at position
i - (w + 1) leaves the window when the one at position i arrives; if it was marked, the new token takes its slot,
otherwise the row grows by one (paper, section 3.2).

``append`` is the specification of ``gpu.append`` and ``cpu.step``, and runs on any device.  The caller guarantees
capacity: after a step no row may need more than ``columns`` pages, nor all rows together more than the pool has.  A row
for which this fails takes no token, stays as it was, and sets ``overflow``, which the caller reads.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dms_kernels.naive import decode_attention, quantise

POOLS = ("keys", "values", "largest")


@dataclass
class Rows:
    """One layer's cache; R rows.  ``append`` works in place; integer tensors are int32."""

    keys: Tensor  # (pages, page, D): numbers, or int8 codes (naive.quantise)
    values: Tensor  # (pages, page, D)
    table: Tensor  # (R, columns): page numbers of each row, in order
    length: Tensor  # (R,): live tokens
    owned: Tensor  # (R,): pages of the row
    free: Tensor  # (pages,): a stack of page numbers, entries 0 .. free_count - 1
    free_count: Tensor  # (1,)
    ring_slot: Tensor  # (R, w + 1): slot of the token at position p, in cell p % (w + 1)
    ring_evict: Tensor  # (R, w + 1) bool: what that token's gate said
    seen: Tensor  # (R,): tokens taken in so far, so the position of the next
    reads: Tensor  # (R,) int64: tokens attended to, summed over decode steps; a row's first token does not count
    overflow: Tensor  # (1,) bool: some token found no page, once and for all
    largest: Tensor | None = None  # (pages, page, 2) bf16, with codes: the largest magnitude of each key and value

    @classmethod
    def empty(
        cls, rows: int, pages: int, columns: int, page: int, window: int, like: Tensor, int8: bool = False
    ) -> Self:
        """No token yet; head dimension, dtype (but with ``int8``) and device from ``like`` (..., D)."""
        if min(rows, pages, columns, page) < 1 or window < 0:
            raise ValueError(
                f"rows {rows}, pages {pages}, columns {columns}, page {page}: must be >= 1; window {window}: >= 0"
            )
        dtype = torch.int8 if int8 else like.dtype
        keys, values = (like.new_zeros(pages, page, like.shape[-1], dtype=dtype) for _ in range(2))
        on = {"dtype": torch.int32, "device": like.device}
        flags = {"dtype": torch.bool, "device": like.device}
        return cls(
            keys=keys,
            values=values,
            table=torch.zeros(rows, columns, **on),
            length=torch.zeros(rows, **on),
            owned=torch.zeros(rows, **on),
            free=torch.arange(pages - 1, -1, -1, **on),
            free_count=torch.full((1,), pages, **on),
            ring_slot=torch.zeros(rows, window + 1, **on),
            ring_evict=torch.zeros(rows, window + 1, **flags),
            seen=torch.zeros(rows, **on),
            reads=torch.zeros(rows, dtype=torch.int64, device=like.device),
            overflow=torch.zeros(1, **flags),
            largest=like.new_zeros(pages, page, 2, dtype=torch.bfloat16) if int8 else None,
        )

    @property
    def pools(self) -> dict[str, Tensor]:
        """The tensors (pages, page, ...) that hold tokens, by name."""
        return {name: pool for name in POOLS if (pool := getattr(self, name)) is not None}

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What the pools hold of k, v (..., D)."""
        return (k, v) if self.largest is None else quantise(k, v)

    @property
    def page(self) -> int:
        return self.keys.shape[1]

    @property
    def cells(self) -> int:
        """Tokens a window holds, the newest included."""
        return self.ring_slot.shape[1]


def append(rows: Rows, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int) -> None:
    """One token a row: k, v (R, D) or (B, H, 1, D); evict (R,) or (B, H, 1) bool, what its gate says about the token
    ``lag`` before it.

    ``active`` (B,) or (B, 1) bool, R / B neighbouring rows each: the others keep what they have.  ``lag`` 1: delayed
    eviction, w: immediate.  With window 0, lag 1 lets the new token itself decide about its predecessor.  Pages are
    handed out in row order.
    """
    cells, page, columns = rows.cells, rows.page, rows.table.shape[1]
    k, v, evict = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1]), evict.flatten()
    active = active.view(-1, 1).expand(-1, len(k) // len(active)).flatten()
    cell = (rows.seen % cells).long()[:, None]  # (R, 1)
    marked = evict if lag == cells else rows.ring_evict.gather(1, (rows.seen[:, None] + lag).long() % cells)[:, 0]
    reuse = marked & (rows.seen >= cells)
    slot = torch.where(reuse, rows.ring_slot.gather(1, cell)[:, 0], rows.length)

    fresh = active & (slot >= rows.owned * page)
    wants = fresh & (rows.owned < columns)
    rank = wants.cumsum(0) - wants.int()
    gets = wants & (rank < rows.free_count)
    takes = active & (gets | ~fresh)
    rows.overflow.logical_or_((active & ~takes).amax(0, keepdim=True))

    on_stack = (rows.free_count - 1 - rank).clamp_(0, len(rows.free) - 1)
    column = (slot // page).clamp_max(columns - 1).long()[:, None]
    number = torch.where(gets, rows.free.gather(0, on_stack), rows.table.gather(1, column)[:, 0])
    rows.table.scatter_(1, column, number[:, None])
    rows.owned += gets
    rows.free_count -= gets.sum(0, keepdim=True, dtype=torch.int32)
    rows.length += takes & ~reuse
    rows.seen += takes
    rows.reads += torch.where(takes & (rows.seen > 1), rows.length, 0)

    rows.ring_slot.scatter_(1, cell, torch.where(takes[:, None], slot[:, None], rows.ring_slot.gather(1, cell)))
    rows.ring_evict.scatter_(1, cell, torch.where(takes[:, None], evict[:, None], rows.ring_evict.gather(1, cell)))
    _store(rows, number.long() * page + slot % page, takes, k, v)


def _store(rows: Rows, place: Tensor, takes: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k, v (R, D) at ``place`` (R,) of the flat pools, for the rows that take a token.

    The others repeat the write of one that does, so that nothing depends on the order of writes.
    """
    source = torch.where(takes, torch.arange(len(takes), device=takes.device), takes.int().argmax())
    place, real = place[source], takes[source, None]
    for pool, new in zip(rows.pools.values(), rows.stored(k, v), strict=True):
        flat = pool.view(-1, pool.shape[-1])
        flat[place] = torch.where(real, new[source].to(pool.dtype), flat[place])


def step(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    active: Tensor,
    lag: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """``append``, then attention of q (B, Hq, 1, D) over what the rows hold: (B, Hq, 1, D)."""
    append(rows, k, v, evict, active, lag)
    return decode_attention(q, rows.keys, rows.values, rows.table, rows.length, scale, sinks, rows.largest)
