"""Compacted attention for DMS: tensor in, tensor out; knows nothing of models.

The facade checks its input once and picks an implementation by device.  ``naive`` is the specification and the test
oracle; ``cpu`` is stock torch; ``gpu`` is Triton.
"""

from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from dms_kernels import naive
from dms_kernels.attention import CompactAttention, common_dtype
from dms_kernels.cpu import dense as _dense
from dms_kernels.plan import training_plan
from dms_kernels.prefill import Kept, Past, prefill_and_pack
from dms_kernels.rows import Rows

__all__ = [
    "EXACT",
    "MODULES",
    "Kept",
    "Past",
    "Rows",
    "cache_append",
    "cache_step",
    "decode_attention",
    "gate_logits",
    "naive",
    "prefill_attention",
    "train_attention",
]

EXACT = -40.0  # nats: e^-40 vanishes in fp32 unless the key scores 23 nats above all others
SHORT, LONG = 512, 1024  # tokens: on a CPU the full matrix is faster up to the first, the list beyond the second
SPARSE = 0.25  # between them the list is faster where less than this share of the keys is kept

MODULES = {  # operation: module for tensors on a CPU, on CUDA, and elsewhere
    "forward": ("cpu.compact", "gpu.forward", None),
    "backward": ("cpu.compact", "gpu.backward", None),
    "decode": ("cpu.step", "gpu.decode", "naive"),
    "append": ("cpu.step", "gpu.append", "rows"),
    "step": ("cpu.step", "gpu.decode", "rows"),
    "gate": ("cpu.step", "gpu.gate", "naive"),
}
DEVICES = ("cpu", "cuda")


@lru_cache
def on(device: torch.device, operation: str) -> ModuleType:
    """The module that holds ``operation`` for tensors on ``device``.  Raises ValueError where there is none."""
    module = MODULES[operation][DEVICES.index(device.type) if device.type in DEVICES else len(DEVICES)]
    if module is None:
        raise ValueError(f"{operation} through the kept list on {device.type}: must be on cpu or cuda")
    return import_module(f"dms_kernels.{module}")


def by_list(device: torch.device, long: bool) -> bool:
    """Whether attention goes through the kept list: always on CUDA, where it is ``long`` on a CPU, else never."""
    return device.type == "cuda" or (device.type == "cpu" and long)


def _list_pays(log_keep: Tensor) -> bool:
    """Whether, in training on a CPU, the list is faster than the full matrix; log_keep (B, H, T)."""
    tokens = log_keep.shape[2]
    if tokens <= SHORT or tokens > LONG or log_keep.device.type != "cpu" or ops.tracing(log_keep):
        return tokens > SHORT
    return float((log_keep.detach() > EXACT).float().mean()) < SPARSE


def _check_heads(q: Tensor, heads: int) -> None:
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads over {heads} KV heads: the first must be a multiple of the second")


def _check_sinks(q: Tensor, sinks: Tensor | None) -> None:
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks of shape {tuple(sinks.shape)}: must be {tuple(q.shape[1:2])}, one a query head")


def _check_window(window: int) -> None:
    if window < 0:
        raise ValueError(f"window {window}: must be >= 0")


def train_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    window: int,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention with delayed eviction, differentiable in q, k, v and log_keep (paper, sections 3.1-3.2).

    q (B, Hq, T, D); k, v (B, H, T, D); log_keep (B, H, T), the bias of a key more than ``window`` tokens behind
    the query, in nats, <= 0; segment_ids (B, T) integers, a document is a run of equal ones (padding is one more),
    or None for one document a row; scale defaults to D ** -0.5.  Keys with a bias below EXACT count as evicted.
    Returns (B, Hq, T, D), and with ``return_lse`` the log-sum-exp of the scores, (B, Hq, T) in fp32, without gradient.
    sinks (Hq,): per query head a logit that only takes part in the normaliser, differentiable too; lse includes it.
    Raises ValueError for a negative window or mismatched heads.
    """
    _check_heads(q, k.shape[1])
    _check_sinks(q, sinks)
    _check_window(window)
    if log_keep.shape != k.shape[:3]:
        raise ValueError(f"log_keep of shape {tuple(log_keep.shape)}: must be {tuple(k.shape[:3])}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not (return_lse or by_list(q.device, _list_pays(log_keep))):
        return _dense.train_attention(q, k, v, log_keep, window, segment_ids, scale, sinks)
    q, k, v = common_dtype(q, k, v)
    plan = training_plan(log_keep.detach(), segment_ids, window, EXACT)
    if ops.tracing(q):
        tensors = (plan.band, plan.kept, plan.count, plan.first, plan.last)
        out, lse = ops.attend(q, k, v, log_keep, *tensors, plan.window, plan.offset, scale, sinks)
    else:
        out, lse = CompactAttention.apply(q, k, v, log_keep, plan, scale, sinks)
    return (out, lse) if return_lse else out


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    window: int,
    past: Past | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    slack: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Kept]:
    """Attention of new tokens with hard decisions, and what the cache keeps of them and of its past, packed.

    q (B, Hq, T, D); k, v (B, H, T, D); lengths (B,): how many of the T are tokens, the rest is padding behind them
    (default: all).  evict: the decision about each token, at the token it is about, False while there is none:
    (B, H, T), or (B, H, R + T) with a past, whose last R = window + 1 + slack tokens come first.  Padding gets finite
    garbage.  slack: so many tokens behind the window stay, too, whatever is decided; sinks: as in train_attention.
    """
    _check_heads(q, k.shape[1])
    _check_sinks(q, sinks)
    _check_window(window)
    about = k.shape[2] + (0 if past is None else window + 1 + slack)
    if evict.shape != (*k.shape[:2], about):
        raise ValueError(f"evict of shape {tuple(evict.shape)}: must be {(*k.shape[:2], about)}")
    lengths = torch.full(q.shape[:1], q.shape[2], device=q.device) if lengths is None else lengths
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return prefill_and_pack(q, k, v, evict, window, past, lengths, scale, slack, sinks)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """Attention of one token a row over ragged, paged (batch, KV head) rows (shapes in naive.decode_attention)."""
    _check_heads(q, table.shape[0] // q.shape[0])
    _check_sinks(q, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if ops.tracing(q):
        return ops.decode(q, keys, values, table, lengths, scale, sinks, largest)
    return on(q.device, "decode").decode_attention(q, keys, values, table, lengths, scale, sinks, largest)


def cache_append(rows: Rows, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int) -> None:
    """One token a row, in place, without waiting for the device (see rows.append)."""
    on(k.device, "append").append(rows, k, v, evict, active, lag)


def cache_step(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    active: Tensor,
    lag: int,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``cache_append``, then ``decode_attention`` of q (B, Hq, 1, D) over what the rows hold: (B, Hq, 1, D)."""
    _check_heads(q, len(rows.length) // q.shape[0])
    _check_sinks(q, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if ops.tracing(q):
        tensors = (getattr(rows, field.name) for field in fields(Rows))
        return ops.step(*tensors, q, k, v, evict, active, lag, scale, sinks)
    return on(q.device, "step").step(rows, q, k, v, evict, active, lag, scale, sinks)


def gate_logits(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, scale: float, offset: float) -> Tensor:
    """The adapter gate's logits scale * (weight . RMSNorm(hidden)) - offset, without gradients, in fp32.

    hidden (B, T, d); norm (d,) and weight (H, d) in fp32; (B, H, T).
    """
    if ops.tracing(hidden):
        return ops.gate(hidden, norm, weight, eps, scale, offset)
    return on(hidden.device, "gate").gate_logits(hidden, norm, weight, eps, scale, offset)


from dms_kernels import ops  # noqa: E402  (it calls `on`)
