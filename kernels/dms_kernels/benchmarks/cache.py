"""One decode step over paged rows, and one append to them, against dense caches."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_kernels import Rows, cache_append, decode_attention
from dms_kernels.benchmarks.case import Case, Work
from dms_kernels.benchmarks.inputs import SEED, draw, live_rows

SHAPES = {
    "cpu": {"batch": 8, "heads": 3, "group": 3, "dim": 64, "tokens": 32768, "window": 256, "page": 64,
            "dtype": "float32"},
    "cuda": {"batch": 32, "heads": 8, "group": 4, "dim": 128, "tokens": 32768, "window": 256, "page": 64,
             "dtype": "bfloat16"},
}  # fmt: skip
QUICK = {"batch": 2, "dim": 16, "tokens": 1024, "window": 16, "page": 16}
SPARE = 4  # pages that a row may take while appending is timed


def decode_cases(device: str, quick: bool) -> list[Case]:
    """Baselines: "sdpa_folded" and "sdpa_gqa", torch's dense attention over a contiguous cache, queries folded to
    (B, H, G, D) or not; "sdpa", the faster of both; on CUDA "flash_attn" and "flashinfer", where installed.
    """
    return [_case(f"decode-cr{cr}", "decode", cr, device, quick, build_decode) for cr in (8, 1)]


def append_cases(device: str, quick: bool) -> list[Case]:
    """Baseline "dynamic_cache": transformers' DynamicCache, which concatenates."""
    return [_case("cache-append", "cache", 8, device, quick, build_append)]


def _case(name: str, kind: str, cr: int, device: str, quick: bool, build) -> Case:
    return Case(name, kind, {**SHAPES[device], "cr": cr, **(QUICK if quick else {})}, build)


def build_decode(shape: dict, device: str) -> Work:
    rows = live_rows(shape, device)
    batch, heads, group, tokens, dim = (shape[key] for key in ("batch", "heads", "group", "tokens", "dim"))
    cache = (batch, heads, tokens, dim)
    q, k, v = draw([(batch, heads * group, 1, dim), cache, cache], shape["dtype"], device)
    folded = q.view(batch, heads, group, dim)
    baselines = {
        "sdpa_folded": partial(F.scaled_dot_product_attention, folded, k, v),
        "sdpa_gqa": partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True),
    }
    if device == "cuda":
        baselines |= {"flash_attn": _lazy(_flash_attn, q, k, v), "flashinfer": _lazy(_flashinfer, q, k, v)}
    live = int(rows.length.sum())
    return Work(
        ours=partial(decode_attention, q, rows.keys, rows.values, rows.table, rows.length),
        baselines=baselines,
        moved=2 * live * dim * k.element_size() + 2 * q.nbytes,
        flops=4 * dim * group * live,
        best_of={"sdpa": ("sdpa_folded", "sdpa_gqa")},
    )


def _lazy(make, *tensors: Tensor):
    """A call whose preparation happens once, in its first run."""
    ready = []

    def call() -> Tensor:
        if not ready:
            ready.append(make(*tensors))
        return ready[0]()

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor):
    """flash-attn wants (B, S, H, D)."""
    from flash_attn import flash_attn_with_kvcache

    return partial(flash_attn_with_kvcache, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))


def _flashinfer(q: Tensor, k: Tensor, v: Tensor):
    """flashinfer's paged decode over the dense cache cut into pages of 64 tokens in order."""
    import flashinfer

    batch, heads, tokens, dim = k.shape
    page = 64
    pages = tokens // page
    paged = torch.stack([x.transpose(1, 2).reshape(batch * pages, page, heads, dim) for x in (k, v)], 1)
    workspace = torch.empty(1 << 28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    on = {"dtype": torch.int32, "device": q.device}
    wrapper.plan(
        torch.arange(batch + 1, **on) * pages, torch.arange(batch * pages, **on), torch.full((batch,), page, **on),
        q.shape[1], heads, dim, page, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return partial(wrapper.run, q.squeeze(2).contiguous(), paged)


def build_append(shape: dict, device: str) -> Work:
    from transformers import DynamicCache

    rows = live_rows(shape, device, SPARE)
    count = rows.table.shape[0]
    batch, heads, tokens, dim = (shape[key] for key in ("batch", "heads", "tokens", "dim"))
    k, v = draw([(count, dim), (count, dim)], shape["dtype"], device)
    evict = torch.rand(count, generator=torch.Generator().manual_seed(SEED)) >= 1 / shape["cr"]
    evict, active = evict.to(device), torch.ones(count, dtype=torch.bool, device=device)
    dense = DynamicCache()
    dense.update(*draw([(batch, heads, tokens, dim)] * 2, shape["dtype"], device), 0)
    new = [x.view(batch, heads, 1, dim) for x in (k, v)]

    def held() -> dict[str, int]:
        if rows.overflow.item():
            raise RuntimeError(f"more than {SPARE} new pages a row were needed: what was timed is not an append")
        return {"ours": bytes_of(rows), "dynamic_cache": sum(x.nbytes for x in dense.update(*new, 0))}

    return Work(
        ours=partial(cache_append, rows, k, v, evict, active, 1),
        baselines={"dynamic_cache": partial(dense.update, *new, 0)},
        moved=2 * (k.nbytes + v.nbytes),
        flops=0,
        held=held,
    )


def bytes_of(rows: Rows) -> int:
    """Bytes of the pages that rows own, and of all that says where things are."""
    pages = int(rows.owned.sum()) * 2 * rows.keys[0].nbytes
    others = [x for name, x in vars(rows).items() if name not in ("keys", "values") and x is not None]
    return pages + sum(tensor.nbytes for tensor in others)
