"""Prefill and training against dense attention, a float mask and FlexAttention."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms_kernels import EXACT, prefill_attention, train_attention
from dms_kernels.benchmarks.case import Case, Work
from dms_kernels.benchmarks.inputs import SEED, draw, kept, queries_keys_values, soft_gates
from dms_kernels.plan import Plan, training_plan

SHAPES = {
    "cpu": {"batch": 1, "heads": 2, "group": 3, "dim": 64, "window": 256, "cr": 8, "dtype": "float32"},
    "cuda": {"batch": 1, "heads": 8, "group": 4, "dim": 128, "window": 256, "cr": 8, "dtype": "bfloat16"},
}
QUICK = {"dim": 16, "window": 16, "tokens": 768}
PREFILL = {"cpu": (32768, 8192, 1024), "cuda": (32768,)}
TRAIN = {
    "cpu": {4096: ("sdpa_mask", "flex", "sdpa"), 16384: ("sdpa",)},
    "cuda": {32768: ("flex", "sdpa")},
}


def prefill_cases(device: str, quick: bool) -> list[Case]:
    """Baseline "sdpa": torch's dense causal attention, its flash kernel."""
    return [_case("prefill", device, tokens, quick, build_prefill) for tokens in PREFILL[device]]


def train_cases(device: str, quick: bool) -> list[Case]:
    """Forward and backward.  Baselines: "sdpa_mask", torch's attention with a float mask made from log_keep, which
    gets its gradient; "flex", FlexAttention with the bias in a score_mod, as published; "sdpa", dense, without gates.
    """
    return [
        _case("train", device, tokens, quick, partial(build_train, names=names))
        for tokens, names in TRAIN[device].items()
    ]


def _case(kind: str, device: str, tokens: int, quick: bool, build) -> Case:
    shape = {**SHAPES[device], "tokens": tokens, **(QUICK if quick else {})}
    return Case(f"{kind}-{tokens}", kind, shape, build)


def build_prefill(shape: dict, device: str) -> Work:
    q, k, v = queries_keys_values(shape, device)
    keep = kept(shape, torch.Generator().manual_seed(SEED)).to(device)
    call = partial(prefill_attention, q, k, v, ~keep, shape["window"])
    packed = 2 * int(call()[1].length.sum()) * shape["dim"] * k.element_size()
    scores = visible_scores(training_plan(keep.float() - 0.5, None, shape["window"], 0.0))
    return Work(
        ours=call,
        baselines={"sdpa": partial(dense, q, k, v)},
        moved=2 * q.nbytes + k.nbytes + v.nbytes + packed,
        flops=4 * shape["dim"] * shape["group"] * scores,
    )


def build_train(shape: dict, device: str, names: Sequence[str]) -> Work:
    q, k, v = queries_keys_values(shape, device)
    generator = torch.Generator().manual_seed(SEED)
    log_keep = soft_gates(kept(shape, generator), EXACT, generator).to(device)
    gradient = draw([q.shape], shape["dtype"], device)[0]
    leaves = [x.requires_grad_() for x in (q, k, v, log_keep)]
    window = shape["window"]
    forward = {
        "ours": lambda: train_attention(*leaves, window),
        "sdpa_mask": lambda: masked(*leaves, window),
        "flex": flexible(leaves, window),
        "sdpa": lambda: dense(q, k, v),
    }

    def both(name: str) -> list[Tensor]:
        with torch.enable_grad():
            out = forward[name]()
            return torch.autograd.grad(out, leaves[:3] if name == "sdpa" else leaves, gradient)

    scores = visible_scores(training_plan(log_keep.detach(), None, window, EXACT))
    # Forward reads q, k, v, gates and writes out, lse; backward reads all these and a gradient, and writes four.
    moved = 6 * q.nbytes + 3 * (k.nbytes + v.nbytes + log_keep.nbytes) + 2 * 4 * q[..., 0].numel()
    return Work(
        ours=partial(both, "ours"),
        baselines={name: partial(both, name) for name in names},
        moved=moved,
        flops=14 * shape["dim"] * shape["group"] * scores,  # two products forward, five backward
    )


def visible_scores(plan: Plan) -> int:
    """Pairs of a query and a key that it reads, over all KV heads."""
    own = torch.arange(plan.band.shape[1], device=plan.band.device) + plan.offset
    return int((own - plan.band + 1).sum()) * plan.first.shape[1] + int((plan.last - plan.first).sum())


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without gates, by torch's flash kernel of the device."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def masked(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int) -> Tensor:
    """The operation as a float mask, one a (batch, KV head), over which the query heads of a group broadcast."""
    group = q.shape[1] // k.shape[1]
    position = torch.arange(q.shape[2], device=q.device)
    behind = position[:, None] - position
    bias = torch.where(behind > window, log_keep[:, :, None], 0.0).masked_fill(behind < 0, float("-inf"))
    queries = q.unflatten(1, (-1, group)).flatten(0, 1)  # (B * H, G, T, D)
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.flatten(0, 1)[:, None].to(q.dtype))
    return out.unflatten(0, k.shape[:2]).flatten(1, 2)


def flexible(leaves: Sequence[Tensor], window: int):
    """FlexAttention with the bias in a compiled score_mod and no block mask: all T * T scores, as published."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, log_keep = leaves
    group = q.shape[1] // k.shape[1]

    def delayed_eviction(score, b, h, i, j):
        score = torch.where(i - j > window, score + log_keep[b, h // group, j], score)
        return torch.where(i >= j, score, float("-inf"))

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=delayed_eviction, enable_gqa=True)
