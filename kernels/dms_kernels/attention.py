"""Compacted attention with gradients: a plan, an implementation for its device, one autograd function over both."""

import torch
from torch import Tensor

import dms_kernels
from dms_kernels.plan import Plan
from dms_kernels.sinks import absorb, sinks_gradient


class CompactAttention(torch.autograd.Function):
    """(q, k, v, log_keep or None, plan, scale, sinks or None) to (out, lse); lse has no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep: Tensor | None, plan: Plan, scale: float, sinks: Tensor | None = None):
        out, lse = dms_kernels.on(q.device, "forward").forward(q, k, v, plan, log_keep, scale)
        if sinks is not None:
            out, lse = absorb(out, lse, sinks)
        ctx.save_for_backward(q, k, v, log_keep, out, lse, sinks)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        q, k, v, log_keep, out, lse, sinks = ctx.saved_tensors
        grads = dms_kernels.on(q.device, "backward").backward(grad, q, k, v, out, lse, ctx.plan, log_keep, ctx.scale)
        return *grads, None, None, None if sinks is None else sinks_gradient(grad, out, lse, sinks)


def common_dtype(*tensors: Tensor) -> list[Tensor]:
    """All in autocast's dtype, or else in the one that torch promotes them to."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
