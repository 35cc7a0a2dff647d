"""Compacted attention for DMS: tensor in, tensor out; knows nothing of models.

The facade picks an implementation by device.  ``naive`` is the specification and the test oracle.
"""

from torch import Tensor

from dms_kernels import naive, torch_cpu

__all__ = ["decode_attention", "naive", "prefill_attention", "torch_cpu", "train_attention"]


def _check_heads(q: Tensor, heads: int) -> None:
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads over {heads} KV heads: the first must be a multiple of the second")


def train_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    window: int,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention with delayed eviction, differentiable in q, k, v and log_keep (paper, sections 3.1-3.2).

    q (B, Hq, T, D); k, v (B, H, T, D); log_keep (B, H, T), the bias of a key more than ``window`` tokens behind
    the query, in nats, <= 0; segment_ids (B, T) integers, or None for one document a row; scale defaults to
    D ** -0.5.  Returns (B, Hq, T, D).  Raises ValueError for a negative window or mismatched heads.
    """
    _check_heads(q, k.shape[1])
    if window < 0:
        raise ValueError(f"window {window}: must be >= 0")
    if log_keep.shape != k.shape[:3]:
        raise ValueError(f"log_keep of shape {tuple(log_keep.shape)}: must be {tuple(k.shape[:3])}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch_cpu.train_attention(q, k, v, log_keep, window, segment_ids, scale)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    k_expiry: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attention of new tokens over past and new keys, hard decisions (shapes in naive.prefill_attention)."""
    _check_heads(q, k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch_cpu.prefill_attention(q, k, v, q_position, k_position, k_expiry, scale)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of one token a row over ragged, paged (batch, KV head) rows (shapes in naive.decode_attention)."""
    _check_heads(q, table.shape[0] // q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch_cpu.decode_attention(q, keys, values, table, lengths, scale)
