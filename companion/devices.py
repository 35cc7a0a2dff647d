"""Devices and dtypes by name, checked against this machine."""

import torch


def checked_device(name: str | None = None) -> str:
    """``name``; for None a GPU where there is one.  Raises ValueError for a device that this machine lacks."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["cpu", *["cuda"] * bool(cards), *cards]
    if name is not None and name not in known:
        raise ValueError(f"device {name!r}: must be one of {', '.join(known)} on this machine")
    return name or ("cuda" if cards else "cpu")


def checked_dtype(name: str) -> str:
    """Raises ValueError for what is neither "auto" nor a floating dtype of torch."""
    kind = getattr(torch, name, None)
    if name != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype {name!r}: must be auto, float32, bfloat16 or float16")
    return name
