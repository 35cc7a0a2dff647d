"""The sizes of a model that transformers knows, counted on its modules, which hold no memory (device "meta").

What a layer keeps of the past is asked of the cache that transformers would make for it.  Of a multimodal model only
the text decoder counts.  Published sizes of models that people run: MODELS.
"""

from collections import Counter

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from companion.cost.roofline import Architecture, Layer

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token")
STATES = ("mamba_d_state", "ssm_state_size", "state_size")
# Types of transformers' configurations, and where their defaults differ from the config.json of the repository named.
MODELS = {
    "qwen3-4b": (  # Qwen/Qwen3-4B
        "qwen3",
        dict(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3-30b-a3b": ("qwen3_moe", dict(num_hidden_layers=48, head_dim=128)),  # Qwen/Qwen3-30B-A3B
    "qwen3-next-80b-a3b": ("qwen3_next", {}),  # Qwen/Qwen3-Next-80B-A3B-Instruct
    "qwen3.5-35b-a3b": ("qwen3_5_moe_text", {}),  # Qwen/Qwen3.5-35B-A3B, without its vision tower
    "mixtral-8x7b": ("mixtral", {}),  # mistralai/Mixtral-8x7B-v0.1
    "olmo-3-7b": ("olmo3", dict(vocab_size=100278)),  # allenai/Olmo-3-7B-Instruct
    "gpt-oss-20b": ("gpt_oss", dict(num_hidden_layers=24, num_local_experts=32)),  # openai/gpt-oss-20b
    "gpt-oss-120b": ("gpt_oss", {}),  # openai/gpt-oss-120b
    "llama-4-scout": ("llama4_text", {}),  # meta-llama/Llama-4-Scout-17B-16E, without its vision tower
    "deepseek-v3": ("deepseek_v3", {}),  # deepseek-ai/DeepSeek-V3, without its layer for multi-token prediction
}


def known(name: str) -> PreTrainedConfig:
    """The configuration of a model of MODELS."""
    kind, sizes = MODELS[name]
    return CONFIG_MAPPING[kind](**sizes)


def count(config: PreTrainedConfig) -> Architecture:
    """The sizes of the text decoder of a configuration.

    Raises ValueError for one that writes no text, and for a layer with a state of an unknown kind.
    """
    model, text = _model(config)
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    layers = next(part for part in lists if len(part) == text.num_hidden_layers)
    held = DynamicCache(config=text).layers or [DynamicLayer() for _ in layers]
    each = getattr(text, "per_layer_config", None) or [text] * len(layers)  # heads may differ
    kinds = Counter(map(_layer, layers, held, each))  # in the order of their first layers
    kv_width = max(layer.cached for layer in kinds) // 2
    sizes = (len(layers), text.hidden_size, getattr(text, "intermediate_size", None), kv_width, text.vocab_size)
    used = {*model.parameters()}
    return Architecture(*sizes, sum(x.numel() for x in used), tuple((number, layer) for layer, number in kinds.items()))


def _model(config: PreTrainedConfig) -> tuple[nn.Module, PreTrainedConfig]:
    """The decoder with its output layer, in bf16 and without memory, and its configuration."""
    text = config.get_text_config()
    with torch.device("meta"):
        if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16), text
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            whole = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
            return nn.ModuleList([whole.get_decoder(), whole.get_output_embeddings()]), text
    raise ValueError(f"model type {config.model_type!r}: transformers has no model of it that writes text")


def _layer(module: nn.Module, cache, text: PreTrainedConfig) -> Layer:
    experts = next((number for name in EXPERTS if (number := getattr(text, name, None))), 0)
    chosen = next((number for name in CHOSEN if (number := getattr(text, name, None))), 0)
    weights = routed = 0
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:  # norms and biases are next to nothing
            parts = name.split(".")
            stacked = parameter.ndim == 3 and parameter.shape[0] == experts and "conv1d" not in parts
            own = bool(experts) and ("experts" in parts or stacked)
            routed, weights = routed + own * parameter.numel(), weights + (not own) * parameter.numel()
    mixture = dict(expert=routed // experts, experts=experts, chosen=chosen) if routed else {}
    state = 0 if getattr(cache, "is_conv_states_initialized", None) is None else _state(module, text)
    if not isinstance(cache, DynamicLayer):
        return Layer(weights, state=state, **mixture)
    limit = cache.sliding_window if isinstance(cache, DynamicSlidingWindowLayer) else None
    if rank := getattr(text, "kv_lora_rank", None):  # keys and values of all heads are products of one latent vector
        rope = text.qk_rope_head_dim
        return Layer(weights, rank + rope, text.num_attention_heads * (2 * rank + rope), limit, **mixture)
    return Layer(weights, *_attention(module, text), limit, limit is None, state, **mixture)


def _attention(module: nn.Module, text: PreTrainedConfig) -> tuple[int, int]:
    """(values cached a token, multiply-adds with a cached token)."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    for part in module.modules():
        if hasattr(part, "k_proj") and hasattr(part, "head_dim"):
            head_dim, kv_heads = part.head_dim, part.k_proj.out_features // part.head_dim
    return 2 * kv_heads * head_dim, 2 * heads * head_dim


def _state(module: nn.Module, text: PreTrainedConfig) -> int:
    """Bytes of a layer's state: inputs of its convolution in 2 bytes, its recurrent state in 4."""
    convolved = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Conv1d))
    size = next((number for name in STATES if (number := getattr(text, name, None))), 0)
    if hasattr(text, "linear_num_value_heads"):
        recurrent = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    elif size:
        recurrent = size * next(p.out_proj.in_features for p in module.modules() if hasattr(p, "out_proj"))
    elif hasattr(text, "conv_L_cache"):
        recurrent = 0
    else:
        raise ValueError(f"model type {text.model_type!r}: the state of its layers without attention is unknown")
    return 2 * convolved + 4 * recurrent
