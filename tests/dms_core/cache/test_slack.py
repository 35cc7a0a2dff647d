"""A cache with slack sees what one without it sees, and forgets what is taken back."""

import random
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from model_inputs import left_padded, random_ids

from dms_core.cache.dms import DMSCache, DMSLayer, sliding_layer
from dms_core.cache.hybrid import ChunkedLayer
from dms_core.cache.pages import AHEAD
from dms_core.config import DMSConfig
from dms_core.visibility import align_decisions, visible
from dms_kernels import naive

WIDTH, HEADS, GROUP = 4, 2, 2


class Row:
    """What one batch row has been given and not taken back; q (Hq, D), k and v (H, D), said (H,) a token."""

    def __init__(self) -> None:
        self.tokens: list[tuple] = []

    def columns(self) -> list[torch.Tensor]:
        return [torch.stack(x, 1)[None] for x in zip(*self.tokens, strict=True)]

    def outputs(self, config: DMSConfig, sinks) -> torch.Tensor:
        """(Hq, n, D): the training operation with hard decisions over the whole history."""
        q, k, v, said = self.columns()
        about = align_decisions(said, config.lag, None, False)
        log_keep = torch.zeros(about.shape).masked_fill(about, float("-inf"))
        return naive.train_attention(q, k, v, log_keep, config.window, None, 0.5, sinks)[0]

    def visible(self, config: DMSConfig) -> list[int]:
        """How many tokens the newest one sees, by head."""
        if not self.tokens:
            return [0] * HEADS
        about = align_decisions(self.columns()[3], config.lag, None, False)
        return visible(about, config.window)[0, :, -1].sum(-1).tolist()


class Fed:
    """A layer with slack, and row by row what it should know."""

    def __init__(self, config: DMSConfig, slack: int, batch: int, page: int, seed: int, sinks: bool = False) -> None:
        self.config, self.slack = config, slack
        self.g, self.rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.layer = DMSLayer(config, page, slack)
        self.layer.lazy_initialization(torch.empty(batch, HEADS, 0, WIDTH))
        self.rows, self.recent = [Row() for _ in range(batch)], []
        self.sinks = torch.randn(HEADS * GROUP, generator=self.g) if sinks else None

    def feed(self, valid: torch.Tensor, share: float) -> None:
        batch, tokens = valid.shape
        q = torch.randn(batch, HEADS * GROUP, tokens, WIDTH, generator=self.g)
        k, v = (torch.randn(batch, HEADS, tokens, WIDTH, generator=self.g) for _ in range(2))
        evict = torch.rand(batch, HEADS, tokens, generator=self.g) < share
        self.layer.update(k, v)
        out = self.layer.attend(q, k, v, evict, None if valid.all() else valid, 0.5, self.sinks)
        for b, row in enumerate(self.rows):
            row.tokens += [(q[b, :, t], k[b, :, t], v[b, :, t], evict[b, :, t]) for t in valid[b].nonzero()[:, 0]]
            if valid[b].any():
                expected = row.outputs(self.config, self.sinks)[:, -int(valid[b].sum()) :]
                torch.testing.assert_close(out[b, :, valid[b]], expected, rtol=1e-4, atol=1e-5)
        assert out.isfinite().all()
        self.recent = (self.recent + [valid[:, t].tolist() for t in range(tokens)])[-self.slack :]

    def crop(self, tokens: int) -> None:
        self.layer.crop(tokens)
        for column in [self.recent.pop() for _ in range(tokens)]:
            for row, taken in zip(self.rows, column, strict=True):
                if taken:
                    row.tokens.pop()

    def check(self) -> None:
        layer, rows = self.layer, self.layer.rows
        assert layer.seen.tolist() == [len(row.tokens) for row in self.rows]
        assert layer.spare == len(self.recent)
        seen = torch.tensor([row.visible(self.config) for row in self.rows])
        extra = layer.live - seen
        assert (extra >= 0).all() and (extra <= self.slack).all()
        owned = [page for row, n in zip(rows.table.tolist(), rows.owned.tolist(), strict=True) for page in row[:n]]
        assert rows.owned.tolist() == [-(-n // rows.page) for n in rows.length.tolist()]
        assert rows.shares or len(owned) == len(set(owned))
        assert len(set(owned)) + int(rows.free_count) == len(rows.keys)

    def step(self) -> None:
        batch, share = len(self.rows), self.rng.choice([0.0, 0.5, 0.9, 1.0])
        what = self.rng.choice(["tokens"] * 4 + ["crop"] * 3 + ["prefill", "select", "clear"])
        if what in ("tokens", "prefill"):
            least, most = (1, self.slack + 1) if what == "tokens" else (self.slack + 2, self.slack + 12)
            valid = torch.rand(batch, self.rng.randint(least, most), generator=self.g) < self.rng.choice([0.6, 2, 2])
            for row in valid:
                row[: self.rng.choice([0, 0, self.rng.randint(0, len(row))])] = False  # left padding, idle rows too
            self.feed(valid, share)
        elif what == "crop":
            self.crop(self.rng.randint(0, len(self.recent)))
        elif what == "select":
            take = [self.rng.randrange(batch) for _ in range(self.rng.randint(1, 3))]
            self.layer.batch_select_indices(torch.tensor(take))
            copies = [Row() for _ in take]
            for copy, i in zip(copies, take, strict=True):
                copy.tokens = list(self.rows[i].tokens)
            self.rows = copies
            self.recent = [[column[i] for i in take] for column in self.recent]
        else:
            i = self.rng.randrange(batch)
            self.layer.clear(torch.tensor([i]))
            self.rows[i] = Row()
            self.recent = [[taken and b != i for b, taken in enumerate(column)] for column in self.recent]
        self.check()


@given(
    window=st.sampled_from([0, 0, 1, 2, 3, 5, 16]),
    delayed=st.booleans(),
    slack=st.sampled_from([1, 2, 3, 5, 20]),
    batch=st.integers(1, 3),
    page=st.sampled_from([1, 2, 4, 16]),
    sinks=st.booleans(),
    steps=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@example(window=0, delayed=True, slack=3, batch=3, page=2, sinks=False, steps=40, seed=7)
@example(window=3, delayed=True, slack=5, batch=2, page=1, sinks=False, steps=60, seed=8)
@example(window=3, delayed=False, slack=5, batch=2, page=4, sinks=True, steps=60, seed=9)
def test_outputs_are_those_of_a_history_without_what_was_taken_back(
    window, delayed, slack, batch, page, sinks, steps, seed
):
    config = DMSConfig(window=window, eviction="delayed" if delayed else "immediate")
    fed = Fed(config, slack, batch, page, seed, sinks)
    for _ in range(steps):
        fed.step()


def test_a_second_turn_after_a_fork_and_a_crop_leaves_shared_pages_alone():
    fed = Fed(DMSConfig(window=2), slack=4, batch=1, page=2, seed=0)
    fed.feed(torch.ones(1, 9, dtype=torch.bool), 0.5)
    fed.layer.batch_select_indices(torch.tensor([0, 0, 0]))
    tokens, fed.rows = fed.rows[0].tokens, [Row() for _ in range(3)]
    for row in fed.rows:
        row.tokens = list(tokens)
    fed.recent = [column * 3 for column in fed.recent]
    for taken, new in ((3, 4), (4, 1), (1, 5), (2, 12), (4, 2)):
        fed.crop(taken)
        fed.feed(torch.ones(3, new, dtype=torch.bool), 0.7)
        fed.check()


def test_steps_that_nothing_is_taken_back_from_find_room_beyond_what_was_made_ahead():
    fed = Fed(DMSConfig(window=2), slack=2, batch=1, page=1, seed=0)
    for _ in range(3 * AHEAD):
        fed.feed(torch.ones(1, 1, dtype=torch.bool), 0.0)
        fed.check()


def test_counters_read_once_a_forward_after_a_past():
    fed = Fed(DMSConfig(window=2), slack=3, batch=1, page=4, seed=0)
    reads = 0
    for tokens in (3, 1, 4, 2, 9, 1):
        fed.feed(torch.ones(1, tokens, dtype=torch.bool), 0.5)
        reads = reads + fed.layer.live if 0 < tokens <= 4 and len(fed.rows[0].tokens) > tokens else reads
        assert (fed.layer.reads == reads).all()
    before = torch.maximum(fed.layer.peak, fed.layer.live)
    fed.crop(3)
    assert (torch.maximum(fed.layer.peak, fed.layer.live) == before).all()


def filled(model, tokens: int, **options) -> DMSCache:
    cache = DMSCache.for_model(model, **options)
    model(random_ids(2, tokens), past_key_values=cache)
    return cache


@torch.no_grad()
def test_crop_refuses_more_than_the_slack_and_changes_nothing(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"crop\(-1\): this cache was made with slack 0; .*slack=N\) can take back N"):
        filled(model, 9).crop(-1)
    cache = filled(model, 9, slack=3)
    with pytest.raises(ValueError, match=r"crop\(-4\): this cache can take back 3 tokens now, not 4; its slack is 3"):
        cache.crop(-4)
    assert cache.get_seq_length() == 9 and cache.tokens_seen().tolist() == [9, 9]
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"crop\(5\): this cache can take back 1 tokens now, not 2"):
        cache.crop(5)  # a positive number: what stays
    cache.crop(6)
    cache.crop(0)
    assert cache.get_seq_length() == 6 and cache.tokens_seen().tolist() == [6, 6]
    with pytest.raises(ValueError, match="slack -1"):
        DMSCache.for_model(model, slack=-1)
    with pytest.raises(ValueError, match="rows of a cache with slack 3: this one has 0"):
        filled(model, 9).put_rows(torch.tensor([0]), cache, torch.tensor([0]))
    other = DMSCache(DMSConfig(window=3), 2, others={1: partial(sliding_layer, DMSConfig(window=3), 4, 16)})
    chunked = DMSCache(DMSConfig(window=3), 2, others={1: partial(ChunkedLayer, DMSConfig(window=3), 4, 16)})
    with pytest.raises(ValueError, match="a ChunkedLayer in layer 1: this one has DMSLayer"):
        other.put_rows(torch.tensor([0]), chunked, torch.tensor([0]))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("options", [{}, {"eviction": "immediate"}, {"gate": "neuron"}])
@torch.no_grad()
def test_a_model_goes_on_as_if_what_was_taken_back_had_never_been(tiny_model, window, options):
    model, slack = tiny_model(window=window, **options), 5
    ids, wrong = random_ids(3, 40), random_ids(3, 40, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    plain, cache = DMSCache.for_model(model, page=2), DMSCache.for_model(model, page=2, slack=slack)
    at, rng = 0, random.Random(window)
    while at < 40:
        new, bad = min(rng.choice([1, 2, 6, 8]), 40 - at), rng.randint(0, 5)
        seen = torch.cat([mask[:, : at + new], torch.ones(3, bad, dtype=torch.long)], 1)
        place = (seen.cumsum(1) - 1).clamp_min(0)[:, at:]
        fed = torch.cat([ids[:, at : at + new], wrong[:, :bad]], 1)
        out = model(fed, attention_mask=seen, position_ids=place, past_key_values=cache).logits[:, :new]
        cache.crop(-bad)
        at += new
        expected = model(
            ids[:, at - new : at], attention_mask=mask[:, :at], position_ids=place[:, :new], past_key_values=plain
        ).logits
        real = mask[:, at - new : at].bool()
        torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)
        extra = cache.live_tokens() - plain.live_tokens()
        assert (extra >= 0).all() and (extra <= slack).all()
        assert cache.tokens_seen().equal(plain.tokens_seen()) and cache.get_seq_length() == at


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_speculation_says_what_generate_says(tiny_model, kind):
    model, assistant = tiny_model(kind, window=2), tiny_model(kind, gates=False)
    pattern = random_ids(1, 7)
    inputs = {**left_padded([pattern.repeat(1, 3)[0].tolist()]), "max_new_tokens": 40, "do_sample": False}
    plain = DMSCache.for_model(model)
    expected = model.generate(**inputs, past_key_values=plain)
    for slack, more in ((3, {"prompt_lookup_num_tokens": 3}), (20, {"assistant_model": assistant})):
        cache = DMSCache.for_model(model, slack=slack)
        taken = []
        crop = cache.crop
        cache.crop = lambda n, crop=crop, taken=taken: (taken.append(-n), crop(n))
        assert model.generate(**inputs, past_key_values=cache, **more).equal(expected), more
        assert sum(taken) > 0 and cache.get_seq_length() == expected.shape[1] - 1
        extra = cache.live_tokens() - plain.live_tokens()
        assert (extra >= 0).all() and (extra <= slack).all() and (plain.live_tokens() < 40).any()
    with pytest.raises(ValueError, match="this cache was made with slack 0"):
        model.generate(**inputs, past_key_values=DMSCache.for_model(model), prompt_lookup_num_tokens=3)
