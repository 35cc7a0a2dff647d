"""``rows.append`` in Triton, bit for bit: two launches, no waiting for the device.

The first kernel is one program: it walks over the rows in blocks, does all bookkeeping and hands out pages by a
prefix sum carried from block to block, so that the result does not depend on scheduling; on the way it writes decode's
plan.  The second moves data, in parallel, and makes codes of it for pools in 8 bits.  All shapes are static, so both
can be captured in a CUDA graph.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels import naive
from dms_kernels.gpu.common import same_device
from dms_kernels.gpu.interpret import repair
from dms_kernels.rows import Rows

repair()

LONGEST = 512  # tokens of a chunk of decode
STORED = 4  # rows a program of _store copies
TO_WHOLE = tl.constexpr(1.5 * 2**23)  # added, it rounds to the nearest whole number and leaves that in the lowest bits
LEVELS, TINY = tl.constexpr(naive.LEVELS), tl.constexpr(naive.TINY)


@triton.jit(do_not_specialize=["rows", "share", "columns", "cells", "page", "lag", "chunk"])
def _allocate(
    table, length, owned, free, free_count, ring_slot, ring_evict, seen, reads, overflow, evict, active, target, first,
    rows, share, columns, cells, page, lag, chunk,
    SELF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bookkeeping of one step; target (R,): where in the flat pools the token goes, -1 for nowhere; first (R + 1,):
    see decode._plan."""
    available = tl.load(free_count)
    wanted = 0
    lost_any = 0
    chunks = 0
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        here = r < rows
        now = tl.load(seen + r, here, other=0)
        said = tl.load(evict + r, here, other=0)
        is_active = tl.load(active + r // share, here, other=0) != 0
        had = tl.load(length + r, here, other=0)
        pages = tl.load(owned + r, here, other=0)
        ring = r.to(tl.int64) * cells + now % cells
        old_slot = tl.load(ring_slot + ring, here, other=0)
        marked = said
        if not SELF:
            marked = tl.load(ring_evict + r.to(tl.int64) * cells + (now + lag) % cells, here, other=0)
        reuse = (marked != 0) & (now >= cells)
        slot = tl.where(reuse, old_slot, had)

        fresh = is_active & (slot >= pages * page)
        wants = (fresh & (pages < columns)).to(tl.int32)
        rank = wanted + tl.cumsum(wants, 0) - wants
        wanted += tl.sum(wants, 0)
        gets = (wants != 0) & (rank < available)
        takes = is_active & (gets | (fresh == 0))
        lost_any = tl.maximum(lost_any, tl.max((is_active & (takes == 0)).to(tl.int32), 0))

        entry = r.to(tl.int64) * columns + slot // page
        held = tl.load(table + entry, takes & (fresh == 0), other=0)
        taken = tl.load(free + (available - 1 - rank), gets, other=0)
        tl.store(table + entry, taken, gets)
        number = tl.where(gets, taken, held).to(tl.int64)
        tl.store(target + r, tl.where(takes, number * page + slot % page, -1), here)
        tl.store(owned + r, pages + 1, gets)
        has = had + (takes & (reuse == 0)).to(tl.int32)
        tl.store(length + r, has, takes)
        tl.store(seen + r, now + 1, takes)
        counted = takes & (now > 0)
        tl.store(reads + r, tl.load(reads + r, counted, other=0) + has, counted)
        count = (has + chunk - 1) // chunk
        tl.store(first + r, chunks + tl.cumsum(count, 0) - count, here)
        chunks += tl.sum(count, 0)
        tl.store(ring_slot + ring, slot, takes)
        tl.store(ring_evict + ring, said, takes)
    tl.store(free_count, available - tl.minimum(wanted, available))
    tl.store(overflow, 1, lost_any != 0)
    tl.store(first + rows, chunks)


@triton.jit
def _quantise(x):
    """naive.quantise: codes (R, D), largest (R,); not with fused multiply-add, which would round otherwise."""
    x = x.to(tl.float32)
    largest = tl.max(tl.abs(x), 1).to(tl.bfloat16)
    scaled = x * tl.div_rn(LEVELS, tl.maximum(largest.to(tl.float32), TINY))[:, None]
    return (scaled + TO_WHOLE).to(tl.int32, bitcast=True).to(tl.int8), largest


@triton.jit(do_not_specialize=["rows"])
def _store(
    keys, values, largest, k, v, target, rows, stride_k, stride_v,
    D: tl.constexpr, D_PAD: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * STORED + tl.arange(0, STORED)
    d = tl.arange(0, D_PAD)
    place = tl.load(target + r, r < rows, other=-1)
    live = (place >= 0)[:, None] & (d < D)[None, :]
    to = place[:, None] * D + d[None, :]
    at = r.to(tl.int64)[:, None]
    new_k = tl.load(k + at * stride_k + d[None, :], live, other=0)
    new_v = tl.load(v + at * stride_v + d[None, :], live, other=0)
    if largest is not None:
        new_k, largest_k = _quantise(new_k)
        new_v, largest_v = _quantise(new_v)
        tl.store(largest + 2 * place, largest_k, place >= 0)
        tl.store(largest + 2 * place + 1, largest_v, place >= 0)
    tl.store(keys + to, new_k, live)
    tl.store(values + to, new_v, live)


def _walk(rows: int) -> dict:
    """How the single program walks over the rows."""
    return {"BLOCK": 128, "num_warps": 4} if rows <= 128 else {"BLOCK": 1024, "num_warps": 8}


def _options(int8: bool) -> dict:
    """How _store is launched."""
    return {"num_warps": 2, **({"enable_fp_fusion": False} if int8 else {})}


def append(rows: Rows, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int, chunk: int = LONGEST) -> Tensor:
    """See rows.append.  Returns the plan for decode in chunks of ``chunk`` tokens, (R + 1,) int32."""
    count, width = len(rows.length), k.shape[-1]
    dtype = rows.keys.dtype if rows.largest is None else k.dtype
    k, v = (x.to(dtype).reshape(count, width) for x in (k, v))
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    flags = [x.contiguous().view(torch.uint8) for x in (evict, active)]
    target = torch.empty(count, dtype=torch.int64, device=k.device)
    first = torch.empty(count + 1, dtype=torch.int32, device=k.device)
    with same_device(rows.keys, rows.table, k, v, *flags):
        _allocate[(1,)](
            rows.table, rows.length, rows.owned, rows.free, rows.free_count, rows.ring_slot,
            rows.ring_evict.view(torch.uint8), rows.seen, rows.reads, rows.overflow.view(torch.uint8), *flags, target,
            first, count, count // len(active), rows.table.shape[1], rows.cells, rows.page, lag, chunk,
            SELF=lag == rows.cells, **_walk(count),
        )  # fmt: skip
        _store[(triton.cdiv(count, STORED),)](
            rows.keys, rows.values, rows.largest, k, v, target, count, k.stride(0), v.stride(0),
            D=width, D_PAD=triton.next_power_of_2(width), STORED=STORED, **_options(rows.largest is not None),
        )  # fmt: skip
    return first


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options) of what is launched; the same for every ``target``."""
    ints = ("table", "length", "owned", "free", "free_count", "ring_slot", "seen", "first")
    types = {
        **dict.fromkeys(ints, "*i32"), "target": "*i64", "reads": "*i64",
        **dict.fromkeys(("ring_evict", "overflow", "evict", "active"), "*u8"),
        **dict.fromkeys(("rows", "share", "columns", "cells", "page", "lag", "chunk", "stride_k", "stride_v"), "i32"),
    }  # fmt: skip

    def case(name, kernel, options, constants, **more):
        known = {**types, **more}
        signature = {arg: known[arg] for arg in kernel.arg_names if arg not in constants}
        return name, kernel, signature, constants, options

    for walk in (_walk(1), _walk(1024)):
        block, warps = walk["BLOCK"], walk["num_warps"]
        for itself in (False, True):
            constants = {"SELF": itself, "BLOCK": block}
            yield case(f"append.allocate rows{block} self{itself:d}", _allocate, {"num_warps": warps}, constants)
    for width in (32, 64, 80, 96, 128, 256):
        for dtype in ("bf16", "fp16", "fp32"):
            constants = {"D": width, "D_PAD": triton.next_power_of_2(width), "STORED": STORED}
            new, plain = dict.fromkeys(("k", "v"), f"*{dtype}"), {**constants, "largest": None}
            pools = dict.fromkeys(("keys", "values"), f"*{dtype}")
            yield case(f"append.store {dtype} D{width}", _store, _options(False), plain, **new, **pools)
            pools = {**dict.fromkeys(("keys", "values"), "*i8"), "largest": "*bf16"}
            yield case(f"append.store {dtype} int8 D{width}", _store, _options(True), constants, **new, **pools)
