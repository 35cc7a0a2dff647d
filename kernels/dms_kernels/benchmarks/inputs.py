"""Fixed random inputs with trained-like gates: heads differ tenfold in what they keep, their mean is 1 / CR."""

import torch
from torch import Tensor

from dms_kernels.rows import Rows

SPREAD = 10.0  # retention of the head that keeps most, over that of the one that keeps least
SEED = 0


def retention(rows: int, cr: float, generator: torch.Generator) -> Tensor:
    """Share of its tokens that each (batch, head) keeps, (rows,): log-uniform over SPREAD, mean 1 / cr."""
    if cr == 1 or rows == 1:
        return torch.full((rows,), 1 / cr)
    place = torch.rand(rows, generator=generator, dtype=torch.float64)
    place = (place - place.min()) / (place.max() - place.min())
    share = SPREAD**place
    share *= 1 / cr / share.mean()
    if share.max() > 1:
        raise ValueError(f"cr {cr}: too small for {rows} rows with a spread of {SPREAD:g}; must be 1 or larger")
    return share.float()


def kept(shape: dict, generator: torch.Generator) -> Tensor:
    """Does the gate keep the token?  (B, H, T) bool; every head keeps its share of tokens, drawn at random."""
    batch, heads, tokens = (shape[key] for key in ("batch", "heads", "tokens"))
    count = (retention(batch * heads, shape["cr"], generator) * tokens).round()
    order = torch.rand(batch * heads, tokens, generator=generator).argsort(-1).argsort(-1)
    return (order < count[:, None]).view(batch, heads, tokens)


def soft_gates(keep: Tensor, threshold: float, generator: torch.Generator) -> Tensor:
    """log_keep of training: kept tokens have a bias of at most log 2, all others one below ``threshold``."""
    noise = torch.rand(keep.shape, generator=generator)
    return torch.where(keep, -torch.log1p(torch.exp(-20 * noise)), threshold * (1 + noise))


def queries_keys_values(shape: dict, device: str) -> list[Tensor]:
    """q (B, H * G, T, D), k and v (B, H, T, D)."""
    batch, heads, group, tokens, dim = (shape[key] for key in ("batch", "heads", "group", "tokens", "dim"))
    return draw([(batch, count, tokens, dim) for count in (heads * group, heads, heads)], shape["dtype"], device)


def draw(shapes: list[tuple], dtype: str, device: str) -> list[Tensor]:
    """Normal random tensors."""
    generator = torch.Generator(device).manual_seed(SEED)
    on = {"dtype": getattr(torch, dtype), "device": device}
    return [torch.randn(shape, generator=generator, **on) for shape in shapes]


def live_rows(shape: dict, device: str, spare: int = 0) -> Rows:
    """A cache after ``tokens`` tokens, each (batch, head) with what it keeps of them; pages in random order.

    ``spare``: pages a row may still take.  The last window + 1 tokens of a row lie in its last slots, and the share
    1 - 1 / cr of them is marked.
    """
    generator = torch.Generator().manual_seed(SEED)
    count, page, cells = shape["batch"] * shape["heads"], shape["page"], shape["window"] + 1
    length = (retention(count, shape["cr"], generator) * shape["tokens"]).round().int().clamp_min(cells)
    owned = (length + page - 1) // page
    used, columns = int(owned.sum()), int(owned.max()) + spare
    like = torch.empty(0, shape["dim"], dtype=getattr(torch, shape["dtype"]), device=device)
    rows = Rows.empty(count, used + count * spare, columns, page, shape["window"], like)
    rows.keys.normal_()
    rows.values.normal_()
    numbers = torch.randperm(len(rows.free), generator=generator).int()
    table = torch.zeros(count, columns, dtype=torch.int32)
    table[torch.arange(columns) < owned[:, None]] = numbers[:used]
    slots = (length[:, None] - cells + torch.arange(cells)).int()
    marked = torch.rand(count, cells, generator=generator) >= 1 / shape["cr"]
    rows.free[: len(numbers) - used] = numbers[used:].to(device)
    rows.free_count.fill_(len(numbers) - used)
    rows.seen.fill_(shape["tokens"] // cells * cells)  # so that the oldest token of the window is in cell 0
    for name, value in {
        "table": table,
        "length": length,
        "owned": owned,
        "ring_slot": slots,
        "ring_evict": marked,
    }.items():
        getattr(rows, name).copy_(value)
    return rows
