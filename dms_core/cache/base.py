"""What every cache here shares: rows that come and go, and budgets counted as in paper section 5.1.

A layer stores new tokens and answers their queries in ``attend``, called by the ``dms`` attention function; it counts
KV reads (items attended to at each decode step; prefill does not count) and says how many items it holds.  DMS
(``dms_core.cache.dms``) and the training-free baselines (``dms_core.baselines``) differ in their layers alone.
"""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dms_core.cache import states
from dms_core.cache.pages import PagedRows, make_room


class RowLayer(CacheLayerMixin):
    """One layer.  A subclass has attend, _allocate, _select, _copy, _empty; and live, lasting, seen, nbytes."""

    # (B, H) int64 each: KV reads so far; most live tokens before they last shrank; number of the row's random stream.
    counters: ClassVar[tuple[str, ...]] = ("reads", "peak", "stream")
    rows: PagedRows | None = None  # where keys and values lie in pages
    peak: Tensor
    slack = spare = 0  # columns that crop() can take back at most, and now
    is_croppable = property(lambda self: self.slack > 0)

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0  # columns of the padded batch seen so far, what generate() calls the length
        self.unread = False  # update() was called, attend() not yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.batch, self.heads = key_states.shape[:2]
        self.like = key_states.new_empty(0, key_states.shape[-1])  # head dimension, dtype and device
        for name in self.counters:
            setattr(self, name, torch.zeros(self.batch, self.heads, dtype=torch.long, device=key_states.device))
        self._allocate()
        self.is_initialized = True

    # What transformers asks of a layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on to the ``dms`` attention function, which calls attend()."""
        if self.unread:
            raise ValueError("a DMSCache was given to a model that dms_core.attach has not prepared")
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if (self.batch, self.heads) != tuple(key_states.shape[:2]):
            raise ValueError(
                f"keys of {tuple(key_states.shape[:2])} (batch, KV heads): this cache holds {(self.batch, self.heads)}"
            )
        self.unread = True
        self.columns += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        self.columns, self.unread, self.is_initialized, self.rows = 0, False, False, None

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        indices = indices.to(self.like.device)
        self._select(indices)
        for name in self.counters:
            setattr(self, name, getattr(self, name)[indices])
        self.batch = len(indices)

    def _count_reads(self, items: Tensor, active: Tensor) -> None:
        """After a token a row was stored: ``items`` (B, H) were attended to in the rows ``active`` (B,).

        A row's first token is its prompt, and prefill does not count.
        """
        self.reads += items * (active & (self.seen > 1))[:, None]

    # Rows one by one.

    def put(self, indices: Tensor, other: Self, source: Tensor) -> None:
        """Batch rows ``indices`` become copies of rows ``source`` of another layer of the same shape."""
        self._copy(indices, other, source)
        for name in self.counters:
            getattr(self, name)[indices] = getattr(other, name)[source]

    def clear(self, indices: Tensor) -> None:
        """Empty batch rows ``indices``."""
        self._empty(indices)
        for name in self.counters:
            getattr(self, name)[indices] = 0

    def trim(self) -> None:
        """Give memory that is not needed back to the allocator."""


class RowCache(Cache):
    """A cache for a model prepared by ``dms_core.attach``.  Works with ``model.generate`` and by hand.

    A subclass has ``_new``, an empty cache like it, and ``config``, its settings.
    """

    config: Any
    idle: Tensor | None = None  # (B,): rows that skipped a step, which their states took in all the same
    static = False  # whether a decode step has static shapes
    slack = 0  # tokens that crop() can take back at most

    @property
    def held(self) -> list[RowLayer]:
        """The layers that hold keys and values; the others have a state that the model makes."""
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]

    @property
    def states(self) -> list:
        """The layers with states: linear attention, convolution, Mamba."""
        return [layer for layer in self.layers if hasattr(layer, "conv_states")]

    def empty_like(self, batch: int) -> Self:
        """An empty cache of ``batch`` rows with this one's settings, heads, dtype and device."""
        other = self._new()
        for mine, theirs in zip(self.held, other.held, strict=True):
            theirs.lazy_initialization(mine.like.new_empty(batch, mine.heads, 0, mine.like.shape[-1]))
        return other

    def check(self, dms) -> None:
        """Raises ValueError if the cache was made for other settings than those of ``dms``, a model's gates."""
        if self.config != dms.config:
            raise ValueError(f"a cache made for {self.config}: this model has {dms.config}")

    def make_room(self) -> bool:
        """Before a step of one token a row: room in all layers, with one wait for the device every some steps.

        Returns whether it looked.  Raises RuntimeError if a row has lost a token since the last look.
        """
        held = self.held
        if all(x.rows is None or x.rows.credit for x in held):
            return False
        pools = [x.rows for x in held if x.rows is not None]
        make_room(pools)
        return True

    @property
    def moves(self) -> int:
        """Grows whenever a tensor that a decode step uses is replaced by another: a captured step is then void."""
        return sum(x.rows.moves for x in self.held if x.rows is not None)

    def count_step(self, steps: int) -> None:
        """Bring the host's counters up to date with decode steps that Python did not see (see dms_core.graphs)."""
        for layer in self.held:
            layer.columns, layer.unread = layer.columns + steps, False
            if layer.rows is not None:
                layer.rows.credit -= steps

    @property
    def columns(self) -> int:
        """Columns of the padded batch so far, what transformers calls the length; rows that come and go may set it."""
        return self.held[0].columns

    @columns.setter
    def columns(self, columns: int) -> None:
        for layer in self.held:
            layer.columns = columns

    @property
    def batch_size(self) -> int:
        return self.held[0].batch

    def live_tokens(self) -> Tensor:
        """Live tokens now, (layers, B, H), of the layers that hold keys and values."""
        return self._of_layers("live")

    def lasting_tokens(self) -> Tensor:
        """Live tokens that can no longer be evicted, (layers, B, H): of a prompt, what all its chains share."""
        return self._of_layers("lasting")

    def tokens_seen(self) -> Tensor:
        """Tokens each batch row has taken in, padding excluded: (B,)."""
        return self.held[0].seen

    def kv_reads(self) -> Tensor:
        """Items attended to, summed over decode steps, (layers, B, H); prefill does not count (section 5.1)."""
        return self._of_layers("reads")

    def peak_tokens(self) -> Tensor:
        """Most live items after any step so far, (layers, B, H).  A layer notes ``peak`` where its rows may shrink."""
        return torch.maximum(self.live_tokens(), self._of_layers("peak"))

    def _of_layers(self, name: str) -> Tensor:
        """A counter of the layers that hold keys and values, (layers, B, H), on the first one's device.

        Where layers have different numbers of KV heads, H is their least common multiple; each repeats its own.
        """
        held = self.held
        heads, device = math.lcm(*(x.heads for x in held)), held[0].like.device
        of_layers = (getattr(x, name).to(device).repeat_interleave(heads // x.heads, 1) for x in held)
        return torch.stack(list(of_layers))

    def bytes_held(self) -> int:
        """Bytes of all key and value tensors, unused room included."""
        return sum(x.nbytes for x in self.held if x.is_initialized)

    def bytes_of_states(self) -> int:
        """Bytes of what layers without keys and values hold: constant in the number of tokens, not DMS's."""
        return sum(map(states.nbytes, self.states))

    def trim(self) -> None:
        """Give unused room back to the allocator."""
        for layer in self.held:
            if layer.is_initialized:
                layer.trim()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns: ``crop(-3)`` three of them, as in transformers; a positive number stays.

        What is then visible is what was before them, and so is what the next tokens see.  Raises ValueError, with
        nothing changed, for more than ``slack`` in all: room for taking back comes again with new columns only.
        """
        columns = self.get_seq_length()
        tokens = min(-tokens_to_remove, columns) if tokens_to_remove <= 0 else max(columns - tokens_to_remove, 0)
        if tokens == 0:
            return
        spare = min(getattr(layer, "spare", 0) for layer in self.layers)
        if not self.slack:
            why = "was made with slack 0; DMSCache.for_model(model, slack=N) can take back N tokens"
        elif fixed := [index for index, layer in enumerate(self.layers) if not getattr(layer, "slack", 0)]:
            why = f"has chunks or states in layers {fixed}, which cannot be taken back"
        elif tokens > spare:
            why = f"can take back {spare} tokens now, not {tokens}; its slack is {self.slack}"
        else:
            why = None
        if why:
            raise ValueError(f"crop({tokens_to_remove}): this cache {why}")
        for layer in self.layers:
            layer.crop(tokens)

    def fork(self, chains: int) -> None:
        """Repeat every row ``chains`` times, neighbours together: one prompt, many chains, which share its pages."""
        if chains < 1:
            raise ValueError(f"chains {chains}: must be >= 1")
        self.batch_repeat_interleave(chains)

    def resumed_after_idle(self, valid: Tensor) -> Tensor:
        """Whether a row that skipped a step is active again in this one, ``valid`` (B, 1).

        Its states took the skipped step in: transformers' layers with states have no mask in decode steps.  Does not
        wait for the device.
        """
        active = valid[:, 0]
        if self.idle is None:
            self.idle = torch.zeros_like(active)
        wrong = (self.idle & active).any()
        self.idle.logical_or_(~active)
        return wrong

    def put_rows(self, indices: Tensor, other: Self, source: Tensor) -> None:
        """Rows ``indices`` become copies of rows ``source`` of ``other``: how a finished chain's row is refilled."""
        if other.config != self.config or len(other.layers) != len(self.layers):
            raise ValueError(f"rows of a cache with {other.config}: this one has {self.config}; both must be the same")
        for index, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if type(mine) is not type(theirs):
                kinds = f"{type(theirs).__name__} in layer {index}: this one has {type(mine).__name__}"
                raise ValueError(f"rows of a cache with a {kinds}; both must be the same")
        for mine, theirs in zip(self.held, other.held, strict=True):
            mine.put(indices.to(mine.like.device), theirs, source.to(mine.like.device))
        for mine, theirs in zip(self.states, other.states, strict=True):
            states.put(mine, self.batch_size, indices, theirs, source)
        if self.idle is not None:
            self.idle[indices.to(self.idle.device)] = False

    def reset_rows(self, indices: Tensor) -> None:
        """Empty single rows."""
        for layer in self.held:
            layer.clear(indices.to(layer.like.device))
        for layer in self.states:
            states.clear(layer, indices)
        if self.idle is not None:
            self.idle[indices.to(self.idle.device)] = False

    def reset(self) -> None:
        """Empty the cache; the next batch may have another size."""
        for layer in self.held:
            layer.reset()
        for layer in self.states:
            states.reset(layer)
        self.idle = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Become copies of the rows named in ``indices``."""
        for layer in self.held:
            layer.batch_select_indices(indices)
        for layer in self.states:
            states.select(layer, indices)
        if self.idle is not None:
            self.idle = self.idle[indices.to(self.idle.device)]

    reorder_cache = batch_select_indices  # its name in beam search

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, neighbours together."""
        if self.held[0].is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def name_streams(self, indices: Tensor, streams: Tensor) -> None:
        """Rows ``indices`` draw from the random streams ``streams`` (int64) from now on; only some methods draw."""
        for layer in self.held:
            layer.stream[indices.to(layer.stream.device)] = streams[:, None].to(layer.stream.device)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, S, D), index (B, H, N): (B, H, N, D)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def tokens_first(valid: Tensor) -> Tensor:
    """An order of the columns of ``valid`` (..., T) that puts tokens first and padding behind them: (..., T)."""
    return torch.argsort((~valid).to(torch.int8), dim=-1, stable=True)


def prepared(model):
    """``model.dms``.  Raises ValueError if ``attach`` has not prepared the model."""
    if getattr(model, "dms", None) is None:
        raise ValueError(f"{type(model).__name__} has no DMS gates: call dms_core.attach(model, config) first")
    return model.dms
