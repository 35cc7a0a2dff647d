"""A hypothesis machine that does to two caches all that can be done to one, and to plain lists the same.

What a cache should hold is told by a ``Row`` for each layer and batch row; a subclass says how tokens are fed and what
must agree.  ``steps`` counts the rules that were applied, in all examples together.
"""

import random
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dms_core.cache.base import RowCache

WIDTH, GROUP, SCALE = 4, 2, 0.5
LONGEST = 40  # tokens from which a row is emptied before it gets more
MOST = 5  # rows

WHICH = st.integers(0, 1)
NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=4)  # of rows, modulo the batch
SHARES = st.sampled_from([0.0, 0.5, 0.9, 1.0])  # of tokens whose gate says yes
PADDING = st.lists(st.integers(0, 12), min_size=MOST, max_size=MOST)  # on the left, row by row


@dataclass
class Row:
    """All that one batch row of one layer was given, and its counters by KV head."""

    heads: int
    tokens: list = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    stream: int = 0  # of random numbers

    def __post_init__(self) -> None:
        self.reads = self.reads or [0] * self.heads
        self.peak = self.peak or [0] * self.heads

    def copy(self) -> "Row":
        return Row(self.heads, list(self.tokens), list(self.reads), list(self.peak), self.stream)


@dataclass
class Twin:
    """A cache, and of each layer the rows that it should agree with."""

    cache: RowCache
    dtype: torch.dtype
    layers: list[list[Row]]
    columns: int = 0
    recent: list[list[bool]] = field(default_factory=list)  # who took a token in the columns that crop() can take back
    changed: bool = True

    @property
    def batch(self) -> int:
        return len(self.layers[0])

    def select(self, rows: list[int]) -> None:
        self.layers = [[layer[i].copy() for i in rows] for layer in self.layers]
        self.recent = [[column[i] for i in rows] for column in self.recent]


def randoms(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g)


def bytes_of(*tensors: torch.Tensor) -> int:
    """What the allocator holds for them, however little of it they show."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class CacheMachine(RuleBasedStateMachine):
    """A subclass has an initial rule, which ends in ``begin``, and what is not implemented here."""

    steps: ClassVar[int]
    slack = 0

    def new_cache(self) -> RowCache:
        raise NotImplementedError

    def heads(self, index: int) -> int:
        """KV heads of a layer."""
        raise NotImplementedError

    def new_row(self, index: int) -> Row:
        return Row(self.heads(index))

    def feed_layer(self, twin: Twin, index: int, valid: list[list[bool]], share: float) -> None:
        """Give one layer the tokens that are ``valid`` [row][column]; check its answers and count."""
        raise NotImplementedError

    def check_layer(self, twin: Twin, index: int) -> None:
        raise NotImplementedError

    def lasting(self, row: Row, index: int) -> list[int]:
        """Tokens that stay whatever comes, by KV head."""
        raise NotImplementedError

    def begin(self, seed: int, batches: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        self.rng, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.twins = [Twin(self.new_cache(), dtype, []) for _ in batches]
        for twin, batch in zip(self.twins, batches, strict=True):
            self.furnish(twin, twin.cache, batch, dtype)

    def furnish(self, twin: Twin, cache: RowCache, batch: int, dtype: torch.dtype) -> None:
        """Make ``cache``, which is empty, the one of ``twin``, with rows without tokens."""
        for index, layer in enumerate(cache.layers):
            layer.lazy_initialization(torch.empty(batch, self.heads(index), 0, WIDTH, dtype=dtype))
        layers = [[self.new_row(index) for _ in range(batch)] for index in range(len(cache.layers))]
        twin.cache, twin.dtype, twin.layers, twin.columns, twin.recent = cache, dtype, layers, 0, []

    def did(self, *twins: Twin) -> None:
        """Ends a rule.  Every other step brings tokens: hypothesis leaves rules out of examples."""
        type(self).steps += 1
        for twin in twins:
            twin.changed = True
        if self.rng.random() < 0.5:
            twin, tokens = twins[0], self.rng.choice([1, 1, 2, 5, 9, 12])
            padding = [self.rng.choice([0, 0, self.rng.randint(0, tokens)]) for _ in range(twin.batch)]
            valid = [[t >= n for t in range(tokens)] for n in padding]
            self.feed(twin, valid, self.rng.choice([0.0, 0.5, 0.9, 1.0]))

    # Tokens.

    def feed(self, twin: Twin, valid: list[list[bool]], share: float) -> None:
        if long := [b for b, row in enumerate(twin.layers[0]) if len(row.tokens) > LONGEST]:
            self.empty(twin, long)
        if len(valid[0]) == 1 and self.rng.random() < 0.5:
            twin.cache.make_room()
        for index in range(len(twin.layers)):
            self.feed_layer(twin, index, valid, share)
        twin.columns += len(valid[0])
        columns = [list(column) for column in zip(*valid, strict=True)]
        twin.recent = (twin.recent + columns)[-self.slack :] if self.slack else []

    @rule(which=WHICH, tokens=st.integers(1, 12), padding=PADDING, holes=st.sampled_from([0, 0, 0.3]), share=SHARES)
    def prefill(self, which, tokens, padding, holes, share):
        twin = self.twins[which]
        valid = [
            [t >= padding[b] % (tokens + 1) and self.rng.random() >= holes for t in range(tokens)]
            for b in range(twin.batch)
        ]
        self.feed(twin, valid, share)
        self.did(twin)

    @rule(which=WHICH, tokens=st.integers(2, 12), share=SHARES)
    def prefill_without_padding(self, which, tokens, share):
        twin = self.twins[which]
        self.feed(twin, [[True] * tokens] * twin.batch, share)
        self.did(twin)

    @rule(which=WHICH, steps=st.sampled_from([1, 1, 2, 3, 19]), idle=st.booleans(), share=SHARES)
    def decode(self, which, steps, idle, share):
        twin = self.twins[which]
        for _ in range(steps):
            self.feed(twin, [[not idle or self.rng.random() < 0.6] for _ in range(twin.batch)], share)
        self.did(twin)

    # Rows.

    @rule(which=WHICH, chains=st.integers(1, 3))
    def fork(self, which, chains):
        twin = self.twins[which]
        chains = min(chains, MOST // twin.batch)
        twin.cache.fork(chains)
        twin.select([b for b in range(twin.batch) for _ in range(chains)])
        self.did(twin)

    @rule(which=WHICH, rows=NUMBERS)
    def reorder(self, which, rows):
        twin = self.twins[which]
        rows = [row % twin.batch for row in rows]
        twin.cache.reorder_cache(torch.tensor(rows))
        twin.select(rows)
        self.did(twin)

    def empty(self, twin: Twin, rows: list[int]) -> None:
        twin.cache.reset_rows(torch.tensor(rows))
        for index, layer in enumerate(twin.layers):
            for b in rows:
                layer[b] = self.new_row(index)
        twin.recent = [[taken and b not in rows for b, taken in enumerate(column)] for column in twin.recent]

    @rule(which=WHICH, rows=NUMBERS)
    def reset_rows(self, which, rows):
        twin = self.twins[which]
        self.empty(twin, [row % twin.batch for row in rows])
        self.did(twin)

    @rule(which=WHICH, batch=st.integers(1, 3))
    def reset(self, which, batch):
        """The whole cache, which goes on with another number of rows."""
        twin = self.twins[which]
        twin.cache.reset()
        assert twin.cache.bytes_held() == twin.cache.get_seq_length() == 0
        self.furnish(twin, twin.cache, batch, twin.dtype)
        self.did(twin)

    @rule(which=WHICH, whose=WHICH, rows=NUMBERS, sources=NUMBERS)
    def put_rows(self, which, whose, rows, sources):
        """Of the other cache, or of the same one."""
        twin, other = self.twins[which], self.twins[whose]
        rows = list(dict.fromkeys(row % twin.batch for row in rows))
        sources = [sources[i % len(sources)] % other.batch for i in range(len(rows))]
        twin.cache.put_rows(torch.tensor(rows), other.cache, torch.tensor(sources))
        for mine, theirs in zip(twin.layers, other.layers, strict=True):
            for b, row in zip(rows, [self.moved(theirs[i], twin.dtype) for i in sources], strict=True):
                mine[b] = row
        twin.recent = []
        self.did(twin, other)

    @rule(which=WHICH, row=st.integers(0, 11), copies=st.integers(1, 3), move=st.booleans())
    def copy_a_prefix(self, which, row, copies, move):
        """One row, copied into a new cache, perhaps of another dtype."""
        twin = self.twins[which]
        dtype, row = self.other_dtype(twin.dtype) if move else twin.dtype, row % twin.batch
        old, rows = twin.cache, [self.moved(layer[row], dtype) for layer in twin.layers]
        if dtype == twin.dtype:
            twin.cache = old.empty_like(copies)
            twin.layers, twin.columns, twin.recent = [[]] * len(rows), 0, []
        else:
            self.furnish(twin, old._new(), copies, dtype)
        twin.cache.put_rows(torch.arange(copies), old, torch.full((copies,), row))
        twin.layers = [[one.copy() for _ in range(copies)] for one in rows]
        self.did(twin)

    def other_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def moved(self, row: Row, dtype: torch.dtype) -> Row:
        """What a row becomes in a cache of this dtype."""
        return row.copy()

    @rule(which=WHICH, rows=NUMBERS, stream=st.integers(0, 2**63 - 1))
    def name_streams(self, which, rows, stream):
        twin = self.twins[which]
        rows = list(dict.fromkeys(row % twin.batch for row in rows))
        streams = [(stream + i) % 2**63 for i in range(len(rows))]
        twin.cache.name_streams(torch.tensor(rows), torch.tensor(streams))
        for layer in twin.layers:
            for b, number in zip(rows, streams, strict=True):
                layer[b].stream = number
        self.did(twin)

    @rule(which=WHICH)
    def trim(self, which):
        twin = self.twins[which]
        twin.cache.trim()
        self.did(twin)

    # What must hold after each step.

    @invariant()
    def caches_agree_with_the_lists(self):
        for twin in getattr(self, "twins", []):
            if twin.changed:
                self.check(twin)
                twin.changed = False

    def check(self, twin: Twin) -> None:
        cache = twin.cache
        assert cache.batch_size == twin.batch and cache.get_seq_length() == twin.columns
        assert cache.tokens_seen().tolist() == [len(row.tokens) for row in twin.layers[0]]
        for index in range(len(twin.layers)):
            self.check_layer(twin, index)
        names = ("lasting_tokens", "kv_reads", "peak_tokens")
        for index, (rows, *found) in enumerate(zip(twin.layers, *(getattr(cache, x)() for x in names), strict=True)):
            times = len(found[0][0]) // rows[0].heads
            wanted = zip(*((self.lasting(row, index), row.reads, row.peak) for row in rows), strict=True)
            for name, of_layer, numbers in zip(names, found, wanted, strict=True):
                assert of_layer.tolist() == [[n for n in row for _ in range(times)] for row in numbers], name
