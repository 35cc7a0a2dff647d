"""Attached models: gates off, detached, padded or packed they are what they should be; bad use is named."""

import copy
import inspect

import pytest
import torch
from model_inputs import (
    PROMPTS,
    cached_logits,
    every_kind,
    greedy_reference,
    left_padded,
    random_ids,
)
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from companion import families
from dms_core import attention
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach, detach


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
    same.train()(ids)
    for evicted in same.dms.step.evicted.values():  # one draw of noise, too
        assert torch.equal(evicted, evicted[:, :1].expand_as(evicted)) and 0 < evicted.mean() < 1


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
def test_packed_documents_are_independent(tiny_model, padded):
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
def test_use_cache_without_a_cache_returns_a_dms_cache(tiny_model):
    model = tiny_model()
    ids = random_ids(2, 12)
    full = model(ids).logits
    assert model.dms.step.evicted and model(ids, use_cache=False).past_key_values is None
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
    for layer in model.dms.layout.modules:
        weight = layer.q_proj.weight.view(2, 2, 8, -1)  # (H, G, D, d)
        weight[:, 0, -1] = torch.randn_like(weight[:, 0, -1])
    assert torch.equal(model(ids).logits, before)
    weight[:, 0, 3] += 1.0  # its partner under RoPE matters
    assert not torch.equal(model(ids).logits, before)


@every_kind
@torch.no_grad()
def test_gate_neuron_of_queries_is_zero_after_rope(tiny_model, kind, monkeypatch):
    queries, plain = [], attention.train_attention
    monkeypatch.setattr(
        attention, "train_attention", lambda q, *rest, **more: queries.append(q) or plain(q, *rest, **more)
    )
    tiny_model(kind, gate="neuron")(random_ids(2, 20))
    for q in queries:
        grouped = q.unflatten(1, (2, 2))  # (B, H, G, T, D)
        assert (grouped[:, :, 0, :, -1] == 0).all()
        assert (grouped[:, :, 1, :, -1] != 0).all() and (grouped[:, :, 0, 1:, :-1] != 0).all()


@torch.no_grad()
def test_neuron_warm_up_moves_from_original_to_silenced_model(tiny_model):
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


def small_mistral(window):
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            sliding_window=window,
        )
    )


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda m: attach(m, DMSConfig()), "already has DMS gates"),
        (lambda m: attach(detach(m), DMSConfig(gate="neuron", neuron=8)), r"neuron 8: must lie in -8..7"),
        (lambda m: detach(detach(m)), "no DMS gates"),
        (lambda m: DMSCache.for_model(detach(m)), "LlamaForCausalLM has no DMS gates"),
        (
            lambda m: attach(families.tiny_model("bloom"), DMSConfig()),
            "BloomForCausalLM: its attention cannot be intercepted",
        ),
        (lambda m: attach(small_mistral(64), DMSConfig()), r"\[64\] tokens in all layers: DMS needs"),
        (lambda m: m(random_ids(1, 3), output_attentions=True), "output_attentions True: must be False"),
        (lambda m: m(random_ids(1, 3), past_key_values=m(random_ids(1, 3)).past_key_values), "pass use_cache=True"),
        (lambda m: m(random_ids(1, 3), attention_mask=torch.zeros(1, 1, 3, 3)), "attention_mask of 4 dimensions"),
        (lambda m: m(random_ids(1, 3), attention_mask={"full_attention": None}), "attention_mask of type dict"),
        (lambda m: m(random_ids(1, 3), past_key_values=DMSCache(DMSConfig(window=7), 2)), "window=7.*window=3"),
        (lambda m: m(random_ids(1, 3), past_key_values=filled_dynamic_cache()), "DynamicCache: must be a DMSCache"),
    ],
    ids=[
        "twice",
        "neuron",
        "detach",
        "no gates",
        "bloom",
        "sliding",
        "attentions",
        "uncached",
        "4d",
        "dict",
        "config",
        "cache",
    ],
)
def test_invalid_use_raises(tiny_model, use, message):
    with pytest.raises(ValueError, match=message):
        use(tiny_model())


@torch.no_grad()
def test_copy_of_a_model_has_gates_of_its_own(tiny_model):
    model, ids = tiny_model(), random_ids(2, 20)
    before = model(ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, before) and other.dms.model is other
    for parameter in other.dms.gate_parameters():
        parameter.zero_()
    assert not torch.equal(other(ids).logits, before) and torch.equal(model(ids).logits, before)
    with other.dms.disabled():
        assert model.dms.enabled
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in detach(other).modules())


@pytest.mark.parametrize("given", ["kept", "returned", "none"])
@torch.no_grad()
def test_hand_written_loop_gives_the_right_text_or_an_error(tiny_model, given):
    """A loop that passes the cache it made at every step, one that takes the cache returned, and one that has none."""
    model, ids = tiny_model(seed=1), random_ids(1, 9)
    expected = greedy_reference(model, ids.tolist(), 12)[0]
    cache, text, step = None if given == "none" else DynamicCache(), [], ids
    for _ in range(12):
        out = model(step, past_key_values=cache)
        step = out.logits[:, -1:].argmax(-1)
        text.append(step.item())
        if given == "none":
            cache = out.past_key_values
            with pytest.raises(ValueError, match="pass use_cache=True"):
                model(step, past_key_values=cache)
            return
        cache = out.past_key_values if given == "returned" else cache
    assert text == expected
    assert isinstance(cache, DMSCache) and cache.get_seq_length() == 20 and (cache.live_tokens() < 20).any()


def filled_dynamic_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    return cache


def test_mistral_with_full_attention_can_be_attached():
    model = attach(small_mistral(None), DMSConfig(window=2)).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(cached_logits(model, ids, [4, 5])[0], model(ids).logits, rtol=1e-4, atol=1e-5)


def test_unattached_model_rejects_dms_cache(tiny_model):
    plain, cache = tiny_model(gates=False), DMSCache(DMSConfig(), 2)
    with pytest.raises(ValueError, match="has not prepared"):
        for _ in range(2):
            plain(random_ids(1, 3), past_key_values=cache)


@torch.no_grad()
def test_nan_raises_in_forward_prefill_and_decode(tiny_model):
    model, ids = tiny_model(), random_ids(1, 3)
    cache = DMSCache.for_model(model)
    model(ids, past_key_values=cache)
    parameter = model.dms.gate_parameters()[1]
    good = parameter.clone()
    parameter.fill_(float("nan"))
    for kwargs in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="gate logits contain NaN"):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match="gate logits contain NaN"):
        model(ids[:, :1], past_key_values=cache)
    parameter.copy_(good)
    model(ids[:, :1], past_key_values=DMSCache.for_model(model))
    model.dms.check_logits()


@torch.no_grad()
def test_decoder_signature_is_read_once(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("inspect.signature in a forward pass"))
    model.dms._begin(model.get_decoder(), (random_ids(1, 3),), {})
    assert model.dms.step.valid.shape == (1, 3)


@torch.no_grad()
def test_nan_gates_raise(tiny_model):
    model = tiny_model()
    model.dms.gate_parameters()[1].fill_(float("nan"))
    for kwargs in ({}, {"use_cache": True}):
        with pytest.raises(ValueError, match="gate logits contain NaN"):
            model(random_ids(1, 3), **kwargs)


@torch.no_grad()
def test_models_that_share_a_configuration_do_not_switch_each_other_off(tiny_model):
    one = tiny_model()
    other, ids = type(one)(one.config).eval(), random_ids(1, 12)
    one.set_attn_implementation("sdpa")
    attach(other, one.dms.config)
    for parameter in other.dms.gate_parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    expected = other(ids).logits
    with one.dms.disabled():
        one(ids)
    assert torch.equal(other(ids).logits, expected)


@torch.no_grad()
def test_gates_off_a_static_cache_sees_the_padding(tiny_model):
    inputs = left_padded(PROMPTS)
    plain = tiny_model(gates=False)
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "output_scores": True}
    expected = plain.generate(**inputs, **settings, return_dict_in_generate=True).scores
    model = tiny_model()
    with model.dms.disabled():
        scores = model.generate(**inputs, **settings, return_dict_in_generate=True).scores
    torch.testing.assert_close(torch.stack(scores), torch.stack(expected), rtol=1e-4, atol=1e-4)
