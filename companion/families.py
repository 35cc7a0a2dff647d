"""Tiny random models of the types that transformers knows, built offline from their configurations."""

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig

SLIDING, CHUNK, EXPERTS = 6, 8, 4  # tokens, tokens, how many
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.25,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    decoder_start_token_id=1,
    attention_dropout=0.0,
    sliding_window=SLIDING,
    attention_chunk_size=CHUNK,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "block_ff_dim"), 48),
    first_k_dense_replace=1,
    global_head_dim=8,
    num_global_key_value_heads=2,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=64,
    num_kv_shared_layers=0,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    lightning_num_heads=4,
    mamba_num_heads=4,
    mamba_n_heads=4,
    mamba_head_dim=16,
    mamba_d_head=16,
    mamba_d_ssm=64,
    mamba_d_state=8,
    ssm_state_size=8,
    mamba_n_groups=1,
    n_groups=1,
    mamba_chunk_size=8,
    chunk_size=8,
    query_pre_attn_scalar=8,
    num_nextn_predict_layers=0,
    patch_size=4,
    image_size=8,
    depth=2,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    qk_head_dim=8,
    v_head_dim=8,
    rotary_dim=4,
    out_hidden_size=32,
)
EXTRA = {  # what the default configuration of a type leaves open
    "qwen2": dict(use_sliding_window=False),
    "gemma2": dict(attn_logit_softcapping=None),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False, block_multiple_of=8),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, position_embedding_type="rope"),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4
    ),
    "zaya": dict(num_experts_per_tok=1),
    "mixtral": dict(sliding_window=None),
    "mistral": dict(sliding_window=None),
    "ministral": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=2, block_multiple_of=8),
}
MROPE = {"qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text"}  # rotary positions in three parts, which their defaults lack
EAGER = {"gemma2"}  # types whose own code lacks capped scores but in eager attention


def tiny_config(kind: str | type[PreTrainedConfig], **settings) -> PreTrainedConfig:
    """The default configuration of a type, made small; of its layers, some of every kind stay.

    Raises ValueError for a type that transformers does not know.
    """
    if isinstance(kind, str):
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"family {kind!r}: must be a model type of transformers, such as llama or qwen3_next")
        kind = CONFIG_MAPPING[kind]
    full = kind()
    settings = {**EXTRA.get(kind.model_type, {}), **settings}
    parts = {name: tiny_config(type(part)).to_dict() for name, part in _parts(full).items()}
    sizes = {name: size for name, size in SIZES.items() if _has(full, name) and name not in parts}
    if sizes.get("sliding_window") and getattr(full, "sliding_window", None) is None:
        del sizes["sliding_window"]
    if "kv_lora_rank" in sizes:  # multi-head latent attention
        sizes = {**sizes, "num_key_value_heads": SIZES["num_attention_heads"]}
        sizes.pop("head_dim", None)
    rope = getattr(full, "rope_parameters", None) or {}
    if "mrope_section" in rope or kind.model_type in MROPE:
        sizes["rope_parameters"] = {**rope, "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return kind(**{**sizes, **_per_layer(full), **parts, **settings})


def _has(config: PreTrainedConfig, name: str) -> bool:
    return name in config.to_dict() or name in type(config).attribute_map


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations of a multimodal model's parts."""
    return {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}


def _per_layer(config: PreTrainedConfig) -> dict[str, list]:
    """Lists with an entry a layer, cut to as many layers as a tiny model has; layers of all kinds stay."""
    layers = getattr(config, "num_hidden_layers", None)
    lists = {n: x for n, x in config.to_dict().items() if isinstance(x, list | tuple) and layers and len(x) == layers}
    kinds: dict[tuple, list[int]] = {}
    for index in range(layers if lists else 0):
        kinds.setdefault(tuple(str(x[index]) for x in lists.values()), []).append(index)
    rounds = [index for turn in zip(*(_padded(where, 4) for where in kinds.values()), strict=True) for index in turn]
    return {name: [x[index] for index in sorted(rounds[:4])] for name, x in lists.items()}


def _padded(indices: list[int], count: int) -> list[int]:
    return (indices * count)[:count]


def tiny_model(kind: str, seed: int = 0, **settings) -> PreTrainedModel:
    """A random model of a type that writes text, in eval mode.  Raises ValueError where there is none."""
    config = tiny_config(kind, **settings)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = AutoModelForImageTextToText
    else:
        raise ValueError(f"family {kind!r}: no model of this type writes text")
    torch.manual_seed(seed)
    attention = {"attn_implementation": "eager"} if kind in EAGER else {}
    return auto.from_config(config, **attention).eval()
