"""One mechanism for every decoder: a tiny random model of each family, built from its configuration."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_model, save_model
from dms_core.config import DMSConfig
from dms_core.model import attach, detach

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.25,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
SLIDING = 6  # tokens
HYBRID = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "llama": LlamaConfig(**SIZES, head_dim=8),
    "llama tied": LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True),  # SmolLM2's shape
    "smollm3": SmolLM3Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 hybrid": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=SLIDING, layer_types=HYBRID),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "phi3": Phi3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None, sliding_window=SLIDING),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=SLIDING, layer_types=HYBRID),
}
PROMPT = torch.randint(1, 40, (1, 13), generator=torch.Generator().manual_seed(0))


def build(family: str):
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"  # what its modelling code has without capped scores
    return AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention).eval()


def gated(family: str, **settings):
    model = build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(model, DMSConfig(**{"window": 3, "scale": 10.0, "offset": 0.0, **settings}))
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter)
    return model


def greedy(model, new: int) -> list[int]:
    ids = PROMPT
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gates_off_equals_original_and_gates_on_generates_the_full_forward(family, tmp_path):
    ids = torch.randint(1, 40, (2, 40), generator=torch.Generator().manual_seed(1))
    original = build(family)(ids, use_cache=False).logits
    model = gated(family)
    with model.dms.disabled():
        torch.testing.assert_close(model(ids, use_cache=False).logits, original, rtol=1e-4, atol=1e-4)
    evicting = model(ids, use_cache=False).logits
    assert (evicting - original).abs().max() > 1e-2

    cache = DMSCache.for_model(model, page=4)
    said = model.generate(PROMPT, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert said[0].tolist() == greedy(model, 20)
    for live, sliding in zip(cache.live_tokens(), model.dms.sliding, strict=True):
        assert (live == sliding).all() if sliding else (live < cache.tokens_seen()).all()

    save_model(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(load_model(tmp_path)(ids, use_cache=False).logits, evicting, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detach(model)(ids, use_cache=False).logits, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phi3"])
@torch.no_grad()
def test_neuron_gates_generate_the_full_forward(family):
    model = gated(family, gate="neuron")
    said = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    assert said[0].tolist() == greedy(model, 12)


@pytest.mark.parametrize("family", ["qwen2 hybrid", "gemma3"])
def test_sliding_window_layers_get_no_gate_and_a_warning(family):
    with pytest.warns(UserWarning, match=r"layers \[0, 2\] keep their sliding window"):
        model = attach(build(family), DMSConfig())
    assert model.dms.sliding == [SLIDING, None] * 2
    assert [hasattr(a, "dms_gate") for a in model.dms.attentions] == [False, True] * 2
    model.train()(PROMPT, use_cache=False)
    assert sorted(model.dms.step.evicted) == [1, 3]


@pytest.mark.parametrize(
    "config, message",
    [
        (Phi3Config(**SIZES, sliding_window=SLIDING), r"\[6\] tokens in all layers"),
        (Gemma2Config(**SIZES, head_dim=8), "attn_logit_softcapping 50.0: must be None"),
        (
            DeepseekV3Config(
                **{**SIZES, "num_key_value_heads": 4},
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
                first_k_dense_replace=4,
            ),
            "multi-head latent attention",
        ),
    ],
    ids=["phi3", "gemma2", "deepseek"],
)
def test_unsupported_attention_raises(config, message):
    with pytest.raises(ValueError, match=message):
        attach(AutoModelForCausalLM.from_config(config), DMSConfig())
