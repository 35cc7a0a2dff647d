"""Tokens a second and bytes of keys and values of an unmodified transformers model."""

import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from dms_core.sampling import pad_left


@torch.inference_mode()
def decode_speed(model, prompts: Sequence[Sequence[int]], pad: int, tokens: int = 32) -> dict:
    """Greedy decoding with a DynamicCache after a prefill, which is not timed: {"tokens_per_s", "kv_bytes"}.

    The rate is that of the median step, of all rows together.
    """
    ids, mask, positions = (x.to(model.device) for x in pad_left(prompts, pad))
    cache, seconds = DynamicCache(), []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)
        seconds.append(time.perf_counter() - began)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return {"tokens_per_s": len(prompts) / statistics.median(seconds[1:]), "kv_bytes": held}
