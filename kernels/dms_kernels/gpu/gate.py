"""The adapter gate of a decode step in one launch: RMSNorm of a token's hidden state, a product for each KV head."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dms_kernels.gpu.common import same_device
from dms_kernels.gpu.interpret import repair

repair()

COLUMNS = 1024  # of the hidden state that a program reads at once


@triton.jit(do_not_specialize=["heads"])
def _gate(
    hidden, norm, weight, out, heads, eps, scale, offset,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token a program: out (tokens, heads)."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    square = tl.zeros([COLUMNS], tl.float32)
    dots = tl.zeros([HEADS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        x = tl.load(hidden + token * WIDTH + d, d < WIDTH, other=0.0).to(tl.float32)
        square += x * x
        x *= tl.load(norm + d, d < WIDTH, other=0.0)
        w = tl.load(weight + h[:, None] * WIDTH + d[None, :], (h < heads)[:, None] & (d < WIDTH)[None, :], other=0.0)
        dots += tl.sum(w * x[None, :], 1)
    factor = scale / tl.sqrt(tl.sum(square, 0) / WIDTH + eps)
    tl.store(out + token * heads + h, dots * factor - offset, h < heads)


def _tiles(width: int, heads: int) -> dict:
    padded = triton.next_power_of_2(heads)
    return {"WIDTH": width, "HEADS": padded, "COLUMNS": max(COLUMNS // padded, 32), "num_warps": 4}


def gate_logits(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, scale: float, offset: float) -> Tensor:
    """See naive.gate_logits."""
    heads, width = weight.shape
    hidden, norm, weight = (x.contiguous() for x in (hidden, norm, weight))
    out = torch.empty(*hidden.shape[:2], heads, dtype=torch.float32, device=hidden.device)
    with same_device(hidden, norm, weight):
        _gate[(out.numel() // heads,)](hidden, norm, weight, out, heads, eps, scale, offset, **_tiles(width, heads))
    return out.transpose(1, 2)


def aot_cases(target: int) -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, options) of what is launched; the same for every ``target``."""
    for dtype in ("bf16", "fp16", "fp32"):
        for width, heads in ((2048, 8), (4096, 8), (5120, 4)):
            tiles = _tiles(width, heads)
            signature = {"hidden": f"*{dtype}", **dict.fromkeys(("norm", "weight", "out"), "*fp32"), "heads": "i32"}
            signature |= dict.fromkeys(("eps", "scale", "offset"), "fp32")
            options = {"num_warps": tiles.pop("num_warps")}
            yield f"gate {dtype} d{width} H{heads}", _gate, signature, tiles, options
