"""The operations registered with PyTorch, for torch.compile, torch.export and fake tensors.

The facade calls them where a graph is being traced; a plain call goes to the implementation directly, which saves the
dispatcher's share of a decode step.  PyTorch's ``opcheck`` passes on each.
"""

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor

import dms_kernels
from dms_kernels.plan import Plan
from dms_kernels.rows import Rows
from dms_kernels.sinks import absorb, sinks_gradient


def tracing(x: Tensor) -> bool:
    """Whether the call is to be recorded, not run."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


@library.custom_op("dms::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor | None, band: Tensor, kept: Tensor, count: Tensor, first: Tensor,
    last: Tensor, window: int, offset: int, scale: float, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by a plan (``plan.Plan``): out (B, Hq, T, D) and lse (B, Hq, T) fp32."""
    plan = Plan(window, offset, band, kept, count, first, last)
    out, lse = dms_kernels.on(q.device, "forward").forward(q, k, v, plan, log_keep, scale)
    return (out, lse) if sinks is None else absorb(out, lse, sinks)


@attend.register_fake
def _(q, k, v, log_keep, band, kept, count, first, last, window, offset, scale, sinks=None):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@library.custom_op("dms::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, log_keep: Tensor | None, band: Tensor,
    kept: Tensor, count: Tensor, first: Tensor, last: Tensor, window: int, offset: int, scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_keep and sinks; of the last two empty where there is none."""
    plan = Plan(window, offset, band, kept, count, first, last)
    backward = dms_kernels.on(q.device, "backward").backward
    *grads, d_keep = backward(grad.contiguous(), q, k, v, out, lse, plan, log_keep, scale)
    d_sinks = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
    return *(x.contiguous() for x in grads), *(lse.new_empty(0) if x is None else x for x in (d_keep, d_sinks))


@attend_backward.register_fake
def _(grad, q, k, v, out, lse, log_keep, band, kept, count, first, last, window, offset, scale, sinks=None):
    more = (lse.new_empty(0) if x is None else torch.empty_like(x) for x in (log_keep, sinks))
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), *more


def _save(ctx, inputs, output) -> None:
    q, k, v, log_keep, band, kept, count, first, last, *ctx.numbers, sinks = inputs
    ctx.save_for_backward(sinks, q, k, v, *output, log_keep, band, kept, count, first, last)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    sinks, q, k, v, out, lse, log_keep, *plan = ctx.saved_tensors
    *grads, d_keep, d_sinks = attend_backward(grad, q, k, v, out, lse, log_keep, *plan, *ctx.numbers, sinks)
    return *grads, None if log_keep is None else d_keep, *[None] * 8, None if sinks is None else d_sinks


attend.register_autograd(_gradients, setup_context=_save)


@library.custom_op("dms::decode", mutates_args=())
def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """See naive.decode_attention."""
    return dms_kernels.on(q.device, "decode").decode_attention(q, keys, values, table, lengths, scale, sinks, largest)


@decode.register_fake
def _(q, keys, values, table, lengths, scale, sinks=None, largest=None):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@library.custom_op(
    "dms::step",
    mutates_args=(
        "keys", "values", "table", "length", "owned", "free", "free_count", "ring_slot", "ring_evict", "seen", "reads",
        "overflow", "largest",
    ),
)  # fmt: skip
def step(
    keys: Tensor, values: Tensor, table: Tensor, length: Tensor, owned: Tensor, free: Tensor, free_count: Tensor,
    ring_slot: Tensor, ring_evict: Tensor, seen: Tensor, reads: Tensor, overflow: Tensor, largest: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int, scale: float,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.step; the first thirteen are the tensors of ``Rows``."""
    first = (keys, values, table, length, owned, free, free_count)
    rows = Rows(*first, ring_slot, ring_evict, seen, reads, overflow, largest)
    return dms_kernels.on(q.device, "step").step(rows, q, k, v, evict, active, lag, scale, sinks)


@step.register_fake
def _(*arguments):
    return torch.empty_like(arguments[13], memory_format=torch.contiguous_format)


@library.custom_op("dms::gate", mutates_args=())
def gate(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, scale: float, offset: float) -> Tensor:
    """See naive.gate_logits."""
    return dms_kernels.on(hidden.device, "gate").gate_logits(hidden, norm, weight, eps, scale, offset).contiguous()


@gate.register_fake
def _(hidden, norm, weight, eps, scale, offset):
    return norm.new_empty(hidden.shape[0], weight.shape[0], hidden.shape[1])
