"""One query token a row over ragged, paged rows: split over (row, chunk) pieces, then merged by log-sum-exp.

Row r has ceil(length_r / chunk) chunks.  A fixed number of programs walks the list of all chunks of all rows with a
stride, so the work is balanced however uneven the rows are, and no shape depends on data (CUDA graphs).  A chunk's
softmax over its own keys gives a partial output o_c and lse_c, both fp32; out = sum_c 2^(lse_c - m) o_c / sum_c
2^(lse_c - m), m = max_c lse_c, logits in units of log 2.

The GQA group fills the rows of one tile, padded to 16, the least that ``tl.dot`` takes: every key is read once for
the whole group.  Decoding waits for memory (16 padded rows cost 16 flops a byte in bf16, under a tenth of what an
H100's tensor cores can do in that time), and a dot, unlike a broadcast product and a reduction, takes its operands
from shared memory, which the pipelined copies fill, and needs no exchange between lanes.

Of keys and values in 8 bits the codes are multiplied, as numbers of the query's dtype, which holds them exactly; what
a code is worth goes to the scores and to the weights, 4 bytes a token.  For a query in fp32, which the tensor cores do
not take, that would spill: there the pools are made numbers first.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels.gpu.append import LONGEST, append
from dms_kernels.gpu.common import LN2, LOG2E, same_device
from dms_kernels.gpu.interpret import repair
from dms_kernels.naive import LEVELS, dequantise
from dms_kernels.rows import Rows

repair()

TILE = 16384  # bytes of keys, and of values, in one tile
SHORTEST = 128  # tokens of a chunk; the longest: append.LONGEST
MERGED = 4096  # partial values the merge reads at once
UNIT = tl.constexpr(1 / LEVELS)  # what a code of 1 is worth, as a share of the largest magnitude


@triton.jit(do_not_specialize=["rows", "capacity", "chunk"])
def _plan(lengths, first, rows, capacity, chunk, BLOCK: tl.constexpr):
    """first (R + 1,): chunks before each row; the last is the number of all chunks."""
    before = 0
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        length = tl.load(lengths + r, r < rows, other=0).to(tl.int32)
        count = (tl.minimum(tl.maximum(length, 0), capacity) + chunk - 1) // chunk
        tl.store(first + r, before + tl.cumsum(count, 0) - count, r < rows)
        before += tl.sum(count, 0)
    tl.store(first + rows, before)


@triton.jit
def _row_of(first, rows, item):
    """The row that chunk ``item`` of the list belongs to: the last with first[row] <= item."""
    low = tl.full([], 0, tl.int32)
    high = rows - 1
    while low < high:
        middle = (low + high) // 2
        beyond = tl.load(first + middle + 1) <= item
        low = tl.where(beyond, middle + 1, low)
        high = tl.where(beyond, high, middle)
    return low


@triton.jit
def _pages_of(table_row, token, start, live, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Place of every token in the flat pools, int64; a tile that lies in one page looks it up once."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table_row + start // PAGE).to(tl.int64) * PAGE + token % PAGE
    return tl.load(table_row + token // PAGE, live, other=0).to(tl.int64) * PAGE + token % PAGE


@triton.jit(do_not_specialize=["rows", "columns", "group", "chunk"])
def _split(
    q, keys, values, largest, table, lengths, first, partial, lse, rows, columns, group, chunk, scale,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (chunks, G, D), lse (chunks, G), for the chunks p, p + P, p + 2 P, ... of program p of P.

    largest: None, or a key's and a value's largest magnitude, both bf16, in one integer a token."""
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.arange(0, D_PAD)
    real = (g < group)[:, None] & (d < D)[None, :]
    total = tl.load(first + rows)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        row = _row_of(first, rows, item).to(tl.int64)
        begin = (item - tl.load(first + row)) * chunk
        end = tl.minimum(begin + chunk, tl.minimum(tl.load(lengths + row).to(tl.int32), columns * PAGE))
        queries = tl.load(q + (row * group + g[:, None]) * D + d[None, :], real, other=0.0)
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, D_PAD], tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            live = token < end
            slot = _pages_of(table + row * columns, token, start, live, PAGE, BLOCK_N)
            place = slot[:, None] * D + d[None, :]
            wanted = live[:, None] & (d < D)[None, :]
            k = tl.load(keys + place, wanted, other=0.0)  # (BLOCK_N, D)
            scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision="ieee") * scale
            if largest is not None:
                both = tl.load(largest + slot, live, other=0)
                scores *= (both << 16).to(tl.float32, bitcast=True)[None, :]
            scores = tl.where(live[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            norm = norm * shrink + tl.sum(weights, 1)
            v = tl.load(values + place, wanted, other=0.0)
            if largest is not None:
                weights *= (both & -65536).to(tl.float32, bitcast=True)[None, :]
            weights = weights.to(queries.dtype)
            acc = tl.dot(weights, v.to(queries.dtype), acc * shrink[:, None], input_precision="ieee")
            top = new_top
        if largest is not None:
            acc *= UNIT
        to = (tl.zeros([BLOCK_G], tl.int64) + item) * group + g
        tl.store(partial + to[:, None] * D + d[None, :], acc / norm[:, None], real)
        tl.store(lse + to, top + tl.log2(norm), g < group)


@triton.jit(do_not_specialize=["group", "heads"])
def _merge(
    first, partial, lse, out, out_lse, sinks, group, heads, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """One query head a program; a row without chunks gives 0 and -inf, or its sink."""
    i = tl.program_id(0)
    d = tl.arange(0, D_PAD)
    row = i // group
    begin = tl.load(first + row)
    end = tl.load(first + row + 1)
    top = tl.full([1], float("-inf"), tl.float32)
    norm = tl.zeros([1], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = c.to(tl.int64) * group + i % group
        part_lse = tl.load(lse + at, c < end, other=float("-inf"))
        part = tl.load(partial + at[:, None] * D + d[None, :], (c < end)[:, None] & (d < D)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        weight = tl.exp2(part_lse - new_top)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        norm = norm * shrink + tl.sum(weight, 0)
        top = new_top
    if sinks is not None:
        sink = tl.load(sinks + i % heads + tl.arange(0, 1)).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink
        norm = norm * shrink + tl.exp2(sink - new_top)
        top = new_top
    some = norm > 0
    tl.store(out + i.to(tl.int64) * D + d, (acc / tl.where(some, norm, 1.0)).to(out.dtype.element_ty), d < D)
    logs = tl.where(some, (top + tl.log2(tl.where(some, norm, 1.0))) * LN2, float("-inf"))
    tl.store(out_lse + i + tl.arange(0, 1), logs)


def _tiles(group: int, width: int, size: int, int8: bool = False) -> tuple[dict, dict]:
    """Tile sizes and launch options for a GQA group, a head dimension, and bytes of a number of the query."""
    padded, half = max(16, triton.next_power_of_2(width)), size == 2  # 16: the least that tl.dot takes
    rows = min(max(16, triton.next_power_of_2(group)), 32 if half else 16)  # more would spill
    tile = TILE // 2 if int8 else TILE  # codes become numbers in registers, of which there are not enough for more
    tokens = min(max(16, tile // (padded * size)), 128 if half else 64)
    # The look-up of the pages takes half of the pipeline's stages: 5 give two tiles of keys and two of values.
    options = {"num_warps": 4, "num_stages": 5 if half else 3}
    return {"D": width, "D_PAD": padded, "BLOCK_G": rows, "BLOCK_N": tokens}, options


def _merge_tiles(width: int) -> dict:
    padded = triton.next_power_of_2(width)
    return {"D": width, "D_PAD": padded, "BLOCK": MERGED // padded}


def chunk_length(rows: int, capacity: int, programs: int) -> int:
    """Tokens a chunk, from static shapes alone: shorter where full rows would leave programs idle."""
    chunk = LONGEST
    while chunk > SHORTEST and rows * triton.cdiv(capacity, chunk) < 2 * programs:
        chunk //= 2
    return chunk


def _programs(device: torch.device) -> int:
    """As many as are resident at once with 72 KiB of shared memory each."""
    if device.type != "cuda":
        return 3
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (3 if properties.major >= 9 else 2)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float,
    sinks: Tensor | None = None, largest: Tensor | None = None, programs: int | None = None, chunk: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See naive.decode_attention.  table (R, columns) and lengths (R,) of any integer dtype, pools contiguous.

    ``programs`` share ``chunk`` tokens at a time, a multiple of 128.  With ``return_lse`` also the log-sum-exp of
    the scores, (B, Hq, 1) fp32, -inf for an empty row; a sink is one of them.  Nothing waits for the device.
    """
    rows, capacity = len(table), table.shape[1] * keys.shape[1]
    programs = programs or _programs(q.device)
    chunk = chunk or chunk_length(rows, capacity, programs)
    if chunk % SHORTEST:
        raise ValueError(f"chunk {chunk}: must be a multiple of {SHORTEST}")
    first = torch.empty(rows + 1, dtype=torch.int32, device=q.device)
    with same_device(q, table, lengths):
        _plan[(1,)](lengths, first, rows, capacity, chunk, BLOCK=128 if rows <= 128 else 1024, num_warps=4)
    out, lse = _attend(q, keys, values, largest, table, lengths, first, scale, sinks, programs, chunk)
    return (out, lse) if return_lse else out


def step(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int, scale: float,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.step; four launches."""
    programs = _programs(q.device)
    chunk = chunk_length(len(rows.length), rows.table.shape[1] * rows.page, programs)
    first = append(rows, k, v, evict, active, lag, chunk)
    pools = rows.keys, rows.values, rows.largest
    return _attend(q, *pools, rows.table, rows.length, first, scale, sinks, programs, chunk)[0]


def _attend(
    q, keys, values, largest, table, lengths, first, scale, sinks, programs: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Split and merge by the plan ``first`` (R + 1,): out (B, Hq, 1, D) and lse (B, Hq, 1)."""
    batch, heads, _, width = q.shape
    rows, columns = table.shape
    page, group = keys.shape[1], batch * heads // rows
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"keys and values of strides {keys.stride()} and {values.stride()}: must be contiguous")
    pieces = rows * triton.cdiv(columns * page, chunk)  # no more chunks than this
    partial = torch.empty(pieces, group, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(pieces, group, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, 1, width, dtype=q.dtype, device=q.device)
    out_lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.contiguous()
    if largest is not None and q.dtype == torch.float32:
        (keys, values), largest = dequantise(keys, values, largest, q.dtype), None
    if largest is not None:
        largest, scale = largest.view(torch.int32), scale * UNIT.value
    tiles, options = _tiles(group, width, q.element_size(), largest is not None)
    with same_device(q, keys, values, largest, table, lengths, first, sinks):
        _split[(programs, triton.cdiv(group, tiles["BLOCK_G"]))](
            q.contiguous(), keys, values, largest, table.contiguous(), lengths.contiguous(), first, partial, lse,
            rows, columns, group, chunk, scale * LOG2E.value, PAGE=page, **tiles, **options,
        )  # fmt: skip
        sizes = {**_merge_tiles(width), "num_warps": 4}
        _merge[(batch * heads,)](first, partial, lse, out, out_lse, sinks, group, heads, **sizes)
    return out, out_lse


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options) of what is launched; the same for every ``target``."""
    types = {
        **dict.fromkeys(("first", "table", "lengths"), "*i32"), **dict.fromkeys(("partial", "lse", "out_lse"), "*fp32"),
        **dict.fromkeys(("rows", "columns", "capacity", "group", "heads", "chunk"), "i32"), "scale": "fp32",
    }  # fmt: skip

    def case(name, kernel, constants, options, **more):
        known = {**types, **more}
        return name, kernel, {x: known[x] for x in kernel.arg_names if x not in constants}, constants, options

    def split(dtype, width, page, group, index="i32", int8=False):
        tiles, options = _tiles(group, width, 4 if dtype == "fp32" else 2, int8)
        pools = dict.fromkeys(("keys", "values"), "*i8" if int8 else f"*{dtype}") | {"largest": "*i32"}
        types = {"q": f"*{dtype}", **pools, "table": f"*{index}", "lengths": f"*{index}"}
        name = f"decode.split {dtype}{' int8' * int8} D{width} page{page} G{group}" + " int64" * (index == "i64")
        constants = {"PAGE": page, **tiles, **({} if int8 else {"largest": None})}
        return case(name, _split, constants, options, **types)

    for width in (32, 64, 80, 96, 128, 256):
        for dtype in ("bf16", "fp16", "fp32"):
            yield split(dtype, width, 16, 4)
            if dtype != "fp32":
                yield split(dtype, width, 16, 4, int8=True)
            for sinks in (None, f"*{dtype}"):
                constants = {**_merge_tiles(width), **({} if sinks else {"sinks": None})}
                name = f"decode.merge {dtype} D{width}" + (" sinks" if sinks else "")
                yield case(name, _merge, constants, {"num_warps": 4}, out=f"*{dtype}", sinks=sinks)
    for width in (64, 128, 256):
        for page, group in ((64, 4), (5, 4), (16, 32), (16, 64)):
            yield split("bf16", width, page, group)
            yield split("bf16", width, page, group, int8=True)
    yield split("bf16", 128, 16, 4, "i64")
    yield split("fp32", 256, 64, 4)
    for block in (128, 1024):
        yield case(f"decode.plan rows{block}", _plan, {"BLOCK": block}, {"num_warps": 4})
