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
from transformers.masking_utils import AttentionMaskInterface

from dms_core.attention import NAME, Step
from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.gate import AdapterGate, gate_logits, read_neuron
from dms_core.parallel import split_of

NEVER = -1e9  # a gate's logit at which no noise evicts


class DMS:
    """The gates of one model: configuration, hooks, and the state of the forward pass under way."""

    def __init__(self, model: PreTrainedModel, config: DMSConfig) -> None:
        self.config = config
        self.model = model
        self.step: Step | None = None
        self.enabled = True
        self.neuron_factor = 0.0  # 1 - t / n_t during the neuron gate's warm-up
        self.evicting = True  # False in that warm-up: the gates are silent, the neuron fades out
        self.noise_keys: Tensor | None = None  # (B,) of noise.row_keys; None: noise from torch's global generator
        self.nan_seen: dict[torch.device, Tensor] = {}  # (1,) bool: NaN logits in the steps since the last check
        decoder = model.get_decoder()
        self.parameters = tuple(inspect.signature(decoder.forward).parameters)
        self.attentions = [layer.self_attn for layer in decoder.layers]
        self.layers = len(self.attentions)
        self.sliding = [sliding_window(attention, model) for attention in self.attentions]  # tokens, None: full
        text = self.text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.split = split_of(model)
        self.heads = self.split.count(heads)  # KV heads on this process
        self.head_dim = getattr(self.attentions[0], "head_dim", None) or text.hidden_size // text.num_attention_heads
        if text.num_attention_heads % heads:
            raise ValueError(f"{text.num_attention_heads} query heads over {heads} KV heads: must divide")
        if self.split.parts > 1 and (config.gate, config.granularity) == ("neuron", "layer"):
            raise ValueError("granularity 'layer' with gate 'neuron': the first head is on one process; use 'adapter'")
        if not -self.head_dim <= config.neuron < self.head_dim:
            raise ValueError(f"neuron {config.neuron}: must lie in -{self.head_dim}..{self.head_dim - 1}")
        if config.gate == "neuron" and not all(hasattr(a, "q_proj") for a in self.attentions):
            raise ValueError(f"gate 'neuron' on {type(model).__name__}: needs a q_proj of its own; 'adapter' works")
        self.hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
        ]
        for index, layer in enumerate(decoder.layers):
            self._attach_layer(index, layer, text)

    def _attach_layer(self, index: int, layer: nn.Module, text) -> None:
        attention = layer.self_attn
        attention.__dict__["dms"] = self
        if self.sliding[index] is not None:
            return
        if self.config.gate == "adapter":
            gate = AdapterGate(text.hidden_size, self.heads * self.split.parts, getattr(text, "rms_norm_eps", 1e-6))
            attention.dms_gate = gate.to(next(attention.parameters()).device)

            def read_residual(module, args, kwargs):
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = hidden.to(gate.norm.weight.device)  # the first layer on another device, under a device_map
                self._put(index, lambda: self.split.take(attention.dms_gate.logits(hidden, self.config)))

            self.hooks.append(layer.register_forward_pre_hook(read_residual, with_kwargs=True))
        else:

            def take_neuron(module, args, output):
                if not self.enabled:
                    return output
                q = output.unflatten(-1, (-1, self.head_dim)) if output.ndim == 3 else output  # (B, T, Hq, D)
                if heads_first:
                    q = q.transpose(1, 2)
                x, q = read_neuron(q, self.heads, self.config.neuron, self.neuron_factor)
                self._put(index, lambda: gate_logits(x, self.config))
                return q.transpose(1, 2) if heads_first else q.view_as(output)

            source = getattr(attention, "q_norm", None) or attention.q_proj
            heads_first = source is not attention.q_proj and text.model_type.startswith("gemma3")  # (B, Hq, T, D)
            self.hooks.append(source.register_forward_hook(take_neuron))

    def _put(self, index: int, logits) -> None:
        if self.enabled:
            z = logits()
            self.step.logits[index] = z if self.evicting else torch.full_like(z, NEVER)

    def _begin(self, module, args, kwargs):
        """Before the decoder runs: which cache, which tokens are valid, which documents."""
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        batch, tokens = inputs.shape[:2]
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        padded = mask is not None
        original = not self.enabled and self._is_original(kwargs)
        self._choose(self.attention_before if original else self.implementation)
        if original:
            self.step = None
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            given = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(f"attention_mask of {given}: DMS needs the (batch, tokens) padding mask")
        if mask is None:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        valid = mask[:, -tokens:]
        valid = valid if valid.dtype == torch.bool else valid.bool()
        cache = self._cache(kwargs)
        segments = None if cache is not None else _segments(valid, position_ids, padded)
        full = cache is not None and tokens > 1 and bool(valid.all())
        if cache is not None and tokens > 1 and cache.get_seq_length() == 0:  # what was noted was another caller's
            self._forget_notes()
        if cache is not None and tokens == 1 and cache.make_room():
            self.check_logits()
        self.step = Step(cache, valid, segments, soft=module.training and self.enabled, full=full)
        return (), kwargs

    def _choose(self, implementation: str) -> None:
        """The attention of the forward pass to come, which transformers looks up in the configuration."""
        if self.text._attn_implementation != implementation:
            self.text._attn_implementation = implementation

    def _is_original(self, kwargs: dict) -> bool:
        """Gates off: whether the call runs as if they had never been attached, with the model's own attention.

        Not with a cache that counts, nor for packed documents with a mask, which transformers would not keep apart.
        """
        past = kwargs.get("past_key_values")
        packed = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is not None
        return not isinstance(past, RowCache) and (past is not None or kwargs.get("use_cache") is True or not packed)

    def _cache(self, kwargs: dict) -> RowCache | None:
        """The call's cache: the one given, a new one where one is expected, or none."""
        past = kwargs.get("past_key_values")
        if isinstance(past, RowCache):
            past.check(self)
        elif isinstance(past, Cache) and past.get_seq_length() == 0:  # what generate() makes by itself
            past = self.new_cache()
        elif past is not None:
            raise ValueError(f"past_key_values of type {type(past).__name__}: must be a DMSCache, or an empty cache")
        elif kwargs.get("use_cache"):  # not by default: a plain forward is for training and evaluation
            past = self.new_cache()
        else:
            kwargs["use_cache"] = False
        if past is not None:
            kwargs["past_key_values"] = past
        return past

    def new_cache(self, page: int | None = None) -> RowCache:
        """An empty cache for this model, ``page`` tokens a page: by default 64 on CUDA, else 16."""
        page = page or (64 if self.model.device.type == "cuda" else 16)
        return DMSCache(self.config, self.layers, page, self.sliding)

    def _end(self, module, args, output) -> None:
        """After the decoder ran: note NaN logits, and look at the notes where that delays nobody."""
        step = self.step
        if not self.enabled:
            self._choose(self.attention_before)
        if step is None or step.soft or not step.logits:
            return
        first = next(iter(step.logits.values()))
        logits = [z.to(first.device) for z in step.logits.values()]
        found = torch.cat(logits, 1).isnan().any()
        if found.device not in self.nan_seen:
            with torch.inference_mode(False):  # so that it can be changed in any mode
                self.nan_seen[found.device] = torch.zeros(1, dtype=torch.bool, device=found.device)
        self.nan_seen[found.device].logical_or_(found)  # in place, as a captured step does it
        if step.cache is None or first.shape[2] > 1 or first.device.type == "cpu":
            self.check_logits()

    def check_logits(self) -> None:
        """Raises ValueError for NaN logits in the steps since the last check; waits for the device.

        Called by itself after each prefill and each full forward, and after decode steps on a CPU; elsewhere whenever
        the cache makes room for some.
        """
        for seen in self.nan_seen.values():
            if seen:
                seen.zero_()
                raise ValueError("gate logits contain NaN: must be finite; is the checkpoint damaged?")

    def _forget_notes(self) -> None:
        for seen in self.nan_seen.values():
            seen.zero_()

    def silence_neuron(self, query: Tensor, heads: int) -> Tensor:
        """The gate's neuron again, after RoPE has mixed its partner into it: (B, Hq, T, D)."""
        _, q = read_neuron(query.transpose(1, 2), heads, self.config.neuron, self.neuron_factor)
        return q.transpose(1, 2)

    def __deepcopy__(self, memo):
        raise ValueError("a model with DMS gates cannot be copied: its hooks would serve the original; detach it first")

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model is the original one: no gate is read, nothing is evicted, and its own attention runs.

        A DMSCache or a baseline's cache still counts; then the ``dms`` attention serves it.
        """
        before = self.enabled, self.step, self.text._attn_implementation
        self.enabled = False
        self._choose(self.attention_before)  # generate() may build masks before the decoder is called
        try:
            yield
        finally:
            self.enabled, self.step = before[:2]
            self._choose(before[2])

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


def no_mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs) -> None:
    """transformers builds no mask: padding and documents come with the step, visibility from the decisions."""


AttentionMaskInterface.register(NAME, no_mask)


def attach(model: PreTrainedModel, config: DMSConfig) -> PreTrainedModel:
    """Put gates on ``model`` in place and return it; ``model.dms`` is their handle (paper sections 3.1-3.2).

    Layers with a sliding window keep it: gates go on the layers with full attention, and a warning names the others.
    Raises ValueError if the model already has gates, or its attention cannot be intercepted.

    >>> attach(model, DMSConfig(window=16)).dms.layers
    2
    >>> with model.dms.disabled():  # the original model
    ...     logits = model(torch.ones(1, 8, dtype=torch.long)).logits  # (B, T, V)
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError("the model already has DMS gates: call dms_core.detach(model) first")
    decoder = model.get_decoder()
    if decoder is None or not all(hasattr(x, "self_attn") for x in getattr(decoder, "layers", [None])):
        raise ValueError(f"{type(model).__name__}: no decoder layers with self_attn: cannot intercept its attention")
    check_attention(decoder, model)
    return install(model, DMS(model, config), NAME)


def install(model: PreTrainedModel, handle: DMS, implementation: str) -> PreTrainedModel:
    """Make ``handle`` the model's, and ``implementation`` its attention."""
    handle.attention_before, handle.implementation = model.config._attn_implementation, implementation
    model.dms = handle
    model.set_attn_implementation(implementation)
    return model


def check_attention(decoder: nn.Module, model: PreTrainedModel) -> None:
    """Raises ValueError for what is not softmax attention over a cache of keys and values per head, or not in reach."""
    name, text = type(model).__name__, model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False) or NAME not in AttentionInterface._global_mapping:
        raise ValueError(f"{name} does not use transformers' attention interface: cannot intercept it")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name}: multi-head latent attention has no keys and values per head; not supported")
    if cap := getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"{name}: attn_logit_softcapping {cap}: must be None, scores are not capped here")
    sliding = [sliding_window(layer.self_attn, model) for layer in decoder.layers]
    if None not in sliding:
        needs = "DMS needs layers with full attention (None)"
        raise ValueError(f"{name}: sliding-window attention of {sorted(set(sliding))} tokens in all layers: {needs}")
    if slide := [index for index, size in enumerate(sliding) if size is not None]:
        warnings.warn(f"{name}: layers {slide} keep their sliding window; DMS is on the other layers", stacklevel=3)


def sliding_window(attention: nn.Module, model: PreTrainedModel) -> int | None:
    """A layer's sliding window; models differ in whether the layer or only the configuration knows it."""
    of_config = getattr(model.config.get_text_config(), "sliding_window", None)
    return getattr(attention, "sliding_window", of_config) or None


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gates off; the model is as it was before ``attach``, but for any training since.

    Raises ValueError if it has none.

    >>> hasattr(detach(attach(model, DMSConfig())), "dms")
    False
    """
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
