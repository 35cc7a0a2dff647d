"""Rows of the states that transformers caches for linear attention, convolution and Mamba: the model's, not tokens.

A layer that has some holds them in two dicts of tensors, whose first dimension is the batch.
"""

import copy
from collections.abc import Iterator

from torch import Tensor

OWN = ("conv_states", "recurrent_states")
SETTINGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


def tensors(layer) -> Iterator[tuple[dict, int, Tensor]]:
    """Where the states of a layer lie: (holder, key, tensor (B, ...)); none for a layer without."""
    for name in OWN:
        for key, value in getattr(layer, name, {}).items():
            if value is not None:
                yield getattr(layer, name), key, value


def nbytes(layer) -> int:
    return sum(x.nbytes for _, _, x in tensors(layer))


def select(layer, indices: Tensor) -> None:
    """Become copies of the batch rows named."""
    for holder, key, state in list(tensors(layer)):
        holder[key] = state[indices.to(state.device)]


def put(layer, batch: int, indices: Tensor, other, source: Tensor) -> None:
    """Batch rows ``indices`` of ``batch`` become copies of rows ``source`` of another layer of the same kind."""
    if not any(True for _ in tensors(layer)):  # nothing has been in it yet
        for name in OWN:
            blank = {k: x if x is None else x.new_zeros(batch, *x.shape[1:]) for k, x in getattr(other, name).items()}
            setattr(layer, name, blank)
        for name in (*SETTINGS, "dtype", "device"):
            setattr(layer, name, copy.copy(getattr(other, name)))
    for (_, _, mine), (_, _, theirs) in zip(tensors(layer), tensors(other), strict=True):
        mine.index_copy_(0, indices.to(mine.device), theirs[source.to(theirs.device)].to(mine))


def reset(layer) -> None:
    """As new: the next batch may have another size."""
    for name in OWN:
        setattr(layer, name, dict.fromkeys(getattr(layer, name)))
    for name in SETTINGS[:3]:
        setattr(layer, name, dict.fromkeys(getattr(layer, name), False))


def clear(layer, indices: Tensor) -> None:
    """Zero batch rows."""
    for _, _, state in tensors(layer):
        state.index_fill_(0, indices.to(state.device), 0)
