"""What a prepared model has as ``model.dms``: its gates, and the forward pass under way.

Hooks read the gates' input and tell the ``dms`` attention function what it needs to know; no modelling code changes.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.cache.hybrid import other_layers
from dms_core.config import DMSConfig
from dms_core.gate import AdapterGate, gate_logits, neuron_rows, read_neuron
from dms_core.parallel import split_of
from dms_core.probe import Attention, decoder_of, layout_of, place_of
from dms_core.step import Step, Uncached, Watch, documents, given_cache, padding_mask, several

KEEP = -1e9  # a gate's logit at which no noise evicts
NAN = "gate logits contain NaN: must be finite; is the checkpoint damaged?"
IDLE = "a row skipped a step and then continued: states cannot skip steps; call put_rows or reset_rows between"


class DMS:
    """The gates of one model: configuration, hooks, and the state of the forward pass under way."""

    attention_before: str  # what transformers looks up in the configuration, without and
    implementation: str  # with the gates

    def __init__(self, model: PreTrainedModel, config: DMSConfig) -> None:
        """Raises ValueError for attention that DMS cannot stand in for (see dms_core.probe)."""
        self.config = config
        self.model = model
        self.step: Step | None = None
        self.enabled = True
        self.neuron_factor = 0.0  # 1 - t / n_t during the neuron gate's warm-up
        self.evicting = True  # False in that warm-up: the gates are silent, the neuron fades out
        self.noise_keys: Tensor | None = None  # (B,) of noise.row_keys; None: noise from torch's global generator
        self.watches = Watch(NAN), Watch(IDLE)
        self.outer_mask: tuple | None = None  # the padding mask that the model around the decoder was called with
        self.tuples = False  # the call under way returns a tuple
        self.no_graph = ""  # why a decode step was once not captured as a CUDA graph
        self.layout, self.split = layout_of(model), split_of(model)
        first = self.layout.full[0]
        self.layers, self.heads, self.head_dim = len(self.layout.attention), first.heads, first.head_dim  # heads here
        self._check(type(model).__name__)
        decoder = decoder_of(model)
        self.parameters = _names(decoder)
        _own_configurations(model)
        self.text = model.config.get_text_config()
        self.hooks = [
            *(
                module.register_forward_pre_hook(partial(self._outer, _names(module)), with_kwargs=True)
                for module in model.modules()
                if module is not decoder and any(inner is decoder for inner in module.modules())
            ),
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
        ]
        for module in self.layout.modules:
            module.__dict__["dms"] = self
        for index, attention in zip(self.layout.gated, self.layout.full, strict=True):
            self._attach_layer(index, attention)

    def _check(self, name: str) -> None:
        """Raises ValueError for gates that this model cannot have."""
        config, width = self.config, self.head_dim
        if self.split.parts > 1 and (config.gate, config.granularity) == ("neuron", "layer"):
            raise ValueError("granularity 'layer' with gate 'neuron': the first head is on one process; use 'adapter'")
        if not -width <= config.neuron < width:
            raise ValueError(f"neuron {config.neuron}: must lie in -{width}..{width - 1}")
        if config.gate == "neuron" and not all(hasattr(a.module, "q_proj") for a in self.layout.full):
            raise ValueError(f"gate 'neuron' on {name}: needs a q_proj of its own; 'adapter' works")

    # Gates.

    def _attach_layer(self, index: int, attention: Attention) -> None:
        module = attention.module
        if self.config.gate == "adapter":
            eps = getattr(self.text, "rms_norm_eps", None) or 1e-6
            gate = AdapterGate(self.text.hidden_size, attention.heads * self.split.parts, eps)
            module.dms_gate = gate.to(place_of(module))
            hook = partial(self._read_residual, index)
            self.hooks.append(attention.layer.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            source = getattr(module, "q_norm", None) or module.q_proj
            self.hooks.append(source.register_forward_hook(partial(self._take_neuron, index)))

    def _read_residual(self, index: int, module, args, kwargs) -> None:
        hidden, gate = args[0] if args else kwargs["hidden_states"], self.layout.attention[index].module.dms_gate
        hidden = hidden.to(gate.norm.weight.device)  # the first layer on another device, under a device_map
        self._put(index, lambda: self.split.take(gate.logits(hidden, self.config)))

    def _take_neuron(self, index: int, module, args, output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        seen = self.layout.attention[index]
        q = output.unflatten(-1, (-1, seen.head_dim)) if output.ndim == 3 else output  # (B, T, Hq, D)
        heads_first = module is not seen.module.q_proj and seen.heads_first  # (B, Hq, T, D)
        if heads_first:
            q = q.transpose(1, 2)
        x, q = read_neuron(q, seen.heads, self.config.neuron, self.neuron_factor)
        self._put(index, lambda: gate_logits(x, self.config))
        return q.transpose(1, 2) if heads_first else q.view_as(output)

    def _put(self, index: int, logits: Callable[[], Tensor]) -> None:
        if self.enabled:
            z = logits()
            self.step.logits[index] = z if self.evicting else torch.full_like(z, KEEP)

    def silence_neuron(self, query: Tensor, heads: int) -> Tensor:
        """The gate's neuron again, after RoPE has mixed its partner into it: (B, Hq, T, D)."""
        _, q = read_neuron(query.transpose(1, 2), heads, self.config.neuron, self.neuron_factor)
        return q.transpose(1, 2)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters of the adapter gates; none for the neuron gate."""
        return (
            [p for a in self.layout.full for p in a.module.dms_gate.parameters()]
            if self.config.gate == "adapter"
            else []
        )

    def gate_rows(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What of the model's own weights serves the gates: parameters and their rows; none for the adapter gate.

        A norm between projection and gate is none of it: all heads share it.
        """
        full, neuron = self.layout.full if self.config.gate == "neuron" else (), self.config.neuron
        return [pair for a in full for pair in neuron_rows(a.module.q_proj, a.heads, neuron % a.head_dim)]

    @torch.no_grad()
    def zero_neurons(self) -> None:
        """Set the neurons of ``gate_rows`` to 0 for all inputs: z = -b0, where adapters begin."""
        for parameter, rows in self.gate_rows():
            parameter[rows] = 0

    # A forward pass.

    def _outer(self, names: tuple[str, ...], module, args, kwargs) -> None:
        """Before a model around the decoder runs."""
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if not isinstance(mask := kwargs.get("attention_mask"), dict):
            self.outer_mask = (mask,)
        if kwargs.get("return_dict") is False:
            self.tuples = True

    def _begin(self, module, args, kwargs):
        """Before the decoder runs: which cache, which tokens are valid, which documents."""
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        tokens = inputs.shape[1]
        original = not self.enabled and self._is_original(kwargs)
        self._choose(self.attention_before if original else self.implementation)
        if original:
            self.step = None
            return None
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions True: must be False; attention with gates is never a matrix")
        mask, padded = padding_mask(kwargs.get("attention_mask"), self.outer_mask, inputs)
        if isinstance(kwargs.get("attention_mask"), dict):
            kwargs["attention_mask"] = mask if padded else None
        cache_unspecified = kwargs.get("use_cache") is None
        valid, cache = mask[:, -tokens:], self._cache(kwargs)
        segments = None if cache is not None else documents(valid, kwargs.get("position_ids"), padded)
        if segments is not None and self.layout.mixes and several(segments):
            raise ValueError("documents packed in a row: must be one a row, layers with a state would mix them")
        full = cache is not None and tokens > 1 and bool(valid.all())
        if cache is not None and self.layout.mixes:
            self._check_states(cache, valid, full)
        if cache is not None and tokens > 1 and cache.get_seq_length() == 0:  # what was noted was another caller's
            for watch in self.watches:
                watch.forget()
        if cache is not None and tokens == 1 and cache.make_room():
            self.check_logits()
        self.step = Step(
            cache,
            valid,
            segments,
            self.model.training and self.enabled,
            full,
            cache_unspecified and cache is None and not self.tuples,
        )
        return (), kwargs

    def _check_states(self, cache: RowCache, valid: Tensor, full: bool) -> None:
        """Padding goes into the states of layers that have some, but in a first prefill, which transformers masks."""
        if valid.shape[1] == 1:
            self.watches[1].note(cache.resumed_after_idle(valid))
        elif not full and cache.get_seq_length():
            raise ValueError("padding after a past: must be none, layers with states would take it in as tokens")

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
        past = given_cache(past, self.new_cache)
        if past is None and kwargs.get("use_cache"):  # not by default: a plain forward is for training and evaluation
            past = self.new_cache()
        if past is None:
            kwargs["use_cache"] = False
        else:
            kwargs["past_key_values"] = past
        return past

    def _end(self, module, args, output) -> None:
        """After the decoder ran: note NaN logits, and look at the notes where that delays nobody."""
        step, self.outer_mask, self.tuples = self.step, None, False
        if not self.enabled:
            self._choose(self.attention_before)
        if step is None:
            return
        cache, step.cache = step.cache, None  # it is the caller's, who may want its memory back
        if step.soft:
            return
        if step.cache_unspecified and isinstance(output, dict):
            output.past_key_values = Uncached()  # type: ignore[attr-defined]  # of a ModelOutput
        if not step.logits:
            return
        logits = list(step.logits.values())
        self.watches[0].note(torch.cat([z.to(logits[0].device) for z in logits], 1).isnan().any())
        if cache is None or logits[0].shape[2] > 1 or logits[0].device.type == "cpu":
            self.check_logits()

    def check_logits(self) -> None:
        """Raises ValueError for NaN logits, or rows wrongly used, in the steps since the last check.  Waits.

        Called by itself after each prefill and each full forward, and after decode steps on a CPU; elsewhere whenever
        the cache makes room for some.
        """
        for watch in self.watches:
            watch.look()

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

    # Caches.

    def new_cache(self, page: int | None = None, slack: int = 0, kv_cache_dtype: str = "auto") -> RowCache:
        """An empty cache for this model, ``page`` tokens a page: by default 64 on CUDA, else 16 (see DMSCache).

        Raises ValueError for ``slack`` where a layer cannot take back tokens.
        """
        fixed = sorted({i for i, n in enumerate(self.layout.chunks) if n} | set(self.layout.states)) if slack else []
        if fixed:
            raise ValueError(
                f"slack {slack}: must be 0, layers {fixed} have chunks or states, which cannot be taken back"
            )
        page = page or (64 if self.model.device.type == "cuda" else 16)
        others = other_layers(self.layout, self.config, page, slack, kv_cache_dtype)
        return DMSCache(self.config, self.layers, page, slack, others, kv_cache_dtype)

    def __deepcopy__(self, memo):
        other = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():  # a step has tensors inside a graph, a split a process group
            kept = {"step": None, "split": self.split}
            setattr(other, name, kept[name] if name in kept else copy.deepcopy(value, memo))
        return other


def _names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of its forward."""
    return tuple(inspect.signature(module.forward).parameters)


def _own_configurations(model: PreTrainedModel) -> None:
    """Give the model copies of its configurations, which name its attention and may be shared with other models."""
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
