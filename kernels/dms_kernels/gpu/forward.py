"""Forward pass of banded + kept-list attention: softmax over band keys and over kept keys with their bias, as one.

A program takes BLOCK_M query rows of one KV head, all heads of its group side by side, so that keys are read once a
group.  It reads a range of the kept list, then a range of keys; blocks that every row sees take no mask.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels.gpu.common import (
    DTYPES,
    FLOOR,
    LN2,
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
    target_of,
    with_whole_rows,
)
from dms_kernels.gpu.tune import best
from dms_kernels.plan import Plan

STRIDES = [f"stride_{name}" for name in ("qb", "qh", "qt", "kb", "kh", "ks", "vb", "vh", "vs", "ob", "oh", "ot")]
SIZES = ["offset", "tokens", "capacity", "heads", "group", "section"]


@triton.jit
def _read(
    acc, peak, total, q, q_rows, q_live, K, V, BIAS, stride_ks, stride_vs, factor,
    low, high, origin, limit, whole, rest, number,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks of one range, either all that need a mask or all that do not."""
    if MASKED:
        first, stop = 0, number - (rest - whole)
    else:
        first, stop = whole, rest
    for step in range(first, stop):
        begin, entry, live = block_keys(step, origin, limit, whole, rest, BLOCK_N, MASKED)
        k_rows = rows_at(K, entry, stride_ks)
        k = load_rows(k_rows, live, HEAD_DIM, BLOCK_D, MASKED)
        logits = products(q, k, q_rows, k_rows, q_live, live, HEAD_DIM, BLOCK_D) * factor  # (BLOCK_M, BLOCK_N), base 2
        if BIAS is not None:
            logits += load_lanes(BIAS, begin, live, BLOCK_N, MASKED)[None, :]
        if MASKED:
            seen = (low[:, None] <= entry[None, :]) & (entry[None, :] < high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - top[:, None])
        fade = tl.exp2(peak - top)
        total = total * fade + tl.sum(weights, 1)
        v = load_rows(rows_at(V, entry, stride_vs), live, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = top
    return acc, peak, total


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    Q, K, V, LISTED_K, LISTED_V, BIAS, OUT, LSE, BAND, FIRST, LAST, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, offset, tokens, capacity, heads, group, section,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * B * H,); see ``query_tile``."""
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, section, 0, BLOCK_M)
    place = batch * heads + head
    q_rows = Q + batch * stride_qb + h * stride_qh + t * stride_qt
    q = load_rows(q_rows, live, HEAD_DIM, BLOCK_D, True)
    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    LISTED_K += place * capacity * HEAD_DIM
    LISTED_V += place * capacity * HEAD_DIM
    if BIAS is not None:
        BIAS += place * capacity
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    factor = scale * LOG2E
    low, high, origin, limit, whole, rest, number = list_range(
        FIRST + place * tokens, LAST + place * tokens, t, start, end, BLOCK_N
    )
    for inner in tl.static_range(2):
        acc, peak, total = _read(
            acc, peak, total, q, q_rows, live, LISTED_K, LISTED_V, BIAS, HEAD_DIM, HEAD_DIM, factor, low, high, origin,
            limit, whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, inner == 0,
        )  # fmt: skip
    low, high, origin, limit, whole, rest, number = band_range(BAND + batch * tokens, t, start, end, offset, BLOCK_N)
    for inner in tl.static_range(2):
        acc, peak, total = _read(
            acc, peak, total, q, q_rows, live, K, V, None, stride_ks, stride_vs, factor, low, high, origin, limit,
            whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, inner == 0,
        )  # fmt: skip
    out = acc / total[:, None]
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, section, hidden_zero(origin), BLOCK_M)
    store_rows(OUT + batch * stride_ob + h * stride_oh + t * stride_ot, live, out, HEAD_DIM, BLOCK_D)
    row = (batch * heads * group + h) * tokens + t  # of (B, Hq, T)
    tl.store(LSE + row, (peak + tl.log2(total)) * LN2, mask=live)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, log_keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``plan``, and the natural logarithm of its normaliser.

    q (B, Hq, T, D); k, v (B, H, S, D); log_keep (B, H, S) is the bias of kept-list keys, None for no bias.  Rows
    that are not contiguous are copied.  Returns out (B, Hq, T, D) in q's dtype and lse (B, Hq, T) fp32.
    """
    q, k, v = map(with_whole_rows, (q, k, v))
    batch, query_heads, tokens, head_dim = q.shape
    heads, group = k.shape[1], query_heads // k.shape[1]
    places, kept = batch * heads, plan.kept.shape[2]
    with same_device(q, k, v, plan.band, plan.kept, log_keep):
        kept_k, kept_v, bias = listed(plan, k, v, log_keep)
        out = torch.empty_like(q)
        lse = torch.empty(batch, query_heads, tokens, dtype=torch.float32, device=q.device)

        def run(launch):
            _forward_kernel[(triton.cdiv(tokens * group, launch.rows) * places,)](
                q, k, v, kept_k, kept_v, bias, out, lse, plan.band, plan.first, plan.last, scale,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                plan.offset, tokens, kept, heads, group,
                section(places, 2 * kept * head_dim * q.element_size()), **blocks(head_dim, launch),
            )  # fmt: skip

        run(best("forward", q, kept, config("forward", head_dim, q.dtype, target_of(q.device)), run))
    return out, lse


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options, attributes) of every shipped configuration on sm_``target``."""
    for dtype, head_dim, launch in shipped("forward", target):
        data = f"*{DTYPES[dtype]}"
        for bias in ("*fp32", None):
            pointers = dict.fromkeys(("Q", "K", "V", "LISTED_K", "LISTED_V", "OUT"), data)
            pointers |= {"BIAS": bias, "LSE": "*fp32"} | dict.fromkeys(("BAND", "FIRST", "LAST"), "*i32")
            name = f"forward{'_bias' if bias else ''}_{DTYPES[dtype]}_d{head_dim}"
            described_case = described(_forward_kernel, pointers, [*STRIDES, *SIZES], STRIDES, launch)
            yield name, _forward_kernel, *described_case
