"""Put DMS gates on a transformers decoder, and take them off, without copying modelling code.

After ``attach`` the model has an attribute ``dms``; a plain forward evicts hard on the full sequence in eval mode and
samples soft decisions in train mode; with a DMSCache it frees memory; inside ``model.dms.disabled()`` it is the
original model.
"""

import warnings

from transformers import PreTrainedModel

from dms_core.attention import NAME
from dms_core.config import DMSConfig
from dms_core.handle import DMS


def attach(model: PreTrainedModel, config: DMSConfig) -> PreTrainedModel:
    """Put gates on ``model`` in place and return it; ``model.dms`` is their handle (paper sections 3.1-3.2).

    One forward pass over a few tokens shows what its attention layers are.  Gates go on those with full attention;
    sliding windows, chunks and states (linear attention, convolution, Mamba) stay, and a warning names the first two.
    Raises ValueError if the model already has gates, or its attention is not what gates can be put on.

    >>> attach(model, DMSConfig(window=16)).dms.layers
    2
    >>> with model.dms.disabled():  # the original model
    ...     logits = model(torch.ones(1, 8, dtype=torch.long)).logits  # (B, T, V)
    """
    if getattr(model, "dms", None) is not None:
        raise ValueError("the model already has DMS gates: call dms_core.detach(model) first")
    install(model, DMS(model, config), NAME)
    for kind, of_layers in (("sliding window", model.dms.layout.sliding), ("chunks", model.dms.layout.chunks)):
        if keep := [index for index, tokens in enumerate(of_layers) if tokens]:
            name = type(model).__name__
            warnings.warn(f"{name}: layers {keep} keep their {kind}; DMS is on the other layers", stacklevel=2)
    return model


def install(model: PreTrainedModel, handle: DMS, implementation: str) -> PreTrainedModel:
    """Make ``handle`` the model's, and ``implementation`` its attention."""
    handle.attention_before, handle.implementation = handle.text._attn_implementation, implementation
    model.dms = handle
    handle._choose(implementation)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gates off; the model is as it was before ``attach``, but for any training since.

    Raises ValueError if it has none.

    >>> hasattr(detach(attach(model, DMSConfig())), "dms")
    False
    """
    dms = getattr(model, "dms", None)
    if dms is None:
        raise ValueError("the model has no DMS gates")
    for hook in dms.hooks:
        hook.remove()
    for module in dms.layout.modules:
        del module.__dict__["dms"]
        if hasattr(module, "dms_gate"):
            del module.dms_gate
    dms._choose(dms.attention_before)
    del model.dms
    return model
