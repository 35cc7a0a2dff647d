"""Paged decode attention in Triton against ``naive``: interpreted on a CPU, and on a device where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dms_kernels import naive, rows
from dms_kernels.rows import Rows

pytest.importorskip("triton")
from dms_kernels.gpu import decode, gate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = st.sampled_from(["any", "none", "one", "whole pages", "uneven"])


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def random_lengths(mode: str, count: int, columns: int, page: int, g: torch.Generator):
    most = columns * page
    lengths = torch.randint(0, most + 1, (count,), generator=g)
    if mode == "uneven":
        lengths[:-1] //= 16
    return {"none": lengths * 0, "one": lengths * 0 + 1, "whole pages": lengths // page * page}.get(mode, lengths)


def problem(batch, heads, group, width, page, columns, mode, dtype, seed, size=1.0, index=torch.int32, device="cpu"):
    """q, keys, values, table, lengths; NaN in every slot that no row uses, nonsense in unused table entries."""
    g = torch.Generator().manual_seed(seed)
    count = batch * heads
    lengths = random_lengths(mode, count, columns, page, g)
    owned = (lengths + page - 1) // page
    pages = int(owned.sum()) + 2
    keys, values = (torch.randn(pages, page, width, generator=g).to(dtype) for _ in range(2))
    table = torch.full((count, columns), 1 << 30, dtype=torch.long)
    order, used = torch.randperm(pages, generator=g).tolist(), torch.zeros(pages, page, dtype=torch.bool)
    for row in range(count):
        for column in range(int(owned[row])):
            table[row, column] = order.pop()
            used[table[row, column], : int(lengths[row]) - column * page] = True
    keys[~used], values[~used] = float("nan"), float("nan")
    q = (torch.randn(batch, heads * group, 1, width, generator=g) * size).to(dtype)
    return [x.to(device) for x in (q, keys, values, table.to(index), lengths.to(index))]


def oracle(q, keys, values, table, lengths, scale):
    """naive, on pools without NaN and a table without nonsense, in fp32."""
    table = torch.where(table < len(keys), table, 0).long()
    clean = [x.nan_to_num(0.0).float() for x in (q, keys, values)]
    return naive.decode_attention(*clean, table, lengths, scale)


def plain(q, keys, values, table, lengths, scale):
    """The same in the inputs' dtype throughout, in stock torch."""
    batch, group = q.shape[0], q.shape[0] * q.shape[1] // len(table)
    table = torch.where(table < len(keys), table, 0).long()
    k, v = (x.nan_to_num(0.0)[table].flatten(1, 2).unflatten(0, (batch, -1)) for x in (keys, values))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    dead = torch.arange(k.shape[2], device=q.device) >= lengths.view(batch, -1, 1).repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(dead[:, :, None], float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).float()


class poisoned:
    """torch.empty gives NaN, or the largest integer, as long as this lasts."""

    def __enter__(self):
        self.empty = torch.empty

        def empty(*args, **kwargs):
            x = self.empty(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        torch.empty = empty

    def __exit__(self, *_):
        torch.empty = self.empty


def check(args, scale, **how):
    with poisoned():
        out, lse = decode.decode_attention(*args, scale, return_lse=True, **how)
    exact, same = oracle(*args, scale), plain(*args, scale)
    assert out.dtype == args[0].dtype and out.shape == args[0].shape
    assert torch.isfinite(out).all()
    allowed = 2 * (same - exact).abs().max() + 1e-5
    assert (out.float() - exact).abs().max() <= allowed
    group = args[0].shape[1] * len(args[0]) // len(args[3])
    empty = (args[4] == 0).repeat_interleave(group)
    assert (out.flatten(0, 2)[empty] == 0).all() and (lse.flatten()[empty] == float("-inf")).all()
    assert torch.isfinite(lse.flatten()[~empty]).all()
    return out, lse


@pytest.mark.slow
@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 17]),
    width=st.sampled_from([32, 64, 80, 96, 128, 256]),
    page=st.sampled_from([1, 3, 5, 16, 64, 128, 200]),
    longest=st.sampled_from([1, 63, 150, 400]),
    mode=LENGTHS,
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    programs=st.sampled_from([1, 2, 5]),
    chunk=st.sampled_from([None, 128, 256]),
    seed=st.integers(0, 2**31),
)
@example(1, 1, 1, 32, 16, 1, "none", torch.bfloat16, torch.int32, 1, None, 0)
@example(2, 1, 66, 64, 16, 63, "any", torch.float16, torch.int32, 2, None, 1)  # more than one tile of query heads
@example(2, 1, 34, 256, 64, 63, "any", torch.bfloat16, torch.int64, 2, None, 1)
@example(43, 3, 1, 32, 1, 3, "any", torch.float32, torch.int32, 3, None, 2)  # more rows than one block of the plan
@example(1, 2, 2, 64, 128, 128, "whole pages", torch.float32, torch.int32, 2, 128, 3)
def test_decode_equals_the_oracle_over_ragged_rows_and_empty_rows_get_zero(
    batch, heads, group, width, page, longest, mode, dtype, index, programs, chunk, seed
):
    args = problem(batch, heads, group, width, page, -(-longest // page), mode, dtype, seed, index=index)
    check(args, width**-0.5, programs=programs, chunk=chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "group, page, longest", [(1, 16, 4096), (4, 64, 3000), (7, 5, 1111), (32, 16, 700), (64, 128, 700)]
)
def test_on_the_device_decode_equals_the_oracle(dtype, width, group, page, longest):
    needs("cuda")
    for mode in ("any", "none", "one", "whole pages", "uneven"):
        args = problem(3, 4, group, width, page, -(-longest // page), mode, dtype, width, device="cuda")
        check(args, width**-0.5)
        check(args, width**-0.5, programs=3, chunk=128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_magnitude_1e4_stay_finite_and_right(device, dtype):
    needs(device)
    args = problem(2, 2, 2, 32, 16, 10, "any", dtype, 5, size=1e3, device=device)
    check(args, 5.0)


@pytest.mark.parametrize("device", DEVICES)
def test_lse_is_the_log_sum_exp_of_the_scores(device):
    needs(device)
    args = problem(2, 2, 3, 32, 5, 60, "any", torch.float32, 8, device=device)
    q, keys, _, table, lengths = args
    _, lse = check(args, 0.3, chunk=128)
    for row in range(4):
        n = int(lengths[row])
        k = keys[table[row, : -(-n // 5)].long()].flatten(0, 1)[:n]
        expected = (q.view(4, 3, 32)[row] @ k.T * 0.3).logsumexp(-1)
        torch.testing.assert_close(lse.view(4, 3)[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_result_does_not_depend_on_who_computes_what(device):
    needs(device)
    args = problem(2, 3, 2, 64, 16, 40, "uneven", torch.float32, 3, device=device)
    one, many = (decode.decode_attention(*args, 0.125, programs=p, chunk=128) for p in (1, 7))
    assert torch.equal(one, many)


def test_queries_need_not_be_contiguous_and_pools_must_be():
    args = problem(2, 3, 2, 32, 16, 4, "any", torch.float32, 3)
    strided = torch.stack([args[0], args[0]], -1)[..., 0]
    assert torch.equal(decode.decode_attention(strided, *args[1:], 0.2), decode.decode_attention(*args, 0.2))
    with pytest.raises(ValueError, match="must be contiguous"):
        decode.decode_attention(args[0], args[1].transpose(0, 1), *args[2:], 0.2)
    with pytest.raises(ValueError, match="chunk 100: must be a multiple of 128"):
        decode.decode_attention(*args, 0.2, chunk=100)


def test_pool_without_pages_gives_zero():
    none, nobody = torch.empty(0, 4, 32), torch.zeros(2, dtype=torch.long)
    out = decode.decode_attention(
        torch.randn(1, 4, 1, 32), none, none, torch.zeros(2, 1, dtype=torch.long), nobody, 1.0
    )
    assert (out == 0).all()


def test_chunks_are_short_only_where_programs_would_idle():
    assert decode.chunk_length(256, 32768, 396) == 512
    assert decode.chunk_length(8, 4096, 396) == 128
    assert decode.chunk_length(8, 32768, 396) == 256


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_decode_never_waits_for_the_device():
    args = problem(2, 3, 2, 32, 16, 4, "any", torch.float32, 3)
    with Operations() as run:
        decode.decode_attention(*args, 0.2)
    waits = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "_unique2",
        "index",
        "index_put_",
    }
    assert not run.names & waits


def step_inputs(count: int, width: int, steps: int, device: str):
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(steps, count, width, generator=g).to(device) for _ in range(2))
    q = torch.randn(steps, count // 2, 4, 1, width, generator=g).to(device)
    evict, active = (torch.rand(steps, count, generator=g).to(device) < share for share in (0.6, 0.9))
    return q, k, v, evict, active


@pytest.mark.parametrize("device", DEVICES)
def test_append_and_decode_together_follow_torch_and_naive(device):
    needs(device)
    q, k, v, evict, active = step_inputs(4, 32, 20, device)
    ours, theirs = (Rows.empty(4, 20, 5, 4, 3, k) for _ in range(2))
    for i in range(20):
        out = decode.step(ours, q[i], k[i], v[i], evict[i], active[i], 1, 0.2)
        rows.append(theirs, k[i], v[i], evict[i], active[i], 1)
        expected = naive.decode_attention(q[i], theirs.keys, theirs.values, theirs.table, theirs.length, 0.2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_of_append_and_decode_replays_20_steps():
    needs("cuda")
    q, k, v, evict, active = step_inputs(4, 128, 20, "cuda")
    cache, plain_cache, warm = (Rows.empty(4, 20, 5, 4, 3, k) for _ in range(3))
    static = [x[0].clone() for x in (q, k, v, evict, active)]

    def step(cache):
        return decode.step(cache, *static, 1, 0.2)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(cache)
    for i in range(20):
        for to, new in zip(static, (q[i], k[i], v[i], evict[i], active[i]), strict=True):
            to.copy_(new)
        graph.replay()
        expected = step(plain_cache)
        assert torch.equal(out, expected) and torch.equal(cache.length, plain_cache.length)
        exact = naive.decode_attention(q[i], cache.keys, cache.values, cache.table, cache.length, 0.2)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_append_and_decode_pass_without_any_synchronisation():
    needs("cuda")
    q, k, v, evict, active = step_inputs(4, 64, 6, "cuda")
    cache, other = (Rows.empty(4, 20, 5, 4, 3, k) for _ in range(2))
    for i in range(6):  # the first step compiles
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            decode.step(cache, q[i], k[i], v[i], evict[i], active[i], 1, 0.2)
            rows.append(other, k[i], v[i], evict[i], active[i], 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cache.length, other.length)


MEMCHECK = """
import torch
from dms_kernels.gpu import append, decode, gate
from dms_kernels.rows import Rows
for width, group, page in ((80, 3, 5), (128, 4, 16), (256, 2, 64)):
    k = torch.randn(6, width, device="cuda", dtype=torch.bfloat16)
    cache, yes = Rows.empty(6, 40, 6, page, 3, k), torch.ones(6, dtype=torch.bool, device="cuda")
    for i in range(40):
        append.append(cache, k, k, yes if i % 2 else ~yes, yes, 1)
        q = torch.randn(2, 3 * group, 1, width, device="cuda", dtype=torch.bfloat16)
        decode.decode_attention(q, cache.keys, cache.values, cache.table, cache.length, 0.1)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_compute_sanitizer_finds_no_bad_access():
    needs("cuda")
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", MEMCHECK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_buffers_depend_on_static_shapes_only():
    sizes = []
    for mode in ("none", "uneven"):
        args = problem(2, 3, 2, 32, 16, 20, mode, torch.float32, 3)
        made, empty = [], torch.empty
        torch.empty = lambda *a, made=made, empty=empty, **k: made.append(a) or empty(*a, **k)
        try:
            decode.decode_attention(*args, 0.2, chunk=128)
        finally:
            torch.empty = empty
        sizes.append(made)
    assert sizes[0] == sizes[1] and (6 * 3, 2, 32) in sizes[0]  # 6 rows of 320 tokens, 128 a chunk


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, width", [(2, 48), (5, 1500)])
def test_gate_is_a_product_with_the_normed_state(device, heads, width):
    needs(device)
    g = torch.Generator().manual_seed(heads)
    hidden = torch.randn(3, 2, width, generator=g).bfloat16().to(device)
    norm, weight = torch.rand(width, generator=g).to(device), torch.randn(heads, width, generator=g).to(device)
    out = gate.gate_logits(hidden, norm, weight, 1e-6, 100.0, 5.0)
    torch.testing.assert_close(out, naive.gate_logits(hidden, norm, weight, 1e-6, 100.0, 5.0), rtol=1e-4, atol=0.02)
