"""The eviction gate (paper section 3.1): z = s * x - b0, alpha = sigmoid((z + g) / tau), g logistic noise.

In training alpha is a Gumbel-sigmoid sample; the compression loss sees its hard value with a straight-through
gradient, attention sees beta = log(1 - alpha).  At inference a token is evicted iff z > 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dms_core.config import DMSConfig


class AdapterGate(nn.Module):
    """x = Linear(RMSNorm(residual stream)), one output a KV head; zero at the start (appendix C)."""

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        self.proj = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, d) to (B, H, T), in the gate's own precision."""
        return self.proj(self.norm(hidden.to(self.proj.weight.dtype))).transpose(1, 2)


def read_neuron(q: Tensor, heads: int, neuron: int, factor: float) -> tuple[Tensor, Tensor]:
    """Take the gate's neuron out of each group's first query head.

    q (B, T, Hq, D) before RoPE.  Returns x (B, H, T) and q with that neuron multiplied by ``factor``: 0 once
    the gate is in use, 1 - t / n_t during the warm-up that precedes the retrofit.
    """
    grouped = q.unflatten(2, (heads, -1))  # (B, T, H, G, D)
    x = grouped[:, :, :, 0, neuron].transpose(1, 2)
    keep = torch.ones(grouped.shape[3:], dtype=q.dtype, device=q.device)
    keep[0, neuron] = factor
    return x, (grouped * keep).flatten(2, 3)


def warmup_factor(step: int, steps: int = 2000) -> float:
    """Neuron gate: what remains of the neuron's part in attention after ``step`` of ``steps`` warm-up steps."""
    if steps < 1:
        raise ValueError(f"warm-up steps {steps}: must be >= 1")
    return max(0.0, 1.0 - step / steps)


def gate_logits(x: Tensor, config: DMSConfig) -> Tensor:
    """z = s * x - b0 in fp32, (B, H, T); with granularity "layer" every head follows the first."""
    z = config.scale * x.float() - config.offset
    return z[:, :1].expand_as(z) if config.granularity == "layer" else z


def sample_noise(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The difference of two Gumbel(0, 1) draws: logistic noise."""
    return _logistic(torch.rand(z.shape, device=z.device, generator=generator))


def keyed_noise(z: Tensor, keys: Tensor, layer: int) -> Tensor:
    """``sample_noise`` as a pure function of row key, layer, token and head: z (B, H, T), keys (B,) integers.

    A hash of the place instead of a generator: a row gets the same noise in whatever batch, padding, process or
    device it is computed, and again when activations are computed twice.
    """
    rows = _mix(keys.to(z.device)[:, None, None] + layer)  # (B, 1, 1)
    place = torch.arange(z.shape[2], device=z.device) * z.shape[1] + torch.arange(z.shape[1], device=z.device)[:, None]
    bits = _mix(rows + place)  # (B, H, T)
    return _logistic(((bits >> 40) & 0xFFFFFF).float() / 2**24)


def row_keys(seed: int, step: int, first: int, count: int) -> Tensor:
    """Keys (count,) for ``keyed_noise`` of the rows first, first + 1, ... of an optimiser step's global batch."""
    rows = torch.arange(first, first + count)
    return _mix(_mix(_mix(torch.tensor(seed)) + step) + rows)


GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the increment and multipliers of SplitMix64 (Steele et al., 2014), as int64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose products wrap; >> fills with the sign, which the mask removes."""
    x = x + GOLDEN
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MULTIPLIERS[1]
    return x ^ ((x >> 31) & (2**33 - 1))


def _logistic(u: Tensor) -> Tensor:
    """Logistic noise from uniform draws."""
    u = u.clamp_(1e-6, 1 - 1e-6)
    return torch.log(u) - torch.log1p(-u)


def soft_decisions(z: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log_keep, evicted): beta = log(1 - alpha) and the hard decision with straight-through gradient."""
    shifted = (z + noise) / temperature
    alpha = torch.sigmoid(shifted)
    hard = (alpha > 0.5).to(alpha.dtype)
    return F.logsigmoid(-shifted), hard - alpha.detach() + alpha


def hard_decisions(z: Tensor) -> Tensor:
    """Evict iff z > 0.  Raises ValueError if a logit is NaN."""
    if z.device.type == "cpu" and torch.isnan(z).any():
        raise ValueError("gate logits contain NaN: allowed are finite values; is the checkpoint damaged?")
    return z > 0
