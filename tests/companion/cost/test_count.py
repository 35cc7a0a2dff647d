"""Sizes counted on modules without memory, against random models that have some and the caches that they fill."""

import re

import pytest
import torch
from transformers import DynamicCache, T5Config

from companion.cost import roofline
from companion.cost.count import EXPERTS, MODELS, count, known
from companion.families import tiny_config, tiny_model

TOKENS = 9  # more than a sliding window or a chunk of the tiny models
FAMILIES = """llama phi3 gemma2 gemma3_text cohere2 olmo3 falcon qwen3 qwen3_moe qwen3_next qwen3_5_text qwen3_5_moe
mixtral granitemoe gpt_oss llama4_text glm4_moe ernie4_5_moe deepseek_v2 deepseek_v3 lfm2 lfm2_moe
granitemoehybrid bamba jamba falcon_h1 nemotron_h"""
PUBLISHED = {  # billions of parameters, all and those that a token uses, as the model cards round them
    "qwen3-4b": (4.0, 4.0),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-next-80b-a3b": (80, 3),
    "qwen3.5-35b-a3b": (35, 3),
    "mixtral-8x7b": (46.7, 12.9),
    "olmo-3-7b": (7, 7),
    "gpt-oss-20b": (21, 3.6),
    "gpt-oss-120b": (117, 5.1),
    "llama-4-scout": (109, 17),
    "deepseek-v3": (671, 37),
}


def held(cache) -> int:
    """Bytes of the tensors of a cache; counters of tokens aside."""
    holders = [x for layer in cache.layers for x in (vars(layer), *vars(layer).values()) if isinstance(x, dict)]
    tensors = [x for holder in holders for x in holder.values() if torch.is_tensor(x) and x.is_floating_point()]
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("family", FAMILIES.split())
def test_parameters_and_cache_are_those_of_a_random_model(family):
    sizes, model = count(tiny_config(family)), tiny_model(family).to(torch.bfloat16)
    assert sizes.parameters == sum(x.numel() for x in model.parameters())
    tables = [x.weight for x in model.modules() if isinstance(x, torch.nn.Embedding)]
    output = model.get_output_embeddings().weight
    inside = [x for x in model.parameters() if x.ndim > 1 and all(x is not y for y in [*tables, output])]
    layers = sum(n * (kind.weights + kind.experts * kind.expert) for n, kind in sizes.kinds)
    assert layers == sum(x.numel() for x in inside)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(1, 60, (1, TOKENS)), past_key_values=cache, use_cache=True)
    left = sum(2 * n * kind.cached for n, kind in sizes.kinds if kind.limit)
    assert held(cache) == roofline.kv_bytes(sizes, 1, TOKENS) - left  # between steps, one token less than the window


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_are_chosen(family):
    large, small = (count(tiny_config(family, **dict.fromkeys(EXPERTS, number))) for number in (8, 2))
    routers = (8 - 2) * sum(n for n, kind in large.kinds if kind.experts)  # their rows, with a bias in gpt-oss
    bias = family == "gpt_oss"
    assert large.active_parameters - small.parameters == routers * (large.hidden + bias)


def test_experts_read_grow_from_the_chosen_ones_to_all():
    layer = roofline.Layer(0, expert=1, experts=8, chosen=2)
    assert [layer.experts_read(batch) for batch in (1, 2)] == [2, 2 + 2 * 6 / 8]
    draws = [torch.stack([torch.randperm(8)[:2] for _ in range(5)]).unique().numel() for _ in range(4000)]
    assert sum(draws) / len(draws) == pytest.approx(layer.experts_read(5), rel=0.02)
    assert layer.experts_read(1000) == pytest.approx(8)


@pytest.mark.parametrize("name", MODELS)
def test_known_models_have_the_published_parameters(name):
    sizes, (all_, active) = count(known(name)), PUBLISHED[name]
    assert sizes.parameters / 1e9 == pytest.approx(all_, rel=0.02 if name != "olmo-3-7b" else 0.05)
    embedding = sizes.hidden * sizes.vocabulary / 1e9
    assert (
        active * 0.97 < sizes.active_parameters / 1e9 < active * 1.04 + embedding + 0.5
    )  # cards round, or leave it out


def test_text_decoder_of_a_multimodal_model_is_counted_alone():
    assert count(tiny_config("gemma3")) == count(tiny_config("gemma3").text_config)
    assert count(tiny_config("qwen3_5")) == count(tiny_config("qwen3_5").text_config)
    vision_language = count(tiny_config("mistral3"))
    assert vision_language.kinds and vision_language == count(tiny_config("mistral3").text_config)


def test_what_cannot_be_counted_is_named():
    with pytest.raises(ValueError, match="model type 't5': transformers has no model of it that writes text"):
        count(T5Config())
    with pytest.raises(ValueError, match=re.escape("model type 'minimax': the state of its layers without attention")):
        count(tiny_config("minimax"))
