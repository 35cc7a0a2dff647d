"""Documents packed into rows of at most ``context`` tokens; positions start over with every document.

Attention, eviction and losses keep apart documents whose positions start over (``model._segments``).  An epoch is a
seeded permutation of the documents, each put into the fullest of a few open rows that has room for it.  Row i of a run
is a function of (store, context, seed, i): a resumed run needs no state.
"""

from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from dms_core.train.data import Store

OPEN = 32  # rows that are open at once: 97 % full for lengths spread evenly up to the context


def pack(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Indices of the documents of each row, for documents in this order; none may be longer than ``context``."""
    rows, open_rows, room = [], [], []
    for index, length in enumerate(lengths.tolist()):
        fits = [place for place, left in enumerate(room) if left >= length]
        if fits:
            place = min(fits, key=room.__getitem__)
        else:
            if len(open_rows) == OPEN:
                fullest = min(range(OPEN), key=room.__getitem__)
                rows.append(open_rows.pop(fullest))
                room.pop(fullest)
            place = len(open_rows)
            open_rows.append([])
            room.append(context)
        open_rows[place].append(index)
        room[place] -= length
    return rows + open_rows


class PackedRows(Dataset):
    """``size`` rows of as many epochs as that takes: input_ids, labels (-100: not predicted) and position_ids."""

    def __init__(self, store: Store, context: int, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size {size}: must be >= 1")
        self.store, self.context, self.size, self.seed = store, context, size, seed
        self.starts = [0]  # first row of each epoch that has been packed, and of the next
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        while self.starts[-1] <= index:
            self.starts.append(self.starts[-1] + len(self._epoch(len(self.starts) - 1)))
        epoch = int(np.searchsorted(self.starts, index, side="right")) - 1
        ids, labels = zip(*map(self.store.document, self._epoch(epoch)[index - self.starts[epoch]]), strict=True)
        places = np.concatenate([np.arange(len(document)) for document in ids])
        return {"input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "position_ids": places}

    def _pack_epoch(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.store))
        return [order[row] for row in pack(self.store.table[order, 1], self.context)]
