"""DMSLayer against its specification: rows hold exactly the tokens that their last query may see.

Keys carry their own position in channel 0 and values a mark of their own, so that a row's contents can be read back.
"""

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dms_core.cache.dms import DMSCache, DMSLayer
from dms_core.cache.pages import AHEAD, PagedRows, make_room
from dms_core.config import DMSConfig
from dms_core.visibility import align_decisions, visible
from dms_kernels import cache_append, naive

WIDTH = 4


@dataclass
class Row:
    """All that one batch row was ever given: q (Hq, n, D), k and v (H, n, D), said (H, n); and its counters."""

    heads: int
    group: int
    q: list = field(default_factory=list)
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)
    said: list = field(default_factory=list)
    reads: list = field(default_factory=list)
    peak: list = field(default_factory=list)

    def copy(self) -> "Row":
        lists = (list(getattr(self, name)) for name in ("q", "k", "v", "said", "reads", "peak"))
        return Row(self.heads, self.group, *lists)

    def seen(self, config: DMSConfig) -> torch.Tensor:
        """(H, n, n) by the specification."""
        about = align_decisions(torch.stack(self.said, 1)[None], config.lag, None, False)
        return visible(about, config.window)[0]

    def held(self, config: DMSConfig) -> list[list[int]]:
        if not self.k:
            return [[] for _ in range(self.heads)]
        return [row.nonzero()[:, 0].tolist() for row in self.seen(config)[:, -1]]

    def outputs(self, config: DMSConfig) -> torch.Tensor:
        """(Hq, n, D): the training operation with hard decisions over the whole history."""
        about = align_decisions(torch.stack(self.said, 1)[None], config.lag, None, False)
        log_keep = torch.zeros(about.shape).masked_fill(about, float("-inf"))
        q, k, v = (torch.stack(x, 1)[None] for x in (self.q, self.k, self.v))
        return naive.train_attention(q, k, v, log_keep, config.window, None, 0.5)[0]


class Model:
    """A layer and, row by row, the history it should agree with."""

    def __init__(self, config: DMSConfig, batch: int, heads: int, group: int, page: int, seed: int) -> None:
        self.config, self.layer = config, DMSLayer(config, page)
        self.rows = [Row(heads, group, reads=[0] * heads, peak=[0] * heads) for _ in range(batch)]
        self.heads, self.group, self.page = heads, group, page
        self.g = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.most_pages, self.ahead = 0, 0
        self.layer.lazy_initialization(torch.empty(batch, heads, 0, WIDTH))

    def feed(self, tokens: int, valid: torch.Tensor, share: float) -> None:
        """In the memory layout of a model's projections, and without ``valid`` where all are."""
        batch, heads = len(self.rows), (self.heads * self.group, self.heads, self.heads)
        q, k, v = (torch.randn(batch, tokens, n, WIDTH, generator=self.g).transpose(1, 2) for n in heads)
        evict = torch.rand(batch, self.heads, tokens, generator=self.g) < share
        for b, row in enumerate(self.rows):
            k[b, :, valid[b], 0] = torch.arange(len(row.k), len(row.k) + int(valid[b].sum())).float() / 64
            for t in valid[b].nonzero()[:, 0].tolist():
                row.q.append(q[b, :, t])
                row.k.append(k[b, :, t])
                row.v.append(v[b, :, t])
                row.said.append(evict[b, :, t])
        self.layer.update(k, v)
        out = self.layer.attend(q, k, v, evict, None if valid.all() else valid, 0.5)
        for b, row in enumerate(self.rows):
            if valid[b].any():
                expected = row.outputs(self.config)[:, -int(valid[b].sum()) :]
                torch.testing.assert_close(out[b, :, valid[b]], expected, rtol=1e-4, atol=1e-5)
            if tokens == 1 and valid[b, 0] and len(row.k) > 1:  # a row's first token is its prompt
                row.reads = [n + len(x) for n, x in zip(row.reads, row.held(self.config), strict=True)]

    def check(self) -> None:
        layer, pages = self.layer, self.layer.rows
        assert layer.seen.tolist() == [len(row.k) for row in self.rows]
        lengths, read = pages.length.view(len(self.rows), self.heads).tolist(), pages.read()
        for b, row in enumerate(self.rows):
            held = row.held(self.config)
            assert lengths[b] == [len(x) for x in held]
            row.peak = [max(n, len(x)) for n, x in zip(row.peak, held, strict=True)]
            for h in range(self.heads):
                k, v = (x[b * self.heads + h, : lengths[b][h]] for x in read)
                place = (k[:, 0] * 64).round().long()
                assert sorted(place.tolist()) == held[h]
                for j, key, value in zip(place.tolist(), k, v, strict=True):
                    assert torch.equal(key, row.k[j][h]) and torch.equal(value, row.v[j][h])
        assert layer.reads.tolist() == [row.reads for row in self.rows]
        peak = torch.maximum(layer.peak, pages.length.view_as(layer.peak))
        assert peak.tolist() == [row.peak for row in self.rows]
        self.check_pages()

    def check_pages(self) -> None:
        pages = self.layer.rows
        owned = [page for row, n in zip(pages.table.tolist(), pages.owned.tolist(), strict=True) for page in row[:n]]
        free = pages.free[: int(pages.free_count)].tolist()
        assert sorted(set(owned)) == sorted(set(range(len(pages.keys))) - set(free)) and len(set(free)) == len(free)
        assert pages.shares or len(owned) == len(set(owned))
        assert pages.owned.tolist() == [-(-n // self.page) for n in pages.length.tolist()]
        self.most_pages = max(self.most_pages, len(owned))
        steps = AHEAD // self.page + 2 + min(AHEAD, pages.cells)  # room for steps to come, and copies of shared pages
        self.ahead = max(self.ahead, pages.count * steps)
        assert len(pages.keys) <= (self.most_pages + self.ahead) * 17 / 16
        assert pages.nbytes == 2 * len(pages.keys) * self.page * WIDTH * 4

    # What can happen to a cache besides new tokens.

    def step(self) -> None:
        batch = len(self.rows)
        what = self.rng.choice(["decode"] * 8 + ["prefill"] * 4 + ["select", "fork", "clear", "put", "trim"])
        share = self.rng.choice([0.0, 0.5, 0.5, 0.9, 1.0])
        if what == "decode":
            idle = self.rng.random() < 0.3
            for _ in range(self.rng.randint(1, 6)):
                valid = torch.rand(batch, 1, generator=self.g) < (0.6 if idle else 2)
                self.feed(1, valid, share)
                self.check()
        elif what == "prefill":
            tokens = self.rng.randint(2, 9)
            valid = torch.rand(batch, tokens, generator=self.g) < self.rng.choice([0.7, 2])  # holes, or none
            for row in valid:
                row[: self.rng.choice([0, 0, self.rng.randint(0, tokens)])] = False  # left padding, idle rows too
            self.feed(tokens, valid, share)
        elif what == "select":
            take = [self.rng.randrange(batch) for _ in range(self.rng.randint(1, 3))]
            self.layer.batch_select_indices(torch.tensor(take))
            self.rows = [self.rows[i].copy() for i in take]
        elif what == "fork" and batch == 1:
            self.layer.batch_select_indices(torch.tensor([0, 0]))
            self.rows = [row.copy() for row in self.rows for _ in range(2)]
        elif what == "clear":
            rows = [i for i in range(batch) if self.rng.random() < 0.5]
            self.layer.clear(torch.tensor(rows, dtype=torch.long))
            for i in rows:
                self.rows[i] = Row(self.heads, self.group, reads=[0] * self.heads, peak=[0] * self.heads)
        elif what == "put":
            other = Model(self.config, 2, self.heads, self.group, self.page, self.rng.randrange(2**31))
            for tokens in (self.rng.randint(2, 8), *[1] * self.rng.randint(0, 4)):
                other.feed(tokens, torch.ones(2, tokens, dtype=torch.bool), share)
                other.check()
            rows = self.rng.sample(range(batch), self.rng.randint(1, batch))
            source = [self.rng.randrange(2) for _ in rows]
            self.layer.put(torch.tensor(rows), other.layer, torch.tensor(source))
            for i, j in zip(rows, source, strict=True):
                self.rows[i] = other.rows[j].copy()
        elif what == "trim":
            self.layer.rows.trim()
            assert self.layer.rows.free_count == 0
            self.most_pages, self.ahead = 0, 0
        self.check()


WINDOWS = st.sampled_from([0, 0, 1, 2, 3, 5, 16, 20])


@given(
    window=WINDOWS,
    delayed=st.booleans(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    page=st.sampled_from([1, 2, 4, 16]),
    steps=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@example(window=0, delayed=True, batch=2, heads=2, group=2, page=2, steps=12, seed=7)
@example(window=20, delayed=False, batch=2, heads=2, group=2, page=4, steps=12, seed=8)
def test_cache_contents_equal_visible_set(window, delayed, batch, heads, group, page, steps, seed):
    config = DMSConfig(window=window, eviction="delayed" if delayed else "immediate")
    model = Model(config, batch, heads, group, page, seed)
    for _ in range(steps):
        model.step()


@settings(max_examples=40)
@given(window=WINDOWS, delayed=st.booleans(), cuts=st.sets(st.integers(1, 29)), seed=st.integers(0, 2**31))
def test_contents_do_not_depend_on_the_split_into_calls(window, delayed, cuts, seed):
    config = DMSConfig(window=window, eviction="delayed" if delayed else "immediate")
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, 30, WIDTH, generator=g) for _ in range(3))
    evict = torch.rand(2, 2, 30, generator=g) < 0.6
    results = []
    for edges in ([0, 30], [0, *sorted(cuts), 30], list(range(31))):
        layer = DMSLayer(config, 4)
        outs = []
        for a, b in pairwise(edges):
            layer.update(k[:, :, a:b], v[:, :, a:b])
            valid = torch.ones(2, b - a, dtype=torch.bool)
            part = (x[:, :, a:b] for x in (q, k, v, evict))
            outs.append(layer.attend(*part, valid, 0.5))
        rows = range(4)
        kept = [layer.rows.read()[0][r, : layer.rows.length[r], 1].sort().values for r in rows]
        results.append((torch.cat(outs, 2), kept))
    for out, kept in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(kept, results[0][1], strict=True))


def test_sinks_take_part_in_a_prefill_and_in_every_decode_step():
    config, g = DMSConfig(window=2), torch.Generator().manual_seed(0)
    layer, sinks = DMSLayer(config, 4), torch.tensor([2.0, -1.0])
    q, k, v = (torch.randn(1, 2, 9, WIDTH, generator=g) for _ in range(3))
    evict = torch.rand(1, 2, 9, generator=g) < 0.5
    outs = []
    for a, b in pairwise((0, 5, 6, 7, 8, 9)):
        layer.update(k[:, :, a:b], v[:, :, a:b])
        outs.append(layer.attend(*(x[:, :, a:b] for x in (q, k, v, evict)), None, 0.5, sinks))
    about = align_decisions(evict, config.lag, None, False)
    log_keep = torch.zeros(about.shape).masked_fill(about, float("-inf"))
    expected = naive.train_attention(q, k, v, log_keep, config.window, None, 0.5, sinks)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-4, atol=1e-5)


def test_all_marked_cache_holds_exactly_the_window():
    model = Model(DMSConfig(window=5), 2, 2, 1, 2, 0)
    for _ in range(40):
        model.feed(1, torch.ones(2, 1, dtype=torch.bool), 1.0)
        model.check()
    assert model.layer.rows.length.tolist() == [6] * 4
    assert len(model.layer.rows.keys) <= 4 * (3 + 1 + AHEAD // 2) * 17 / 16


@pytest.mark.parametrize("prompt", [10, 12], ids=["10", "whole pages"])
def test_unmarked_cache_is_dense(prompt):
    model = Model(DMSConfig(window=5), 1, 2, 2, 4, 0)
    model.feed(prompt, torch.ones(1, prompt, dtype=torch.bool), 0.0)
    for n in range(prompt + 1, 31):
        model.feed(1, torch.ones(1, 1, dtype=torch.bool), 0.0)
        model.check()
        assert model.layer.rows.length.tolist() == [n, n]
    assert model.layer.reads.tolist() == [[sum(range(prompt + 1, 31))] * 2]


def test_freed_pages_are_used_before_the_pool_grows():
    model = Model(DMSConfig(window=0), 2, 1, 1, 2, 0)
    model.feed(8, torch.ones(2, 8, dtype=torch.bool), 0.0)
    before = len(model.layer.rows.keys)
    for _ in range(20):
        model.layer.clear(torch.tensor([1]))
        model.rows[1] = Row(1, 1, reads=[0], peak=[0])
        model.feed(8, torch.tensor([[False] * 8, [True] * 8]), 0.0)
        model.check()
    assert len(model.layer.rows.keys) == before


@pytest.mark.parametrize("trim", [False, True])
def test_reloaded_rows_leave_no_page_without_owner(trim):
    rows = PagedRows.new(2, torch.empty(0, WIDTH), page=4, window=3)

    def accounted() -> bool:
        return int(rows.owned.sum()) + int(rows.free_count) == len(rows.keys) == len(rows.free)

    for tokens in (404, 408, 412, 416, 8, 500):
        k = torch.randn(2, tokens, WIDTH)
        rows.load(k, -k, torch.tensor([tokens, 5]))
        if trim:
            rows.trim()
        assert accounted() and rows.owned.tolist() == [tokens // 4, 2]
        assert torch.equal(rows.read()[0][0, :tokens], k[0]) and torch.equal(rows.read()[1][1, :5], -k[1, :5])
    rows.release(torch.tensor([0, 1]))
    assert accounted() and rows.free_count == len(rows.keys)
    rows.trim()
    assert len(rows.keys) == rows.nbytes == 0


def test_rows_are_short_of_pages_or_columns_only_beyond_what_is_there():
    rows = PagedRows.new(1, torch.empty(0, WIDTH), page=1, window=0)
    make_room([rows])
    free, columns = int(rows.free_count), rows.table.shape[1]
    asked = [(free, columns), (free + 1, columns), (free, columns + 1)]
    assert [rows.is_short([pages, 0, most, free, 0, 0]) for pages, most in asked] == [False, True, True]


def reload(rows: PagedRows) -> None:
    rows.load(torch.ones(1, 1, WIDTH), torch.ones(1, 1, WIDTH), torch.ones(1, dtype=torch.long))


@pytest.mark.parametrize("look", [lambda rows: make_room([rows]), PagedRows.trim, reload])
def test_lost_token_raises_when_rows_are_next_looked_at(look):
    rows = PagedRows.new(1, torch.empty(0, WIDTH), page=1, window=0)
    make_room([rows])
    flag = torch.ones(1, dtype=torch.bool)
    for _ in range(AHEAD + 1):  # the last token finds no page
        cache_append(rows, torch.ones(1, WIDTH), torch.ones(1, WIDTH), ~flag, flag, 1)
    assert rows.seen.tolist() == [AHEAD]
    with pytest.raises(RuntimeError, match="found no free page and lost a token"):
        look(rows)


def test_one_token_prompt_is_prefill_and_counts_no_reads():
    model = Model(DMSConfig(window=5), 2, 1, 1, 2, 0)
    for valid, reads in (([True, False], [0, 0]), ([True, True], [2, 0]), ([True, True], [5, 2])):
        model.feed(1, torch.tensor(valid)[:, None], 0.0)
        assert model.layer.reads[:, 0].tolist() == reads
        model.check()
    model.layer.clear(torch.tensor([0]))
    model.rows[0] = Row(1, 1, reads=[0], peak=[0])
    model.feed(1, torch.tensor([[True], [False]]), 0.0)
    model.check()


def fill(cache: DMSCache, batch: int = 2, tokens: int = 12, share: float = 0.5) -> DMSCache:
    g = torch.Generator().manual_seed(0)
    for index, layer in enumerate(cache.layers):
        q, k, v = (torch.randn(batch, 2, tokens, WIDTH, generator=g) for _ in range(3))
        evict = torch.rand(batch, 2, tokens, generator=g) < share
        cache.update(k, v, index)
        layer.attend(q, k, v, evict, torch.ones(batch, tokens, dtype=torch.bool), 0.5)
    return cache


def test_reports_have_layers_rows_and_heads():
    cache = fill(DMSCache(DMSConfig(window=2), layers=3, page=2))
    assert cache.live_tokens().shape == cache.kv_reads().shape == cache.peak_tokens().shape == (3, 2, 2)
    assert cache.batch_size == 2 and cache.tokens_seen().tolist() == [12, 12] and cache.get_seq_length() == 12
    live = cache.live_tokens()
    assert cache.bytes_held() >= int(live.sum()) * 2 * WIDTH * 4
    assert cache.bytes_held() <= int((live + 1).sum()) * 2 * WIDTH * 4  # pages of two tokens
    assert (cache.peak_tokens() >= live).all() and (cache.kv_reads() == 0).all()


def test_reset_cache_is_empty_and_reusable():
    cache = fill(DMSCache(DMSConfig(window=2), layers=2))
    live = cache.live_tokens()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.bytes_held() == 0
    cache.trim()
    assert torch.equal(fill(cache).live_tokens(), live)


def test_fork_repeats_neighbours_and_reset_rows_gives_memory_back_after_trim():
    cache = fill(DMSCache(DMSConfig(window=2), layers=2, page=1))
    live, held = cache.live_tokens(), cache.bytes_held()
    cache.fork(3)
    assert torch.equal(cache.live_tokens(), live.repeat_interleave(3, 1)) and cache.bytes_held() == held
    cache.reset_rows(torch.tensor([1, 2, 4, 5]))
    cache.trim()
    assert cache.bytes_held() == held
    cache.reorder_cache(torch.tensor([3, 0]))
    assert torch.equal(cache.live_tokens(), live[:, [1, 0]])


def test_eight_chains_hold_a_prompt_of_1000_tokens_once_until_they_write():
    cache, steps = fill(DMSCache(DMSConfig(window=16), layers=2, page=16), batch=1, tokens=1000), 40
    one = cache.bytes_held()
    cache.fork(8)
    assert cache.bytes_held() == one
    alone = fill(DMSCache(DMSConfig(window=16), layers=2, page=16), batch=1, tokens=1000)
    for step in range(steps):
        for index, (shared, single) in enumerate(zip(cache.layers, alone.layers, strict=True)):
            g = torch.Generator().manual_seed(100 * step + index)
            new = [torch.randn(8, 2, 1, WIDTH, generator=g) for _ in range(3)]
            evict = torch.rand(8, 2, 1, generator=g) < 0.5
            valid = torch.ones(8, 1, dtype=torch.bool)
            outs = []
            for layer, rows in ((shared, slice(None)), (single, slice(5, 6))):
                layer.update(*(x[rows] for x in new[1:]))
                outs.append(layer.attend(*(x[rows] for x in (*new, evict, valid)), 0.5))
            torch.testing.assert_close(outs[0][5:6], outs[1])
    written = 8 * (steps + 16 + 3 * 16)  # tokens: new ones, the window's, and what begins and ends within a page
    assert cache.bytes_held() <= 1.1 * (one + written * 2 * 2 * 2 * WIDTH * 4)


def test_empty_like_takes_rows_of_the_original():
    cache = fill(DMSCache(DMSConfig(window=2), layers=2))
    other = cache.empty_like(5)
    assert other.bytes_held() == 0 and other.batch_size == 5
    other.put_rows(torch.tensor([4, 1]), cache, torch.tensor([0, 1]))
    expected = torch.zeros_like(other.live_tokens())
    expected[:, [4, 1]] = cache.live_tokens()
    assert torch.equal(other.live_tokens(), expected)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda c: DMSCache(DMSConfig(), layers=0), "layers 0, page 16: both must be >= 1"),
        (lambda c: DMSCache(DMSConfig(), layers=1, page=0), "layers 1, page 0: both must be >= 1"),
        (lambda c: c.fork(0), "chains 0: must be >= 1"),
        (lambda c: c.layers[0].update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4)), r"\(3, 2\).*\(2, 2\)"),
        (lambda c: c.put_rows(torch.arange(1), fill(DMSCache(DMSConfig(window=9), 2)), torch.arange(1)), "window=9"),
    ],
    ids=["layers", "page", "fork", "batch", "other settings"],
)
def test_invalid_input_raises(use, message):
    cache = fill(DMSCache(DMSConfig(window=2), layers=2))
    with pytest.raises(ValueError, match=message):
        use(cache)


def test_rows_may_change_places_within_a_cache_and_pages_must_be_of_one_size():
    cache = fill(DMSCache(DMSConfig(window=2), layers=2, page=2))
    live, (k, _) = cache.live_tokens(), cache.layers[0].rows.read()
    cache.put_rows(torch.tensor([0, 1]), cache, torch.tensor([1, 0]))
    assert torch.equal(cache.live_tokens(), live[:, [1, 0]])
    for row, old in enumerate((2, 3, 0, 1)):
        count = int(cache.layers[0].rows.length[row])
        assert torch.equal(cache.layers[0].rows.read()[0][row, :count], k[old, :count])
    other = fill(DMSCache(DMSConfig(window=2), layers=2, page=4))
    with pytest.raises(ValueError, match="pages of 2 tokens: this cache has pages of 4"):
        other.put_rows(torch.tensor([0]), cache, torch.tensor([0]))
    assert torch.equal(other.live_tokens(), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_one_page_with_room_for_more_goes_into_an_empty_layer_of_any_dtype(dtype):
    one, other = Model(DMSConfig(window=2), 1, 1, 1, 16, 0), DMSLayer(DMSConfig(window=2), 16)
    one.feed(4, torch.ones(1, 4, dtype=torch.bool), 0.0)
    make_room([one.layer.rows])
    other.lazy_initialization(torch.empty(1, 1, 0, WIDTH, dtype=dtype))
    other.put(torch.tensor([0]), one.layer, torch.tensor([0]))
    assert len(other.rows.keys) == 1 < other.rows.table.shape[1]
    for mine, theirs in zip(other.rows.read(), one.layer.rows.read(), strict=True):
        assert mine.dtype == dtype and torch.equal(mine[:, :4], theirs[:, :4].to(dtype))


def test_an_empty_cache_can_be_forked_and_filled_token_by_token():
    cache = fill(DMSCache(DMSConfig(window=2), layers=1), batch=1).empty_like(1)
    cache.fork(2)
    new, flag = torch.ones(2, 2, 1, WIDTH), torch.zeros(2, 2, 1, dtype=torch.bool)
    cache.update(new, new, 0)
    cache.layers[0].attend(new, new, new, flag, torch.ones(2, 1, dtype=torch.bool), 0.5)
    assert (cache.live_tokens() == 1).all()
