"""Backward pass of banded + kept-list attention: probabilities come again from the normaliser; nothing is atomic.

With P the probabilities, G the gradient of the output and delta = rowsum(out * G), the gradient of the logits is
dS = P * (G V^T - delta).  ``_query_kernel`` gathers dQ = scale * dS K over the keys that forward reads, and leaves
delta and the normaliser in base 2 to ``keys``.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels.gpu.common import (
    DTYPES,
    LOG2E,
    band_range,
    block_keys,
    blocks,
    config,
    described,
    hidden_zero,
    list_range,
    listed,
    load_lanes,
    load_rows,
    products,
    query_tile,
    rows_at,
    same_device,
    section,
    shipped,
    store_rows,
    strides_of,
    target_of,
    with_whole_rows,
)
from dms_kernels.gpu.keys import add_list_gradient, key_cases, key_gradient
from dms_kernels.gpu.tune import best
from dms_kernels.plan import Plan

QUERY_STRIDES = strides_of("q", "k", "v", "o", "g", "dq")
QUERY_SIZES = ["offset", "tokens", "capacity", "heads", "group", "section"]


@triton.jit
def _read(
    dq, q, grad, q_rows, grad_rows, q_live, lse, delta, K, V, BIAS, stride_kt, stride_vt, factor,
    low, high, origin, limit, whole, rest, number,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS K over the blocks of one range, either all that need a mask or all that do not."""
    if MASKED:
        first, stop = 0, number - (rest - whole)
    else:
        first, stop = whole, rest
    for step in range(first, stop):
        begin, entry, live = block_keys(step, origin, limit, whole, rest, BLOCK_N, MASKED)
        k_rows, v_rows = rows_at(K, entry, stride_kt), rows_at(V, entry, stride_vt)
        k = load_rows(k_rows, live, HEAD_DIM, BLOCK_D, MASKED)
        v = load_rows(v_rows, live, HEAD_DIM, BLOCK_D, MASKED)
        logits = products(q, k, q_rows, k_rows, q_live, live, HEAD_DIM, BLOCK_D) * factor  # (BLOCK_M, BLOCK_N), base 2
        if BIAS is not None:
            logits += load_lanes(BIAS, begin, live, BLOCK_N, MASKED)[None, :]
        if MASKED:
            seen = (low[:, None] <= entry[None, :]) & (entry[None, :] < high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(logits - lse[:, None])
        d_weights = products(grad, v, grad_rows, v_rows, q_live, live, HEAD_DIM, BLOCK_D)
        d_logits = weights * (d_weights - delta[:, None])
        dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=QUERY_SIZES)
def _query_kernel(
    Q, K, V, LISTED_K, LISTED_V, BIAS, OUT, GRAD, LSE, LSE2, DELTA, DQ, BAND, FIRST, LAST, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    offset, tokens, capacity, heads, group, section,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * B * H,); see ``query_tile``."""
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, section, 0, BLOCK_M)
    place = batch * heads + head
    q_rows = Q + batch * stride_qb + h * stride_qh + t * stride_qt
    grad_rows = GRAD + batch * stride_gb + h * stride_gh + t * stride_gt
    out_rows = OUT + batch * stride_ob + h * stride_oh + t * stride_ot
    q = load_rows(q_rows, live, HEAD_DIM, BLOCK_D, True)
    grad = load_rows(grad_rows, live, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_rows, live, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    row = (batch * heads * group + h) * tokens + t  # of (B, Hq, T)
    lse = tl.load(LSE + row) * LOG2E
    tl.store(LSE2 + row, lse, mask=live)
    tl.store(DELTA + row, delta, mask=live)
    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    LISTED_K += place * capacity * HEAD_DIM
    LISTED_V += place * capacity * HEAD_DIM
    if BIAS is not None:
        BIAS += place * capacity
    factor = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, high, origin, limit, whole, rest, number = list_range(
        FIRST + place * tokens, LAST + place * tokens, t, start, end, BLOCK_N
    )
    for inner in tl.static_range(2):
        dq = _read(
            dq, q, grad, q_rows, grad_rows, live, lse, delta, LISTED_K, LISTED_V, BIAS, HEAD_DIM, HEAD_DIM, factor,
            low, high, origin, limit, whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, inner == 0,
        )  # fmt: skip
    low, high, origin, limit, whole, rest, number = band_range(BAND + batch * tokens, t, start, end, offset, BLOCK_N)
    for inner in tl.static_range(2):
        dq = _read(
            dq, q, grad, q_rows, grad_rows, live, lse, delta, K, V, None, stride_kt, stride_vt, factor,
            low, high, origin, limit, whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, inner == 0,
        )  # fmt: skip
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, section, hidden_zero(origin), BLOCK_M)
    store_rows(DQ + batch * stride_dqb + h * stride_dqh + t * stride_dqt, live, dq * scale, HEAD_DIM, BLOCK_D)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, log_keep: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and log_keep (None without one) from ``grad``, that of out; the rest as in ``forward``."""
    grad, q, k, v, out = map(with_whole_rows, (grad, q, k, v, out))
    with same_device(grad, q, k, v, out, lse, plan.band, plan.kept, log_keep):
        kept_k, kept_v, bias = listed(plan, k, v, log_keep)
        stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=lse.device)  # lse in base 2, delta
        dq = _query_gradient(grad, q, k, v, kept_k, kept_v, bias, out, lse, stats, plan, scale)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        d_keep = None if log_keep is None else torch.zeros(k.shape[:3], dtype=log_keep.dtype, device=k.device)
        key_gradient(grad, q, k, v, None, stats, plan, scale, dk, dv)
        if plan.kept.shape[2]:
            add_list_gradient(grad, q, kept_k, kept_v, bias, stats, plan, scale, dk, dv, d_keep)
    return dq, dk, dv, d_keep


def _query_gradient(grad, q, k, v, kept_k, kept_v, bias, out, lse, stats, plan, scale) -> Tensor:
    """dq; fills stats."""
    batch, query_heads, tokens, head_dim = q.shape
    heads, group = k.shape[1], query_heads // k.shape[1]
    dq, places, kept = torch.empty_like(q), batch * heads, plan.kept.shape[2]
    strides = [step for x in (q, k, v, out, grad, dq) for step in x.stride()[:3]]

    def run(launch):
        _query_kernel[(triton.cdiv(tokens * group, launch.rows) * places,)](
            q, k, v, kept_k, kept_v, bias, out, grad, lse, *stats, dq, plan.band, plan.first, plan.last, scale,
            *strides, plan.offset, tokens, kept, heads, group,
            section(places, 2 * kept * head_dim * q.element_size()), **blocks(head_dim, launch),
        )  # fmt: skip

    run(best("dq", q, kept, config("dq", head_dim, q.dtype, target_of(q.device)), run))
    return dq


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options, attributes) of every shipped configuration on sm_``target``."""
    for (dtype, head_dim, launch), bias in product(shipped("dq", target), ("*fp32", None)):
        pointers = dict.fromkeys(("Q", "K", "V", "LISTED_K", "LISTED_V", "OUT", "GRAD", "DQ"), f"*{DTYPES[dtype]}")
        pointers |= dict.fromkeys(("LSE", "LSE2", "DELTA"), "*fp32") | {"BIAS": bias}
        pointers |= dict.fromkeys(("BAND", "FIRST", "LAST"), "*i32")
        case = described(_query_kernel, pointers, [*QUERY_STRIDES, *QUERY_SIZES], QUERY_STRIDES, launch)
        yield f"dq{'_bias' if bias else ''}_{DTYPES[dtype]}_d{head_dim}", _query_kernel, *case
    yield from key_cases(target)
