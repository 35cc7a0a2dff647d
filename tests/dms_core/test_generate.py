"""generate() and the cache say what the full forward says: training mask = prefill = decode = cache contents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import (
    KINDS,
    PROMPTS,
    SETTINGS,
    cached_logits,
    every_kind,
    every_setting,
    greedy_reference,
    left_padded,
    random_ids,
)

from dms_core.cache.dms import DMSCache
from dms_core.visibility import visible


@every_kind
@every_setting
@torch.no_grad()
def test_cached_logits_equal_full_forward_and_cache_holds_the_visible_set(tiny_model, kind, options):
    for window in (0, 3, 9):
        model = tiny_model(kind, window=window, **options)
        ids = random_ids(2, 26)
        full = model(ids).logits
        evicted = torch.stack(list(model.dms.step.evicted.values()))  # (L, B, H, T)
        assert 0.1 < evicted.float().mean() < 0.9
        logits, cache = cached_logits(model, ids, [7, 8, 9, 10, 11, 18, *range(19, 26)])
        torch.testing.assert_close(logits, full, rtol=1e-3, atol=1e-4)
        seen = torch.stack([visible(layer, window)[:, :, -1].sum(-1) for layer in evicted])
        assert torch.equal(cache.live_tokens(), seen)


@pytest.mark.every(5)
@every_kind
@every_setting
@torch.no_grad()
def test_generate_equals_greedy_full_forward(tiny_model, kind, options):
    model = tiny_model(kind, seed=1, **options)
    expected = greedy_reference(model, PROMPTS, 16)
    inputs = left_padded(PROMPTS)
    width = inputs["input_ids"].shape[1]
    default = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert default[:, width:].tolist() == expected
    cache = DMSCache.for_model(model, page=4)
    explicit = model.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=cache)
    assert explicit[:, width:].tolist() == expected
    uncached = model.generate(**inputs, max_new_tokens=16, do_sample=False, use_cache=False)
    assert uncached[:, width:].tolist() == expected
    assert cache.tokens_seen().tolist() == [len(p) + 15 for p in PROMPTS]
    assert (cache.live_tokens() < cache.tokens_seen()[:, None]).any()


@pytest.mark.slow
@settings(max_examples=150)
@given(
    window=st.integers(0, 8),
    kind=st.sampled_from(KINDS),
    option=st.sampled_from(SETTINGS),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_generate_equals_full_forward_for_random_gates_windows_and_padding(
    tiny_model, window, kind, option, lengths, seed
):
    model = tiny_model(kind, seed=seed, window=window, **option)
    prompts = [random_ids(1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]
    inputs = left_padded(prompts)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert out.tolist() == greedy_reference(model, prompts, 8)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_second_turn_with_same_cache_equals_generation_from_scratch(tiny_model, kind):
    model = tiny_model(kind, seed=2)
    inputs = left_padded(PROMPTS)
    cache = DMSCache.for_model(model)
    first = model.generate(**inputs, max_new_tokens=6, do_sample=False, past_key_values=cache)
    turn = random_ids(3, 5, 9)
    ids = torch.cat([first, turn], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 11, dtype=torch.long)], 1)
    second = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, past_key_values=cache
    )[:, ids.shape[1] :]
    whole = [ids[b, mask[b].bool()].tolist() for b in range(3)]
    assert second.tolist() == greedy_reference(model, whole, 6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_beam_search_with_cache_equals_beam_search_without(tiny_model, kind):
    model = tiny_model(kind, seed=3, window=2)
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    inputs = left_padded(PROMPTS)
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    assert not torch.equal(cached, model.generate(**inputs, max_new_tokens=10, do_sample=False))


@torch.no_grad()
def test_sampling_generate_equals_uncached_sampling_with_the_same_seed(tiny_model):
    model = tiny_model(seed=4)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(
            model.generate(
                **left_padded(PROMPTS), max_new_tokens=12, do_sample=True, num_return_sequences=2, use_cache=use_cache
            )
        )
    assert torch.equal(*runs) and runs[0].shape == (6, 23)
