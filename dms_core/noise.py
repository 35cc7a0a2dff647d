"""Logistic noise for the gates' samples (paper section 3.1), and the hash that gives every place its own draw.

The hash is SplitMix64 (Steele et al., 2014) on int64 tensors, whose products wrap as those of unsigned numbers do.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment, in two's complement
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))  # shift, multiplier


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64's output function: int64 states to int64 numbers, elementwise."""
    for shift, factor in ROUNDS:  # >> repeats the sign, which the mask removes
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x


def row_keys(seed: int, step: int, first: int, count: int) -> Tensor:
    """Keys (count,) for ``keyed_noise`` of the rows first, first + 1, ... of an optimiser step's global batch."""
    key = torch.tensor(seed)
    for number in (step, torch.arange(first, first + count)):
        key = splitmix64(key + GOLDEN) + number
    return splitmix64(key + GOLDEN)


def sample_noise(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logistic noise of z's shape, the difference of two Gumbel(0, 1) draws, from a generator."""
    return _logistic(torch.rand(z.shape, device=z.device, generator=generator))


def keyed_noise(z: Tensor, keys: Tensor, layer: int) -> Tensor:
    """``sample_noise`` as a pure function of row key, layer, token and head: z (B, H, T), keys (B,) integers.

    A row gets the same noise in whatever batch, padding, process or device it is computed, and again when activations
    are computed twice.
    """
    rows = splitmix64(keys.to(z.device)[:, None, None] + layer + GOLDEN)  # (B, 1, 1)
    heads, tokens = (torch.arange(size, device=z.device) for size in z.shape[1:])
    bits = splitmix64(rows + (tokens * z.shape[1] + heads[:, None]) + GOLDEN)  # (B, H, T)
    return _logistic(((bits >> 40) & 0xFFFFFF).float() / 2**24)


def _logistic(u: Tensor) -> Tensor:
    """The logistic distribution's quantiles at uniform draws."""
    u = u.clamp_(1e-6, 1 - 1e-6)
    return torch.log(u) - torch.log1p(-u)
