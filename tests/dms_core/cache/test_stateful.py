"""DMSCache, also with random marks, sliding windows and chunks, and DMC's cache: 7,000 steps in any order.

Who sees whom is told here by lists alone: the token at position i sees that at j while 0 <= i - j <= window, and later
unless what the token at j + lag said was yes.  A cache holds what the newest token sees; with slack at most as many
tokens more.  DMC is window 0: a token that takes over the entry before it hides it.  Every number is looked at: keys
and values exactly, or in 8 bits within half a step of a token's largest.
"""

import copy
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cache_machine import GROUP, SCALE, WHICH, WIDTH, CacheMachine, Row, Twin, bytes_of, randoms
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from dms_core.baselines.dmc import DMCConfig
from dms_core.baselines.dmc_cache import DMCCache
from dms_core.baselines.random_marks import MarkedCache
from dms_core.cache.dms import DMSCache, DMSLayer, sliding_layer
from dms_core.cache.hybrid import ChunkedLayer
from dms_core.config import DMSConfig
from dms_kernels import prefill

ROUNDS, EXAMPLES, STEPS = 34, 5, 50  # hypothesis repeats much of an example in the next: each round draws anew
LEAST = 7_000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2},
    torch.float16: {"rtol": 4e-3, "atol": 6e-3},
}
IN_8_BITS = {"rtol": 0.1, "atol": 0.15}


@dataclass(frozen=True)
class Token:
    """By KV head: key and value in one list, and whether its gate said yes."""

    numbers: list[list[float]]
    said: list[bool]


@dataclass(frozen=True)
class Sight:
    """Who sees whom in one layer."""

    heads: int
    window: int
    lag: int
    chunk: int = 0  # tokens; 0: none
    sliding: bool = False  # what leaves the window is always gone

    def sees(self, tokens: list[Token], head: int, i: int, j: int) -> bool:
        if self.chunk:
            return j <= i and i // self.chunk == j // self.chunk
        if i - j <= self.window:
            return j <= i
        return not self.sliding and not tokens[j + self.lag].said[head]

    def held(self, tokens: list[Token], head: int) -> list[list[float]]:
        """Keys and values of what the newest token sees."""
        newest = len(tokens) - 1
        return [x.numbers[head] for j, x in enumerate(tokens) if self.sees(tokens, head, newest, j)]

    def lasting(self, tokens: list[Token], head: int) -> int:
        """Tokens that are seen for good: nothing still to be said is about them."""
        decided = tokens[self.lag :]
        return 0 if self.chunk or self.sliding else sum(not x.said[head] for x in decided)

    def answers(self, tokens: list[Token], q: torch.Tensor) -> torch.Tensor:
        """(Hq, n, D): of the newest n tokens, whose queries are q (Hq, n, D)."""
        every, first = range(len(tokens)), len(tokens) - q.shape[1]
        sees = [[[self.sees(tokens, h, i, j) for j in every] for i in every[first:]] for h in range(self.heads)]
        k, v = torch.tensor([x.numbers for x in tokens]).double().transpose(0, 1)[:, None].split(WIDTH, -1)
        scores = q.double().unflatten(0, (self.heads, -1)) @ k.transpose(-1, -2) * SCALE  # (H, G, n, all)
        weights = scores.masked_fill(~torch.tensor(sees)[:, None], float("-inf")).softmax(-1)
        return (weights @ v).flatten(0, 1)


def alike(found: list[float], wanted: list[float], dtype: torch.dtype) -> bool:
    """Whether ``found`` is what 8 bits and then ``dtype`` hold of a key and a value."""
    for part in (slice(None, WIDTH), slice(WIDTH, None)):
        largest = max(map(abs, wanted[part]))
        most = largest * (1.01 / 254 + torch.finfo(dtype).eps) + 1e-30
        if any(abs(x - y) > most for x, y in zip(found[part], wanted[part], strict=True)):
            return False
    return True


class DMSMachine(CacheMachine):
    steps = round = 0

    @initialize(seeds=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)))
    def start(self, seeds):
        rng = random.Random(f"{self.round} {seeds}")
        kind = rng.choice([DMSCache, DMSCache, DMSCache, MarkedCache, DMCCache])
        window, delayed, slack = (
            rng.choice([0, 0, 1, 2, 5, 15, 16, 17]),
            rng.random() < 0.6,
            rng.choice([0, 0, 0, 1, 3]),
        )
        page, heads, local = rng.choice([1, 2, 3, 16]), (rng.randint(1, 2), rng.randint(1, 2)), rng.randint(1, 9)
        second = rng.choice([None, "gated", "sliding", "chunked"])
        stored, dtype = rng.choice(["auto", "auto", "int8"]), rng.choice(DTYPES)
        listed, batches = rng.random() < 0.5, (rng.randint(1, 3), rng.randint(1, 2))
        self.dense, prefill.DENSE = prefill.DENSE, 0 if listed else prefill.DENSE
        self.page, self.stored, self.merging = page, stored, kind is DMCCache
        if self.merging:
            self.sights = [Sight(heads[0], window=0, lag=1)] * (1 if second is None else 2)
            self.new_cache, self.stored = partial(DMCCache, DMCConfig(), len(self.sights)), "auto"
        else:
            self.slack = 0 if second == "chunked" else slack
            config = DMSConfig(window=window, eviction="delayed" if delayed else "immediate")
            gated = Sight(heads[0], window, 1 if delayed else window)
            rules = {
                None: [gated],
                "gated": [gated, Sight(heads[1], gated.window, gated.lag)],
                "sliding": [gated, Sight(heads[1], local - 1, 1, sliding=True)],
                "chunked": [gated, Sight(heads[1], 0, 1, chunk=local)],
            }
            others = {
                "sliding": {1: partial(sliding_layer, config, local, page, self.slack, stored)},
                "chunked": {1: partial(ChunkedLayer, config, local, page, stored)},
            }
            self.sights = rules[second]
            how = config, len(self.sights), page, self.slack, others.get(second), stored
            self.new_cache = partial(kind, *how)
        self.begin(rng.getrandbits(31), batches, dtype)

    def teardown(self):
        if hasattr(self, "dense"):
            prefill.DENSE = self.dense

    def heads(self, index: int) -> int:
        return self.sights[index].heads

    def other_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[(DTYPES.index(dtype) + 1) % len(DTYPES)]

    def moved(self, row: Row, dtype: torch.dtype) -> Row:
        row = row.copy()
        if self.stored == "auto":  # 8 bits stay what they are
            rounded = (torch.tensor(x.numbers, dtype=torch.float64).to(dtype).tolist() for x in row.tokens)
            row.tokens = [Token(numbers, x.said) for numbers, x in zip(rounded, row.tokens, strict=True)]
        return row

    def feed_layer(self, twin: Twin, index: int, valid: list[list[bool]], share: float) -> None:
        layer, rows, sight = twin.cache.layers[index], twin.layers[index], self.sights[index]
        batch, tokens, mask = len(rows), len(valid[0]), torch.tensor(valid)
        q = randoms(self.g, batch, sight.heads * GROUP, tokens, WIDTH).to(twin.dtype)
        k, v = (randoms(self.g, batch, sight.heads, tokens, WIDTH).to(twin.dtype) for _ in "kv")
        said = torch.rand(batch, sight.heads, tokens, generator=self.g) < share
        if sight.sliding:
            said.fill_(True)
        if self.merging:  # a row's first token has nothing to take over
            said &= (mask.cumsum(1) + layer.seen[:, None] > 1)[:, None]
        twin.cache.update(k, v, index)
        given = None if mask.all() and not self.merging and self.rng.random() < 0.5 else mask
        out = layer.attend(q, k, v, said, given, SCALE)
        assert out.dtype == twin.dtype and out.isfinite().all()
        numbers, yes = torch.cat([k, v], -1).transpose(1, 2).tolist(), said.transpose(1, 2).tolist()
        live = layer.live.tolist()
        for b, row in enumerate(rows):
            new = [t for t in range(tokens) if valid[b][t]]
            counts = bool(row.tokens and new) and (tokens == 1 or tokens <= self.slack + 1)
            row.tokens += [Token(numbers[b][t], yes[b][t]) for t in new]
            if new:
                expected = sight.answers(row.tokens, q[b, :, new])
                close = IN_8_BITS if self.stored == "int8" else CLOSE[twin.dtype]
                torch.testing.assert_close(out[b, :, new].double(), expected, **close)
            for head, held in enumerate(live[b]):
                extra = held - len(sight.held(row.tokens, head))
                assert 0 <= extra <= self.slack, "tokens held"
                row.peak[head] = max(row.peak[head], held)
                row.reads[head] += held * counts

    @precondition(lambda self: self.slack)
    @rule(which=WHICH, tokens=st.integers(1, 5))
    def crop(self, which, tokens):
        twin = self.twins[which]
        tokens = min(tokens, twin.columns)
        if tokens > len(twin.recent):
            with pytest.raises(ValueError, match="can take back"):
                twin.cache.crop(-tokens)
        else:
            twin.cache.crop(-tokens)
            twin.columns -= tokens
            for column in [twin.recent.pop() for _ in range(tokens)]:
                for b in (b for b, taken in enumerate(column) if taken):
                    for layer in twin.layers:
                        layer[b].tokens.pop()
        self.did(twin)

    @rule(which=WHICH)
    def copy_the_whole(self, which):
        """As transformers' users do with a prefix that serves many prompts."""
        twin = self.twins[which]
        twin.cache = copy.deepcopy(twin.cache)
        self.did(twin)

    # What must hold.

    def lasting(self, row: Row, index: int) -> list[int]:
        return [self.sights[index].lasting(row.tokens, head) for head in range(row.heads)]

    def check_layer(self, twin: Twin, index: int) -> None:
        layer, rows = twin.cache.layers[index], twin.layers[index]
        if self.merging:
            found = torch.cat([layer.keys, layer.values], -1).tolist()
            assert layer.nbytes == bytes_of(layer.keys, layer.values, layer.open)
        else:
            numbers = torch.cat(layer.rows.read(), -1)
            assert numbers.dtype == twin.dtype
            found = numbers.unflatten(0, (len(rows), -1)).tolist()
            check_pages(layer)
        assert layer.stream.tolist() == [[row.stream] * row.heads for row in rows]
        assert layer.seen.tolist() == [len(row.tokens) for row in rows]
        for row, of_row, live in zip(rows, found, layer.live.tolist(), strict=True):
            for head, (numbers, n) in enumerate(zip(of_row, live, strict=True)):
                self.check_contents(numbers[:n], self.sights[index].held(row.tokens, head), twin.dtype)

    def check_contents(self, found: list, wanted: list, dtype: torch.dtype) -> None:
        """A head holds what it should, and with slack some tokens more."""
        assert len(wanted) <= len(found) <= len(wanted) + self.slack
        if self.stored == "auto":
            assert Counter(map(tuple, found)) >= Counter(map(tuple, wanted))
            return
        left = list(found)
        for numbers in wanted:
            left.remove(next(x for x in left if alike(x, numbers, dtype)))


def check_pages(layer: DMSLayer) -> None:
    """Every page is owned or free, none is lost, and bytes are those of the tensors."""
    rows, free = layer.rows, layer.rows.free[: int(layer.rows.free_count)].tolist()
    of_rows = [pages[:n] for pages, n in zip(rows.table.tolist(), rows.owned.tolist(), strict=True)]
    owned = {page for pages in of_rows for page in pages}
    assert sorted([*owned, *free]) == list(range(len(rows.keys))), "pages owned and free"
    assert all(len(pages) == len(set(pages)) for pages in of_rows)
    assert rows.shares or len(owned) == sum(map(len, of_rows)), "a page with two owners"
    for pages, length in zip(of_rows, rows.length.tolist(), strict=True):
        spare = len(pages) - -(-length // rows.page)
        assert spare == 0 or (spare > 0 and isinstance(layer, ChunkedLayer))
    assert not rows.overflow
    assert layer.nbytes == bytes_of(*rows.pools.values())
    assert layer.nbytes == len(rows.keys) * rows.page * 2 * (
        WIDTH + 2 if rows.largest is not None else WIDTH * rows.keys.itemsize
    )


@pytest.mark.slow
def test_caches_hold_what_the_newest_token_sees():
    steps = 0
    for number in range(ROUNDS):  # some examples end early: fewer rounds may do
        if steps >= LEAST:
            break
        machine = type("DMSMachine", (DMSMachine,), {"round": number, "steps": 0})
        run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS + 1))
        steps += machine.steps
    assert steps >= LEAST
