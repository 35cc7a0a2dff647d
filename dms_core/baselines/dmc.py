"""Dynamic Memory Compression (DMC, Nawrot et al. 2024, arXiv 2403.09636): the predecessor, which merges.

Per KV head one neuron of the key decides and one of the query weighs (their section 3.1):

    alpha_t = 1[s * k_t[n] - b0 > 0]        omega_t = sigmoid(mean over the group of q_t[n] + b0)
    alpha_t = 1: k <- (z k + omega_t k_t) / (z + omega_t), the same for v, z <- z + omega_t, in the last entry
    alpha_t = 0: append (k_t, v_t), z = omega_t

In training alpha_t is a Gumbel-sigmoid sample that mixes the two: S_t = alpha_t S_(t-1) + omega_t [k_t, v_t, 1].
Query i sees its own S_i, partly accumulated, and earlier S_j with the bias log(1 - alpha_(j+1)): an entry that its
successor takes over is hidden.  So DMC is DMS with window 0 over running averages; the same attention serves both.

Keys are merged before RoPE and the average is rotated to the place of its last token, as in the authors' code
(NVIDIA/Megatron-LM, branch dmc).  That code cuts the average to its last 12 tokens, because it sums over a window;
here a scan takes all of them.  Logit, importance and offset are that code's: s = 1, b0 = 5, the last neuron.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from dms_core.attention import SINKS, no_mask
from dms_core.baselines.dmc_cache import DMCCache, running_average
from dms_core.checkpoint import load_base, model_shape, read_settings
from dms_core.gate import gate_logits, hard_decisions, neuron_rows, soft_decisions
from dms_core.handle import DMS
from dms_core.model import install
from dms_core.noise import sample_noise
from dms_core.probe import Attention, layout_of
from dms_core.visibility import align_decisions
from dms_kernels import train_attention

NAME = "dmc"


@dataclass(frozen=True)
class DMCConfig:
    """How a model decides what to merge.  The class attributes say what DMC is in the terms of DMSConfig."""

    scale: float = 1.0  # s in z = s * x - offset
    offset: float = 5.0  # b0: merging is off, and the importance near 1, at the start
    temperature: float = 0.1  # tau of the Gumbel-sigmoid
    neuron: int = -1  # which neuron of every key and query head

    gate = "neuron"
    granularity = "head"
    window = 0  # an entry is hidden as soon as its successor has taken it over
    lag = 1  # token j + 1 decides whether the entry that ends at j goes on

    def __post_init__(self) -> None:
        for name in ("scale", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be > 0")

    def to_dict(self) -> dict:
        return {"method": NAME, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "DMCConfig":
        known = {field.name for field in fields(cls)}
        if values.get("method") != NAME or (unknown := set(values) - known - {"method"}):
            wrong = sorted(unknown) if values.get("method") == NAME else f"of method {values.get('method', 'dms')!r}"
            raise ValueError(f"settings {wrong}: must be of method {NAME!r}, with {sorted(known)}")
        return cls(**{name: value for name, value in values.items() if name != "method"})


@dataclass
class Plan:
    """What one layer does with the tokens of one forward pass; padding passes the open entry on unchanged."""

    alpha: Tensor  # (B, H, T): the share of the entry before that is taken over; 1 for padding
    weight: Tensor  # (B, H, T): omega; 0 for padding
    log_keep: Tensor | None = None  # (B, H, T): log(1 - alpha) at the token it hides; None with a cache


class DMC(DMS):
    """The merging of one model, with the interface of the DMS handle (``model.dms``)."""

    def __init__(self, model: PreTrainedModel, config: DMCConfig) -> None:
        self.plans: dict[int, Plan] = {}
        self.weights: dict[int, Tensor] = {}  # layer -> omega (B, H, T) of the pass under way
        super().__init__(model, config)

    def new_cache(self, page: int | None = None, slack: int = 0, kv_cache_dtype: str = "auto") -> DMCCache:
        """An empty cache for this model; it has no pages.  Raises ValueError for slack, as merged tokens stay merged,
        and for 8 bits."""
        if slack:
            raise ValueError(f"slack {slack}: must be 0 with DMC, which merges tokens")
        if kv_cache_dtype != "auto":
            raise ValueError(f"kv_cache_dtype {kv_cache_dtype!r}: must be auto with DMC, which has no pages")
        return DMCCache(self.config, self.layers)

    def gate_rows(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The rows of the keys' deciding neurons, and of the queries' weighing ones."""
        found, neuron = [], self.config.neuron % self.head_dim
        for a in self.layout.full:
            found += neuron_rows(a.module.k_proj, a.heads, neuron)
            found += neuron_rows(a.module.q_proj, a.heads * a.group, neuron)
        return found

    def _begin(self, module, args, kwargs):
        self.plans, self.weights = {}, {}
        return super()._begin(module, args, kwargs)

    def _attach_layer(self, index: int, seen: Attention) -> None:
        attention = seen.module
        for kind, take in (("q", self._take_query), ("k", self._take_key), ("v", self._take_value)):

            def hook(module, args, output, take=take):
                if not self.enabled:
                    return output
                heads = output.unflatten(-1, (-1, self.head_dim)) if output.ndim == 3 else output  # (B, T, ., D)
                return take(index, heads).reshape(output.shape)

            source = getattr(attention, f"{kind}_norm", None) or getattr(attention, f"{kind}_proj")
            self.hooks.append(source.register_forward_hook(hook))

    def _take_query(self, index: int, q: Tensor) -> Tensor:
        x = q[..., self.config.neuron].unflatten(2, (self.heads, -1)).mean(-1).transpose(1, 2)  # (B, H, T)
        self.weights[index] = torch.sigmoid(x.float() + self.config.offset) + torch.finfo(torch.bfloat16).eps
        return self.silence(q)

    def _take_key(self, index: int, k: Tensor) -> Tensor:
        z = gate_logits(k[..., self.config.neuron].transpose(1, 2), self.config)
        if self.neuron_factor > 0:  # a warm-up comes before any merging
            z = torch.full_like(z, float("-inf"))
        self.step.logits[index] = z
        if self.step.cache is not None and not self.step.cache.layers[index].is_initialized:  # update() comes later
            self.step.cache.layers[index].lazy_initialization(k.transpose(1, 2))
        self.plans[index] = self._plan(index, z, self.weights[index])
        return self._merge(index, 0, self.silence(k))

    def _take_value(self, index: int, v: Tensor) -> Tensor:
        return self._merge(index, 1, v)

    def _plan(self, index: int, z: Tensor, weight: Tensor) -> Plan:
        step = self.step
        padding = ~step.valid[:, None]
        weight = weight.masked_fill(padding, 0.0)
        if step.cache is not None:
            layer = step.cache.layers[index]
            opens = (step.valid.cumsum(1) + layer.seen[:, None] == 1)[:, None]
            alpha = hard_decisions(z).float().masked_fill(opens, 0.0)
            return Plan(alpha.masked_fill(padding, 1.0), weight)
        if step.soft:
            log_keep, merged = soft_decisions(z, sample_noise(z), self.config.temperature)
            alpha, fill = -torch.expm1(log_keep), 0.0
        else:
            merged, fill = hard_decisions(z), False
            log_keep, alpha = torch.zeros_like(z).masked_fill(merged, float("-inf")), merged.float()
        step.evicted[index] = align_decisions(merged, 1, step.segment_ids, fill)
        log_keep = align_decisions(log_keep, 1, step.segment_ids, 0.0)
        alpha = alpha.masked_fill(_starts(step.valid, step.segment_ids)[:, None], 0.0).masked_fill(padding, 1.0)
        return Plan(alpha, weight, log_keep)

    def _merge(self, index: int, kind: int, x: Tensor) -> Tensor:
        """Every token's entry as it stands after that token: (B, T, H, D) to the same; kind 0: keys, 1: values."""
        plan, cache = self.plans[index], self.step.cache
        carry = None if cache is None else cache.layers[index].open[:, :, kind]
        average, last = running_average(x.transpose(1, 2), plan.alpha, plan.weight, carry)
        if carry is not None:
            carry.copy_(last)
        return average.transpose(1, 2)

    def silence(self, x: Tensor) -> Tensor:
        """The neuron takes no part in attention, or only ``neuron_factor`` of it during a warm-up."""
        keep = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        keep[self.config.neuron] = self.neuron_factor
        return x * keep


def _starts(valid: Tensor, segment_ids: Tensor | None) -> Tensor:
    """First tokens of documents, (B, T): they have no entry before them."""
    starts = torch.zeros_like(valid)
    starts[:, 0] = True
    if segment_ids is not None:
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def dmc_attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, T, D), merged key and value (B, H, T, D) -> (B, T, Hq, D)."""
    dmc = module.__dict__.get("dms")
    if not isinstance(dmc, DMC) or dmc.step is None:
        raise ValueError("attention implementation 'dmc' needs attach_dmc(model, config) first")
    step, plan = dmc.step, dmc.plans.get(module.layer_idx)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
    if plan is not None:  # RoPE has mixed the neuron's partner into it
        query, key = dmc.silence(query), dmc.silence(key)
    if step.cache is not None:
        merged = torch.zeros_like(key[..., 0], dtype=torch.bool) if plan is None else plan.alpha > 0
        out = step.cache.layers[module.layer_idx].attend(query, key, value, merged, step.valid, scale, sinks)
    else:
        log_keep = key.new_zeros(key.shape[:3]) if plan is None else plan.log_keep
        out = train_attention(query, key, value, log_keep, dmc.config.window, step.segment_ids, scale, sinks=sinks)
    return out.transpose(1, 2), None


def attach_dmc(model: PreTrainedModel, config: DMCConfig) -> PreTrainedModel:
    """Make ``model`` a DMC model in place and return it; ``model.dms`` is the handle, ``dms_core.detach`` undoes it.

    The neurons have the values of the base model: at a large ``scale`` they merge at random, so a retrofit begins with
    ``model.dms.zero_neurons()`` (``RetrofitConfig.neuron_zero``).  ``detach`` does not bring those values back.
    Raises ValueError if the model has gates already, sliding-window layers, or no q_proj, k_proj and v_proj.
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError("the model already has gates: call dms_core.detach(model) first")
    name, layout = type(model).__name__, layout_of(model)
    if other := sorted(set(range(len(layout.attention))) - set(layout.gated) | set(layout.states)):
        raise ValueError(
            f"{name}: layers {other} have a sliding window or no attention: DMC needs full attention in all"
        )
    if not all(hasattr(a.module, f"{kind}_proj") for a in layout.full for kind in "qkv"):
        raise ValueError(f"{name}: DMC needs attention layers with q_proj, k_proj and v_proj")
    install(model, DMC(model, config), NAME)
    return model


def load_dmc(directory: Path | str, **from_pretrained) -> PreTrainedModel:
    """A retrofitted DMC model in eval mode, from what ``dms_core.checkpoint.save_model`` wrote."""
    settings = read_settings(directory)
    config = DMCConfig.from_dict(settings["dms"])
    model = load_base(directory, **from_pretrained)
    if (shape := model_shape(model)) != settings["model"]:
        raise ValueError(f"{directory} holds settings for {settings['model']}: this model is {shape}")
    return attach_dmc(model, config).eval()


AttentionInterface.register(NAME, dmc_attention)
AttentionMaskInterface.register(NAME, no_mask)
