"""Gradients of keys, values and bias: dK = scale * dS^T Q, dV = P^T G and sums of dS (see ``backward``).

``_key_kernel`` gathers them over the queries that read a block of keys: through the band, and through the kept list,
whose queries several programs share.  Their fp32 parts are added to what the band gave by ``_merge_kernel``, in a fixed
order.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl

from dms_kernels.gpu.common import (
    DTYPES,
    HEAD_DIMS,
    LOG2E,
    blocks,
    config,
    cut,
    described,
    first_above,
    hidden_zero,
    load_lanes,
    load_rows,
    products,
    rows_at,
    section,
    shipped,
    store_rows,
    strides_of,
    target_of,
    turn,
)
from dms_kernels.gpu.tune import best

KEY_STRIDES = strides_of("q", "k", "v", "g", "dk", "dv")
MERGE_STRIDES = strides_of("dk", "dv")
KEY_SIZES = ["offset", "window", "tokens", "keys", "heads", "group", "parts", "section"]
MERGE_SIZES = ["keys", "capacity", "heads", "parts"]
MERGED = {"BLOCK_N": 8, "num_warps": 8, "num_stages": 1}
PARTS = 8  # the most programs that share the queries of a block of the kept list


@triton.jit
def _gather(
    dk, dv, d_bias, k, v, k_rows, v_rows, k_live, bias, low, high, Q, GRAD, LSE2, DELTA, factor, tokens, group,
    stride_qh, stride_qt, stride_gh, stride_gt, origin, limit, whole, rest, number, part, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what a part of the query tiles of one range gives, either of all that need a mask or of all that do not; head
    after head."""
    if MASKED:
        first, tiles = 0, number - (rest - whole)
    else:
        first, tiles = whole, rest - whole
    steps = group * tiles
    for step in range(steps * part // parts, steps * (part + 1) // parts):
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
        lse = load_lanes(LSE2 + h * tokens, begin, live, BLOCK_M, MASKED)
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


@triton.jit
def _key_tile(keys, heads, parts, section, hidden, BLOCK_N: tl.constexpr):
    """Of a program of ``_key_kernel``: keys, part of their queries, place, batch and head; and how many places are."""
    tiles = tl.cdiv(keys, BLOCK_N) * parts
    tile, place = turn(tiles, section, hidden)
    entry = tile // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    return entry, tile % parts, place.to(tl.int64), batch, head, tl.num_programs(0) // tiles


@triton.jit(do_not_specialize=KEY_SIZES)
def _key_kernel(
    Q, K, V, BIAS, GRAD, LSE2, DELTA, DK, DV, DBIAS, BAND, COUNT, FIRST, LAST, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    offset, window, tokens, keys, heads, group, parts, section,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * parts * B * H,); see ``turn``.  With BAND, the keys are read through the band; else they are those
    of the kept list, of which the first are read most.  Part p of batch b goes to row p * B + b of DK, DV and DBIAS."""
    entry, part, place, batch, head, places = _key_tile(keys, heads, parts, section, 0, BLOCK_N)
    if BAND is not None:
        stop = keys
        live = entry < stop
        low, high = _band_readers(BAND + batch * tokens, entry, offset, window, tokens)
    else:
        stop = tl.load(COUNT + place)
        if tl.min(entry) >= stop:
            return
        live = entry < stop
        low, high = _list_readers(FIRST + place * tokens, LAST + place * tokens, entry, tokens)
    origin, limit = tl.min(low), tl.max(tl.where(live, high, 0))
    whole, rest, number = cut(origin, tl.max(low), tl.min(high), limit, BLOCK_M)
    k_rows = rows_at(K + batch * stride_kb + head * stride_kh, entry, stride_kt)
    v_rows = rows_at(V + batch * stride_vb + head * stride_vh, entry, stride_vt)
    k = load_rows(k_rows, live, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_rows, live, HEAD_DIM, BLOCK_D, True)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + place * keys + entry, mask=live, other=0.0)
    Q += batch * stride_qb + head * group * stride_qh
    GRAD += batch * stride_gb + head * group * stride_gh
    LSE2 += place * group * tokens
    DELTA += place * group * tokens
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_N], tl.float32)
    for inner in tl.static_range(2):
        dk, dv, d_bias = _gather(
            dk, dv, d_bias, k, v, k_rows, v_rows, live, bias, low, high, Q, GRAD, LSE2, DELTA, scale * LOG2E,
            tokens, group, stride_qh, stride_qt, stride_gh, stride_gt, origin, limit, whole, rest, number, part, parts,
            HEAD_DIM, BLOCK_D, BLOCK_M, inner == 0,
        )  # fmt: skip
    entry, part, place, batch, head, places = _key_tile(keys, heads, parts, section, hidden_zero(limit), BLOCK_N)
    live = entry < stop
    if DBIAS is not None:
        tl.store(DBIAS + (part * places + place) * keys + entry, d_bias, mask=live)
    batch += part * (places // heads)
    dk_rows = rows_at(DK + batch * stride_dkb + head * stride_dkh, entry, stride_dkt)
    store_rows(dk_rows, live, dk * scale, HEAD_DIM, BLOCK_D)
    dv_rows = rows_at(DV + batch * stride_dvb + head * stride_dvh, entry, stride_dvt)
    store_rows(dv_rows, live, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=MERGE_SIZES)
def _merge_kernel(
    PART_K, PART_V, PART_BIAS, DK, DV, DKEEP, KEPT, COUNT,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt, keys, capacity, heads, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * B * H,): add the (parts, B, H, M, D) fp32 parts of kept-list entries to DK and DV, and write
    their sums of PART_BIAS into DKEEP."""
    blocks = tl.cdiv(capacity, BLOCK_N)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    live = entry < tl.load(COUNT + place)
    key = tl.load(KEPT + place * capacity + entry, mask=live, other=0)
    batch, head = place // heads, place % heads
    dk_rows = rows_at(DK + batch * stride_dkb + head * stride_dkh, key, stride_dkt)
    dv_rows = rows_at(DV + batch * stride_dvb + head * stride_dvh, key, stride_dvt)
    dk = load_rows(dk_rows, live, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    dv = load_rows(dv_rows, live, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    d_bias = tl.zeros([BLOCK_N], tl.float32)
    for part in range(0, parts):
        row = (part * (tl.num_programs(0) // blocks) + place) * capacity + entry
        dk += load_rows(rows_at(PART_K, row, HEAD_DIM), live, HEAD_DIM, BLOCK_D, True)
        dv += load_rows(rows_at(PART_V, row, HEAD_DIM), live, HEAD_DIM, BLOCK_D, True)
        if DKEEP is not None:
            d_bias += tl.load(PART_BIAS + row, mask=live, other=0.0)
    store_rows(dk_rows, live, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_rows, live, dv, HEAD_DIM, BLOCK_D)
    if DKEEP is not None:
        tl.store(DKEEP + place * keys + key, d_bias.to(DKEEP.dtype.element_ty), mask=live)


def _parts(tiles: int, device: torch.device) -> int:
    """How many programs share the queries of a block: more where few heads have few blocks, as the longest of them
    would then last longer than all others together."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(triton.cdiv(4 * processors, tiles), PARTS)


def add_list_gradient(grad, q, k, v, bias, stats, plan, scale, dk, dv, d_keep) -> None:
    """Add to dk and dv, and write into d_keep, what reading through the list gives; k, v and bias are its rows."""
    batch, heads, capacity, head_dim = k.shape
    launch = config("dkv_plain" if bias is None else "dkv", head_dim, q.dtype, target_of(q.device))
    parts = _parts(triton.cdiv(capacity, launch.keys) * batch * heads, q.device)
    part_k, part_v = torch.empty(2, parts * batch, *k.shape[1:], dtype=torch.float32, device=k.device)
    part_bias = None if d_keep is None else torch.empty(part_k.shape[:3], dtype=torch.float32, device=k.device)
    key_gradient(grad, q, k, v, bias, stats, plan, scale, part_k, part_v, part_bias, parts, through="list")
    _merge_kernel[(triton.cdiv(capacity, MERGED["BLOCK_N"]) * batch * heads,)](
        part_k, part_v, part_bias, dk, dv, d_keep, plan.kept, plan.count, *dk.stride()[:3], *dv.stride()[:3],
        dk.shape[2], capacity, heads, parts, **_merge_blocks(head_dim),
    )  # fmt: skip


def key_gradient(
    grad, q, k, v, bias, stats, plan, scale, dk, dv, d_bias=None, parts=1, through="band"
) -> None:  # fmt: skip
    """Write into dk, dv and d_bias what reading rows k, v ``through`` the band or the list gives."""
    batch, heads, keys, head_dim = k.shape
    kind = "dkv_plain" if bias is None else "dkv"
    index = (plan.band, None, None, None) if through == "band" else (None, plan.count, plan.first, plan.last)
    strides = [step for x in (q, k, v, grad, dk, dv) for step in x.stride()[:3]]
    group, places = q.shape[1] // heads, batch * heads

    def run(launch):
        _key_kernel[(triton.cdiv(keys, launch.keys) * parts * places,)](
            q, k, v, bias, grad, *stats, dk, dv, d_bias, *index, scale, *strides,
            plan.offset, plan.window, q.shape[2], keys, heads, group, parts,
            section(places, 2 * group * q.shape[2] * head_dim * q.element_size()), **blocks(head_dim, launch),
        )  # fmt: skip

    run(best(kind, q, 0 if through == "band" else keys, config(kind, head_dim, q.dtype, target_of(q.device)), run))


def _merge_blocks(head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "BLOCK_D": max(triton.next_power_of_2(head_dim), 16), **MERGED}


def key_cases(target: int) -> Iterator[tuple]:
    """As ``aot_cases`` of ``backward``."""
    for kind in ("dkv", "dkv_plain"):
        for dtype, head_dim, launch in shipped(kind, target):
            for name, pointers in _variants(f"*{DTYPES[dtype]}", kind == "dkv"):
                case = described(_key_kernel, pointers, [*KEY_STRIDES, *KEY_SIZES], KEY_STRIDES, launch)
                yield f"{name}_{DTYPES[dtype]}_d{head_dim}", _key_kernel, *case
    parts = dict.fromkeys(("PART_K", "PART_V", "PART_BIAS"), "*fp32") | {"KEPT": "*i32", "COUNT": "*i32"}
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):
        pointers = parts | dict.fromkeys(("DK", "DV"), f"*{DTYPES[dtype]}") | {"DKEEP": "*fp32"}
        integers = [*MERGE_STRIDES, *MERGE_SIZES]
        case = described(_merge_kernel, pointers, integers, MERGE_STRIDES, _merge_blocks(head_dim))
        yield f"dkv_merge_{DTYPES[dtype]}_d{head_dim}", _merge_kernel, *case


def _variants(data: str, biased: bool) -> Iterator[tuple[str, dict]]:
    """Name and pointer types of the variants of ``_key_kernel``."""
    bias = "*fp32" if biased else None
    pointers = dict.fromkeys(("Q", "K", "V", "GRAD"), data) | {"LSE2": "*fp32", "DELTA": "*fp32", "BIAS": bias}
    through_list = dict.fromkeys(("DK", "DV"), "*fp32") | dict.fromkeys(("COUNT", "FIRST", "LAST"), "*i32")
    yield f"dkv_list{'_bias' if biased else ''}", pointers | through_list | {"DBIAS": bias, "BAND": None}
    if not biased:
        through_band = dict.fromkeys(("COUNT", "FIRST", "LAST", "DBIAS")) | dict.fromkeys(("DK", "DV"), data)
        yield "dkv_band", pointers | through_band | {"BAND": "*i32"}
