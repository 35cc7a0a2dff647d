"""The eviction gate (paper section 3.1): z = s * x - b0, alpha = sigmoid((z + g) / tau), g logistic noise.

In training alpha is a Gumbel-sigmoid sample; the compression loss sees its hard value with a straight-through
gradient, attention sees beta = log(1 - alpha).  At inference a token is evicted iff z > 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dms_core.config import DMSConfig
from dms_kernels import gate_logits as fused


class AdapterGate(nn.Module):
    """x = Linear(RMSNorm(residual stream)), one output a KV head; zero at the start (appendix C).

    Always fp32, in training under autocast as at inference, so that both decide alike: z = 100 x - 5 has no bits to
    spare.  ``model.to(dtype)`` leaves the parameters in fp32.
    """

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.RMSNorm(width, eps=eps, dtype=torch.float32)
        self.proj = nn.Linear(width, heads, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.proj.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, d) to (B, H, T) in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):  # .float(): sharded weights come in the model's dtype
            normed = F.rms_norm(hidden.float(), hidden.shape[-1:], self.norm.weight.float(), self.norm.eps)
            return F.linear(normed, self.proj.weight.float()).transpose(1, 2)

    def logits(self, hidden: Tensor, config: DMSConfig) -> Tensor:
        """``gate_logits`` of what the gate reads; in a decode step as one operation."""
        if hidden.shape[1] > 1 or torch.is_grad_enabled() or config.granularity == "layer":
            return gate_logits(self(hidden), config)
        return fused(hidden, self.norm.weight, self.proj.weight, self.eps, config.scale, config.offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterGate":
        """Move with the model, but keep the dtype."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)


def read_neuron(q: Tensor, heads: int, neuron: int, factor: float) -> tuple[Tensor, Tensor]:
    """Take the gate's neuron out of each group's first query head (appendix C).

    q (B, T, Hq, D) before RoPE.  Returns x (B, H, T) and q with that neuron multiplied by ``factor``: 0 once
    the gate is in use, 1 - t / n_t during the warm-up that precedes the retrofit.
    """
    grouped = q.unflatten(2, (heads, -1))  # (B, T, H, G, D)
    x = grouped[:, :, :, 0, neuron].transpose(1, 2)
    keep = torch.ones(grouped.shape[3:], dtype=q.dtype, device=q.device)
    keep[0, neuron].fill_(factor)  # an assignment would copy it from the host, which no CUDA graph may
    return x, (grouped * keep).flatten(2, 3)


def neuron_rows(projection: nn.Module, heads: int, neuron: int) -> list[tuple[nn.Parameter, Tensor]]:
    """A projection's weight and bias, each with the rows of ``neuron`` >= 0 in every of ``heads`` equal parts."""
    return [(p, torch.arange(heads) * (len(p) // heads) + neuron) for p in projection.parameters()]


def warmup_factor(step: int, steps: int = 2000) -> float:
    """Neuron gate: what remains of the neuron's part in attention after ``step`` of ``steps`` warm-up steps."""
    if steps < 1:
        raise ValueError(f"warm-up steps {steps}: must be >= 1")
    return max(0.0, 1.0 - step / steps)


def gate_logits(x: Tensor, config: DMSConfig) -> Tensor:
    """z = s * x - b0 in fp32, (B, H, T); with granularity "layer" every head follows the first."""
    z = config.scale * x.float() - config.offset
    return z[:, :1].expand_as(z) if config.granularity == "layer" else z


def soft_decisions(z: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log_keep, evicted): beta = log(1 - alpha) and the hard decision with straight-through gradient."""
    shifted = (z + noise) / temperature
    alpha = torch.sigmoid(shifted)
    hard = (alpha > 0.5).to(alpha.dtype)
    return F.logsigmoid(-shifted), hard - alpha.detach() + alpha


def hard_decisions(z: Tensor) -> Tensor:
    """Evict iff z > 0.  NaN is looked for after the step, without waiting for the device (DMS.check_logits)."""
    return z > 0
