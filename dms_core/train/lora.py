"""Low-rank adapters (LoRA) on the linear layers of a model whose own weights stay frozen: peft's, put on and taken off.

What they learn is a difference of weights of low rank, which is all that a checkpoint keeps of it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names
SCALE = 2.0  # of the product of the two, whatever the rank


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the weights, and put fp32 factors of ``rank`` on all linear layers but the output layer, in place.

    At first they change nothing.  Raises ValueError if the model is quantised or has no linear layer, and
    ModuleNotFoundError without peft.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    settings = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules="all-linear")
    inject_adapter_in_model(settings, model)
    cast_adapter_dtype(model, "default")  # small steps are lost in the bf16 of frozen weights


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the linear layer that each wraps."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside, the model has its own weights."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def lora_difference(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From a state dict NAME.weight.up (rows, rank) and NAME.weight.down (rank, columns), whose product to add."""
    found = {}
    for name in [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]:
        found[f"{name}.weight.up"] = SCALE * state[name + UP].detach()
        found[f"{name}.weight.down"] = state[name + DOWN].detach()
    return found


@torch.no_grad()
def fold_lora(model: nn.Module) -> None:
    """Add the adapters to the weights that they belong to, and take them off."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        place, _, own = name.rpartition(".")
        setattr(model.get_submodule(place), own, layer.get_base_layer())
