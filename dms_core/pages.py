"""Ragged rows of keys and values over one pool of pages: memory in proportion to live tokens.

A row is one (batch, KV head).  Its live tokens fill its pages from the first slot on; pages come from the pool
and go back to it, and the pool grows by small steps, so that the tensors' size follows what is held.
"""

import torch
from torch import Tensor


class PagedRows:
    """keys, values (pages, page, D); table (R, columns) page numbers; length (R,) live tokens; owned (R,) pages."""

    def __init__(self, rows: int, like: Tensor, page: int) -> None:
        self.page, self.rows = page, rows
        self.keys = like.new_empty(0, page, like.shape[-1])
        self.values = torch.empty_like(self.keys)
        self.table = torch.zeros(rows, 1, dtype=torch.long, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.owned = torch.zeros_like(self.length)
        self.free = self.length.new_empty(0)  # page numbers nobody owns

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors, free pages included."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, length: Tensor) -> None:
        """Give every row pages for ``length`` (R,) tokens; never takes any away."""
        want = (length + self.page - 1) // self.page
        extra = (want - self.owned).clamp_min(0)
        total = int(extra.sum())
        if total == 0:
            return
        self._grow(total - len(self.free))
        if (columns := int(want.max())) > self.table.shape[1]:
            more = max(columns - self.table.shape[1], 4)
            self.table = torch.cat([self.table, self.table.new_zeros(self.rows, more)], 1)
        row = torch.repeat_interleave(torch.arange(self.rows, device=extra.device), extra)
        first = extra.cumsum(0) - extra  # position of each row's first new page among all new pages
        column = self.owned[row] + torch.arange(total, device=extra.device) - first[row]
        pages, self.free = self.free[:total], self.free[total:]
        self.table[row, column] = pages
        self.owned = self.owned + extra

    def release(self, rows: Tensor) -> None:
        """Return all pages of ``rows`` to the pool and empty them."""
        columns = torch.arange(self.table.shape[1], device=rows.device)
        held = columns < self.owned[rows, None]
        self.free = torch.cat([self.free, self.table[rows][held]])
        self.owned[rows] = 0
        self.length[rows] = 0

    def write(self, row: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v (N, D) into ``slot`` (N,) of ``row`` (N,)."""
        at = self.table[row, slot // self.page] * self.page + slot % self.page
        self.keys.view(-1, k.shape[-1])[at] = k
        self.values.view(-1, v.shape[-1])[at] = v

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``rows``, padded with garbage to whole pages of the longest: (N, S, D)."""
        pages = self.table[rows, : int(self.owned[rows].max())] if len(rows) else self.table[rows, :0]
        return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)

    def load(self, rows: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
        """Replace the contents of ``rows`` by the first ``length`` (N,) tokens of k, v (N, S, D)."""
        self.release(rows)
        want = self.length.index_put((rows,), length)
        self.reserve(want)
        self.length = want
        row, slot = (torch.arange(k.shape[1], device=k.device) < length[:, None]).nonzero(as_tuple=True)
        self.write(rows[row], slot, k[row, slot], v[row, slot])

    def select(self, rows: Tensor) -> "PagedRows":
        """A new set of rows, each a copy of the row named in ``rows`` (N,); its pool has no free page."""
        k, v = self.read(rows)
        copy = PagedRows(len(rows), self.keys, self.page)
        copy.load(torch.arange(len(rows), device=rows.device), k, v, self.length[rows])
        copy.trim()
        return copy

    def trim(self) -> None:
        """Give free pages back to the allocator."""
        if not len(self.free):
            return
        used = torch.ones(len(self.keys), dtype=torch.bool, device=self.free.device)
        used[self.free] = False
        renumber = used.cumsum(0) - 1
        self.keys, self.values = self.keys[used], self.values[used]
        self.table = renumber[self.table].clamp_min(0)
        self.free = self.free[:0]

    def _grow(self, pages: int) -> None:
        if pages <= 0:
            return
        pages = max(pages, len(self.keys) // 16)
        start = len(self.keys)
        self.keys, self.values = (
            torch.cat([pool, pool.new_zeros(pages, *pool.shape[1:])]) for pool in (self.keys, self.values)
        )
        self.free = torch.cat([self.free, torch.arange(start, start + pages, device=self.free.device)])
