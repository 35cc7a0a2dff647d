"""What the attention kernels share: jitted helpers, launch configurations, the description of cases to compile."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels.gpu.interpret import repair
from dms_kernels.plan import Plan

repair()

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHUNK = tl.constexpr(32)  # columns
FLOOR = tl.constexpr(-1e30)  # a running maximum that is finite where nothing was seen yet

CACHE, FEWEST = 1 << 25, 8  # bytes of L2 cache to count on; places taken at a time even if they need more
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Launch(NamedTuple):
    """Tile of query rows, tile of keys, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kind and target, for head dims up to 64, 80, 96, 128 and 256: tiles that compile without spills.
_HALF = {
    ("forward", 80): [(128, 64, 8, 3)] + [(128, 32, 8, 4)] * 3 + [(64, 32, 8, 2)],
    ("forward", 86): [(128, 64, 8, 3)] + [(128, 32, 8, 3)] * 3 + [(64, 32, 8, 2)],
    ("forward", 90): [(128, 64, 8, 5)] * 4 + [(128, 64, 8, 2)],
    ("forward", 100): [(128, 64, 8, 3)] + [(128, 32, 8, 3)] * 3 + [(128, 32, 8, 2)],
    ("dq", 80): [(128, 64, 8, 3)] + [(64, 64, 8, 3)] * 3 + [(64, 32, 8, 2)],
    ("dq", 86): [(128, 32, 8, 3)] + [(64, 32, 4, 3)] * 3 + [(32, 32, 8, 2)],
    ("dq", 90): [(128, 64, 8, 5)] * 4 + [(128, 32, 8, 2)],
    ("dq", 100): [(128, 128, 8, 2)] + [(64, 64, 8, 3)] * 3 + [(128, 32, 8, 2)],
    ("dkv", 80): [(32, 128, 8, 3)] + [(128, 64, 8, 2)] * 3 + [(64, 32, 8, 2)],
    ("dkv", 86): [(32, 32, 8, 3)] + [(64, 64, 8, 2)] * 3 + [(32, 32, 8, 2)],
    ("dkv", 90): [(64, 128, 8, 3)] * 4 + [(64, 32, 8, 3)],
    ("dkv_plain", 90): [(64, 128, 8, 3)] + [(64, 64, 8, 4)] * 3 + [(64, 32, 8, 3)],  # without a bias
    ("dkv", 100): [(64, 128, 8, 3)] * 4 + [(64, 64, 8, 1)],
}
_FULL = {  # fp32 runs without tensor cores; up to 64, 80, 96, 128 and 256
    "forward": [(64, 32, 8, 2), *[(32, 32, 4, 1)] * 3, (64, 32, 8, 1)],
    "dq": [(32, 32, 8, 1), (64, 32, 16, 1), (64, 32, 16, 1), (64, 32, 16, 1), (64, 32, 8, 1)],
    "dkv": [(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1), (16, 16, 8, 1), (16, 16, 8, 1)],
}


def config(kind: str, head_dim: int, dtype: torch.dtype, target: int) -> Launch:
    """Launch configuration of ``kind`` (forward, dq, dkv, or without a bias dkv_plain) on sm_``target`` (80 to 100)."""
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(f"head_dim {head_dim}: must be at most {HEAD_DIMS[-1]}")
    plain = kind.removesuffix("_plain")
    table = _FULL[plain] if dtype == torch.float32 else _HALF.get((kind, target)) or _HALF[plain, target]
    return Launch(*table[bisect_left((64, 80, 96, 128), head_dim)])


def target_of(device: torch.device) -> int:
    """The capability whose configurations a device runs; the most modest, 86, are for 8.6, 8.9, 12 and all others."""
    if device.type != "cuda":
        return 90
    return {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get(torch.cuda.get_device_capability(device), 86)


def same_device(*tensors: Tensor | None) -> torch.cuda.device_of:
    """A guard under which to launch on the device that all tensors share; ValueError if they do not."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.device != given[0].device for tensor in given):
        raise ValueError(f"devices {', '.join(sorted({str(x.device) for x in given}))}: must be one")
    return torch.cuda.device_of(given[0])


def section(places: int, size: int) -> int:
    """How many of the B * H places ``turn`` takes at a time, if what a place's programs read has ``size`` bytes."""
    return max(min(places, max(CACHE // max(size, 1), FEWEST)), 1)


def with_whole_rows(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def listed(plan: Plan, k: Tensor, v: Tensor, log_keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the kept list, (B, H, M, D), and its bias, (B, H, M) fp32 in base 2: gathered once, as every
    row is then read by many tiles, which need no index.  Past ``count`` they mean nothing."""
    kept = plan.kept.long()
    rows = kept[..., None].expand(-1, -1, -1, k.shape[3])
    bias = None if log_keep is None else log_keep.gather(2, kept).float().mul_(LOG2E.value)
    return k.gather(2, rows), v.gather(2, rows), bias


def blocks(head_dim: int, launch: Launch) -> dict[str, int]:
    """The constexpr arguments and launch options that every kernel here takes."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


@triton.jit
def rows_at(base, index, stride):
    """Addresses of rows of a matrix."""
    return base + index.to(tl.int64) * stride


@triton.jit
def load_rows(rows, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """The HEAD_DIM columns of rows at these addresses, padded to BLOCK_D; if MASKED, rows not ``live`` are 0."""
    column = tl.arange(0, BLOCK_D)
    pointers = rows[:, None] + column[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=live[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def products(x, y, x_rows, y_rows, x_live, y_live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x y^T of loaded rows.  Without tensor cores a dot holds its operands in registers, so that long fp32 rows are
    taken from their addresses anew, a few columns at a time."""
    if x.dtype != tl.float32 or BLOCK_D <= CHUNK * 2:
        return tl.dot(x, tl.trans(y), input_precision="ieee")
    else:
        total = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        for start in range(0, HEAD_DIM, CHUNK):
            column = start + tl.arange(0, CHUNK)
            inside = (column < HEAD_DIM)[None, :]
            x_part = tl.load(x_rows[:, None] + column[None, :], mask=x_live[:, None] & inside, other=0.0)
            y_part = tl.load(y_rows[:, None] + column[None, :], mask=y_live[:, None] & inside, other=0.0)
            total = tl.dot(x_part, tl.trans(y_part), total, input_precision="ieee")
        return total


@triton.jit
def load_lanes(base, begin, live, LANES: tl.constexpr, MASKED: tl.constexpr):
    """Entries begin .. begin + LANES of an array; if MASKED, those not ``live`` are 0.  As a column and its sum: else
    the compiler gives the load the layout of its use, in which every thread copies nearly all entries."""
    entry = tl.arange(0, LANES)[:, None] + tl.arange(0, 1)[None, :]
    if MASKED:
        return tl.sum(tl.load(base + begin + entry, mask=live[:, None], other=0), 1)
    else:
        return tl.sum(tl.load(base + begin + entry), 1)


@triton.jit
def store_rows(rows, live, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the ``live`` ones of ``values`` (., BLOCK_D) as rows at these addresses."""
    column = tl.arange(0, BLOCK_D)
    pointers = rows[:, None] + column[None, :]
    tl.store(pointers, values.to(rows.dtype.element_ty), mask=live[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def hidden_zero(index):
    """0, unknown to the compiler, from an ``index`` >= 0.  Adding it to a program's number makes addresses that are
    needed again after the loops be computed again, instead of held in registers or spilled meanwhile."""
    return tl.minimum(index, 0)


@triton.jit
def cut(low, inner_low, inner_high, high, BLOCK: tl.constexpr):
    """Cut [low, high) into ``number`` blocks, of which [whole, rest) lie within [inner_low, inner_high)."""
    number = tl.cdiv(high - low, BLOCK)
    whole = tl.minimum(tl.cdiv(inner_low - low, BLOCK), number)
    rest = tl.minimum(tl.maximum((inner_high - low) // BLOCK, whole), number)
    return whole, rest, number


@triton.jit
def first_above(array, low, high, value, span):
    """For each element, the first index in [low, high) whose entry of a non-decreasing array is above ``value``, else
    ``high``; ``span``: the most that high - low can be."""
    while span > 0:
        middle, unsure = (low + high) // 2, low < high
        above = tl.load(array + middle, mask=unsure, other=0) > value
        high = tl.where(unsure & above, middle, high)
        low = tl.where(unsure & (above == 0), middle + 1, low)
        span = span // 2
    return low


@triton.jit
def turn(tiles, section, hidden):
    """Tile and place (of B * H) of a program of a grid of tiles * places: the first tile of ``section`` places, their
    second, and so on, then the next places.  So the long tiles of many heads start first, and what they read stays in
    the L2 cache.  ``hidden``: see ``hidden_zero``."""
    program = tl.program_id(0) + hidden
    first = program // (tiles * section) * section
    width = tl.minimum(section, tl.num_programs(0) // tiles - first)
    rest = program - first * tiles
    return rest // width, first + rest % width


@triton.jit
def query_tile(heads, tokens, group, section, hidden, BLOCK_M: tl.constexpr):
    """The query rows of a program, long tiles first (see ``turn``), the G heads of a token side by side: batch, KV
    head, query head and token of each row, whether it exists, and the first and last token.  Rows past the end repeat
    the last token."""
    tiles = tl.cdiv(tokens * group, BLOCK_M)
    tile, place = turn(tiles, section, hidden)
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    begin = (tiles - 1 - tile) * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    token = tl.minimum(row // group, tokens - 1)
    start, end = begin // group, tl.minimum((begin + BLOCK_M - 1) // group, tokens - 1)
    return batch, head, head * group + row % group, token.to(tl.int64), row < tokens * group, start, end


@triton.jit
def list_range(FIRST, LAST, token, start, end, BLOCK_N: tl.constexpr):
    """What a tile reads of the kept list: each row's entries [low, high), the first and one past the last entry of the
    tile, and its blocks (see ``cut``)."""
    origin, limit = tl.load(FIRST + start), tl.load(LAST + end)
    whole, rest, number = cut(origin, tl.load(FIRST + end), tl.load(LAST + start), limit, BLOCK_N)
    return tl.load(FIRST + token), tl.load(LAST + token), origin, limit, whole, rest, number


@triton.jit
def band_range(BAND, token, start, end, offset, BLOCK_N: tl.constexpr):
    """What a tile reads of the band, as ``list_range`` says it; entries are key numbers."""
    origin, limit = tl.load(BAND + start), end + offset + 1
    whole, rest, number = cut(origin, tl.load(BAND + end), start + offset + 1, limit, BLOCK_N)
    return tl.load(BAND + token), token.to(tl.int32) + offset + 1, origin, limit, whole, rest, number


@triton.jit
def block_keys(step, origin, limit, whole, rest, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """First entry of one block, its entries and their existence; masked blocks are those outside [whole, rest)."""
    block = step
    if MASKED:
        block = tl.where(step < whole, step, step + rest - whole)
    begin = origin + block * BLOCK_N
    entry = begin + tl.arange(0, BLOCK_N)
    return begin, entry, entry < limit


def strides_of(*names: str) -> list[str]:
    """Names of the strides of batch, head and token of tensors."""
    return [f"stride_{name}{dim}" for name in names for dim in "bht"]


def described(
    fn: triton.JITFunction,
    pointers: dict[str, str | None],
    integers: Iterable[str],
    aligned: Iterable[str],
    launch: dict,
) -> tuple[dict, dict, dict, dict]:
    """Signature, constexprs, options and attributes of one compilation: pointers by name (None: not given), the names
    of integer arguments, those among them that are multiples of 16, and ``blocks``."""
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in launch.items() if name not in options}
    constexprs |= {name: None for name, kind in pointers.items() if kind is None}
    kinds = {name: kind for name, kind in pointers.items() if kind} | dict.fromkeys(integers, "i32")
    signature = {name: kinds.get(name, "fp32") for name in fn.arg_names}
    signature |= dict.fromkeys(constexprs, "constexpr")
    whole = {*aligned, *(name for name, kind in pointers.items() if kind)}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name in whole}
    return signature, constexprs, options, attrs


def shipped(kind: str, target: int) -> Iterator[tuple[torch.dtype, int, dict]]:
    """Every configuration of a kind of kernel: dtype, head dim, ``blocks``."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            yield dtype, head_dim, blocks(head_dim, config(kind, head_dim, dtype, target))
