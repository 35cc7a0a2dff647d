"""Triton attention over a band and a kept list against ``naive``: interpreted on a CPU, and on a device if there is."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dms_kernels import naive
from dms_kernels.plan import document_starts, make_plan, training_plan

pytest.importorskip("triton")
import triton

from dms_kernels.gpu import backward, common, forward, keys

NEVER = float("-inf")
without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, without])]
LONGER = {1: 1, 2: 2, 17: 333, 63: 1023, 111: 2111}  # tokens on a device
WINDOWS = {0: 0, 1: 1, 7: 63, 20: 256, 200: 4000}
NAMES = ("out", "dq", "dk", "dv", "dlog_keep")


@pytest.fixture(autouse=True)
def bfloat16_rounds_as_on_a_device(monkeypatch):
    """The interpreter truncates from fp32 to bf16."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, to, mode):
        if (source.scalar, to.scalar) != (float32, bfloat16):
            return convert(x, source, to, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


class Case:
    """Inputs over S = past + T keys; the T last of S queries are asked."""

    def __init__(self, shape, window, mode, packing, past, spare, strided, seed, device="cpu", size=1.0, lengthen=True):
        batch, heads, group, tokens, width = shape
        if device == "cuda" and lengthen:
            tokens, window = LONGER[tokens], WINDOWS[window]
        g = torch.Generator().manual_seed(seed)
        keys = past + tokens
        self.past, self.window, self.scale, self.device = past, window, width**-0.5, device
        self.q = torch.randn(batch, keys, heads * group, width, generator=g).mul_(size).to(device).transpose(1, 2)
        self.k, self.v = torch.randn(2, batch, heads, keys, width + 16, generator=g)[..., :width].to(device)
        self.log_keep = random_log_keep((batch, heads, keys), mode, g).to(device)
        self.segments = random_segments((batch, keys), packing, g)
        self.grad = torch.randn(self.q[:, :, past:].shape, generator=g).to(device)
        if strided:
            self.log_keep, self.grad = (
                x.transpose(1, -1).contiguous().transpose(1, -1) for x in (self.log_keep, self.grad)
            )
        else:
            self.q, self.k, self.v = (x.contiguous() for x in (self.q, self.k, self.v))
        if self.segments is None:
            start = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        else:
            self.segments = self.segments.to(device)
            start = document_starts(self.segments)[:, past:]
        self.plan = make_plan(self.log_keep > NEVER, start, window, None if spare is None else keys + spare)
        if past == 0 and spare is None:
            self.plan = training_plan(self.log_keep, self.segments, window, NEVER)

    def oracle(self, dtype=torch.float32, attend=naive.train_attention):
        """out and the gradients of q, k, v and log_keep; ``attend`` computes in ``dtype``."""
        leaves = [x.to(dtype).float().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        leaves.append(self.log_keep.clone().requires_grad_())
        low = [x.to(dtype) for x in leaves[:3]] if attend is not naive.train_attention else leaves[:3]
        out = attend(*low, leaves[3], self.window, self.segments, self.scale)[:, :, self.past :]
        out.backward(self.grad.to(dtype).to(out.dtype))
        return [out.detach(), leaves[0].grad[:, :, self.past :], *(x.grad for x in leaves[1:])]

    def ours(self, dtype=torch.float32, biased=True, tile=None):
        """The same from the kernels, and lse.  ``tile``: rows and keys of a block, in place of what is shipped."""
        q, k, v, grad = (x.to(dtype) for x in (self.q[:, :, self.past :], self.k, self.v, self.grad))
        log_keep = self.log_keep if biased else None
        with pytest.MonkeyPatch.context() as patch:
            poison(patch)
            if tile is not None and self.device == "cpu":
                for module in (forward, backward, keys):
                    patch.setattr(module, "config", lambda *_: common.Launch(*tile, 4, 1))
            out, lse = forward.forward(q, k, v, self.plan, log_keep, self.scale)
            grads = backward.backward(grad, q, k, v, out, lse, self.plan, log_keep, self.scale)
        return [out, *grads], lse


def poison(patch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        patch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))


def random_log_keep(shape, mode: str, g: torch.Generator):
    soft = -torch.rand(shape, generator=g) * 8
    hard = torch.where(torch.rand(shape, generator=g) < 0.5, NEVER, 0.0)
    everything, nothing = torch.full_like(soft, NEVER), torch.zeros_like(soft)
    log_keep = {"soft": soft, "hard": hard, "mixed": soft + hard, "all": everything, "none": nothing}[mode]
    if mode == "mixed":
        log_keep[:, 0] = NEVER  # one head without any kept key, the others mixed
    return log_keep


def random_segments(shape, mode: str, g: torch.Generator):
    if mode == "none":
        return None
    segments = (torch.rand(shape, generator=g) < 0.1).long().cumsum(1)
    if mode == "padded":
        edge = torch.randint(0, shape[1], (shape[0], 1), generator=g)
        left = torch.rand(shape[0], 1, generator=g) < 0.5
        place = torch.arange(shape[1])
        segments = segments.masked_fill(torch.where(left, place < edge, place > edge), -1)
    return segments


def dense_bias(case: Case):
    """What naive adds to the logits, (B, H, S, S)."""
    place = torch.arange(case.k.shape[2], device=case.device)
    behind = place[:, None] - place
    bias = torch.where(behind > case.window, case.log_keep[:, :, None], 0.0).masked_fill(behind < 0, NEVER)
    if case.segments is not None:
        bias = bias.masked_fill((case.segments[:, :, None] != case.segments[:, None])[:, None], NEVER)
    return bias


def dense_logits(case: Case):
    group = case.q.shape[1] // case.k.shape[1]
    k, bias = (x.repeat_interleave(group, 1) for x in (case.k, dense_bias(case)))
    return (case.q @ k.transpose(-1, -2) * case.scale + bias)[:, :, case.past :]


SHAPES = st.tuples(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 5),
    st.sampled_from([1, 2, 17, 63, 111]),
    st.sampled_from([16, 32, 80, 96]),
)
TILES = st.sampled_from([(16, 16), (64, 32), (32, 64), (128, 64), (64, 128)])
CASES = {
    "shape": SHAPES,
    "window": st.sampled_from(sorted(WINDOWS)),
    "mode": st.sampled_from(["soft", "hard", "mixed", "all", "none"]),
    "packing": st.sampled_from(["none", "packed", "padded"]),
    "past": st.sampled_from([0, 0, 40]),
    "spare": st.sampled_from([None, 0, 37]),
    "strided": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=24)
@given(biased=st.booleans(), tile=TILES, **CASES)
@example(
    biased=True,
    tile=(16, 16),
    shape=(1, 1, 3, 111, 32),
    window=20,
    mode="mixed",
    packing="none",
    past=0,
    spare=None,
    strided=True,
    seed=1,
)
@example(
    biased=True,
    tile=(16, 16),
    shape=(1, 1, 1, 111, 80),
    window=0,
    mode="none",
    packing="packed",
    past=40,
    spare=37,
    strided=False,
    seed=2,
)
def test_attention_and_its_gradients_equal_the_oracle(device, biased, tile, **case):
    biased = biased or case["mode"] in ("soft", "mixed")
    case = Case(**case, device=device)
    results, lse = case.ours(biased=biased, tile=tile)
    for name, actual, expected in zip(NAMES, results, case.oracle(), strict=True):
        if name == "dlog_keep" and not biased:
            assert actual is None
            continue
        assert torch.isfinite(actual).all(), name
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(lse, dense_logits(case).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=4)
@given(mode=CASES["mode"], seed=CASES["seed"], tile=TILES)
@example(mode="mixed", seed=0, tile=(16, 16))
def test_logits_of_magnitude_1e4_stay_finite_and_right(device, mode, seed, tile):
    case = Case((1, 2, 2, 63, 32), 7, mode, "none", 0, None, False, seed, device, size=1e4)
    results, lse = case.ours(tile=tile)
    assert all(torch.isfinite(x).all() for x in (*results, lse))
    torch.testing.assert_close(results[0], case.oracle()[0], rtol=0, atol=0.05)  # fp32 resolves 1e4 to about 1e-3


def plain_attention(q, k, v, log_keep, window, segments, scale):
    """naive.train_attention in the dtype of its inputs."""
    group = q.shape[1] // k.shape[1]
    k, v, log_keep = (x.repeat_interleave(group, 1) for x in (k, v, log_keep.to(q.dtype)))
    place = torch.arange(k.shape[2], device=q.device)
    behind = place[:, None] - place
    bias = torch.where(behind > window, log_keep[:, :, None], 0.0).to(q.dtype).masked_fill(behind < 0, NEVER)
    return (q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["hard", "mixed"])
def test_half_precision_errs_at_most_twice_as_much_as_the_same_in_torch(device, dtype, mode):
    case = Case((1, 2, 3, 111, 32), 7, mode, "none", 0, None, True, 0, device)
    ours, lse = case.ours(dtype, biased=mode == "mixed")
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == ours[3].dtype == dtype and lse.dtype == torch.float32
    references = case.oracle(dtype), case.oracle(dtype, plain_attention)
    for name, actual, exact, plain in zip(NAMES, ours, *references, strict=True):
        if actual is not None:
            assert (actual.float() - exact).abs().max() <= 2 * (plain.float() - exact).abs().max() + 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
def test_a_key_that_nobody_reads_may_hold_anything(device):
    case = Case((1, 2, 2, 17, 32), 1, "hard", "none", 40, 5, False, 3, device)
    expected = case.oracle()[0]
    unread = (case.log_keep == NEVER) & (torch.arange(case.k.shape[2], device=device) < case.past - case.window)
    case.k[unread] = case.v[unread] = float("nan")
    q = case.q[:, :, case.past :]
    out, _ = forward.forward(q, case.k, case.v, case.plan, None, case.scale)
    torch.testing.assert_close(out, expected, rtol=2e-4, atol=3e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_2_to_the_31_are_right(device, tmp_path):
    tokens, width, stride = 140, 16, 1 << 24
    if device == "cpu":  # a sparse file: only the pages that are touched exist
        room = torch.from_file(str(tmp_path / "room"), shared=True, size=tokens * stride, dtype=torch.float16)
    else:
        room = torch.empty(tokens * stride, dtype=torch.float16, device=device)
    case = Case((1, 1, 1, 111, width), 7, "hard", "none", tokens - 111, None, False, 4, device, lengthen=False)
    case.q, case.k, case.v = (
        room.as_strided((1, 1, tokens, width), (0, 0, stride, 1), place * 4096).copy_(x)
        for place, x in enumerate((case.q, case.k, case.v))
    )
    far, _ = case.ours(torch.float16)
    case.q, case.k, case.v = (x.contiguous() for x in (case.q, case.k, case.v))
    near, _ = case.ours(torch.float16)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_input_gives_the_same_bits(device):
    case = Case((1, 2, 2, 63, 32), 7, "mixed", "packed", 0, 9, True, 5, device)
    for a, b in zip(case.ours()[0], case.ours()[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.every(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("target", "width", "group"), [(90, 64, 2), (90, 128, 1), (86, 64, 1), (86, 128, 2)])
def test_shipped_tiles_in_bf16_err_at_most_twice_as_much_as_torch(device, target, width, group, monkeypatch):
    for module in (forward, backward, keys):
        monkeypatch.setattr(module, "target_of", lambda _: target)
    case = Case((1, 1, group, 300, width), 20, "soft", "none", 0, None, False, 6, device, lengthen=False)
    ours, _ = case.ours(torch.bfloat16)
    references = case.oracle(torch.bfloat16), case.oracle(torch.bfloat16, plain_attention)
    for name, actual, exact, plain in zip(NAMES, ours, *references, strict=True):
        assert (actual.float() - exact).abs().max() <= 2 * (plain.float() - exact).abs().max() + 1e-5, name


@pytest.mark.every(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("parts", "places"), [(2, 4), (1, 1), (5, 2)])
def test_order_of_programs_and_parts_of_a_block_do_not_matter(device, parts, places, monkeypatch):
    monkeypatch.setattr(keys, "_parts", lambda *_: parts)
    for module in (forward, backward, keys):
        monkeypatch.setattr(module, "section", lambda *_: places)
    case = Case((3, 2, 1, 63, 16), 7, "mixed", "none", 0, 9, True, 5, device, lengthen=False)
    for name, actual, expected in zip(NAMES, case.ours(tile=(32, 32))[0], case.oracle(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_section_holds_what_fits_the_cache_and_at_least_a_few_places():
    assert common.section(1000, common.CACHE // 100) == 100
    assert common.section(1000, common.CACHE) == common.FEWEST
    assert common.section(3, common.CACHE) == 3 and common.section(1000, 0) == 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's limits")
def test_interpreter_refuses_a_dot_over_fewer_than_16_columns():
    case = Case((1, 1, 1, 17, 16), 1, "hard", "none", 0, None, False, 3)
    with pytest.raises(Exception, match="K >= 16"):
        case.ours(tile=(16, 8))
    case.ours(tile=(16, 16))


def test_tensors_of_two_devices_are_refused():
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    with common.same_device(here, None, here):
        pass
    with pytest.raises(ValueError, match="devices cpu, meta: must be one"):
        common.same_device(here, None, there)
    case = Case((1, 1, 1, 17, 16), 1, "hard", "none", 0, None, False, 3)
    with pytest.raises(ValueError, match="must be one"):
        forward.forward(case.q, case.k, case.v.to("meta"), case.plan, None, case.scale)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), 86),
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((12, 0), 86),
        ((13, 0), 86),
    ],
)
def test_unknown_cards_run_the_most_modest_tiles(capability, target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert common.target_of(torch.device("cuda:0")) == target


def test_head_dim_beyond_the_table_is_named():
    with pytest.raises(ValueError, match="head_dim 320: must be at most 256"):
        common.config("forward", 320, torch.bfloat16, 90)


def test_every_shipped_launch_has_tiles_that_a_dot_accepts():
    for target in (80, 86, 90, 100):
        for kind in ("forward", "dq", "dkv", "dkv_plain"):
            for dtype, head_dim, launch in common.shipped(kind, target):
                assert min(launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_D"]) >= 16, (kind, dtype, head_dim)
                assert launch["BLOCK_D"] >= head_dim
