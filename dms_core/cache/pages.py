"""A cache's rows and their pool of pages, seen from the host: what needs to know sizes.

One decode step changes rows on the device alone (``dms_kernels.rows``).  Growing the pool, loading whole rows, copying
and trimming are here; they wait for the device.  The pool grows by small steps, so that the tensors' size follows what
is held.
"""

import torch
from torch import Tensor

from dms_kernels import cache_release
from dms_kernels.rows import Rows

AHEAD = 16  # decode steps for which room is made at once where looking at sizes waits for the device


class PagedRows(Rows):
    """Rows (see dms_kernels.rows) whose pool grows and shrinks."""

    @classmethod
    def new(cls, rows: int, like: Tensor, page: int, window: int) -> "PagedRows":
        """Rows without any page; head dimension, dtype and device from ``like`` (..., D)."""
        made = cls.empty(rows, 1, 1, page, window, like)
        made.keys, made.values, made.free = made.keys[:0], made.values[:0], made.free[:0]
        made.free_count.zero_()
        return made

    credit = 0  # appends for which there is room without looking

    @property
    def count(self) -> int:
        return len(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors, free pages included."""
        return self.keys.nbytes + self.values.nbytes

    def make_room(self) -> None:
        """Call before each append: the pool then has the pages that it may take."""
        if self.credit:
            self.credit -= 1
            return
        steps = AHEAD if self.keys.is_cuda else 1
        pages = self._pages(self.length + steps)
        missing = (pages - self.owned).clamp_min(0).sum()
        facts = torch.stack([missing, pages.max(), self.free_count[0], self.overflow[0]])  # one wait for the device
        missing, columns, free, overflow = facts.tolist()
        self._check(overflow)
        self._grow(missing - free, columns, free)
        self.credit = steps - 1

    def _check(self, overflow: bool) -> None:
        """Raises RuntimeError if a token was lost since the last look."""
        if overflow:
            raise RuntimeError("a cache row found no free page and lost a token: make_room() must precede each append")

    def release(self, rows: Tensor) -> None:
        """Return all pages of ``rows`` (N,) to the pool and empty them."""
        which = torch.zeros(self.count, dtype=torch.bool, device=rows.device)
        which[rows] = True
        cache_release(self, which)
        self.credit = 0

    def load(self, rows: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
        """Replace the contents of ``rows`` (N,) by the first ``length`` (N,) tokens of k, v (N, S, D)."""
        self.release(rows)
        pages = self._pages(length)
        total = int(pages.sum())
        free = int(self.free_count)
        free += self._grow(total - free, int(pages.max()) if len(pages) else 0, free)
        column = torch.arange(self.table.shape[1], device=rows.device)
        row, column = (column < pages[:, None]).nonzero(as_tuple=True)
        self.table[rows[row], column] = self.free[free - total : free].flip(0)
        self.free_count.fill_(free - total)
        self.owned[rows], self.length[rows] = pages.int(), length.int()
        row, slot = (torch.arange(k.shape[1], device=k.device) < length[:, None]).nonzero(as_tuple=True)
        at = self.table[rows[row], slot // self.page] * self.page + slot % self.page
        for pool, new in ((self.keys, k), (self.values, v)):
            pool.view(-1, pool.shape[-1])[at] = new[row, slot]

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``rows`` (N,), padded with garbage to whole pages of the longest: (N, S, D)."""
        self._check(bool(self.overflow))
        pages = self.table[rows, : int(self.owned[rows].max())] if len(rows) else self.table[rows, :0]
        return self.keys[pages].flatten(1, 2), self.values[pages].flatten(1, 2)

    def select(self, rows: Tensor) -> "PagedRows":
        """A new set of rows, each a copy of the row named in ``rows`` (N,); its pool has no free page."""
        copy = PagedRows.new(len(rows), self.keys, self.page, self.cells - 1)
        copy.copy_rows(torch.arange(len(rows), device=rows.device), self, rows)
        copy.trim()
        return copy

    def copy_rows(self, rows: Tensor, other: "PagedRows", source: Tensor) -> None:
        """Rows (N,) become copies of rows ``source`` (N,) of ``other``."""
        self.load(rows, *other.read(source), other.length[source])
        for name in ("ring_slot", "ring_evict", "seen"):
            getattr(self, name)[rows] = getattr(other, name)[source]

    def trim(self) -> None:
        """Give free pages back to the allocator."""
        self._check(bool(self.overflow))
        used = torch.ones(len(self.keys), dtype=torch.bool, device=self.free.device)
        used[self.free[: int(self.free_count)]] = False
        renumber = used.cumsum(0, dtype=torch.int32) - 1
        self.keys, self.values = self.keys[used], self.values[used]
        self.table = renumber[self.table].clamp_min_(0) if len(renumber) else self.table
        self.free, self.credit = self.free[: len(self.keys)].clone(), 0
        self.free_count.zero_()

    def _pages(self, length: Tensor) -> Tensor:
        """Pages that ``length`` tokens fill."""
        page = self.keys.shape[1]
        return (length + page - 1) // page

    def _grow(self, pages: int, columns: int, free: int) -> int:
        """Add at least ``pages`` pages to the ``free`` ones, and columns to the table up to ``columns``.

        Returns how many pages were added.
        """
        if (more := columns - self.table.shape[1]) > 0:
            self.table = torch.cat([self.table, self.table.new_zeros(self.count, max(more, 4))], 1)
        if pages <= 0:
            return 0
        start, pages = len(self.keys), max(pages, len(self.keys) // 16)
        self.keys, self.values = (
            torch.cat([pool, pool.new_zeros(pages, *pool.shape[1:])]) for pool in (self.keys, self.values)
        )
        added = torch.arange(start + pages - 1, start - 1, -1, dtype=torch.int32, device=self.free.device)
        self.free = torch.cat([self.free[:free], added, self.free.new_zeros(start - free)])
        self.free_count.fill_(free + pages)
        return pages
