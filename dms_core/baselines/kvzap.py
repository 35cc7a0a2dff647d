"""KVzap's way (Jegou and Jeblick 2026, arXiv 2601.07891): regress a token's future attention on its hidden state.

A linear map per layer and KV head, of the RMS-normed residual stream, predicts the log of the most attention that the
token will get from any query of the head's group.  A token whose prediction lies below one threshold, the same in all
layers and heads, is evicted once it has left the window.  Here the map is a gate with a bias, z = threshold -
prediction, so that a DMSCache stores and counts as for DMS: the adapter gate with another teacher, in closed form;
unlike it, a token decides about itself (lag 0).

Where this differs from KVzap: the future is that of ordinary documents, beyond the window, and not of a prompt that
the model is asked to repeat; attention is not weighted by the values' share of the residual stream, as in KVzip+; the
map is ridge regression on a handful of documents; and the threshold is the one that meets a ratio on these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dms_core.baselines.base import BLOCK, Baseline, BaselineLayer, attention
from dms_core.config import DMSConfig, target_fraction
from dms_core.gate import AdapterGate, gate_logits
from dms_core.model import attach, detach
from dms_core.probe import place_of

LEAST = 1e-9  # attention that counts as none


@dataclass(frozen=True)
class ScoreConfig(DMSConfig):
    """``offset`` is minus the threshold.  Not a setting of checkpoints: fit again where it is needed."""

    scale: float = 1.0
    offset: float = 0.0

    @property
    def lag(self) -> int:
        return 0

    def to_dict(self) -> dict:
        return {"method": "kvzap", **super().to_dict()}


class ScoreGate(AdapterGate):
    """x = minus the predicted log attention."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__(width, heads, eps)
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.bias[:, None]

    def logits(self, hidden: Tensor, config: DMSConfig) -> Tensor:
        return gate_logits(self(hidden), config)


class FutureLayer(BaselineLayer):
    """Dense.  ``future`` (B, H, T), after a first prefill: the most attention a token gets from beyond the window."""

    method: "Future"
    keeps_all = True

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
        column, grouped = torch.arange(k.shape[2], device=k.device), q.unflatten(1, (self.heads, -1))
        self.future = torch.zeros(k.shape[:3], device=k.device)
        for start in range(0, k.shape[2], BLOCK):
            rows = column[start : start + BLOCK, None]
            part = grouped[:, :, :, start : start + BLOCK]
            weights = attention(part, k, v, column <= rows, rest[-1], self.sinks)[1]
            beyond = weights.masked_fill(rows - column <= self.method.window, 0).amax((2, 3))
            self.future = torch.maximum(self.future, beyond)
        return super()._dense(q, k, v, *rest)


@dataclass(frozen=True)
class Future(Baseline):
    window: int = 0

    name = "future"
    layer = FutureLayer


@torch.no_grad()
def observe(model, ids: Sequence[int], window: int) -> list[tuple[Tensor, Tensor]]:
    """One document in the dense model: of each layer with a gate the features (T, d) and ``future`` (T, H)."""
    hidden: dict[int, Tensor] = {}

    def note(index: int, module, args, kwargs) -> None:
        hidden[index] = args[0] if args else kwargs["hidden_states"]

    layout, cache = model.dms.layout, Future(1.0, window=window)(model, 0)
    layers = [(index, layout.attention[index].layer) for index in layout.gated]
    hooks = [layer.register_forward_pre_hook(partial(note, index), with_kwargs=True) for index, layer in layers]
    try:
        with model.dms.disabled():
            model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    eps = layout.full[0].module.dms_gate.norm.eps
    return [
        (F.rms_norm(hidden[i][0].float(), hidden[i].shape[-1:], eps=eps), cache.layers[i].future[0].T)
        for i, _ in layers
    ]


def ridge_fit(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """w (H, d) and b (H,) of least sum |y - x w - b|^2 + ridge n |w|^2: x (n, d), y (n, H)."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    square = centred.T @ centred + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(square, centred.T @ (y - y.mean(0))).T
    return w, y.mean(0) - w @ x.mean(0)


def attach_scores(model, documents: Sequence[Sequence[int]], window: int, cr: float, ridge: float = 1e-2):
    """Put gates on a dense ``model`` in place and return it, fitted on the token ids of ``documents``.

    Of these documents' tokens, over all layers and heads, the share 1 - 1 / ``cr`` is marked.  Raises ValueError for a
    model that has gates or is spread over processes, and for documents with no token that a later one sees beyond
    the window.
    """
    fraction = target_fraction(cr)
    attach(model, ScoreConfig(window=window))
    try:
        if model.dms.split.parts > 1:
            raise ValueError("a model spread over processes: fit on one")
        if not any(len(ids) > window + 1 for ids in documents):
            raise ValueError(f"documents of at most {window + 1} tokens: one must be longer than window + 1")
        seen = [observe(model, ids, window) for ids in documents]
    except ValueError:
        detach(model)
        raise
    scores = []
    for number, at in enumerate(model.dms.layout.full):
        features = torch.cat([layers[number][0] for layers in seen])
        pairs = [tuple(x[: max(len(x) - window - 1, 0)] for x in layers[number]) for layers in seen]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        w, b = ridge_fit(x, y.clamp_min(LEAST).log(), ridge)
        gate = ScoreGate(x.shape[1], at.heads, at.module.dms_gate.norm.eps)
        gate.proj.weight.data, gate.bias.data = -w.float(), -b.float()
        at.module.dms_gate = gate.to(place_of(at.module))
        with torch.no_grad():
            scores.append(-(gate.proj(features) + gate.bias).flatten().cpu())
    ranked = torch.cat(scores).sort().values
    threshold = ranked[int(fraction * len(ranked))].item()
    model.dms.config = replace(model.dms.config, offset=-threshold)
    return model
