"""Files of checkpoints: a directory or a hub id, JSON and safetensors; damage is a ValueError that names the file."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")  # those of from_pretrained
PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
]  # weights, settings, tokenizer; no code


def local_directory(name: Path | str, **hub) -> Path:
    """``name`` if it is a directory, else the hub repository of that id, downloaded or found in the cache.

    Raises ValueError if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=PATTERNS, **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: not a DMS checkpoint: no such directory, and no repository on the hub ({reason})"
        ) from None


def read_object(file: Path) -> dict:
    """The object in a JSON file.  Raises ValueError if it cannot be read; a missing file is a FileNotFoundError."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise
    except ValueError as error:  # JSON, or its encoding
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object, holds a {type(values).__name__}")
    return values


def read_safetensors(file: Path, part: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file whose names hold ``part``.  Raises ValueError for a missing, truncated or damaged one."""
    try:
        if not part:
            return load_file(file)
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if part in name}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged ({error})") from None
