"""Attention sinks: one more term of the softmax's normaliser, learnt per query head (gpt-oss).

p_j = exp(s_j) / (exp(sink) + sum_i exp(s_i)).  With out and lse of attention without it, lse' = logaddexp(lse, sink)
and out' = exp(lse - lse') out.  A backward pass that is given out' and lse' in place of out and lse has the right
probabilities and delta' = rowsum(out' * G); the sink's own gradient is -sum exp(sink - lse') delta'.
"""

import torch
from torch import Tensor


def absorb(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, D), lse (B, Hq, T) fp32 and sinks (Hq,): both with the sinks in the normaliser."""
    sinks = sinks.float()[:, None]
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(Hq,) from the gradient of out; out and lse as ``absorb`` returns them."""
    delta = (grad.float() * out.float()).sum(-1)
    return -(torch.exp(sinks.float()[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
