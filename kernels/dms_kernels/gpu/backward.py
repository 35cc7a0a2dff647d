"""Backward pass of banded + kept-list attention: probabilities come again from the normaliser; nothing is atomic.

With P the probabilities, G the gradient of the output and delta = rowsum(out * G), the gradient of the logits is
dS = P * (G V^T - delta).  ``_query_kernel`` gathers dQ = scale * dS K over the keys that forward reads and leaves
delta; ``_key_kernel`` gathers dK = scale * dS^T Q, dV = P^T G and the bias gradient, sums of dS, over the queries that
read a block: first of keys read through the band, then of entries of the kept list, which it adds.
"""

from collections.abc import Iterator

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
    cut,
    described,
    first_above,
    hidden_zero,
    list_bias,
    list_range,
    load_lanes,
    load_rows,
    products,
    query_tile,
    rows_at,
    shipped,
    store_rows,
    target_of,
    with_whole_rows,
)
from dms_kernels.plan import Plan


def _strides(*names: str) -> list[str]:
    return [f"stride_{name}{dim}" for name in names for dim in ("b", "h", "t")]


QUERY_STRIDES = _strides("q", "k", "v", "o", "g", "dq")
KEY_STRIDES = _strides("q", "k", "v", "g", "dk", "dv")
QUERY_SIZES = ["offset", "tokens", "capacity", "heads", "group"]
KEY_SIZES = ["offset", "window", "tokens", "keys", "capacity", "heads", "group"]


@triton.jit
def _read(
    dq, q, grad, q_rows, grad_rows, q_live, lse, delta, K, V, BIAS, KEPT, stride_kt, stride_vt, factor,
    low, high, origin, limit, whole, rest, number,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS K over the blocks of one range, either all that need a mask or all that do not."""
    if MASKED:
        first, stop = 0, number - (rest - whole)
    else:
        first, stop = whole, rest
    for step in range(first, stop):
        begin, entry, key, live = block_keys(KEPT, step, origin, limit, whole, rest, BLOCK_N, MASKED)
        k_rows, v_rows = rows_at(K, key, stride_kt), rows_at(V, key, stride_vt)
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
    Q, K, V, BIAS, OUT, GRAD, LSE, DELTA, DQ, BAND, KEPT, FIRST, LAST, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    offset, tokens, capacity, heads, group,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * H); see ``query_tile``."""
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, 0, BLOCK_M)
    place = batch * heads + head
    q_rows = Q + batch * stride_qb + h * stride_qh + t * stride_qt
    grad_rows = GRAD + batch * stride_gb + h * stride_gh + t * stride_gt
    out_rows = OUT + batch * stride_ob + h * stride_oh + t * stride_ot
    q = load_rows(q_rows, live, HEAD_DIM, BLOCK_D, True)
    grad = load_rows(grad_rows, live, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_rows, live, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    row = (batch * heads * group + h) * tokens + t  # of (B, Hq, T)
    tl.store(DELTA + row, delta, mask=live)
    lse = tl.load(LSE + row) * LOG2E
    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    KEPT += place * capacity
    if BIAS is not None:
        BIAS += place * capacity
    factor = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, high, origin, limit, whole, rest, number = list_range(
        FIRST + place * tokens, LAST + place * tokens, t, start, end, BLOCK_N
    )
    for turn in tl.static_range(2):
        dq = _read(
            dq, q, grad, q_rows, grad_rows, live, lse, delta, K, V, BIAS, KEPT, stride_kt, stride_vt, factor,
            low, high, origin, limit, whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, turn == 0,
        )  # fmt: skip
    low, high, origin, limit, whole, rest, number = band_range(BAND + batch * tokens, t, start, end, offset, BLOCK_N)
    for turn in tl.static_range(2):
        dq = _read(
            dq, q, grad, q_rows, grad_rows, live, lse, delta, K, V, None, None, stride_kt, stride_vt, factor,
            low, high, origin, limit, whole, rest, number, HEAD_DIM, BLOCK_D, BLOCK_N, turn == 0,
        )  # fmt: skip
    batch, head, h, t, live, start, end = query_tile(heads, tokens, group, hidden_zero(origin), BLOCK_M)
    store_rows(DQ + batch * stride_dqb + h * stride_dqh + t * stride_dqt, live, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _gather(
    dk, dv, d_bias, k, v, k_rows, v_rows, k_live, bias, low, high, Q, GRAD, LSE, DELTA, factor, tokens, group,
    stride_qh, stride_qt, stride_gh, stride_gt, origin, limit, whole, rest, number,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the query tiles of one range give, either all that need a mask or all that do not; head after head."""
    if MASKED:
        first, tiles = 0, number - (rest - whole)
    else:
        first, tiles = whole, rest - whole
    for step in range(0, group * tiles):
        member, tile = step // tl.maximum(tiles, 1), first + step % tl.maximum(tiles, 1)
        if MASKED:
            tile = tl.where(tile < whole, tile, tile + rest - whole)
        begin = origin + tile * BLOCK_M
        token = begin + tl.arange(0, BLOCK_M)
        live = token < limit
        h = member.to(tl.int64)
        q_rows = rows_at(Q + h * stride_qh, token, stride_qt)
        grad_rows = rows_at(GRAD + h * stride_gh, token, stride_gt)
        q = load_rows(q_rows, live, HEAD_DIM, BLOCK_D, MASKED)
        grad = load_rows(grad_rows, live, HEAD_DIM, BLOCK_D, MASKED)
        logits = products(k, q, k_rows, q_rows, k_live, live, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_M)
        logits = logits * factor + bias[:, None]  # base 2
        if MASKED:
            seen = (low[:, None] <= token[None, :]) & (token[None, :] < high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        lse = load_lanes(LSE + h * tokens, begin, live, BLOCK_M, MASKED) * LOG2E
        weights = tl.exp2(logits - lse[None, :])
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        d_weights = products(v, grad, v_rows, grad_rows, k_live, live, HEAD_DIM, BLOCK_D)
        delta = load_lanes(DELTA + h * tokens, begin, live, BLOCK_M, MASKED)
        d_logits = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision="ieee")
        d_bias += tl.sum(d_logits, 1)
    return dk, dv, d_bias


@triton.jit
def _band_readers(BAND, key, offset, window, tokens):
    """Tokens [low, high) whose band holds each key."""
    low = tl.maximum(key - offset, 0)
    high = tl.maximum(tl.minimum(key + window + 1 - offset, tokens), low)
    return low, first_above(BAND, low, high, key, window + 1)


@triton.jit
def _list_readers(FIRST, LAST, entry, tokens):
    """Tokens [low, high) that read each entry of the kept list."""
    first, end = tl.zeros_like(entry), tl.zeros_like(entry) + tokens
    low = first_above(LAST, first, end, entry, tokens)
    return low, first_above(FIRST, low, end, entry, tokens)


@triton.jit(do_not_specialize=KEY_SIZES)
def _key_kernel(
    Q, K, V, BIAS, GRAD, LSE, DELTA, DK, DV, DKEEP, BAND, KEPT, COUNT, FIRST, LAST, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    offset, window, tokens, keys, capacity, heads, group,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B * H).  Without KEPT the blocks are keys read through the band, and all of dk and dv is written;
    with it they are kept-list entries, whose part is added and whose bias gradient, if wanted, is written."""
    place = tl.program_id(1)
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    place = place.to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    entry = begin + tl.arange(0, BLOCK_N)
    if KEPT is None:
        stop = keys
        live = entry < stop
        key = entry
        low, high = _band_readers(BAND + batch * tokens, key, offset, window, tokens)
    else:
        stop = tl.load(COUNT + place)
        if begin >= stop:
            return
        live = entry < stop
        key = tl.load(KEPT + place * capacity + entry, mask=live, other=0)
        low, high = _list_readers(FIRST + place * tokens, LAST + place * tokens, entry, tokens)
    origin, limit = tl.min(low), tl.max(tl.where(live, high, 0))
    whole, rest, number = cut(origin, tl.max(low), tl.min(high), limit, BLOCK_M)
    k_rows = rows_at(K + batch * stride_kb + head * stride_kh, key, stride_kt)
    v_rows = rows_at(V + batch * stride_vb + head * stride_vh, key, stride_vt)
    k = load_rows(k_rows, live, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_rows, live, HEAD_DIM, BLOCK_D, True)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + place * capacity + entry, mask=live, other=0.0)
    Q += batch * stride_qb + head * group * stride_qh
    GRAD += batch * stride_gb + head * group * stride_gh
    LSE += place * group * tokens
    DELTA += place * group * tokens
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_N], tl.float32)
    for turn in tl.static_range(2):
        dk, dv, d_bias = _gather(
            dk, dv, d_bias, k, v, k_rows, v_rows, live, bias, low, high, Q, GRAD, LSE, DELTA, scale * LOG2E,
            tokens, group, stride_qh, stride_qt, stride_gh, stride_gt, origin, limit, whole, rest, number,
            HEAD_DIM, BLOCK_D, BLOCK_M, turn == 0,
        )  # fmt: skip
    entry += hidden_zero(limit)
    live, key = entry < stop, entry
    if KEPT is not None:
        key = tl.load(KEPT + place * capacity + entry, mask=live, other=0)
        if DKEEP is not None:
            tl.store(DKEEP + place * keys + key, d_bias.to(DKEEP.dtype.element_ty), mask=live)
    dk_rows = rows_at(DK + batch * stride_dkb + head * stride_dkh, key, stride_dkt)
    dk *= scale
    if KEPT is not None:
        dk += load_rows(dk_rows, live, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    store_rows(dk_rows, live, dk, HEAD_DIM, BLOCK_D)
    dv_rows = rows_at(DV + batch * stride_dvb + head * stride_dvh, key, stride_dvt)
    if KEPT is not None:
        dv += load_rows(dv_rows, live, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    store_rows(dv_rows, live, dv, HEAD_DIM, BLOCK_D)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, log_keep: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and log_keep (None without one) from ``grad``, that of out; the rest as in ``forward``."""
    grad, q, k, v, out = map(with_whole_rows, (grad, q, k, v, out))
    bias, delta = list_bias(plan, log_keep), torch.empty_like(lse)
    dq = _query_gradient(grad, q, k, v, out, lse, delta, plan, bias, scale)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    d_keep = None if log_keep is None else torch.zeros(k.shape[:3], dtype=log_keep.dtype, device=k.device)
    _key_gradient(grad, q, k, v, lse, delta, dk, dv, plan, None, None, scale, through="band")
    if plan.kept.shape[2]:
        _key_gradient(grad, q, k, v, lse, delta, dk, dv, plan, bias, d_keep, scale, through="list")
    return dq, dk, dv, d_keep


def _query_gradient(grad, q, k, v, out, lse, delta, plan, bias, scale) -> Tensor:
    """dq; fills delta."""
    batch, query_heads, tokens, head_dim = q.shape
    heads, group = k.shape[1], query_heads // k.shape[1]
    dq = torch.empty_like(q)
    launch = config("dq", head_dim, q.dtype, target_of(q.device))
    strides = [step for x in (q, k, v, out, grad, dq) for step in x.stride()[:3]]
    _query_kernel[triton.cdiv(tokens * group, launch.rows), batch * heads](
        q, k, v, bias, out, grad, lse, delta, dq, plan.band, plan.kept, plan.first, plan.last, scale, *strides,
        plan.offset, tokens, plan.kept.shape[2], heads, group, **blocks(head_dim, launch),
    )  # fmt: skip
    return dq


def _key_gradient(grad, q, k, v, lse, delta, dk, dv, plan, bias, d_keep, scale, through: str) -> None:
    """Write into dk and dv what reading through the band gives, or add what reading through the list gives."""
    batch, heads, keys, head_dim = k.shape
    listed = through == "list"
    kept = (plan.kept, plan.count, plan.first, plan.last) if listed else (None,) * 4
    launch = config("dkv", head_dim, q.dtype, target_of(q.device))
    strides = [step for x in (q, k, v, grad, dk, dv) for step in x.stride()[:3]]
    capacity = plan.kept.shape[2]
    _key_kernel[triton.cdiv(capacity if listed else keys, launch.keys), batch * heads](
        q, k, v, bias, grad, lse, delta, dk, dv, d_keep, None if listed else plan.band, *kept, scale, *strides,
        plan.offset, plan.window, q.shape[2], keys, capacity, heads, q.shape[1] // heads,
        **blocks(head_dim, launch),
    )  # fmt: skip


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options, attributes) of every shipped configuration on sm_``target``."""
    for kind in ("dq", "dkv"):
        for dtype, head_dim, launch in shipped(kind, target):
            for name, fn, pointers in _variants(kind, f"*{DTYPES[dtype]}"):
                strides, sizes = (QUERY_STRIDES, QUERY_SIZES) if kind == "dq" else (KEY_STRIDES, KEY_SIZES)
                case = described(fn, pointers, [*strides, *sizes], strides, launch)
                yield f"{name}_{DTYPES[dtype]}_d{head_dim}", fn, *case


def _variants(kind: str, data: str) -> Iterator[tuple[str, triton.JITFunction, dict]]:
    """Name, kernel and pointer types of the variants of a kind of kernel."""
    for bias in ("*fp32", None):
        suffix = "_bias" if bias else ""
        pointers = dict.fromkeys(("Q", "K", "V", "GRAD"), data) | {"LSE": "*fp32", "DELTA": "*fp32", "BIAS": bias}
        if kind == "dq":
            pointers |= {"OUT": data, "DQ": data} | dict.fromkeys(("BAND", "KEPT", "FIRST", "LAST"), "*i32")
            yield f"dq{suffix}", _query_kernel, pointers
            continue
        pointers |= {"DK": data, "DV": data}
        listed = dict.fromkeys(("KEPT", "COUNT", "FIRST", "LAST"), "*i32") | {"DKEEP": bias, "BAND": None}
        yield f"dkv_list{suffix}", _key_kernel, pointers | listed
        if bias is None:
            banded = dict.fromkeys(("KEPT", "COUNT", "FIRST", "LAST", "DKEEP")) | {"BAND": "*i32"}
            yield "dkv_band", _key_kernel, pointers | banded
