"""What a decode step needs on a CPU: by numba where it is installed and numbers are fp32, else by torch.

Pools of int8 codes are for torch alone.
"""

from dataclasses import fields
from importlib.util import find_spec
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from dms_kernels import naive
from dms_kernels import rows as by_torch
from dms_kernels.cpu import decode
from dms_kernels.rows import Rows

COMPILED = find_spec("numba") is not None
ALONE = 1 << 20  # numbers in the keys' pool, up to which a second thread is not worth its start
NO_SINKS = np.empty(0, np.float32)
# In the order of compiled.append's arguments.
tensors = attrgetter(*(field.name for field in fields(Rows) if field.name != "largest"))


def append(rows: Rows, k: Tensor, v: Tensor, evict: Tensor, active: Tensor, lag: int) -> None:
    """See rows.append."""
    if not _fits(rows.keys, k, v):
        return by_torch.append(rows, k, v, evict, active, lag)
    from dms_kernels.cpu import compiled

    k, v = (x.view(-1, x.shape[-1]) for x in (k.contiguous(), v.contiguous()))
    compiled.append(*_numpy(*tensors(rows), k, v, evict.flatten(), active.flatten()), lag)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """See naive.decode_attention.  Much work goes to torch where it has threads: its own wait actively for the next
    operation, and would share the cores with any others."""
    if not _fits(q, keys, values) or (torch.get_num_threads() > 1 and keys.numel() > ALONE):
        return decode.decode_attention(q, keys, values, table, lengths, scale, sinks, largest)
    from dms_kernels.cpu import compiled

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = (len(table), -1, q.shape[-1])
    arrays = _numpy(q.reshape(heads), keys, values, table, lengths)
    more = NO_SINKS if sinks is None else sinks.detach().float().contiguous().numpy()
    compiled.attend(*arrays, np.float32(scale * compiled.LOG2E), more, out.view(heads).numpy(), 0, len(table))
    return out


def step(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    active: Tensor,
    lag: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """``append``, then ``decode_attention``; on one thread they are one call."""
    if not _fits(rows.keys, q, k, v) or torch.get_num_threads() > 1:
        append(rows, k, v, evict, active, lag)
        return decode_attention(q, rows.keys, rows.values, rows.table, rows.length, scale, sinks, rows.largest)
    from dms_kernels.cpu import compiled

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    new = [x if x.is_contiguous() else x.contiguous() for x in (k, v, evict, active, q)]  # alive until the call is over
    (pages, page, width), (count, columns) = rows.keys.shape, rows.table.shape
    addresses, heads = [x.data_ptr() for x in (*tensors(rows), *new, out)], 0
    if sinks is None:
        addresses.append(None)
    else:
        sinks = sinks.float().contiguous()
        addresses.append(sinks.data_ptr())
        heads = len(sinks)
    sizes = count, pages, page, width, columns, rows.cells, q.numel() // (count * width), len(active), lag
    compiled.step(*addresses, *sizes, heads, scale * compiled.LOG2E)
    return out


def gate_logits(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, scale: float, offset: float) -> Tensor:
    """See naive.gate_logits."""
    if not _fits(hidden, norm, weight):
        return naive.gate_logits(hidden, norm, weight, eps, scale, offset)
    from dms_kernels.cpu import compiled

    hidden, norm, weight = (x.contiguous() for x in (hidden, norm, weight))
    (heads, width), rows = weight.shape, hidden.numel() // hidden.shape[-1]
    out = hidden.new_empty(*hidden.shape[:2], heads)
    compiled.gate(*(x.data_ptr() for x in (hidden, norm, weight, out)), rows, heads, width, eps, scale, offset)
    return out.transpose(1, 2)


def _fits(*inputs: Tensor) -> bool:
    return COMPILED and all(x.dtype == torch.float32 for x in inputs)


def _numpy(*inputs: Tensor) -> list[np.ndarray]:
    return [x.detach().contiguous().numpy() for x in inputs]
