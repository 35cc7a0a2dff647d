"""Attached models: training mask = prefill = decode = cache contents; generate() says what the full forward says."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from dms_core import attention
from dms_core.cache import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.visibility import visible

KINDS = ("llama", "qwen2", "qwen3")
SETTINGS = [
    {"gate": gate, "granularity": granularity, "eviction": eviction}
    for gate in ("adapter", "neuron")
    for granularity in ("head", "layer")
    for eviction in ("delayed", "immediate")
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_setting = pytest.mark.parametrize("options", SETTINGS, ids=lambda s: "-".join(s.values()))


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def cached_logits(model, ids, cuts, cache=None):
    cache = cache or DMSCache.for_model(model, page=2)
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(edges)], 1), cache


def greedy_reference(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The full-sequence hard-masked forward repeated step by step, one prompt at a time."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        out.append(ids[0, len(prompt) :].tolist())
    return out


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [random_ids(1, n, n)[0].tolist() for n in (3, 11, 7)]


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


@every_kind
@every_setting
@torch.no_grad()
def test_generate_says_what_the_full_forward_says_token_for_token(tiny_model, kind, options):
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


@settings(max_examples=150)
@given(
    window=st.integers(0, 8), kind=st.sampled_from(KINDS), option=st.sampled_from(SETTINGS),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 2**31),
)  # fmt: skip
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
def test_a_second_turn_with_the_same_cache_equals_generating_from_scratch(tiny_model, kind):
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
def test_sampling_generate_repeats_with_the_seed_and_equals_its_uncached_self(tiny_model):
    model = tiny_model(seed=4)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(model.generate(
            **left_padded(PROMPTS), max_new_tokens=12, do_sample=True, num_return_sequences=2, use_cache=use_cache
        ))  # fmt: skip
    assert torch.equal(*runs) and runs[0].shape == (6, 23)


@every_kind
@pytest.mark.parametrize("gate", ["adapter", "neuron"])
@torch.no_grad()
def test_gates_off_is_the_original_model(tiny_model, kind, gate):
    ids, inputs = random_ids(2, 20), left_padded(PROMPTS)
    plain = tiny_model(kind, gates=False)
    expected = plain(ids).logits
    text = plain.generate(**inputs, max_new_tokens=10, do_sample=False)
    model = tiny_model(kind, gate=gate)
    with model.dms.disabled():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        logits, cache = cached_logits(model, ids, [9, 10, 11])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert (cache.live_tokens() == 20).all()
        assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), text)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


@every_kind
@pytest.mark.parametrize("gate", ["adapter", "neuron"])
@torch.no_grad()
def test_detach_restores_the_model_exactly(tiny_model, kind, gate):
    plain, model = tiny_model(kind, gates=False), tiny_model(kind, gate=gate)
    ids = random_ids(2, 20)
    model(ids)
    assert detach(model) is model
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "dms")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    attach(model, DMSConfig(window=2))


@torch.no_grad()
def test_untrained_gates_evict_nothing(tiny_model):
    ids = random_ids(2, 20)
    plain = tiny_model(gates=False)
    expected = plain(ids).logits
    attach(plain, DMSConfig(window=2))
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_granularity_layer_gives_all_heads_the_decisions_of_the_first(tiny_model):
    model, same = tiny_model(), tiny_model(granularity="layer")
    ids = random_ids(2, 20)
    model(ids), same(ids)
    for layer in same.dms.step.logits.values():
        assert torch.equal(layer, layer[:, :1].expand_as(layer))
    assert torch.equal(same.dms.step.logits[0][:, 0], model.dms.step.logits[0][:, 0])


@torch.no_grad()
def test_padding_on_either_side_does_not_change_a_row(tiny_model):
    model = tiny_model()
    ids = random_ids(1, 12)
    alone = model(ids).logits[0]
    evicted = torch.stack(list(model.dms.step.evicted.values()))
    pad = torch.zeros(1, 5, dtype=torch.long)
    other = random_ids(1, 17, 3)
    for left in (False, True):
        row = torch.cat([pad, ids] if left else [ids, pad], 1)
        mask = torch.ones(2, 17, dtype=torch.long)
        place = slice(5, None) if left else slice(None, 12)
        mask[0] = 0
        mask[0, place] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(torch.cat([row, other]), attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(out[0, place], alone, rtol=1e-4, atol=1e-5)
        inside = torch.stack(list(model.dms.step.evicted.values()))[:, :1, :, place]
        assert torch.equal(inside, evicted)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_packed_documents_do_not_see_or_evict_one_another(tiny_model, padded):
    model = tiny_model()
    documents = [random_ids(1, n, n) for n in (9, 4, 12)]
    alone = torch.cat([model(d).logits for d in documents], 1)
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    mask = None
    if padded:
        ids, positions = (torch.cat([x, torch.zeros(1, 3, dtype=torch.long)], 1) for x in (ids, positions))
        mask = torch.cat([torch.ones(1, 25, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)], 1)
    out = model(ids, attention_mask=mask, position_ids=positions).logits[:, :25]
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_mask_counts_when_the_decoder_is_called_with_positional_arguments(tiny_model):
    model = tiny_model()
    inputs = left_padded(PROMPTS)
    named = model.model(**inputs).last_hidden_state
    assert torch.equal(model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state, named)


@torch.no_grad()
def test_use_cache_without_a_cache_gives_one_back(tiny_model):
    model = tiny_model()
    ids = random_ids(2, 12)
    full = model(ids).logits
    assert model.dms.step.evicted and model(ids).past_key_values is None
    first = model(ids[:, :8], use_cache=True)
    assert isinstance(first.past_key_values, DMSCache)
    second = model(ids[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, full[:, 8:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_neuron_of_the_gate_takes_no_part_in_attention(tiny_model):
    """With the gate's logits fixed, what the neuron's query weights say cannot matter."""
    model = tiny_model("llama", gate="neuron", scale=1e-9, offset=1.0)  # z < 0 whatever the neuron says
    ids = random_ids(2, 20)
    before = model(ids).logits
    for layer in model.dms.attentions:
        weight = layer.q_proj.weight.view(2, 2, 8, -1)  # (H, G, D, d)
        weight[:, 0, -1] = torch.randn_like(weight[:, 0, -1])
    assert torch.equal(model(ids).logits, before)
    weight[:, 0, 3] += 1.0  # its partner under RoPE matters
    assert not torch.equal(model(ids).logits, before)


@every_kind
@torch.no_grad()
def test_attention_gets_queries_whose_gate_neuron_is_zero_after_rope_too(tiny_model, kind, monkeypatch):
    queries, plain = [], attention.train_attention
    monkeypatch.setattr(attention, "train_attention", lambda q, *rest: queries.append(q) or plain(q, *rest))
    tiny_model(kind, gate="neuron")(random_ids(2, 20))
    for q in queries:
        grouped = q.unflatten(1, (2, 2))  # (B, H, G, T, D)
        assert (grouped[:, :, 0, :, -1] == 0).all()
        assert (grouped[:, :, 1, :, -1] != 0).all() and (grouped[:, :, 0, 1:, :-1] != 0).all()


@torch.no_grad()
def test_neuron_warm_up_goes_from_the_original_model_to_the_silenced_one(tiny_model):
    ids = random_ids(2, 20)
    original = tiny_model("qwen2", gates=False)(ids).logits
    model = tiny_model("qwen2", gate="neuron", offset=1e9)
    silenced = model(ids).logits
    model.dms.neuron_factor = 1.0
    torch.testing.assert_close(model(ids).logits, original, rtol=1e-4, atol=1e-5)
    gaps = []
    for factor in (0.9, 0.5, 0.1):
        model.dms.neuron_factor = factor
        gaps.append((model(ids).logits - silenced).norm())
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_training_forward_samples_soft_decisions_with_gradients(tiny_model):
    model = tiny_model().train()
    ids = random_ids(2, 20)
    model(ids).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.dms.gate_parameters())
    one, two = (model(ids).logits for _ in range(2))
    assert not torch.equal(one, two)


def test_gradient_checkpointing_changes_no_gradient(tiny_model):
    grads = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        hidden = model.get_decoder()(random_ids(2, 20), use_cache=False).last_hidden_state
        evicted = torch.stack(list(model.dms.step.evicted.values()))
        (hidden.square().mean() + evicted.mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))


def small_mistral(window):
    return MistralForCausalLM(MistralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, sliding_window=window,
    ))  # fmt: skip


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m: attach(m, DMSConfig()), "already has DMS gates"),
        (lambda m: attach(detach(m), DMSConfig(gate="neuron", neuron=8)), r"neuron 8: must lie in -8..7"),
        (lambda m: detach(detach(m)), "no DMS gates"),
        (lambda m: DMSCache.for_model(detach(m)), "LlamaForCausalLM has no DMS gates"),
        (lambda m: attach(small_gpt2(), DMSConfig()), "GPT2LMHeadModel.*cannot intercept"),
        (lambda m: attach(small_mistral(64), DMSConfig()), r"\[64\] tokens in all layers: DMS needs"),
        (lambda m: m(random_ids(1, 3), attention_mask=torch.zeros(1, 1, 3, 3)), "attention_mask of 4 dimensions"),
        (lambda m: m(random_ids(1, 3), attention_mask={"full_attention": None}), "attention_mask of type dict"),
        (lambda m: m(random_ids(1, 3), past_key_values=DMSCache(DMSConfig(window=7), 2)), "window=7.*window=3"),
        (lambda m: m(random_ids(1, 3), past_key_values=filled_dynamic_cache()), "DynamicCache: must be a DMSCache"),
        (lambda m: copy.deepcopy(m), "cannot be copied"),
    ],
    ids=["twice", "neuron", "detach", "no gates", "gpt2", "sliding", "4d", "dict", "config", "cache", "copy"],
)
def test_bad_use_is_named(tiny_model, use, message):
    with pytest.raises(ValueError, match=message):
        use(tiny_model())


def filled_dynamic_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    return cache


def test_mistral_with_full_attention_can_be_attached():
    model = attach(small_mistral(None), DMSConfig(window=2)).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(cached_logits(model, ids, [4, 5])[0], model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_cache_in_the_hands_of_an_unprepared_model_is_refused(tiny_model):
    plain, cache = tiny_model(gates=False), DMSCache(DMSConfig(), 2)
    with pytest.raises(ValueError, match="has not prepared"):
        for _ in range(2):
            plain(random_ids(1, 3), past_key_values=cache)


@torch.no_grad()
def test_nan_gates_are_refused(tiny_model):
    model = tiny_model()
    model.dms.gate_parameters()[1].fill_(float("nan"))
    for kwargs in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="gate logits contain NaN"):
            model(random_ids(1, 3), **kwargs)
