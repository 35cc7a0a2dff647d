"""Rotary positions whose frequencies depend on the longest row of a batch: longrope and dynamic NTK.

transformers computes them from the largest position of each forward pass, so that beyond a model's original length a
row depends on its neighbours, and keys in a cache on the step in which they were stored.  Up to it they are constant.
"""


def varying_rope(config) -> tuple[str, int] | None:
    """The rope type and the most tokens for which its frequencies are constant; None where they always are.

    config: a model's.  Where kinds of layers have ropes of their own, the one with the fewest tokens.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rope in [given, *(x for x in given.values() if isinstance(x, dict))]:
        kind = rope.get("rope_type")
        if kind == "longrope":
            limits.append((rope.get("original_max_position_embeddings") or text.max_position_embeddings, kind))
        elif kind == "dynamic":
            limits.append((text.max_position_embeddings, kind))
    return (min(limits)[1], int(min(limits)[0])) if limits else None


def check_length(config, tokens: int) -> None:
    """Raises ValueError if ``tokens`` exceeds the length up to which positions are encoded the same in every batch.

    Beside frequencies, that is the temperature of Llama 4's layers without positions, which transformers takes from the
    columns of the cache, not of a row; below its first step it is 1.
    """
    text, total = config.get_text_config(), f"{tokens} tokens, the longest prompt and max_new_tokens"
    if (rope := varying_rope(config)) and tokens > rope[1]:
        kind, limit = rope
        raise ValueError(
            f"{total}: must be <= {limit}, since rope_type {kind!r} of this {text.model_type} changes its frequencies "
            "beyond; lower max_new_tokens, or load the model with rope_parameters of a fixed type, such as 'yarn'"
        )
    if getattr(text, "attn_temperature_tuning", None) and tokens >= (step := getattr(text, "floor_scale", tokens + 1)):
        raise ValueError(
            f"{total}: must be < {step}, since attn_temperature_tuning of this {text.model_type} goes by the batch's "
            "columns beyond; lower max_new_tokens"
        )
