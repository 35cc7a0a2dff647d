"""Put DMS gates on a transformers decoder, and take them off, without copying modelling code.

Hooks read the gate's input; the ``dms`` attention function does the rest.  After ``attach`` the model has an
attribute ``dms``; a plain forward evicts hard on the full sequence in eval mode and samples soft decisions in
train mode; with a DMSCache it frees memory; inside ``model.dms.disabled()`` it is the original model.
"""

import contextlib
import inspect
import warnings

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from dms_core.attention import NAME, Step
from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.gate import AdapterGate, gate_logits, read_neuron

NEVER = -1e9  # a gate's logit at which no noise evicts


class DMS:
    """The gates of one model: configuration, hooks, and the state of the forward pass under way."""

    cache_class = DMSCache

    def __init__(self, model: PreTrainedModel, config: DMSConfig) -> None:
        self.config = config
        self.model = model
        self.step: Step | None = None
        self.enabled = True
        self.neuron_factor = 0.0  # 1 - t / n_t during the neuron gate's warm-up
        self.evicting = True  # False in that warm-up: the gates are silent, the neuron fades out
        self.noise_keys: Tensor | None = None  # (B,) of gate.row_keys; None: noise from torch's global generator
        decoder = model.get_decoder()
        self.attentions = [layer.self_attn for layer in decoder.layers]
        self.layers = len(self.attentions)
        self.sliding = [_sliding_window(attention, model) for attention in self.attentions]  # tokens, None: full
        text = model.config.get_text_config()
        self.heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.head_dim = getattr(self.attentions[0], "head_dim", None) or text.hidden_size // text.num_attention_heads
        if text.num_attention_heads % self.heads:
            raise ValueError(f"{text.num_attention_heads} query heads over {self.heads} KV heads: must divide")
        if not -self.head_dim <= config.neuron < self.head_dim:
            raise ValueError(f"neuron {config.neuron}: must lie in -{self.head_dim}..{self.head_dim - 1}")
        if config.gate == "neuron" and not all(hasattr(a, "q_proj") for a in self.attentions):
            raise ValueError(f"gate 'neuron' on {type(model).__name__}: needs a q_proj of its own; 'adapter' works")
        self.hooks = [decoder.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, layer in enumerate(decoder.layers):
            self._attach_layer(index, layer, text)

    def _attach_layer(self, index: int, layer: nn.Module, text) -> None:
        attention = layer.self_attn
        attention.__dict__["dms"] = self
        if self.sliding[index] is not None:
            return
        if self.config.gate == "adapter":
            gate = AdapterGate(text.hidden_size, self.heads, getattr(text, "rms_norm_eps", 1e-6))
            # in fp32 whatever the model: it is small, and z = 100 x - 5 has no bits to spare
            attention.dms_gate = gate.to(next(attention.parameters()).device, torch.float32)

            def read_residual(module, args, kwargs):
                hidden = args[0] if args else kwargs["hidden_states"]
                self._put(index, lambda: attention.dms_gate(hidden))

            self.hooks.append(layer.register_forward_pre_hook(read_residual, with_kwargs=True))
        else:

            def take_neuron(module, args, output):
                if not self.enabled:
                    return output
                q = output.unflatten(-1, (-1, self.head_dim)) if output.ndim == 3 else output  # (B, T, Hq, D)
                if heads_first:
                    q = q.transpose(1, 2)
                x, q = read_neuron(q, self.heads, self.config.neuron, self.neuron_factor)
                self._put(index, lambda: x)
                return q.transpose(1, 2) if heads_first else q.view_as(output)

            source = getattr(attention, "q_norm", None) or attention.q_proj
            heads_first = source is not attention.q_proj and text.model_type.startswith("gemma3")  # (B, Hq, T, D)
            self.hooks.append(source.register_forward_hook(take_neuron))

    def _put(self, index: int, gate) -> None:
        if self.enabled:
            z = gate_logits(gate(), self.config)
            self.step.logits[index] = z if self.evicting else torch.full_like(z, NEVER)

    def _begin(self, module, args, kwargs):
        """Before the decoder runs: which cache, which tokens are valid, which documents."""
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        batch, tokens = inputs.shape[:2]
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            given = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(f"attention_mask of {given}: DMS needs the (batch, tokens) padding mask")
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        if mask is not None:
            valid = mask[:, -tokens:].bool()
        cache = self._cache(kwargs)
        segments = None if cache is not None else _segments(valid, position_ids, mask is not None)
        self.step = Step(cache, valid, segments, soft=module.training and self.enabled)
        return (), kwargs

    def _cache(self, kwargs: dict) -> RowCache | None:
        past = kwargs.get("past_key_values")
        if past is None:
            if kwargs.get("use_cache"):  # asked for in so many words
                kwargs["past_key_values"] = DMSCache.for_model(self.model)
            else:
                kwargs["use_cache"] = False
            return kwargs.get("past_key_values")
        if isinstance(past, RowCache):
            past.check(self)
            return past
        if isinstance(past, Cache) and past.get_seq_length() == 0:  # what generate() makes by itself
            kwargs["past_key_values"] = DMSCache.for_model(self.model)
            return kwargs["past_key_values"]
        raise ValueError(f"past_key_values of type {type(past).__name__}: must be a DMSCache, or an empty cache")

    def silence_neuron(self, query: Tensor, heads: int) -> Tensor:
        """The gate's neuron again, after RoPE has mixed its partner into it: (B, Hq, T, D)."""
        _, q = read_neuron(query.transpose(1, 2), heads, self.config.neuron, self.neuron_factor)
        return q.transpose(1, 2)

    def __deepcopy__(self, memo):
        raise ValueError("a model with DMS gates cannot be copied: its hooks would serve the original; detach it first")

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model is the original one: no gate is read and nothing is evicted."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def gate_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters; empty for the neuron gate."""
        return [p for a in self.attentions if hasattr(a, "dms_gate") for p in a.dms_gate.parameters()]


def _segments(valid: Tensor, position_ids: Tensor | None, padded: bool) -> Tensor | None:
    """Documents packed in a row, told by positions that start over; padding is -1."""
    segments = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
    if position_ids is not None and position_ids.shape == valid.shape:
        jump = position_ids[:, 1:] != position_ids[:, :-1] + 1
        begins = valid[:, 1:] & jump & (valid[:, :-1] | (position_ids[:, 1:] == 0))  # padding may have any position
        segments[:, 1:] = begins.long().cumsum(1)
    elif not padded:
        return None
    return segments.masked_fill(~valid, -1)


def attach(model: PreTrainedModel, config: DMSConfig) -> PreTrainedModel:
    """Put gates on ``model`` in place and return it; ``model.dms`` is their handle.

    Layers with a sliding window keep it: gates go on the layers with full attention, and a warning names the others.

    Raises ValueError if the model already has gates, or its attention cannot be intercepted.
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError("the model already has DMS gates: call dms_core.detach(model) first")
    decoder = model.get_decoder()
    if decoder is None or not all(hasattr(x, "self_attn") for x in getattr(decoder, "layers", [None])):
        raise ValueError(f"{type(model).__name__}: no decoder layers with self_attn: cannot intercept its attention")
    if not getattr(model, "_supports_attention_backend", False) or NAME not in AttentionInterface._global_mapping:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface: cannot intercept it")
    _check_attention(decoder, model)
    before = model.config._attn_implementation
    model.dms = DMS(model, config)
    model.dms.attention_before = before
    model.set_attn_implementation(NAME)
    return model


def _check_attention(decoder: nn.Module, model: PreTrainedModel) -> None:
    """Raises ValueError for what is not softmax attention over a cache of keys and values per head."""
    name, text = type(model).__name__, model.config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name}: multi-head latent attention has no keys and values per head; not supported")
    if cap := getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"{name}: attn_logit_softcapping {cap}: must be None, scores are not capped here")
    sliding = [_sliding_window(layer.self_attn, model) for layer in decoder.layers]
    if None not in sliding:
        raise ValueError(f"{name}: sliding-window attention of {sorted(set(sliding))} tokens in all layers: DMS needs "
                         "layers with full attention (None)")  # fmt: skip
    if slide := [index for index, size in enumerate(sliding) if size is not None]:
        warnings.warn(f"{name}: layers {slide} keep their sliding window; DMS is on the other layers", stacklevel=3)


def _sliding_window(attention: nn.Module, model: PreTrainedModel) -> int | None:
    """A layer's sliding window; models differ in whether the layer or only the configuration knows it."""
    of_config = getattr(model.config.get_text_config(), "sliding_window", None)
    return getattr(attention, "sliding_window", of_config) or None


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gates off; the model is as it was before ``attach``, but for any training since."""
    dms = getattr(model, "dms", None)
    if dms is None:
        raise ValueError("the model has no DMS gates")
    for hook in dms.hooks:
        hook.remove()
    for attention in dms.attentions:
        del attention.__dict__["dms"]
        if hasattr(attention, "dms_gate"):
            del attention.dms_gate
    model.set_attn_implementation(dms.attention_before)
    del model.dms
    return model
