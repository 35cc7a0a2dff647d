"""A cache's rows and their pool of pages, seen from the host: what needs to know sizes.

One decode step changes rows on the device alone (``dms_kernels.rows``).  Making room for the steps to come, loading,
copying and sharing rows are here; they wait for the device.  The table says which row owns which page; the free stack
follows from it.  Rows may share pages, as the chains of one prompt do: a page gets a copy for each of its owners
before a step may write to it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dms_kernels.naive import dequantise
from dms_kernels.rows import Rows

AHEAD = 16  # decode steps for which room is made at once: looking at sizes waits for the device
SPARE = 8  # on CUDA a pool grows by an eighth
PER_ROW = ("table", "length", "owned", "ring_slot", "ring_evict", "seen", "reads")


class PagedRows(Rows):
    """Rows (see dms_kernels.rows) whose pool grows and shrinks."""

    dtype: torch.dtype  # of what is read
    credit = 0  # appends for which there is room
    shares = False  # some page may have several owners
    moves = 0  # how often a tensor that append or attention uses was replaced
    owners: Tensor  # (pages,): rows that own each page, when they were last counted

    @classmethod
    def new(cls, rows: int, like: Tensor, page: int, window: int, int8: bool = False) -> "PagedRows":
        """Rows without any page; head dimension, dtype and device from ``like`` (..., D)."""
        made = cls.empty(rows, 1, 1, page, window, like, int8)
        made.dtype = like.dtype
        made._replace(lambda pool: pool[:0].clone())
        made.free = made.free[:0]
        made.free_count.zero_()
        made.owners = made.free
        return made

    @property
    def count(self) -> int:
        return len(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors, free pages included; a page that rows share counts once."""
        return sum(pool.nbytes for pool in self.pools.values())

    # Room for the steps to come.

    def wants(self, steps: int) -> Tensor:
        """What the host must know to make room for ``steps`` appends: (6,) pages to take and, of them, copies; table
        columns; free pages; whether a token was lost; whether a page has several owners."""
        pages = self._pages(self.length + steps)
        missing = (pages - self.owned).clamp_min(0).sum()
        copies = self._written(steps).sum() if self.shares else torch.zeros_like(missing)
        shares = (self.owners > 1).any() if self.shares else self.overflow[0]
        return torch.stack([missing + copies, copies, pages.max(), self.free_count[0], self.overflow[0], shares])

    def grant(self, steps: int, wants: Sequence[int], spare: int = 0) -> None:
        """Make the room that ``wants`` asks for, and for 1 / ``spare`` more where that is given.

        Raises RuntimeError if a token was lost since the last look.
        """
        missing, copies, columns, free, overflow, shares = wants
        self._check(bool(overflow))
        if spare:
            missing, columns = missing + len(self.keys) // spare, columns + columns // spare
        self._grow(missing - free, columns)
        self.shares &= bool(shares)
        if copies:
            row, column = torch.nonzero_static(self._written(steps), size=copies).unbind(1)  # does not wait
            old, new = self.table[row, column].long(), self._take(copies)
            for pool in self.pools.values():
                pool[new] = pool[old]
            self.table[row, column] = new.int()
            self._count_owners()
        self.credit = steps

    def is_short(self, wants: Sequence[int]) -> bool:
        """Whether the room that ``wants`` asks for takes new memory."""
        return wants[0] > wants[3] or wants[2] > self.table.shape[1]

    def _check(self, overflow: bool) -> None:
        if overflow:
            raise RuntimeError("a cache row found no free page and lost a token: make_room() must precede each append")

    def _written(self, steps: int) -> Tensor:
        """Pages of several owners to which one of the next ``steps`` appends may write: (R, columns)."""
        if not len(self.keys):
            return self._held()
        ages = torch.arange(min(steps, self.cells), device=self.seen.device)
        leaving = self.seen[:, None] + (ages - self.cells)  # positions
        slot = self.ring_slot.gather(1, leaving.long() % self.cells)
        column = torch.cat([self.length[:, None], torch.where(leaving >= 0, slot, 0)], 1) // self.page
        there = torch.cat([torch.ones_like(leaving[:, :1], dtype=torch.bool), leaving >= 0], 1)
        bin_ = self.table.shape[1]
        column = torch.where(there, column, bin_).clamp_max(bin_).long()
        marked = torch.zeros(self.count, bin_ + 1, dtype=torch.bool, device=column.device).scatter_(1, column, True)
        return marked[:, :-1] & self._held() & (self.owners[self.table] > 1)

    def take_back(self, tokens: Tensor, most: int, lag: int) -> None:
        """Undo the last ``tokens`` (R,) appends, at most ``most``; what they overwrote is not brought back.

        The newest token's slot is released if it is the row's last.  Any other becomes a hole: it counts as marked
        again, so the next append in this one's place reuses it.  Does not wait.
        """
        for step in range(most):
            position = self.seen - 1 - step
            slot = self.ring_slot.gather(1, (position % self.cells).long()[:, None])[:, 0]
            there = tokens > step
            last = there & (slot == self.length - 1)
            self.length -= last.int()
            cell = ((position + lag) % self.cells).long()[:, None]  # what was said about the token before
            said = torch.where(there[:, None], ~last[:, None], self.ring_evict.gather(1, cell))
            self.ring_evict.scatter_(1, cell, said)
        self.seen -= tokens.int()
        self.owned.copy_(self._pages(self.length))
        self.credit = 0
        self._count_owners()

    # Whole rows.

    def load(self, k: Tensor, v: Tensor, length: Tensor) -> None:
        """Replace the contents of all rows by the first ``length`` (R,) tokens of k, v (R, S, D)."""
        pages = self._pages(length)
        total, columns, overflow = torch.stack([pages.sum(), pages.max(), self.overflow[0]]).tolist()  # the one wait
        self._check(overflow)
        self.owned.zero_()
        self._grow(total - len(self.keys), columns)
        column = torch.arange(self.table.shape[1], device=length.device)
        there = column < pages[:, None]  # the pages of a row follow each other, and row follows row
        self.table.copy_(torch.where(there, (pages.cumsum(0) - pages)[:, None] + column, 0))
        self.owned.copy_(pages)
        self.length.copy_(length)
        there = there[:, :columns].flatten()
        order = None if total == len(there) else torch.argsort((~there).to(torch.uint8), stable=True)[:total]
        for pool, new in zip(self.pools.values(), self.stored(k, v), strict=True):
            padded = torch.nn.functional.pad(new, (0, 0, 0, columns * self.page - new.shape[1]))
            paged = padded.reshape(-1, *pool.shape[1:])
            pool[:total] = paged if order is None else paged[order]
        self.shares, self.credit = False, 0
        self._count_owners()

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, padded with garbage to the table's columns: (R, S, D)."""
        pages = self.table if len(self.keys) else self.table[:, :0]
        k, v, *largest = (pool[pages].flatten(1, 2) for pool in self.pools.values())
        return dequantise(k, v, largest[0], self.dtype) if largest else (k, v)

    def release(self, rows: Tensor) -> None:
        """Empty ``rows`` (N,); pages that nobody owns any more are free.  Does not wait."""
        for name in ("length", "owned", "seen", "reads"):
            getattr(self, name)[rows] = 0
        self._count_owners()

    def select(self, rows: Tensor) -> "PagedRows":
        """Become copies of the rows named in ``rows`` (N,), which share their pages.  Does not wait."""
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[rows])
        self.shares, self.credit, self.moves = True, 0, self.moves + 1
        self._count_owners()
        return self

    def copy_rows(self, rows: Tensor, other: "PagedRows", source: Tensor) -> None:
        """Rows (N,) become copies of rows ``source`` (N,) of ``other``; copies of one row share their pages."""
        if other.page != self.page:
            raise ValueError(f"rows in pages of {other.page} tokens: this cache has pages of {self.page}")
        if other.pools.keys() != self.pools.keys():
            raise ValueError(f"rows of {other.keys.dtype}: this cache holds {self.keys.dtype}")
        taken = {name: getattr(other, name)[source] for name in PER_ROW}  # before rows of our own are released
        there, columns = other._held()[source], other.table.shape[1]
        self.release(rows)
        needed = torch.zeros(len(other.keys) + 1, dtype=torch.bool, device=rows.device)
        needed[torch.where(there, taken["table"], len(other.keys)).flatten()] = True
        needed = needed[:-1].nonzero()[:, 0]
        self._grow(len(needed) - int(self.free_count), columns)
        number = torch.zeros(len(other.keys), dtype=torch.int32, device=rows.device)
        number[needed] = new = self._take(len(needed))
        for pool, theirs in zip(self.pools.values(), other.pools.values(), strict=True):
            pool[new.long()] = theirs[needed].to(pool.dtype)
        for name in PER_ROW[1:]:
            getattr(self, name)[rows] = taken[name]
        self.table[rows, :columns] = torch.where(there, number[taken["table"]], 0) if len(number) else 0
        self.shares, self.credit = True, 0
        self._count_owners()

    def trim(self) -> None:
        """Give free pages back to the allocator."""
        self._check(bool(self.overflow))
        self._count_owners()
        used = self.owners > 0
        renumber = used.cumsum(0, dtype=torch.int32) - 1
        self._replace(lambda pool: pool[used])
        self.table = renumber[self.table].clamp_min_(0) if len(renumber) else self.table
        self.free, self.credit, self.moves = self.free[: len(self.keys)].clone(), 0, self.moves + 1
        self._count_owners()

    # Pages.

    def _replace(self, by: Callable[[Tensor], Tensor]) -> None:
        for name, pool in self.pools.items():
            setattr(self, name, by(pool))

    def _pages(self, length: Tensor) -> Tensor:
        """Pages that ``length`` tokens fill."""
        return (length + self.page - 1) // self.page

    def _held(self) -> Tensor:
        """Which entries of the table count: (R, columns)."""
        return torch.arange(self.table.shape[1], device=self.owned.device) < self.owned[:, None]

    def _take(self, pages: int) -> Tensor:
        """The numbers of ``pages`` free ones, to be entered into the table."""
        return self.free[self.free_count - pages + torch.arange(pages, device=self.free.device)]

    def _count_owners(self) -> None:
        """Who owns which page, from the table; the others are free.  Tensors stay where they are."""
        pages = len(self.keys)
        if not pages:
            self.owners = self.free
            self.free_count.zero_()
            return
        held = self._held().flatten().int()
        self.owners = torch.zeros_like(self.free).index_add_(0, self.table.flatten().long(), held)
        self.free.copy_(torch.argsort((self.owners > 0).to(torch.uint8), stable=True))
        self.free_count.copy_((self.owners == 0).sum())

    def _grow(self, pages: int, columns: int) -> None:
        """Add at least ``pages`` pages to the pool, and columns to the table up to ``columns``."""
        if (more := columns - self.table.shape[1]) > 0:
            self.table = torch.cat([self.table, self.table.new_zeros(self.count, max(more, 4))], 1)
            self.moves += 1
        if pages <= 0:
            return
        self.moves += 1
        pages = max(pages, len(self.keys) // 16)
        self._replace(lambda pool: torch.cat([pool, pool.new_zeros(pages, *pool.shape[1:])]))
        added = torch.arange(len(self.free), len(self.keys), dtype=torch.int32, device=self.free.device)
        self.free = torch.cat([added, self.free])  # below what is on the stack
        self.owners = torch.cat([self.owners, torch.zeros_like(added)])
        self.free_count += pages


def make_room(pools: Sequence[PagedRows]) -> None:
    """Room in every pool for some decode steps, with one wait for the device in all.

    On CUDA, where a captured step is void once a tensor has moved, all pools grow together and seldom.
    """
    if not pools:
        return
    device = pools[0].seen.device
    wants = torch.stack([rows.wants(AHEAD).to(device) for rows in pools]).tolist()
    short = any(rows.is_short(wanted) for rows, wanted in zip(pools, wants, strict=True))
    for rows, wanted in zip(pools, wants, strict=True):
        rows.grant(AHEAD, wanted, SPARE if short and device.type == "cuda" else 0)
