"""What the training-free baselines share: a budget a row, dense storage, attention by plain matrix products.

The KV budget of a row is (prompt + max generation length) / CR tokens per KV head (paper section 5.1 and appendix),
rounded down; it is fixed by the row's first prompt and follows the row into other caches.  The first tokens are
prefilled densely up to the budget; from there on each token, also of the prompt, is a step that ends in an eviction.
A row's slots depend on its own tokens alone, so what is evicted does not depend on the rest of the batch.

With ``protect`` the row's first prompt is never evicted (in Quest: is always read), and what comes after competes for
the rest of the same budget.  A prompt that leaves no room is kept all the same: the budget is then the prompt and one
token, the least with which a step has a slot.  Such a row misses its ratio, which its counters show.  Only the first
prompt is protected, as only it fixes the budget: a later turn's is evicted like anything generated.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from dms_core.cache.base import RowCache, RowLayer, prepared, take, tokens_first
from dms_core.cache.hybrid import other_layers
from dms_core.parallel import WHOLE, Split

BLOCK = 256  # queries whose attention weights are held at once in a prefill
ROUND = 1e-6  # tokens: a quotient this close below a whole number counts as that number


@dataclass(frozen=True)
class Baseline:
    """One method's settings.  An instance is what ``sample_chains`` takes as ``make_cache``."""

    cr: float  # target compression ratio
    protect: bool = field(default=False, kw_only=True)  # keep the prompt; the papers' methods do not

    name: ClassVar[str]
    layer: ClassVar[type["BaselineLayer"]]

    def __post_init__(self) -> None:
        if not self.cr >= 1:
            raise ValueError(f"compression ratio {self.cr}: must be >= 1")

    def __call__(self, model, max_new_tokens: int) -> "BaselineCache":
        """An empty cache for a model prepared by ``attach``, to be used inside ``model.dms.disabled()``."""
        return BaselineCache(self, model, max_new_tokens)

    def settings(self) -> dict:
        """Everything that shapes what a chain says and costs; ``protect`` only if set, as older records lack it."""
        settings = {"method": self.name, **asdict(self)}
        return settings if self.protect else {k: v for k, v in settings.items() if k != "protect"}

    def budget(self, prompt: Tensor, max_new_tokens: int) -> Tensor:
        """Tokens per KV head for rows whose prompts have ``prompt`` (B,) tokens: (B,), at least 1."""
        tokens = ((prompt + max_new_tokens) / self.cr + ROUND).long().clamp_min(1)
        return torch.maximum(tokens, prompt + 1) if self.protect else tokens


class DenseLayer(RowLayer):
    """Rows of slots (B, H, S, D), the live ones first.  ``per_slot`` and ``per_row`` name all that belongs to a row."""

    def _allocate(self) -> None:
        self.per_slot, self.per_row = ["keys", "values"], ["seen"]
        self.keys, self.values = (self.like.new_zeros(self.batch, self.heads, 0, self.like.shape[-1]) for _ in "kv")
        self.seen = self._counter(self.batch)  # tokens that each batch row has taken in, padding excluded

    def _counter(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.like.device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def _reserve(self, slots: int) -> None:
        """Room for ``slots`` slots."""
        if (more := slots - self.capacity) > 0:
            for name in self.per_slot:
                x = getattr(self, name)
                setattr(self, name, torch.cat([x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])], 2))

    def _measure(self) -> None:
        """Called after rows have come or gone."""

    def _select(self, indices: Tensor) -> None:
        for name in (*self.per_slot, *self.per_row):
            setattr(self, name, getattr(self, name)[indices])
        self.batch = len(indices)
        self._measure()

    def _copy(self, indices: Tensor, other: Self, source: Tensor) -> None:
        self._reserve(other.capacity)
        for name in self.per_slot:
            mine = getattr(self, name)
            mine[indices, :, : other.capacity] = getattr(other, name)[source].to(mine.dtype)
        for name in self.per_row:
            mine = getattr(self, name)
            mine[indices] = getattr(other, name)[source].to(mine.dtype)
        self._measure()

    def _empty(self, indices: Tensor) -> None:
        for name in self.per_row:
            getattr(self, name)[indices] = 0
        self._measure()


class BaselineLayer(DenseLayer):
    """One layer that evicts down to a budget.  Live tokens fill the slots from the first on; the last is a bin.

    A method says where the next token goes (_place) and learns what was attended to (_observe, _after_dense).
    """

    keeps_all: ClassVar[bool] = False  # nothing is evicted in a step
    evicts_first: ClassVar[bool] = False  # a full row makes room before it attends, not after
    scored: ClassVar[bool] = False  # _after_dense wants the attention that each token received

    def __init__(self, method: Baseline, max_new_tokens: int, index: int, split: Split = WHOLE) -> None:
        super().__init__()
        self.method, self.max_new_tokens, self.index, self.split = method, max_new_tokens, index, split
        self.sinks: Tensor | None = None  # (Hq,) of the call of attend under way

    def _allocate(self) -> None:
        super()._allocate()
        self.per_row += ["budget", "pinned", "held"]
        # ``pinned``: tokens of a protected prompt, which lie in the first slots and stay there.
        self.budget, self.pinned, self.held = (self._counter(self.batch) for _ in range(3))
        self.one = self.method.budget(self._counter(1) + 1, self.max_new_tokens)  # of a row without a prompt
        self.width = 0  # slots that some row uses

    @property
    def live(self) -> Tensor:
        """Live tokens, (B, H)."""
        return self.held[:, None].expand(-1, self.heads)

    @property
    def lasting(self) -> Tensor:
        """Live tokens that no step can evict, (B, H)."""
        return self.live if self.keeps_all else torch.minimum(self.live, self.pinned[:, None])

    def _keep_best(self, rows: Tensor, worth: Tensor, keep: Tensor) -> None:
        """Of the tokens of ``rows`` (N,) the ``keep`` (N,) of largest ``worth`` (N, H, S) stay, in their order."""
        best = torch.argsort(worth, dim=-1, descending=True, stable=True)[..., : int(keep.max())]
        last = worth.shape[-1] - 1
        behind = torch.arange(best.shape[-1], device=worth.device) >= keep[:, None]
        best = best.masked_fill(behind[:, None], last + 1).sort(-1).values.clamp_max(last)  # behind ``keep`` anything
        for pool in (self.keys, self.values):
            pool[rows, :, : best.shape[-1]] = take(pool[rows], best)
        self.held[rows] = keep

    def _measure(self) -> None:
        self.width = int(self.held.max()) if self.batch else 0

    # Storing and attending.

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, scale: float, sinks=None
    ) -> Tensor:
        """Store new tokens and attend to what they may see (shapes in DMSLayer.attend); ``evict`` is not used."""
        self.unread, self.sinks = False, sinks
        padded = valid is not None
        valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
        if q.shape[2] == 1 and self.capacity:
            return self._step(q, k[:, :, 0], v[:, :, 0], valid[:, 0], scale, counts=True)
        return self._prefill(q, k, v, valid, padded, scale)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, active: Tensor, scale: float, counts: bool) -> Tensor:
        """One token a row: q (B, Hq, 1, D), k and v (B, H, D), active (B,)."""
        if self.keeps_all and self.width + 1 >= self.capacity:
            self._reserve(self.capacity + 64)
        self.width = min(self.width + 1, self.capacity - 1)
        self.budget = torch.where(self.seen == 0, self.one, self.budget)
        self.pinned = torch.where(self.seen == 0, int(self.method.protect), self.pinned)
        slot = torch.where(active[:, None], self._place(), self.capacity - 1).expand(-1, self.heads)
        self._write(slot, k, v)
        count = self.held + active
        if self.evicts_first:
            count = torch.minimum(count, self.budget)
        grouped = q.unflatten(1, (self.heads, -1))  # (B, H, G, 1, D)
        visible, reads = self._visible(grouped, count)
        k, v = self.keys[:, :, : self.width], self.values[:, :, : self.width]
        out, weights = attention(grouped, k, v, visible, scale, self.sinks)
        self._observe(weights.squeeze(3), count, active)
        self.held = count if self.keeps_all else torch.minimum(count, self.budget)
        self.seen = self.seen + active
        if counts:
            self._count_reads(reads, active)
        return out.flatten(1, 2)

    def _place(self) -> Tensor:
        """The slot of each row's next token: (B, H or 1)."""
        return self.held[:, None]

    def _write(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (B, H, D) into ``slot`` (B, H)."""
        for pool, new in ((self.keys, k), (self.values, v)):
            put_at(pool, slot, new)

    def _visible(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What queries (B, H, G, 1, D) see, broadcastable to (B, H, G, 1, width), and items read, (B, H or 1)."""
        live = torch.arange(self.width, device=count.device) < count[:, None]
        return live[:, None, None, None], count[:, None]

    def _observe(self, weights: Tensor, count: Tensor, active: Tensor) -> None:
        """After a step: weights (B, H, G, width) over ``count`` (B,) tokens of the rows that are ``active``."""

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, padded: bool, scale: float) -> Tensor:
        """Many tokens a row, after any past: densely up to the budget, then step by step."""
        if padded:  # tokens first, padding behind them
            order = tokens_first(valid)[:, None]
            q, k, v = (take(x, order.expand(-1, x.shape[1], -1)) for x in (q, k, v))
        lengths = valid.sum(1)
        fresh = (self.seen == 0) & (lengths > 0)
        self.budget = torch.where(fresh, self.method.budget(lengths, self.max_new_tokens), self.budget)
        self.pinned = torch.where(fresh, lengths * self.method.protect, self.pinned)
        grown = self.held + lengths + fresh * self.max_new_tokens  # a prompt brings room for its chain
        slots = grown if self.keeps_all else torch.maximum(self.budget, self.one) + 1  # a row may begin with a step
        self._reserve(int(slots.max()) + 1)  # and the bin
        dense = lengths if self.keeps_all else torch.minimum(lengths, (self.budget - self.held).clamp_min(0))
        out = torch.zeros_like(q)
        if first := int(dense.max()):
            out[:, :, :first] = self._dense(q[:, :, :first], k[:, :, :first], v[:, :, :first], dense, fresh, scale)
        unfinished = dense[dense < lengths]
        for t in range(int(unfinished.min()) if len(unfinished) else q.shape[2], int(lengths.max())):
            active = (t >= dense) & (t < lengths)
            step = self._step(q[:, :, t : t + 1], k[:, :, t], v[:, :, t], active, scale, counts=False)
            out[:, :, t] = torch.where(active[:, None, None], step[:, :, 0], out[:, :, t])
        return take(out, torch.argsort(order, dim=2).expand(-1, q.shape[1], -1)) if padded else out

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> Tensor:
        """The first ``dense`` (B,) new tokens of each row, all of which stay: shapes as in attend."""
        past, new = self.width, k.shape[2]
        keys, values = torch.cat([self.keys[:, :, :past], k], 2), torch.cat([self.values[:, :, :past], v], 2)
        column = torch.arange(new, device=q.device)
        old = (torch.arange(past, device=q.device) < self.held[:, None])[:, None]
        there = (column < dense[:, None])[:, None]
        received = torch.zeros(keys.shape[:3], device=q.device)
        outs = []
        for start in range(0, new, BLOCK):
            rows = column[start : start + BLOCK, None]
            visible = torch.cat([old.expand(-1, len(rows), -1), there & (column <= rows)], 2)[:, None, None]
            grouped = q[:, :, start : start + BLOCK].unflatten(1, (self.heads, -1))
            out, weights = attention(grouped, keys, values, visible, scale, self.sinks)
            outs.append(out.flatten(1, 2))
            if self.scored:
                received += (weights * there.transpose(1, 2)[:, None, None, start : start + BLOCK]).sum((2, 3))
        row, at = there[:, 0].nonzero(as_tuple=True)
        slot = self.held[row] + at
        self.keys[row, :, slot], self.values[row, :, slot] = k[row, :, at], v[row, :, at]
        self._after_dense(q, received, dense, fresh, scale)
        self.seen = self.seen + dense
        self._measure()
        return torch.cat(outs, 2)

    def _after_dense(self, q: Tensor, received: Tensor, dense: Tensor, fresh: Tensor, scale: float) -> None:
        """``received`` (B, H, width + new): the attention summed over queries and the group; updates ``held``."""
        self.held = self.held + dense


class BaselineCache(RowCache):
    """The cache of one baseline; layers with a sliding window keep it."""

    def __init__(self, method: Baseline, model, max_new_tokens: int) -> None:
        """Raises ValueError for ``max_new_tokens`` < 0 or a model that ``attach`` has not prepared."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be >= 0")
        self.model, self.config = model, (method, max_new_tokens)
        dms = prepared(model)
        makes = partial(method.layer, method, max_new_tokens, split=dms.split)
        others = other_layers(dms.layout, dms.config)
        if both := [index for index in others if index in dms.layout.gated]:
            raise ValueError(f"layers {both} have attention and a state: {method.name} needs attention alone")
        super().__init__([others[i]() if i in others else makes(i) for i in range(dms.layers)])

    def _new(self) -> "BaselineCache":
        return BaselineCache(self.config[0], self.model, self.config[1])

    def check(self, dms) -> None:
        """Raises ValueError if the model's gates are on: a baseline is the original model with another cache."""
        if dms.enabled:
            raise ValueError(f"a {self.config[0].name} cache and gates that are on: call it in model.dms.disabled()")


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q (B, H, G, T, D), k and v (B, H, S, D), visible broadcastable to (B, H, G, T, S), sinks (H * G,).

    Returns (B, H, G, T, D) and the weights (B, H, G, T, S) in fp32; a query that sees nothing gets finite garbage.
    """
    scores = torch.matmul((q * scale).flatten(2, 3), k.transpose(-1, -2)).float().unflatten(2, q.shape[2:4])
    scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # one more key, whose value is 0
        more = sinks.float().view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, more], -1).softmax(-1)[..., :-1]
    return torch.matmul(weights.flatten(2, 3).to(v.dtype), v).unflatten(2, q.shape[2:4]), weights


def put_at(pool: Tensor, slot: Tensor, new: Tensor) -> None:
    """pool (B, H, S, ...), slot (B, H), new (B, H, ...): pool[b, h, slot[b, h]] = new[b, h]."""
    row = torch.arange(slot.numel(), device=slot.device) * pool.shape[2] + slot.flatten()
    pool.view(-1, *pool.shape[3:]).index_copy_(0, row, new.flatten(0, 1).to(pool.dtype))
