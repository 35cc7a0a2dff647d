"""A cache in 8 bits does what one in the model's dtype does, with numbers that 8 bits hold; others are rounded once."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_inputs import random_ids

from companion import families
from dms_core.baselines import get_baseline
from dms_core.baselines.dmc import DMCConfig, attach_dmc
from dms_core.cache.dms import DMSCache, DMSLayer
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.sampling import SamplingConfig, sample_chains
from dms_kernels import naive

WIDTH, HEADS, GROUP = 8, 2, 2
COUNTERS = ("table", "length", "owned", "free_count", "ring_slot", "ring_evict", "seen", "reads", "overflow")


class Twins:
    """Two layers that are told the same; keys and values are numbers of the ``dtype`` that 8 bits hold."""

    def __init__(self, config: DMSConfig, page: int, slack: int, batch: int, dtype: torch.dtype, seed: int) -> None:
        self.new = config, page, slack, batch, dtype
        self.g, self.rng, self.dtype, self.slack = (
            torch.Generator().manual_seed(seed),
            random.Random(seed),
            dtype,
            slack,
        )
        self.layers = [DMSLayer(config, page, slack, name) for name in ("auto", "int8")]
        for layer in self.layers:
            layer.lazy_initialization(torch.empty(batch, HEADS, 0, WIDTH, dtype=dtype))

    def feed(self, tokens: int, share: float) -> None:
        batch = self.layers[0].batch
        valid = torch.rand(batch, tokens, generator=self.g) < self.rng.choice([0.7, 2])
        k, v = (torch.randn(batch, HEADS, tokens, WIDTH, generator=self.g) for _ in range(2))
        k, v = naive.dequantise(*naive.quantise(k, v), self.dtype)
        q = torch.randn(batch, HEADS * GROUP, tokens, WIDTH, generator=self.g).to(self.dtype)
        evict = torch.rand(batch, HEADS, tokens, generator=self.g) < share
        outs = []
        for layer in self.layers:
            layer.update(k, v)
            outs.append(layer.attend(q, k, v, evict, valid, 0.5).transpose(1, 2)[valid])
        close = {"rtol": 1e-4, "atol": 1e-5} if self.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(*outs, **close)

    def step(self) -> None:
        batch, share = self.layers[0].batch, self.rng.choice([0.0, 0.5, 1.0])
        what = self.rng.choice(["decode"] * 3 + ["prefill", "select", "fork", "clear", "put", "trim", "crop", "empty"])
        if what == "decode":
            for _ in range(self.rng.randint(1, 6)):
                self.feed(1, share)
        elif what == "prefill":
            self.feed(self.rng.randint(2, 9), share)
        elif what == "select":
            take = torch.tensor([self.rng.randrange(batch) for _ in range(self.rng.randint(1, 3))])
            self.each(lambda layer: layer.batch_select_indices(take))
        elif what == "fork" and batch < 3:
            self.each(lambda layer: layer.batch_select_indices(torch.arange(batch).repeat_interleave(2)))
        elif what == "clear":
            self.each(lambda layer: layer.clear(torch.tensor([0])))
        elif what == "put":
            other = Twins(*self.new, self.rng.randrange(2**31))
            for tokens in (5, 1):
                other.feed(tokens, share)
            for mine, theirs in zip(self.layers, other.layers, strict=True):
                mine.put(torch.tensor([batch - 1]), theirs, torch.tensor([0]))
        elif what == "trim":
            self.each(lambda layer: layer.trim())
        elif what == "crop" and self.slack:
            self.each(lambda layer: layer.crop(layer.spare))
        elif what == "empty":
            self.each(lambda layer: layer.reset())
            self.each(lambda layer: layer.lazy_initialization(torch.empty(batch, HEADS, 0, WIDTH, dtype=self.dtype)))
        self.check()

    def each(self, do) -> None:
        for layer in self.layers:
            do(layer)

    def check(self) -> None:
        plain, packed = (layer.rows for layer in self.layers)
        for name in COUNTERS:
            assert torch.equal(getattr(plain, name), getattr(packed, name)), name
        live = torch.arange(plain.table.shape[1] * plain.page) < plain.length[:, None]
        for mine, theirs in zip(packed.read(), plain.read(), strict=True):
            assert mine.dtype == self.dtype and torch.equal(
                mine[live[:, : mine.shape[1]]], theirs[live[:, : mine.shape[1]]]
            )
        assert packed.keys.dtype == torch.int8 and len(packed.largest) == len(packed.keys) == len(plain.keys)
        assert packed.nbytes == len(plain.keys) * plain.page * 2 * (WIDTH + 2)


@settings(max_examples=60)
@given(
    window=st.sampled_from([0, 1, 3, 16]),
    delayed=st.booleans(),
    page=st.sampled_from([1, 2, 4]),
    slack=st.sampled_from([0, 0, 3]),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    steps=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
@example(window=3, delayed=True, page=2, slack=0, batch=2, dtype=torch.bfloat16, steps=30, seed=1)
def test_all_that_can_happen_to_a_cache(window, delayed, page, slack, batch, dtype, steps, seed):
    config = DMSConfig(window=window, eviction="delayed" if delayed else "immediate")
    twins = Twins(config, page, slack, batch, dtype, seed)
    for _ in range(steps):
        twins.step()


@pytest.mark.parametrize("width, ratio", [(32, 34 / 64), (64, 66 / 128)])
def test_bytes_are_those_of_the_tensors_and_at_most_0_56_of_bf16(width, ratio):
    held = []
    for name in ("auto", "int8"):
        cache = DMSCache(DMSConfig(window=4), layers=2, page=8, kv_cache_dtype=name)
        for index, layer in enumerate(cache.layers):
            k = torch.ones(3, 2, 50, width, dtype=torch.bfloat16)
            cache.update(k, k, index)
            layer.attend(k, k, k, torch.zeros(3, 2, 50, dtype=torch.bool), None, 0.5)
        cache.trim()
        held.append(cache.bytes_held())
        assert held[-1] == sum(pool.nbytes for layer in cache.layers for pool in layer.rows.pools.values())
    assert held[1] / held[0] == ratio <= 0.56


def after(model, name: str, ids: torch.Tensor, cuts: list[int], **how) -> torch.Tensor:
    """Logits (B, T, V) of ``ids``, fed in parts of these lengths."""
    cache = DMSCache.for_model(model, page=4, kv_cache_dtype=name, **how)
    said = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(cuts, 1)], 1)
    assert cache.empty_like(2).kv_cache_dtype == name
    return said


@pytest.mark.filterwarnings("ignore:.*keep their")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llama4_text", "falcon_h1", "qwen3_next", "gpt_oss"])
@torch.no_grad()
def test_a_model_says_nearly_the_same(family):
    """Also with sliding windows, chunks, states and sinks."""
    model = attach(families.tiny_model(family), DMSConfig(window=3, scale=10.0, offset=0.0))
    ids, cuts = random_ids(2, 30, 3), [11, *[1] * 9, 10]
    plain, packed = (after(model, name, ids, cuts).log_softmax(-1) for name in ("auto", "int8"))
    far = (plain.exp() * (plain - packed)).sum(-1)
    assert far[:, :11].abs().max() < 1e-6  # the first prefill sees its own tokens unrounded
    assert 0 < far[:, 11:].median() < 1e-3  # a mixture may choose another expert


@torch.no_grad()
def test_prompt_lookup_takes_back_tokens(tiny_model):
    model, ids = tiny_model(), random_ids(1, 4, 3).repeat(1, 4)
    ends = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    makes = [DMSCache.for_model(model, slack=slack, kv_cache_dtype="int8") for slack in (3, 0)]
    guessed = model.generate(ids, **ends, past_key_values=makes[0], prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, model.generate(ids, **ends, past_key_values=makes[1]))


class Tokenizer:
    eos_token_id, pad_token_id = 1, 0


def test_chains_do_not_depend_on_their_batch(tiny_model):
    model, prompts = tiny_model(), [random_ids(1, n, n)[0].tolist() for n in (5, 9)]
    jobs = [(0, 0), (1, 0), (1, 1), (0, 1)]

    def said(batch: int, **how) -> dict:
        config = SamplingConfig(20, batch=batch, kv_cache_dtype="int8", **how)
        chains = sample_chains(model, Tokenizer, prompts, jobs, config)
        return {(chain.problem, chain.chain): chain for chain in chains}

    assert said(1) == said(4)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m: DMSCache.for_model(m, kv_cache_dtype="int4"), "kv_cache_dtype 'int4': must be one of auto, int8"),
        (lambda m: SamplingConfig(4, kv_cache_dtype="fp8"), "kv_cache_dtype 'fp8': must be one of auto, int8"),
        (
            lambda m: next(
                sample_chains(
                    m, Tokenizer, [[3]], [(0, 0)], SamplingConfig(4, kv_cache_dtype="int8"), get_baseline("tova")(2.0)
                )
            ),
            "kv_cache_dtype 'int8': must be auto with another cache",
        ),
        (
            lambda m: DMSCache.for_model(attach_dmc(detach(m), DMCConfig()), kv_cache_dtype="int8"),
            "kv_cache_dtype 'int8': must be auto with DMC",
        ),
    ],
)
def test_what_cannot_be_is_named(tiny_model, use, message):
    with pytest.raises(ValueError, match=message):
        use(tiny_model())


def test_rows_go_to_caches_of_their_kind_only(tiny_model):
    model = tiny_model()
    caches = [DMSCache.for_model(model, kv_cache_dtype=name) for name in ("auto", "int8")]
    for cache in caches:
        model(random_ids(2, 9), past_key_values=cache)
    for mine, theirs, message in (
        (*caches, "rows of torch.int8: .* holds torch.float32"),
        (*caches[::-1], "holds torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.put_rows(torch.tensor([0]), theirs, torch.tensor([1]))
