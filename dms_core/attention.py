"""The ``dms`` attention function, registered with transformers beside ``sdpa`` and ``flash_attention_2``.

Per layer: the gate's logits, put down by a hook just before, become biases (training), hard decisions on a full
sequence, or decisions that the cache acts on.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from dms_core.gate import hard_decisions, soft_decisions
from dms_core.noise import keyed_noise, sample_noise
from dms_core.step import chunks
from dms_core.visibility import align_decisions
from dms_kernels import train_attention

NAME = "dms"
SINKS = ("s_aux", "sinks")  # what models call a learnt logit per query head, one more term of the normaliser


def dms_attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, T, D), key and value (B, H, T, D) -> (B, T, Hq, D)."""
    dms = module.__dict__.get("dms")
    if dms is None or dms.step is None:
        raise ValueError("attention implementation 'dms' needs dms_core.attach(model, config) first")
    step, layer, config = dms.step, module.layer_idx, dms.config
    chunk = dms.layout.attention[layer].chunk
    local = dms.layout.attention[layer].sliding or chunk  # tokens that a layer without a gate sees at most
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    z = step.logits.get(layer)
    if z is not None and config.gate == "neuron":
        query = dms.silence_neuron(query, key.shape[1])
    # Of a model that lies on several devices (device_map), each layer takes them to its own.
    valid, segments = (x if x is None else x.to(key.device) for x in (step.valid, step.segment_ids))
    if step.cache is not None:
        evict = key.new_ones(key.shape[:3], dtype=torch.bool) if local else None
        evict = evict if z is None else hard_decisions(z)
        valid = None if step.full else valid
        out = step.cache.layers[layer].attend(query, key, value, evict, valid, scale, sinks)
    else:
        if local is None:
            log_keep, window = _log_keep(dms, layer, z, key, segments), config.window
        else:  # a sliding window is one that every token leaves marked
            log_keep, window = torch.full_like(key[..., 0], float("-inf")), local - 1
        if chunk:
            segments = chunks(segments, key, chunk)
        out = train_attention(query, key, value, log_keep, window, segments, scale, sinks=sinks)
    return out.transpose(1, 2).contiguous(), None  # some models view it


def _log_keep(dms, layer: int, z: Tensor | None, key: Tensor, segments: Tensor | None) -> Tensor:
    """beta (B, H, T) at the token it is about; the decisions are left in ``step.evicted`` for the losses."""
    step, config = dms.step, dms.config
    if z is None:
        return key.new_zeros(key.shape[:3])
    if step.soft:
        own = z[:, :1] if config.granularity == "layer" else z  # one decision, one draw
        noise = sample_noise(own) if dms.noise_keys is None else keyed_noise(own, dms.noise_keys, layer)
        log_keep, evicted = soft_decisions(z, noise.expand_as(z), config.temperature)
    else:
        evicted = hard_decisions(z)
        log_keep = torch.zeros_like(z).masked_fill(evicted, float("-inf"))
    fill = 0.0 if step.soft else False
    step.evicted[layer] = align_decisions(evicted, config.lag, segments, fill)
    return align_decisions(log_keep, config.lag, segments, 0.0)


AttentionInterface.register(NAME, dms_attention)


def no_mask(batch_size, q_length, kv_length, q_offset=0, mask_function=None, **kwargs) -> None:
    """transformers builds no mask: padding and documents come with the step, visibility from the decisions.

    Raises ValueError where tokens see later ones, as those of an image do in some models.
    """
    if getattr(mask_function, "__qualname__", "").startswith("or_masks"):
        row, query = torch.arange(batch_size)[:, None], q_offset + torch.arange(q_length - 1)
        if mask_function(row, 0, query, query + 1).any():
            raise ValueError("tokens that see later ones, such as an image's: attention with gates must be causal")


AttentionMaskInterface.register(NAME, no_mask)
