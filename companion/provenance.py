"""What a measurement was made on: recorded beside every result."""

import contextlib
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "triton")


def describe() -> dict:
    """Python, package versions, processor, threads, and the accelerator if there is one."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name.*?: *(.*\S)", info.read_text() if info.exists() else "", re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
