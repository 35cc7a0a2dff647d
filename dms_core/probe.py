"""What the attention layers of a decoder are, seen by running it: one forward pass over a few tokens.

Models differ in what their configurations say and agree in what they do: every attention calls transformers' interface
once, with its queries, keys, scale, sinks and the mask that it asked for.  A call that DMS cannot stand in for is a
ValueError that names the model and the reason, before any gate is made.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.masking_utils import AttentionMaskInterface

NAME = "dms_probe"
TOKENS = 7  # unlike any number of heads
# Arguments of the interface that DMS respects or that change nothing in causal attention over the given keys.
KNOWN = {"scaling", "dropout", "sliding_window", "is_causal", "s_aux", "sinks", "position_ids", "output_attentions"}
KNOWN |= {"use_cache", "past_key_values", "cache_position", "position_embeddings", "output_router_logits"}
DummyLayer = getattr(cache_utils, "DummyLayer", type(None))  # since transformers 5.23
WITH_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)
WITHOUT = (LinearAttentionLayer, DummyLayer)
STATES = (LinearAttentionCacheLayerMixin, DummyLayer)


@dataclass(frozen=True)
class Attention:
    """One layer's attention.  Heads are those on this process."""

    module: Any  # an nn.Module, which calls the interface
    layer: nn.Module  # the decoder layer around it
    heads: int  # KV heads
    group: int  # query heads of a KV head
    head_dim: int
    sliding: int | None  # tokens of its sliding window, itself included; None: all before it
    chunk: int | None  # tokens of its chunks, outside of which it sees nothing; None: no chunks
    heads_first: bool = False  # its q_norm gives (B, Hq, T, D), not (B, T, Hq, D)


@dataclass(frozen=True)
class Layout:
    """What the layers of a decoder are, by number."""

    attention: list[Attention | None]  # None: a layer that has none (linear attention, convolution, Mamba)
    states: dict[int, Any]  # transformers' cache layers of those with a state, empty, to be copied
    mixes: bool  # whether a state goes from token to token, so that documents packed in a row would mix

    @property
    def sliding(self) -> list[int | None]:
        """Tokens of the sliding windows; None: none."""
        return [a.sliding if a else None for a in self.attention]

    @property
    def chunks(self) -> list[int | None]:
        """Tokens of the chunks; None: none."""
        return [a.chunk if a else None for a in self.attention]

    @property
    def gated(self) -> list[int]:
        """The layers with full attention, which get gates."""
        return [index for index, a in enumerate(self.attention) if a and not (a.sliding or a.chunk)]

    @property
    def full(self) -> list[Attention]:
        """The attention of the layers with gates."""
        return [a for a in self.attention if a and not (a.sliding or a.chunk)]

    @property
    def modules(self) -> list[nn.Module]:
        """All attention modules."""
        return [a.module for a in self.attention if a]


class _Mask:
    """Stands for a mask; a model that does anything with its mask but pass it on fails here."""

    def __init__(self, sliding: int | None = None, chunk: int | None = None) -> None:
        self.sliding, self.chunk = sliding, chunk

    def __getattr__(self, name: str):
        raise AttributeError(f"its mask is changed ({name}) on the way to the attention")

    def __radd__(self, other):
        raise TypeError("it adds the mask to its scores itself")


def _mask(mask_function, local_size: int | None = None, **kwargs) -> _Mask:
    """transformers' mask interface: which tokens a layer wants to see, found by asking about some."""

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(0, 0, torch.tensor(query), torch.tensor(key)))

    if sees(0, 1):
        raise ValueError("tokens see later ones: must be causal")
    if local_size is None:
        return _Mask()
    return _Mask(sliding=local_size) if sees(local_size, 1) else _Mask(chunk=local_size)


class _Cache(DynamicCache):
    """Notes which keys it is given, and hands them on."""

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self.given: dict[int, tuple] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.given[layer_idx] = key_states.shape, key_states.data_ptr()
        return key_states, value_states


AttentionMaskInterface.register(NAME, _mask)
_calls: list[tuple] = []  # of the attention interface, in the forward pass under way


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs) -> tuple[Tensor, None]:
    _calls.append((module, (key.shape, key.data_ptr()), query.shape, key.shape, value.shape, attention_mask, kwargs))
    return torch.zeros_like(query if query.shape[-1] == value.shape[-1] else value).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


def place_of(module: nn.Module) -> torch.device:
    """Where a module computes: of weights that accelerate keeps elsewhere, where it brings them."""
    for inner in module.modules():
        if (place := getattr(getattr(inner, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(place)
    return next(module.parameters()).device


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder inside a causal language model.  Raises ValueError where there is none."""
    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # what some models answer
        decoder = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if decoder is None:
        raise ValueError(f"{type(model).__name__}: no decoder; DMS is for causal language models")
    return decoder


def layout_of(model: PreTrainedModel) -> Layout:
    """What the layers are.  Raises ValueError for attention that DMS cannot stand in for, or where none is full."""
    attention = _probe(model)
    layout = Layout(attention, _state_layers(model, attention), has_states(model))
    if not layout.gated:
        name, local = type(model).__name__, sorted({n for n in (*layout.sliding, *layout.chunks) if n})
        raise ValueError(f"{name}: sliding-window attention of {local} tokens in all layers: DMS needs full attention")
    return layout


def _probe(model: PreTrainedModel) -> list[Attention | None]:
    """Per decoder layer its attention, as a forward pass over a few tokens shows it."""
    name, decoder = type(model).__name__, decoder_of(model)
    if vars(model.config.get_text_config()).get("kv_lora_rank"):
        raise ValueError(f"{name}: multi-head latent attention has no keys and values per head; not supported")
    try:
        calls, cached, inputs = _run(decoder, model)
    except Exception as error:  # whatever this model's code raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: its attention cannot be intercepted: {reason}") from error
    if not calls:
        raise ValueError(f"{name} does not use transformers' attention interface: cannot intercept it")
    layers = _layers(name, decoder, [call[0] for call in calls])
    found: list[Attention | None] = [None] * len(layers)
    for module, key, *call in calls:
        index = next(i for i, layer in enumerate(layers) if any(module is m for m in layer.modules()))
        if getattr(module, "layer_idx", None) != index:
            number = getattr(module, "layer_idx", None)
            raise ValueError(f"{name}: layer {index} calls itself {number}: must be its place in the decoder")
        if found[index] is not None:
            raise ValueError(f"{name}: layer {index} attends more than once: must be one softmax attention a layer")
        if cached.get(index) != key:
            raise ValueError(
                f"{name}: layer {index} attends to other keys than it puts into its cache: must be the same"
            )
        if len(shape := inputs.get(id(layers[index]), ())) != 3:
            raise ValueError(f"{name}: layer {index} reads {list(shape)}: must be (batch, tokens, width), for its gate")
        seen = _described(f"{name}: layer {index}", module, layers[index], *call)
        norm = inputs.get(id(getattr(module, "q_norm", None)), ())
        heads_first = len(norm) == 4 and norm[1:3] == (seen.heads * seen.group, TOKENS)
        found[index] = replace(seen, heads_first=heads_first)
    return found


def _run(decoder: nn.Module, model: PreTrainedModel) -> tuple[list[tuple], dict[int, tuple], dict[int, tuple]]:
    """A forward pass over a few tokens.

    Returns the calls of the attention interface, the keys that the cache got, by layer, and by id the shapes that
    members of module lists read, and that norms of queries give.
    """
    training, text = [module for module in decoder.modules() if module.training], model.config.get_text_config()
    before, text._attn_implementation = text._attn_implementation, NAME
    inputs: dict[int, tuple] = {}

    def note(module, args, kwargs) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        inputs[id(module)] = tuple(getattr(hidden, "shape", ()))

    def note_norm(module, args, output) -> None:
        inputs[id(module)] = tuple(output.shape)

    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    hooks = [member.register_forward_pre_hook(note, with_kwargs=True) for members in lists for member in members]
    norms = [module for name, module in decoder.named_modules() if name.endswith("q_norm")]
    hooks += [module.register_forward_hook(note_norm) for module in norms]
    _calls.clear()
    decoder.eval()
    try:
        cache, ids = _Cache(model.config), torch.ones(1, TOKENS, dtype=torch.long, device=place_of(decoder))
        with torch.no_grad():
            decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return list(_calls), cache.given, inputs
    finally:
        _calls.clear()
        text._attn_implementation = before
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True


def _layers(name: str, decoder: nn.Module, attentions: list[nn.Module]) -> nn.ModuleList:
    """The list of decoder layers, the outermost one that holds all attentions."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList):
            inside = {id(m) for m in module.modules()}
            if all(id(attention) in inside for attention in attentions):
                return module
    raise ValueError(f"{name}: its attention does not lie in one list of layers: cannot intercept it")


def _described(name: str, module, layer, query, key, value, mask, arguments: dict) -> Attention:
    """One call of the interface, in words that DMS understands.  Raises ValueError for what it cannot stand in for."""
    (_, query_heads, tokens, head_dim), (_, heads, keys, _) = query, key
    if (tokens, keys) != (TOKENS, TOKENS) or arguments.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"{name}: attention to other tokens than those before: must be causal self-attention")
    if key != value or key[-1] != head_dim:
        raise ValueError(f"{name}: queries, keys, values of {head_dim}, {key[-1]}, {value[-1]} numbers: must be equal")
    if query_heads % heads:
        raise ValueError(f"{name}: {query_heads} query heads over {heads} KV heads: must divide")
    if (cap := arguments.pop("softcap", None)) is not None:
        raise ValueError(f"{name}: attn_logit_softcapping {cap}: must be None, scores are not capped here")
    if unknown := sorted(key for key, x in arguments.items() if key not in KNOWN and x is not None):
        raise ValueError(f"{name}: attention with {', '.join(unknown)}: must be plain causal softmax attention")
    if not isinstance(mask, _Mask | None):
        raise ValueError(f"{name}: a bias of its own in the attention mask: must be plain causal softmax attention")
    mask = mask or _Mask()
    return Attention(module, layer, heads, query_heads // heads, head_dim, mask.sliding, mask.chunk)


def _state_layers(
    model: PreTrainedModel, attentions: list[Attention | None]
) -> dict[int, LinearAttentionCacheLayerMixin]:
    """transformers' cache layers for linear attention, convolution and Mamba, empty, by number; to be copied.

    A layer may have both a state and attention.  Raises ValueError for attention over keys of another layer, or cached
    in another way than per token and head.
    """
    name, layers = type(model).__name__, DynamicCache(config=model.config).layers
    if len(layers) != len(attentions):
        raise ValueError(f"{name}: a cache of {len(layers)} layers for {len(attentions)}: cannot tell which is which")
    for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        if type(layer) not in (WITH_ATTENTION if attention else WITHOUT):
            what = "keys and values of another layer" if isinstance(layer, DummyLayer) else type(layer).__name__
            raise ValueError(f"{name}: layer {index} with {what}: must be attention over its own keys, or a state")
    return {index: layer for index, layer in enumerate(layers) if isinstance(layer, STATES)}


def has_states(model: PreTrainedModel) -> bool:
    """Whether some layer carries a state from token to token; documents packed in a row would then mix."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)
