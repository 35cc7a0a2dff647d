"""Attention sinks: a term of the normaliser of its own in every operation, with a gradient."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import dms_kernels
from dms_kernels import EXACT, Past, Rows, naive, ops, prefill, rows, train_attention
from dms_kernels.attention import CompactAttention
from dms_kernels.cpu import decode as by_torch
from dms_kernels.cpu import dense, step
from dms_kernels.plan import training_plan
from dms_kernels.sinks import absorb, sinks_gradient

SHAPE = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 17, 111]), st.sampled_from([4, 16])
)
NAMES = ("out", "dq", "dk", "dv", "dlog_keep", "dsinks")


def draws(shape, seed: int):
    """q (B, H * G, T, D), k and v (B, H, T, D), log_keep (B, H, T), sinks (H * G,), and the generator."""
    batch, heads, group, tokens, width = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, tokens, width, generator=g)
    k, v = (torch.randn(batch, heads, tokens, width, generator=g) for _ in range(2))
    log_keep = -torch.rand(batch, heads, tokens, generator=g) * 4
    log_keep[torch.rand(log_keep.shape, generator=g) < 0.5] = float("-inf")
    return q, k, v, log_keep, torch.randn(heads * group, generator=g) * 3, g


def compact(q, k, v, log_keep, window, segment_ids, scale, sinks):
    plan = training_plan(log_keep.detach(), segment_ids, window, EXACT)
    return CompactAttention.apply(q, k, v, log_keep, plan, scale, sinks)[0]


def on_triton(q, k, v, log_keep, window, segment_ids, scale, sinks):
    """As CompactAttention, with the kernels for a device, interpreted on a CPU."""
    from dms_kernels.gpu import backward, forward

    plan = training_plan(log_keep.detach(), segment_ids, window, EXACT)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, log_keep, sinks):
            out, lse = absorb(*forward.forward(q, k, v, plan, log_keep, scale), sinks)
            ctx.save_for_backward(q, k, v, log_keep, sinks, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, log_keep, sinks, out, lse = ctx.saved_tensors
            grads = backward.backward(grad, q, k, v, out, lse, plan, log_keep, scale)
            return *grads, sinks_gradient(grad, out, lse, sinks)

    return Attention.apply(q, k, v, log_keep, sinks)


def prefilled(limit: int, q, k, v, log_keep, window, _, scale, sinks):
    """Hard decisions, by one masked product up to ``limit`` scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "DENSE", limit)
        return dms_kernels.prefill_attention(q, k, v, log_keep < 0, window, scale=scale, sinks=sinks)[0]


def paged_rows(call, q, k, v, log_keep, window, _, scale, sinks):
    """The last query's answer from pages of all that it sees, and the oracle's for the others."""
    lengths, kept = [], []
    for b in range(len(k)):
        for h in range(k.shape[1]):
            seen = (log_keep[b, h] == 0) | (torch.arange(k.shape[2]) >= k.shape[2] - 1 - window)
            kept.append([torch.nn.functional.pad(x[b, h, seen], (0, 0, 0, 64 - int(seen.sum()))) for x in (k, v)])
            lengths.append(int(seen.sum()))
    keys, values = (torch.cat(x).unflatten(0, (-1, 4)) for x in zip(*kept, strict=True))
    table = torch.arange(len(keys), dtype=torch.int32).view(len(lengths), -1)
    last = call(q[:, :, -1:], keys, values, table, torch.tensor(lengths, dtype=torch.int32), scale, sinks)
    rest = naive.train_attention(q, k, v, log_keep, window, None, scale, sinks)[:, :, :-1]
    return torch.cat([rest, last], 2)


def triton_decode(*arguments):
    from dms_kernels.gpu import decode

    return decode.decode_attention(*arguments)


TRAINERS = {"dense": dense.train_attention, "compact": compact, "triton": on_triton}
OTHERS = {
    "masked prefill": partial(prefilled, 1 << 40),
    "listed prefill": partial(prefilled, 0),
    "decode": partial(paged_rows, dms_kernels.decode_attention),
    "triton decode": partial(paged_rows, triton_decode),
}


def test_the_oracle_is_the_attention_of_gpt_oss():
    q, k, v, log_keep, sinks, _ = draws((2, 2, 2, 33, 16), 0)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    behind = torch.arange(33)[:, None] - torch.arange(33)
    bias = torch.where(behind > 5, log_keep[:, :, None], 0.0).masked_fill(behind < 0, float("-inf"))
    expected = eager_attention_forward(module, q, k, v, bias.repeat_interleave(2, 1), 0.3)[0].transpose(1, 2)
    torch.testing.assert_close(naive.train_attention(q, k, v, log_keep, 5, None, 0.3, sinks), expected)


@pytest.mark.parametrize("implementation", ["dense", "compact"])
@settings(max_examples=15)
@given(shape=SHAPE, window=st.sampled_from([0, 7, 200]), packed=st.booleans(), seed=st.integers(0, 2**31))
def test_training_and_its_gradients_equal_the_oracle(implementation, shape, window, packed, seed):
    check_training(TRAINERS[implementation], shape, window, packed, seed)


@pytest.mark.parametrize(
    "shape, window, packed",
    [((2, 2, 3, 17, 16), 0, True), ((1, 1, 2, 111, 16), 7, True), ((1, 2, 1, 1, 16), 200, False)],
)
def test_training_on_triton_and_its_gradients_equal_the_oracle(shape, window, packed):
    """Its kernels know nothing of sinks, which join afterwards: tests/dms_kernels/test_gpu_attention.py tests them."""
    pytest.importorskip("triton")
    check_training(on_triton, shape, window, packed, seed=0)


def check_training(trainer, shape, window: int, packed: bool, seed: int) -> None:
    *inputs, g = draws(shape, seed)
    segments = (torch.rand(shape[0], shape[3], generator=g) < 0.1).long().cumsum(1) if packed else None
    cotangent, results = torch.randn(inputs[0].shape, generator=g), []
    for function in (naive.train_attention, trainer):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves[:4], window, segments, 0.3, leaves[4])
        out.backward(cotangent)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for name, expected, actual in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", [*TRAINERS, *OTHERS])
def test_half_precision_errs_at_most_twice_as_much_as_the_same_in_torch(implementation):
    if "triton" in implementation:
        pytest.importorskip("triton")
    q, k, v, log_keep, sinks, _ = draws((2, 2, 2, 63, 16), 0)
    log_keep = torch.where(log_keep.isinf(), log_keep, 0.0)
    exact = naive.train_attention(q, k, v, log_keep, 7, None, 0.25, sinks)
    low = [x.bfloat16() for x in (q, k, v)]
    behind = torch.arange(63)[:, None] - torch.arange(63)
    bias = torch.where(behind > 7, log_keep[:, :, None], 0.0).masked_fill(behind < 0, float("-inf"))
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks.bfloat16(), training=False)
    plain = eager_attention_forward(module, *low, bias.repeat_interleave(2, 1).bfloat16(), 0.25)[0].transpose(1, 2)
    out = {**TRAINERS, **OTHERS}[implementation](*low, log_keep, 7, None, 0.25, sinks.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() <= 2 * (plain.float() - exact).abs().max() + 1e-5


@pytest.mark.parametrize("implementation", ["dense", "compact"])
@settings(max_examples=25)
@given(shape=SHAPE, window=st.sampled_from([0, 3, 16]), before=st.sampled_from([None, 40]), seed=st.integers(0, 2**31))
def test_prefill_equals_the_oracle(implementation, shape, window, before, seed):
    batch, heads, _, tokens, width = shape
    q, k, v, _, sinks, g = draws(shape, seed)
    past, about = None, tokens
    if before is not None:
        seen = torch.randint(0, before + 1, (batch,), generator=g)
        count = (torch.rand(batch, heads, generator=g) * ((seen - window - 1).clamp_min(0)[:, None] + 1)).long()
        stored = [torch.randn(batch, heads, n, width, generator=g) for n in (int(count.max()),) * 2 + (window + 1,) * 2]
        past, about = Past(*stored[:2], count, *stored[2:], seen), window + 1 + tokens
    evict = torch.rand(batch, heads, about, generator=g) < 0.5
    lengths = torch.full((batch,), tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "DENSE", 0 if implementation == "compact" else 1 << 40)
        out, _ = dms_kernels.prefill_attention(q, k, v, evict.clone(), window, past, lengths, sinks=sinks)
    expected, _ = naive.prefill_attention(q, k, v, evict, window, past, lengths, width**-0.5, sinks=sinks)
    torch.testing.assert_close(out, expected, rtol=2e-4, atol=2e-5)


def paged(batch: int, heads: int, group: int, width: int, g: torch.Generator):
    """q, keys, values, table, lengths; the first row is empty."""
    table = torch.randperm(batch * heads * 50, generator=g).view(-1, 50).int()
    lengths = torch.randint(1, 201, (batch * heads,), generator=g).int()
    lengths[0] = 0
    keys, values = (torch.randn(table.numel(), 4, width, generator=g) for _ in range(2))
    return torch.randn(batch, heads * group, 1, width, generator=g), keys, values, table, lengths


@pytest.mark.parametrize("implementation", ["facade", "torch", "triton"])
@pytest.mark.parametrize("group", [1, 3])
def test_decode_equals_the_oracle_over_ragged_rows(implementation, group):
    if implementation == "triton":
        pytest.importorskip("triton")
        from dms_kernels.gpu import decode
    g = torch.Generator().manual_seed(group)
    inputs = paged(2, 2, group, 32, g)
    sinks = torch.randn(2 * group, generator=g) * 3
    expected = naive.decode_attention(*inputs, 0.2, sinks)
    if implementation == "triton":
        out, lse = decode.decode_attention(*inputs, 0.2, sinks, chunk=128, return_lse=True)
        plain = decode.decode_attention(*inputs, 0.2, chunk=128, return_lse=True)[1]
        torch.testing.assert_close(lse, torch.logaddexp(plain, sinks[:, None]))
    else:
        call = {"facade": dms_kernels.decode_attention, "torch": by_torch.decode_attention}[implementation]
        out = call(*inputs, 0.2, sinks)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (out[0, :group] == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_is_append_and_attention(threads):
    g = torch.Generator().manual_seed(0)
    ours, theirs = (Rows.empty(4, 80, 20, 4, 3, torch.empty(0, 16)) for _ in range(2))
    sinks, before = torch.randn(4, generator=g), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            q, k, v = (torch.randn(2, n, 1, 16, generator=g) for n in (4, 2, 2))
            flags = torch.rand(2, 2, 1, generator=g) < 0.6, torch.ones(2, 1, dtype=torch.bool)
            out = step.step(ours, q, k, v, *flags, 1, 0.3, sinks)
            torch.testing.assert_close(out, rows.step(theirs, q, k, v, *flags, 1, 0.3, sinks), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_traced_operations_carry_sinks():
    q, k, v, log_keep, sinks, g = draws((1, 2, 2, 70, 8), 0)
    leaves = [x.requires_grad_() for x in (q, k, v, log_keep.clamp_min(-60.0))]
    plan = training_plan(leaves[3].detach(), None, 5, EXACT)
    arguments = (plan.band, plan.kept, plan.count, plan.first, plan.last, plan.window, plan.offset, 0.3)
    library.opcheck(ops.attend, (*leaves, *arguments, sinks.requires_grad_()))
    library.opcheck(ops.decode, (*paged(2, 2, 2, 8, g), 0.3, sinks.detach()))

    traced = torch.compile(train_attention, backend="eager", fullgraph=True)
    q, k, v, log_keep, sinks, _ = draws((1, 2, 2, 600, 8), 0)
    results = []
    for function in (train_attention, traced):
        leaf = sinks.clone().requires_grad_()
        out = function(q, k, v, log_keep, 5, sinks=leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_sinks_of_another_shape_are_refused():
    q, k, v, log_keep, _, _ = draws((1, 2, 2, 9, 4), 0)
    with pytest.raises(ValueError, match=r"sinks of shape \(2,\): must be \(4,\), one a query head"):
        train_attention(q, k, v, log_keep, 2, sinks=torch.zeros(2))
