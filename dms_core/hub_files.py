"""Files of checkpoints: a directory or a hub id, and safetensors; damage is a ValueError that names the file."""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open

from dms_core.storage import read_json

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")  # those of from_pretrained
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # weights, settings, tokenizer; no code
TIMEOUT = 10.0  # seconds for the hub's first answer


def local_directory(name: Path | str, code: bool = False, **hub) -> Path:
    """``name`` if it is a directory, else the hub repository of that id, downloaded or found in the cache.

    The hub is asked once, without the retries of huggingface_hub; out of reach, only the cache counts.  ``code``: with
    Python files.  ``hub``: those of HUB_OPTIONS.  Raises ValueError that names ``name`` if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    failed = None
    if not hub.get("local_files_only"):
        try:
            HfApi(token=hub.get("token")).model_info(str(name), revision=hub.get("revision"), timeout=TIMEOUT)
        except Exception as error:  # bad ids, HTTP errors, and those of whichever HTTP client is installed
            failed, hub = error, {**hub, "local_files_only": True}
    try:
        return Path(snapshot_download(str(name), allow_patterns=PATTERNS + ["*.py"] * code, **hub))
    except Exception as error:
        reason = str(failed or error).splitlines()[0]
        raise ValueError(f"model {str(name)!r}: neither a directory nor a hub id in reach ({reason})") from None


def resolve(name: Path | str, options: dict) -> tuple[Path, dict]:
    """``local_directory`` by those of from_pretrained's options that are about the hub, and the other options."""
    rest = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    hub = {key: options[key] for key in options.keys() - rest.keys()}
    return local_directory(name, bool(options.get("trust_remote_code")), **hub), rest


def check_references(directory: Path) -> None:
    """Raises ValueError where JSON of a checkpoint names shards outside its directory, or kernels (code) of the hub."""
    for file in sorted(directory.glob("*.index.json")):
        for name in _values(read_json(file).get("weight_map")):
            if Path(name).name != name:
                raise ValueError(f"{file}: weight_map names {name!r}; must be files beside it")
    for file in sorted(directory.glob("*config.json")):
        for name in _values(read_json(file), "_implementation"):
            if "/" in name:
                raise ValueError(f"{file}: an implementation is {name!r}, code of the hub; must be a plain name")


def _values(node, ending: str = "", inside: bool = False) -> Iterator[str]:
    """All text below ``node``, or below those keys of it, however deep, that end with ``ending``."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _values(value, ending, inside or key.endswith(ending))
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, ending, inside)
    elif isinstance(node, str) and inside:
        yield node


def read_safetensors(file: Path, part: str | None = "") -> dict[str, torch.Tensor]:
    """The tensors of a file whose names hold ``part``; with None the file is checked and no tensor is read.

    Raises ValueError for a missing, truncated or damaged file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if part is not None and part in name]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged ({error})") from None
