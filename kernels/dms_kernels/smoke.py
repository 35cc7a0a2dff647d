"""The first thing to run on a card: each operation once against ``naive``, one line of JSON a step, on after a failure.

``python -m dms_kernels.smoke`` takes the first CUDA device, else the CPU with small shapes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import dms_kernels
from dms_kernels import Rows, naive

LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of |x - naive| / |naive|
WINDOW, STEPS = 256, 320  # of attention and of appending on a card; both less on a CPU


def steps(device: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name and call of every step; a call returns the largest relative error of what it computed."""
    small = 32 if device == "cpu" else 1
    yield "append", partial(_append, device, 24 if small > 1 else STEPS)
    for page in (64, 16):
        yield f"decode bf16 D128 G4 page{page}", partial(_decode, device, page, 4096 // small)
    yield "decode with sinks bf16 D128 G4 page64", partial(_decode, device, 64, 4096 // small, sinks=True)
    for width in (64, 128):
        shape = (1, 2, 2, 4096 // small, width)
        yield f"prefill bf16 D{width}", partial(_prefill, device, shape, WINDOW // small)
        yield f"train bf16 D{width}", partial(_train, device, shape, WINDOW // small)


def run(device: str) -> Iterator[dict]:
    """{"step", "device", "ok", "error", "limit", "seconds"} of each step, with "failed" in place of an exception."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    for step, call in steps(device):
        began = time.perf_counter()
        limit = LIMIT[torch.bfloat16 if "bf16" in step else torch.float32]
        result = {"step": step, "device": name, "ok": False, "error": None, "limit": limit}
        try:
            result["error"] = call()
            result["ok"] = result["error"] <= limit
        except Exception as error:  # whatever a compiler or driver raises: the next step may still run
            result["failed"] = f"{type(error).__name__}: {error}"[:500]
        yield {**result, "seconds": round(time.perf_counter() - began, 3)}


def _error(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.float(), exact.float()
    return ((actual - exact).norm() / exact.norm().clamp_min(1e-30)).item() if actual.isfinite().all() else float("inf")


def _inputs(device: str, batch: int, heads: int, group: int, tokens: int, width: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, in bf16."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads * group, heads, heads, heads * group)
    shapes = [(batch, count, tokens, width) for count in counts]
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]


def _marks(device: str, *shape: int) -> Tensor:
    """True for 7 of 8 tokens."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 7 / 8).to(device)


def _append(device: str, count: int) -> float:
    """The device's rows against those of the specification on the CPU, in every field."""
    from dms_kernels.rows import append

    rows, window, width = 12, 15, 64
    ours, exact = (
        Rows.empty(rows, 24 * rows, 24, 16, window, torch.empty(0, width, device=x)) for x in (device, "cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for evict in _marks("cpu", count, rows):
        k, v = torch.randn(2, rows, width, generator=generator)
        active = torch.rand(3, generator=generator) < 0.9
        append(exact, k, v, evict, active, 1)
        dms_kernels.cache_append(ours, *(x.to(device) for x in (k, v, evict, active)), 1)
    same = (
        torch.equal(getattr(ours, name).cpu(), value) for name, value in vars(exact).items() if torch.is_tensor(value)
    )
    return 0.0 if all(same) else float("inf")


def _decode(device: str, page: int, tokens: int, sinks: bool = False) -> float:
    batch, heads, group, width = 4, 2, 4, 128
    columns = -(-tokens // page)
    q, _, _, _ = _inputs(device, batch, heads, group, 1, width)
    pages = batch * heads * columns
    keys, values = torch.randn(2, pages, page, width, generator=torch.Generator().manual_seed(2)).to(device, q.dtype)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(3)).view(-1, columns).int().to(device)
    lengths = torch.linspace(1, columns * page, batch * heads).int().to(device)
    sink = torch.linspace(-2, 6, heads * group).to(device, q.dtype) if sinks else None
    out = dms_kernels.decode_attention(q, keys, values, table, lengths, sinks=sink)
    exact = naive.decode_attention(q.float(), keys.float(), values.float(), table.long(), lengths, width**-0.5, sink)
    return _error(out, exact)


def _prefill(device: str, shape: tuple, window: int) -> float:
    q, k, v, _ = _inputs(device, *shape)
    evict = _marks(device, *k.shape[:3])
    out, _ = dms_kernels.prefill_attention(q, k, v, evict, window)
    log_keep = torch.zeros(evict.shape, device=device).masked_fill(evict, float("-inf"))
    return _error(
        out, naive.train_attention(q.float(), k.float(), v.float(), log_keep, window, None, shape[-1] ** -0.5)
    )


def _train(device: str, shape: tuple, window: int) -> float:
    """Output and the gradients of q, k, v and log_keep."""
    q, k, v, grad = _inputs(device, *shape)
    evict = _marks(device, *k.shape[:3])
    log_keep = torch.where(
        evict, -60.0, -torch.rand(evict.shape, generator=torch.Generator().manual_seed(4)).to(device)
    )
    results = []
    for half in (True, False):
        leaves = [(x if half else x.float()).detach().clone().requires_grad_() for x in (q, k, v, log_keep)]
        if half:  # return_lse: through the kept list on any device
            out, _ = dms_kernels.train_attention(*leaves, window, return_lse=True)
        else:
            out = naive.train_attention(*leaves, window, None, shape[-1] ** -0.5)
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(x.grad for x in leaves)])
    return max(_error(*pair) for pair in zip(*results, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dms_kernels.smoke", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    failed = 0
    for result in run(parser.parse_args(arguments).device):
        print(json.dumps(result), flush=True)
        failed += not result["ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
