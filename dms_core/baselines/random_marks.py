"""DMS with random marks: the same cache, delay and share evicted in each layer and KV head, but of no token's choosing.

What is left of DMS when its gates know nothing.  A mark is a hash of (seed, stream, position, layer, head), so a
chain's marks do not depend on its batch.  Sampling gives each chain a stream of its own; marks within a prompt are
those of the one prefill that its chains share, in stream 0.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dms_core.cache.dms import DMSCache
from dms_core.noise import GOLDEN, splitmix64


class MarkedCache(DMSCache):
    """A DMSCache whose decode steps are not captured in a graph: the next ones draw other numbers."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.static = False


def draw(stream: Tensor, position: Tensor, layer: int, heads: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1): stream (B,), position (B, T); (B, heads, T) in fp32."""
    head = torch.arange(heads, device=position.device)[:, None] + (layer << 12)
    counter = (position[:, None] << 24) + head
    bits = splitmix64(stream[:, None, None] + seed + counter * GOLDEN)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


@contextlib.contextmanager
def random_marks(model, retention: Sequence[Sequence[float]], seed: int = 0):
    """Inside, each token of a model with gates is marked with probability 1 - ``retention``, whatever its gate says.

    retention (layers with gates, KV heads): the share kept of each head, as measured for a model on held-out
    documents.  Caches must be made inside.  Raises ValueError for another shape or numbers out of 0..1.
    """
    dms = model.dms
    shares = 1 - torch.tensor(retention, dtype=torch.float32)
    shape = len(dms.layout.gated), dms.heads * dms.split.parts
    if tuple(shares.shape) != shape or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"retention of shape {tuple(shares.shape)}: must be {shape} numbers in 0..1")

    def new_cache(*args, **kwargs) -> MarkedCache:
        made = type(dms).new_cache(dms, *args, **kwargs)
        return MarkedCache(made.config, len(made.layers), made.page, made.slack, made.others, made.kv_cache_dtype)

    def put(index: int, gate) -> None:
        if not dms.enabled:
            return
        valid, cache = dms.step.valid, dms.step.cache
        position, stream = valid.cumsum(1) - 1, valid.new_zeros(len(valid), dtype=torch.long)
        if cache is not None and (layer := cache.layers[index]).is_initialized:
            stream = layer.stream[:, 0].to(valid.device)
            position = position + layer.seen.to(valid.device)[:, None]
        share = shares[dms.layout.gated.index(index)].to(valid.device)
        z = share[:, None] - draw(stream, position, index, len(share), seed)
        dms.step.logits[index] = dms.split.take(z)

    dms._put, dms.new_cache = put, new_cache
    try:
        yield model
    finally:
        del dms._put, dms.new_cache
