"""Every implementation behind the facade against ``naive``, the oracle."""

import importlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dms_kernels
from dms_kernels import (
    EXACT,
    Past,
    Rows,
    decode_attention,
    gate_logits,
    naive,
    prefill,
    prefill_attention,
    rows,
    train_attention,
)
from dms_kernels.attention import CompactAttention
from dms_kernels.cpu import decode as by_torch
from dms_kernels.cpu import dense
from dms_kernels.plan import make_plan, training_plan

SHAPES = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 17, 63, 111]),
    st.sampled_from([4, 5, 16]),
)


def draws(shape, seed: int, size: float = 1.0):
    """q (B, H * G, T, D), k and v (B, H, T, D), and the generator."""
    batch, heads, group, tokens, width = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, tokens, width, generator=g) * size
    k, v = (torch.randn(batch, heads, tokens, width, generator=g) for _ in range(2))
    return q, k, v, g


def random_log_keep(shape, mode: str, g: torch.Generator):
    batch, heads, _, tokens, _ = shape
    soft = -torch.rand(batch, heads, tokens, generator=g) * 8
    hard = torch.where(torch.rand(batch, heads, tokens, generator=g) < 0.5, float("-inf"), 0.0)
    everything, nothing = torch.full_like(soft, float("-inf")), torch.zeros_like(soft)
    log_keep = {"soft": soft, "hard": hard, "mixed": soft + hard, "all": everything, "none": nothing}[mode]
    if mode == "mixed":
        log_keep[:, 0] = float("-inf")  # one head without any kept key, the others mixed
    return log_keep


def random_segments(shape, mode: str, g: torch.Generator):
    batch, tokens = shape[0], shape[3]
    if mode == "none":
        return None
    segments = (torch.rand(batch, tokens, generator=g) < 0.1).long().cumsum(1)
    if mode == "padded":
        edge = torch.randint(0, tokens, (batch, 1), generator=g)
        left = torch.rand(batch, 1, generator=g) < 0.5
        place = torch.arange(tokens)
        segments = segments.masked_fill(torch.where(left, place < edge, place > edge), -1)
    return segments


def compacted(q, k, v, log_keep, window, segment_ids=None, scale=None):
    """What train_attention does with sequences that are not short."""
    plan = training_plan(log_keep.detach(), segment_ids, window, EXACT)
    return CompactAttention.apply(q, k, v, log_keep, plan, q.shape[-1] ** -0.5 if scale is None else scale)[0]


TRAINERS = {"dense": dense.train_attention, "compact": compacted}
KEEPS = st.sampled_from(["soft", "hard", "mixed", "all", "none"])
PACKINGS = st.sampled_from(["none", "packed", "padded"])
WINDOWS = st.sampled_from([0, 1, 2, 7, 16, 62, 64, 200])


@pytest.mark.parametrize("implementation", TRAINERS)
@settings(max_examples=120)
@given(shape=SHAPES, window=WINDOWS, mode=KEEPS, packing=PACKINGS, seed=st.integers(0, 2**31))
@example(shape=(1, 2, 2, 128, 4), window=64, mode="hard", packing="packed", seed=1)
@example(shape=(1, 2, 2, 129, 4), window=0, mode="mixed", packing="none", seed=2)
@example(shape=(2, 2, 2, 700, 4), window=7, mode="mixed", packing="packed", seed=3)
@example(shape=(1, 1, 1, 800, 4), window=300, mode="soft", packing="padded", seed=4)
def test_train_attention_and_its_gradients_equal_the_oracle(implementation, shape, window, mode, packing, seed):
    q, k, v, g = draws(shape, seed)
    log_keep, segments = random_log_keep(shape, mode, g), random_segments(shape, packing, g)
    scale = shape[-1] ** -0.5
    cotangent = torch.randn(q.shape, generator=g)
    results = []
    for function in (naive.train_attention, TRAINERS[implementation]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, log_keep)]
        out = function(*leaves, window, segments, scale)
        out.backward(cotangent)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for name, expected, actual in zip(("out", "dq", "dk", "dv", "dlog_keep"), *results, strict=True):
        assert torch.isfinite(actual).all(), name
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", TRAINERS)
@settings(max_examples=20)
@given(shape=SHAPES, mode=KEEPS, seed=st.integers(0, 2**31))
def test_logits_of_magnitude_1e4_stay_finite_and_right(implementation, shape, mode, seed):
    q, k, v, g = draws(shape, seed, size=1e4)
    log_keep = random_log_keep(shape, mode, g)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_keep)]
    out = TRAINERS[implementation](*leaves, 2, None, 1.0)
    out.sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, *(leaf.grad for leaf in leaves)))
    exact = naive.train_attention(q, k, v, log_keep, 2, None, 1.0)
    torch.testing.assert_close(out, exact, rtol=0, atol=0.05)  # fp32 resolves a logit of 1e4 to about 1e-3


@pytest.mark.parametrize("implementation", TRAINERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_the_same_in_torch(dtype, implementation):
    q, k, v, g = draws((2, 2, 2, 63, 16), 0)
    log_keep = random_log_keep((2, 2, 2, 63, 16), "hard", g)
    exact = naive.train_attention(q, k, v, log_keep, 7, None, 0.25)
    low = [x.to(dtype) for x in (q, k, v)]
    group = [x.repeat_interleave(2, 1) for x in (*low[1:], log_keep.to(dtype))]
    behind = torch.arange(63)[:, None] - torch.arange(63)
    bias = torch.where(behind > 7, group[2][:, :, None], 0.0).masked_fill(behind < 0, float("-inf")).to(dtype)
    plain = ((low[0] @ group[0].transpose(-1, -2) * 0.25 + bias).softmax(-1) @ group[1]).float()
    out = TRAINERS[implementation](*low, log_keep, 7, None, 0.25)
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@pytest.mark.parametrize("tokens", [17, 600])
def test_train_attention_runs_forward_and_backward_under_autocast(tokens):
    q, k, v, g = draws((1, 2, 2, tokens, 4), 3)
    leaves = [x.requires_grad_() for x in (q, k, v, random_log_keep((1, 2, 2, tokens, 4), "soft", g))]
    with torch.autocast("cpu", torch.bfloat16):
        out = train_attention(leaves[0], leaves[1], leaves[2].bfloat16(), leaves[3], 2)
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("implementation", ["dense", "compact"])
@settings(max_examples=120)
@given(
    shape=SHAPES,
    window=st.sampled_from([0, 1, 3, 16, 200]),
    slack=st.sampled_from([0, 0, 2, 30]),
    before=st.sampled_from([None, 0, 1, 5, 40]),
    evicted=st.sampled_from([0.0, 0.5, 1.0]),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(shape=(2, 2, 2, 300, 4), window=7, slack=0, before=40, evicted=0.7, padded=True, seed=1)
def test_prefill_equals_the_oracle_and_keeps_what_its_last_token_sees(
    implementation, shape, window, slack, before, evicted, padded, seed
):
    batch, heads, _, tokens, width = shape
    q, k, v, g = draws(shape, seed)
    past, about = None, tokens
    if before is not None:
        seen = torch.randint(0, before + 1, (batch,), generator=g)
        recents = window + 1 + slack
        outside = (seen - recents).clamp_min(0)
        count = (torch.rand(batch, heads, generator=g) * (outside[:, None] + 1)).long()
        stored = [torch.randn(batch, heads, n, width, generator=g) for n in (int(count.max()),) * 2 + (recents,) * 2]
        past, about = Past(*stored[:2], count, *stored[2:], seen), recents + tokens
    evict = torch.rand(batch, heads, about, generator=g) < evicted
    lengths = torch.randint(0, tokens + 1, (batch,), generator=g) if padded else torch.full((batch,), tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "DENSE", 0 if implementation == "compact" else 1 << 40)
        out, kept = prefill_attention(q, k, v, evict.clone(), window, past, lengths, slack=slack)
    expected, stays = naive.prefill_attention(q, k, v, evict, window, past, lengths, width**-0.5, slack)
    tokens_only = (torch.arange(tokens) < lengths[:, None])[:, None, :, None]
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out * tokens_only, expected * tokens_only, rtol=2e-4, atol=2e-5)
    assert (kept.length == stays.sum(2)).all()
    everything = k if past is None else torch.cat([past.k, past.recent_k, k], 2)
    for b in range(batch):
        for h in range(heads):  # the window comes last, so in order
            torch.testing.assert_close(kept.k[b, h, : kept.length[b, h]], everything[b, h, stays[b, h]])


def test_a_plan_lists_each_kept_key_once_and_gives_the_list_room_if_asked():
    keep = torch.tensor([[[True, False, True, True, False, True]]])
    plan = make_plan(keep, torch.zeros(1, 6, dtype=torch.long), window=1, capacity=8)
    assert plan.kept[0, 0].tolist() == [0, 2, 3, 5, 0, 0, 0, 0] and plan.count.item() == 4
    assert plan.band[0].tolist() == [0, 0, 1, 2, 3, 4]
    assert plan.last[0, 0].tolist() == [0, 0, 1, 1, 2, 3] and plan.first[0, 0].tolist() == [0] * 6


@settings(max_examples=100)
@given(
    shape=SHAPES,
    page=st.integers(1, 6),
    longest=st.sampled_from([0, 1, 5, 40]),
    seed=st.integers(0, 2**31),
)
def test_decode_attention_equals_the_oracle_over_ragged_rows_and_empty_rows_get_zero(shape, page, longest, seed):
    batch, heads, group, _, width = shape
    g = torch.Generator().manual_seed(seed)
    rows = batch * heads
    lengths = torch.randint(0, longest + 1, (rows,), generator=g)
    owned = (lengths + page - 1) // page
    columns = max(int(owned.max()), 1)
    pages = int(owned.sum()) + 1
    keys, values = (torch.randn(pages, page, width, generator=g) for _ in range(2))
    table = torch.zeros(rows, columns, dtype=torch.long)
    order = torch.randperm(pages, generator=g).tolist()
    for row in range(rows):
        for column in range(int(owned[row])):
            table[row, column] = order.pop()
    q = torch.randn(batch, heads * group, 1, width, generator=g)
    expected = naive.decode_attention(q, keys, values, table, lengths, width**-0.5)
    empty = (lengths == 0).view(batch, heads, 1).expand(-1, -1, group).flatten(1)
    for actual in (
        decode_attention(q, keys, values, table, lengths),
        by_torch.decode_attention(q, keys, values, table, lengths, width**-0.5),
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)
        assert (actual[empty] == 0).all()


@pytest.mark.every(3)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "heads, group, width, page, window, lag", [(2, 2, 16, 4, 3, 1), (1, 3, 32, 8, 5, 5), (2, 4, 64, 16, 0, 1)]
)
def test_a_compiled_step_is_append_and_attention(heads, group, width, page, window, lag, threads, monkeypatch):
    step = pytest.importorskip("dms_kernels.cpu.compiled") and importlib.import_module("dms_kernels.cpu.step")
    monkeypatch.setattr(step, "ALONE", 0)
    g = torch.Generator().manual_seed(width)
    ours, theirs = (Rows.empty(3 * heads, 60 * heads, 30, page, window, torch.empty(0, width)) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(60):
            q = 3 * torch.randn(3, heads * group, 1, width, generator=g)
            k, v = (torch.randn(3, heads, 1, width, generator=g) for _ in range(2))
            evict, active = torch.rand(3, heads, 1, generator=g) < 0.6, torch.rand(3, 1, generator=g) < 0.8
            out = step.step(ours, q, k, v, evict, active, lag, 0.3)
            torch.testing.assert_close(out, rows.step(theirs, q, k, v, evict, active, lag, 0.3), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)
    for name, tensor in vars(theirs).items():
        assert tensor is None or torch.equal(getattr(ours, name), tensor), name


def test_gate_logits_by_machine_code_equal_the_oracle():
    g = torch.Generator().manual_seed(0)
    hidden, norm, weight = (
        torch.randn(3, 2, 48, generator=g),
        torch.rand(48, generator=g),
        torch.randn(2, 48, generator=g),
    )
    expected = naive.gate_logits(hidden, norm, weight, 1e-6, 100.0, 5.0)
    torch.testing.assert_close(gate_logits(hidden, norm, weight, 1e-6, 100.0, 5.0), expected, rtol=1e-4, atol=1e-3)


def test_decode_attention_over_a_pool_without_pages_is_zero():
    none = torch.empty(0, 4, 8)
    nobody = torch.zeros(2, dtype=torch.long)
    out = decode_attention(torch.randn(1, 4, 1, 8), none, none, torch.zeros(2, 1, dtype=torch.long), nobody)
    assert (out == 0).all()


def test_lse_on_request_is_that_of_the_visible_scores():
    q, k, v, g = draws((1, 2, 2, 63, 8), 6)
    log_keep = random_log_keep((1, 2, 2, 63, 8), "soft", g)
    out, lse = train_attention(q, k, v, log_keep, 5, return_lse=True)
    torch.testing.assert_close(out, train_attention(q, k, v, log_keep, 5), rtol=2e-4, atol=2e-5)
    behind = torch.arange(63)[:, None] - torch.arange(63)
    bias = torch.where(behind > 5, log_keep[:, :, None], 0.0).masked_fill(behind < 0, float("-inf"))
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + bias.repeat_interleave(2, 1)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_scale_defaults_to_one_over_the_root_of_the_head_dimension():
    q, k, v, g = draws((1, 2, 2, 9, 4), 5)
    log_keep = random_log_keep((1, 2, 2, 9, 4), "hard", g)
    torch.testing.assert_close(train_attention(q, k, v, log_keep, 2), train_attention(q, k, v, log_keep, 2, None, 0.5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": -1}, r"window -1: must be >= 0"),
        ({"heads": 3}, r"4 query heads over 3 KV heads"),
        ({"log_keep": torch.zeros(1, 2, 8)}, r"log_keep of shape \(1, 2, 8\): must be \(1, 2, 9\)"),
    ],
)
def test_train_attention_names_what_is_wrong(change, message):
    q, k, v, _ = draws((1, 2, 2, 9, 4), 0)
    if "heads" in change:
        k = v = torch.randn(1, change["heads"], 9, 4)
    with pytest.raises(ValueError, match=message):
        train_attention(q, k, v, change.get("log_keep", torch.zeros(k.shape[:3])), change.get("window", 2))


def test_prefill_and_decode_name_mismatched_heads():
    q, k = torch.randn(1, 4, 2, 4), torch.randn(1, 3, 2, 4)
    at = torch.zeros(1, 3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="4 query heads over 3 KV heads"):
        prefill_attention(q, k, k, at > 0, 2)
    with pytest.raises(ValueError, match=r"evict of shape \(1, 3, 2\): must be \(1, 2, 2\)"):
        prefill_attention(q, k[:, :2], k[:, :2], at > 0, 2)
    with pytest.raises(ValueError, match="4 query heads over 3 KV heads"):
        decode_attention(q[:, :, :1], k[0], k[0], at[0, :, :1], torch.zeros(3, dtype=torch.long))


def test_facade_offers_the_three_operations():
    assert {"train_attention", "prefill_attention", "decode_attention", "naive"} <= set(dms_kernels.__all__)


@pytest.mark.parametrize(("tokens", "kept", "listed"), [(400, 0.1, False), (700, 0.1, True), (700, 0.6, False)])
def test_training_takes_the_list_where_it_pays_and_gives_the_same(tokens, kept, listed, monkeypatch):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (2, 1, 1))
    keep = torch.where(torch.rand(1, 1, tokens, generator=generator) < kept, -0.1, -60.0)
    plans = []
    make = dms_kernels.training_plan
    monkeypatch.setattr(dms_kernels, "training_plan", lambda *given: plans.append(1) or make(*given))
    out = dms_kernels.train_attention(q, k, v, keep, 4)
    assert bool(plans) == listed
    torch.testing.assert_close(out, naive.train_attention(q, k, v, keep, 4, None, 8**-0.5), rtol=1e-4, atol=1e-5)
