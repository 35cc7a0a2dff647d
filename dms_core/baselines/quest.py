"""Quest (Tang et al. 2024): the whole cache stays, and each query head reads the pages that may matter most to it.

A page of consecutive tokens is bounded by its keys' largest and smallest value per channel: q . k is at most
sum_d max(q_d max_d, q_d min_d).  Each query head takes the budget's number of pages (rounded up, so that CR 1 is dense)
with the largest bounds; the newest page is always one of them, as in the authors' kernels.  Reads count every distinct
page of a KV head's group once, and not the bounds themselves; nothing is freed.  The authors leave the first two layers
dense; here every layer selects.  The pages of a protected prompt are always read too, within the budget's pages, which
are then at least those and the newest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dms_core.baselines.base import Baseline, BaselineLayer, put_at


class QuestLayer(BaselineLayer):
    method: "Quest"
    keeps_all = True

    def _allocate(self) -> None:
        super()._allocate()
        # Of each page the largest k and the largest -k; the last entry is a bin.
        self.bounds = self.like.new_zeros(self.batch, self.heads, 1, 2 * self.like.shape[-1])
        self.most = -(-int(self.one) // self.method.page)  # pages of the largest budget

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.bounds.nbytes

    def _write(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        super()._write(slot, k, v)
        size, spare = self.method.page, self.bounds.shape[2] - 1
        page = torch.where(slot == self.capacity - 1, spare, slot // size)
        new = torch.cat([k, -k], -1)
        old = self.bounds.gather(2, page[..., None, None].expand(-1, -1, 1, new.shape[-1]))[:, :, 0]
        put_at(self.bounds, page, torch.where((slot % size == 0)[..., None], new, torch.maximum(old, new)))

    def _visible(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        size = self.method.page
        page = torch.arange(-(-self.width // size), device=q.device)
        newest = (count[:, None] - 1) // size  # (B, 1)
        signed = torch.cat([q, -q], -1).relu().squeeze(3)  # (B, H, G, 2 D)
        bound = torch.matmul(signed, self.bounds[:, :, : len(page)].transpose(-1, -2)).float()  # (B, H, G, pages)
        bound = bound.masked_fill_((page > newest)[:, None, None], -torch.inf)
        always = (page == newest) | (page * size < self.pinned[:, None])
        bound = bound.masked_fill_(always[:, None, None], torch.inf)
        first = bound.sort(dim=-1, descending=True, stable=True).indices[..., : self.most]  # of equals, the oldest
        allowed = page[: first.shape[-1]] < -(-self.budget[:, None] // size)  # (B, most)
        chosen = torch.zeros_like(bound, dtype=torch.bool).scatter_(-1, first, allowed[:, None, None].expand_as(first))
        tokens = (count[:, None] - page * size).clamp(0, size)  # (B, pages)
        reads = (chosen.any(2) * tokens[:, None]).sum(-1)
        slots = chosen[..., None].expand(*chosen.shape, size).flatten(-2)[..., : self.width]
        live = super()._visible(q, count)[0]
        return slots[:, :, :, None] & live, reads

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        super()._after_dense(q, received, dense, fresh, scale)
        self.bounds[:, :, :-1] = self._bound(self.keys, self.held)

    def _bound(self, keys: Tensor, held: Tensor) -> Tensor:
        """Bounds of the pages of keys (B, H, S, D), ``held`` (B,) of which are live: (B, H, pages, 2 D)."""
        size = self.method.page
        live = (torch.arange(keys.shape[2], device=keys.device) < held[:, None])[:, None, :, None]
        signed = torch.cat([keys, -keys], -1).masked_fill(~live, torch.finfo(keys.dtype).min)
        signed = torch.nn.functional.pad(signed, (0, 0, 0, -keys.shape[2] % size), value=torch.finfo(keys.dtype).min)
        return signed.unflatten(2, (-1, size)).amax(3)

    def _reserve(self, slots: int) -> None:
        super()._reserve(slots)
        if (more := -(-self.capacity // self.method.page) + 1 - self.bounds.shape[2]) > 0:
            self.bounds = torch.nn.functional.pad(self.bounds, (0, 0, 0, more))

    def _measure(self) -> None:
        super()._measure()
        self.most = -(-max(int(self.budget.max()) if self.batch else 1, int(self.one)) // self.method.page)

    def _select(self, indices: Tensor) -> None:
        self.bounds = self.bounds[indices]
        super()._select(indices)

    def _copy(self, indices: Tensor, other: "QuestLayer", source: Tensor) -> None:
        super()._copy(indices, other, source)
        self.bounds[indices, :, :-1] = self._bound(self.keys[indices], self.held[indices])


@dataclass(frozen=True)
class Quest(Baseline):
    page: int = 16  # tokens a page; the embedded model's texts want smaller ones

    name = "quest"
    layer = QuestLayer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page {self.page}: must be >= 1")

    def budget(self, prompt: Tensor, max_new_tokens: int) -> Tensor:
        """Tokens per KV head that a step may read, in whole pages: (B,)."""
        tokens = super().budget(prompt, max_new_tokens)
        last = -(-prompt // self.page) * self.page  # where the prompt's last page ends
        return torch.maximum(tokens, last + 1) if self.protect else tokens
