"""Pools in 8 bits: every implementation against ``naive.quantise`` and the attention over what it gives back."""

import os
from dataclasses import fields

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import dms_kernels
from dms_kernels import Rows, naive, ops, rows
from dms_kernels.cpu import decode as by_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gpu(name: str):
    pytest.importorskip("triton")
    from dms_kernels.gpu import append, decode

    return {"append": append, "decode": decode}[name]


def test_error_is_half_a_step_and_zeros_stay():
    x = torch.randn(2, 500, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 500)[:, None]
    x[:, 7] = 0
    keys, values, largest = naive.quantise(*x)
    assert keys.dtype == values.dtype == torch.int8 and largest.shape == (500, 2) and largest.dtype == torch.bfloat16
    assert keys.abs().max() == values.abs().max() == 127  # symmetric: -128 is no code
    for given_, back, top in zip(x, naive.dequantise(keys, values, largest, torch.float32), largest.T, strict=True):
        assert ((given_ - back).abs() <= 0.5001 * (top.float() / 127)[:, None]).all()
        assert (back[7] == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_what_was_read_has_the_same_codes_when_it_is_stored_again(dtype):
    """All codes with all largest magnitudes that bf16 has between two powers of two, at several sizes."""
    codes = torch.arange(-127, 128, dtype=torch.int8)
    sizes = torch.tensor([2.0**-9, 1.0, 64.0]) if dtype == torch.float16 else torch.tensor([2.0**-90, 1.0, 2.0**60])
    largest = (sizes[:, None] * (1 + torch.arange(128) / 128)).flatten().bfloat16()[:, None].expand(-1, 2)
    stored = codes.expand(len(largest), -1), -codes.expand(len(largest), -1), largest
    again = naive.quantise(*naive.dequantise(*stored, dtype))
    assert all(torch.equal(a, b) for a, b in zip(again, stored, strict=True))


@settings(max_examples=12)
@given(
    count=st.sampled_from([1, 2, 33]),
    page=st.integers(1, 5),
    width=st.sampled_from([1, 5, 32]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    pages=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@pytest.mark.slow
def test_triton_stores_what_torch_stores_bit_for_bit(count, page, width, dtype, size, pages, seed):
    g = torch.Generator().manual_seed(seed)
    ours, theirs = (Rows.empty(count, pages, 4, page, 2, torch.empty(0, width, dtype=dtype), True) for _ in range(2))
    for _ in range(8):
        k, v = ((size * torch.randn(count, 2 * width, generator=g))[:, ::2].to(dtype) for _ in range(2))
        k[0] = 0
        evict, active = (torch.rand(count, generator=g) < share for share in (0.5, 0.9))
        gpu("append").append(ours, k, v, evict, active, 1)
        rows.append(theirs, k, v, evict, active, 1)
        for field in fields(Rows):
            assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def problem(batch, heads, group, width, page, columns, dtype, seed):
    """q, codes of keys and of values, table, lengths, largest; NaN for the tokens that no row has."""
    g = torch.Generator().manual_seed(seed)
    count = batch * heads
    lengths = torch.randint(0, columns * page + 1, (count,), generator=g).int()
    lengths[0] = 0
    pages = count * columns + 1
    table = torch.randperm(pages, generator=g)[:-1].view(count, columns).int()
    spread = torch.logspace(-1, 1, width)  # some channels are larger than others
    *codes, largest = naive.quantise(*(spread * torch.randn(pages, page, width, generator=g) for _ in range(2)))
    live = torch.zeros(pages, page, dtype=torch.bool)
    live[table.long()] = (torch.arange(columns * page) < lengths[:, None]).view(count, columns, page)
    largest[~live] = float("nan")
    q = torch.randn(batch, heads * group, 1, width, generator=g).to(dtype)
    return q, *(x.contiguous() for x in codes), table, lengths, largest


@settings(max_examples=20)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 17]),
    width=st.sampled_from([32, 80, 128]),
    page=st.sampled_from([1, 5, 16, 64]),
    longest=st.sampled_from([1, 63, 150]),
    dtype=st.sampled_from(DTYPES),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decode_attention_equals_the_oracle(batch, heads, group, width, page, longest, dtype, sinks, seed):
    q, keys, values, table, lengths, largest = problem(
        batch, heads, group, width, page, -(-longest // page), dtype, seed
    )
    sinks = torch.linspace(-1, 2, q.shape[1]) if sinks else None
    clean, scale = largest.nan_to_num(0.0), width**-0.5
    exact = naive.decode_attention(q.float(), keys, values, table, lengths, scale, sinks, clean)
    numbers = naive.dequantise(keys, values, clean, dtype)
    plain = naive.decode_attention(q, *numbers, table, lengths, scale, sinks)
    allowed = 2 * (by_torch.decode_attention(q, *numbers, table, lengths, scale, sinks).float() - exact).abs().max()
    for ours in (dms_kernels, gpu("decode")):
        out = ours.decode_attention(q, keys, values, table, lengths, scale, sinks, largest)
        assert out.dtype == dtype and out.isfinite().all()
        assert (out.float() - exact).abs().max() <= max(allowed, 2 * (plain.float() - exact).abs().max()) + 2e-5


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", DTYPES[::-1])
def test_a_step_is_append_and_attention_and_numbers_are_rounded_once(dtype):
    g = torch.Generator().manual_seed(1)
    like = torch.empty(0, 32, dtype=dtype)
    stores = [Rows.empty(4, 20, 5, 4, 3, like, True) for _ in range(3)]
    plain = Rows.empty(4, 20, 5, 4, 3, like)
    for _ in range(20):
        q = torch.randn(2, 4, 1, 32, generator=g).to(dtype)
        k, v = (torch.randn(2, 2, 1, 32, generator=g).to(dtype) for _ in range(2))
        evict, active = torch.rand(2, 2, 1, generator=g) < 0.6, torch.rand(2, 1, generator=g) < 0.9
        how = evict, active, 1, 0.2
        ours, triton, exact = (
            step(store, q, k, v, *how)
            for step, store in zip((dms_kernels.cache_step, gpu("decode").step, rows.step), stores, strict=True)
        )
        expected = rows.step(plain, q, *naive.dequantise(*naive.quantise(k, v), dtype), *how)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        for out in (ours, triton, expected):
            torch.testing.assert_close(out, exact, **close)
    for store in stores[:2]:
        for field in fields(Rows):
            assert torch.equal(getattr(store, field.name), getattr(stores[2], field.name)), field.name


def test_torch_library_knows_largest():
    store = Rows.empty(4, 20, 5, 4, 3, torch.empty(0, 8), True)
    q, k, v = (torch.randn(2, n, 1, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    flags = torch.ones(2, 2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    dms_kernels.cache_step(store, q, k, v, *flags, 1)
    library.opcheck(ops.step, (*(getattr(store, field.name) for field in fields(store)), q, k, v, *flags, 1, 0.3))
    library.opcheck(ops.decode, (q, store.keys, store.values, store.table, store.length, 0.3, None, store.largest))
