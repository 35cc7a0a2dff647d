"""Which implementation serves a device."""

from importlib import import_module
from types import ModuleType

import torch

MODULES = {  # operation: (elsewhere: stock torch, on CUDA: Triton)
    "forward": ("cpu.compact", "gpu.forward"),
    "backward": ("cpu.compact", "gpu.backward"),
    "decode": ("cpu.decode", "gpu.decode"),
    "append": ("rows", "gpu.append"),
}


def on(device: torch.device, operation: str) -> ModuleType:
    """The module that holds ``operation`` for tensors on ``device``."""
    return import_module(f"dms_kernels.{MODULES[operation][device.type == 'cuda']}")
