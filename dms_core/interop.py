"""The authors' checkpoints: read as they are, and written from ours.

Two kinds, both a transformers model whose config.json has keys ``dms_*``:

- neuron, as in nvidia/Qwen3-8B-DMS-8x (paper appendix C; its licence is non-commercial): no parameters of its own;
  the last neuron of the first query head of each group, after q_norm and before RoPE, is x in z = s * x - b0.
- adapter, as NVIDIA/Model-Optimizer's experimental/dms trains: ``dms_separate_alpha`` is true, and each
  ``model.layers.N.self_attn`` has ``dms_proj_alpha.weight`` (KV heads, hidden size) and
  ``dms_proj_alpha_norm.weight`` (hidden size,), applied to the residual stream before the layer's input norm.

In both, ``dms_window_size`` is our window w: their training mask and prefill let query i see key j while
i - j <= dms_window_size, and their cache is made for dms_window_size + 1 tokens.  In both, the decision about
token j is read from token j + 1.  z is computed in fp32 here, in the model's dtype there.

No code of a checkpoint is executed, whatever its ``auto_map`` says, and only safetensors are read.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dms_core.config import DMSConfig
from dms_core.hub_files import read_safetensors
from dms_core.storage import read_json, write_text

CONFIG, ADAPTERS, MARK = "config.json", "dms_adapters.safetensors", "dms_proj_alpha"
BLOCK = 256  # their default of dms_paged_attention_block_size; they require dms_window_size > it

# key -> (field of DMSConfig, their default, what is allowed, in words and as a test)
_OFF = "false; to run without eviction use model.dms.disabled()"
_POSITIVE = ("a number > 0", lambda x: _is_number(x) and x > 0)
_KEYS = {
    "dms_alpha_scale": ("scale", 100.0, *_POSITIVE),
    "dms_initial_alpha_offset": ("offset", 5.0, "a finite number", lambda x: _is_number(x)),
    "dms_window_size": ("window", 512, "an integer >= 0", lambda x: type(x) is int and x >= 0),
    "dms_tau": ("temperature", 0.1, *_POSITIVE),
    "dms_alpha_per": ("granularity", "head", "'head' or 'layer'", lambda x: x in ("head", "layer")),
    "dms_separate_alpha": ("gate", False, "true (adapter) or false (neuron)", lambda x: type(x) is bool),
    "dms_disable_eviction": (None, False, _OFF, lambda x: x is False),
}
# Keys that say how their code runs, or what a checkpoint was trained for; none changes what is evicted.
_WITHOUT_EFFECT = {
    "dms_cr",
    "dms_paged_attention_block_size",
    "dms_compile_limit",
    "dms_manual_inference_mode",
    "dms_chunked_prefill",
    "dms_preallocate_for_tokens",
}


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_foreign(directory: Path | str) -> bool:
    """Is this a checkpoint of the authors' code?  Told by keys ``dms_*`` in config.json and no dms.json."""
    directory = Path(directory)
    return not (directory / "dms.json").exists() and any(key.startswith("dms_") for key in _read_config(directory))


def _read_config(directory: Path) -> dict:
    try:
        return read_json(directory / CONFIG)
    except FileNotFoundError:
        return {}


def read_foreign_settings(directory: Path | str) -> DMSConfig:
    """The settings in a foreign config.json; a key that is not there has its default in the authors' code.

    A key ``dms_*`` that is not known here is left out with a warning (their code ignores such keys).
    Raises ValueError that names the file, the key and what is allowed.
    """
    file = Path(directory) / CONFIG
    given = {key: value for key, value in _read_config(Path(directory)).items() if key.startswith("dms_")}
    if unknown := sorted(set(given) - set(_KEYS) - _WITHOUT_EFFECT):
        warnings.warn(f"{file}: {unknown} are not known here and have no effect", stacklevel=2)
    fields = {}
    for key, (field, default, allowed, test) in _KEYS.items():
        value = given.get(key, default)
        if not test(value):
            raise ValueError(f"{file}: {key} {value!r}: must be {allowed}")
        if field:
            fields[field] = value
    fields["gate"] = "adapter" if fields["gate"] else "neuron"
    return DMSConfig(**fields)  # neuron -1, delayed eviction: all that their code knows


def read_foreign_shape(directory: Path | str) -> dict:
    """What model a foreign checkpoint belongs to, as ``dms_core.checkpoint.model_shape`` says it."""
    config = _read_config(Path(directory))
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in keys if config.get(key) is None]:
        raise ValueError(f"{Path(directory) / CONFIG}: {missing} are missing; all of {list(keys)} must be there")
    kind, width, layers, heads = (config[key] for key in keys)
    kv_heads = config.get("num_key_value_heads") or heads
    return {"model_type": kind, "hidden_size": width, "layers": layers, "kv_heads": kv_heads}


def foreign_name(name: str) -> str:
    """Our name of a gate's parameter in their spelling."""
    return name.replace(".dms_gate.norm.", f".{MARK}_norm.").replace(".dms_gate.proj.", f".{MARK}.")


def read_foreign_gates(directory: Path | str) -> tuple[dict[str, torch.Tensor], Path]:
    """The adapters' tensors by their own names, and the file that holds them (the directory if several or none do).

    ``dms_proj_alpha.bias``, which a model with ``attention_bias`` has, must be zero: our gate has none.
    """
    gates: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    for file in sorted(Path(directory).glob("*.safetensors")):
        found = read_safetensors(file, part=MARK)
        for name in [name for name in found if name.endswith(f"{MARK}.bias")]:
            if found.pop(name).any():
                raise ValueError(f"{file}: {name} is not zero: a bias of the gate is not supported, it must be zero")
        gates |= found
        files += [file] if found else []
    return gates, files[0] if len(files) == 1 else Path(directory)


@contextlib.contextmanager
def gates_expected() -> Iterator[None]:
    """Inside, transformers does not report the adapters' tensors, which are read after the model, as unexpected."""
    before = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"\.{MARK}(_norm)?\."]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = before


def forget_foreign_keys(model: PreTrainedModel) -> None:
    """Take the authors' keys off a loaded configuration: from now on the settings are in ``model.dms.config``."""
    for key in [key for key in vars(model.config) if key.startswith("dms_") or key == "auto_map"]:
        delattr(model.config, key)


def export_adapters(model: PreTrainedModel, directory: Path | str, cr: float | None = None) -> None:
    """Write the adapters alone under the names of the authors' code, and a config.json with their keys.

    ``load_gates(base, directory)`` reads them back; ``cr`` is for the record.  Raises ValueError for what their
    code cannot express, and for a neuron gate, which has no parameters: ``export_model`` writes whole models.
    """
    if model.dms.config.gate != "adapter":
        raise ValueError(f"gate {model.dms.config.gate!r}: only 'adapter' has parameters to export; use export_model")
    keys = _foreign_keys(model, cr)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(_foreign_gates(model), directory / ADAPTERS, {"format": "pt"})
    _write_config(directory, json.loads(model.config.to_json_string()), keys)
    (directory / ADAPTERS).chmod((directory / CONFIG).stat().st_mode)  # not for its owner alone


def export_model(model: PreTrainedModel, directory: Path | str, tokenizer=None, cr: float | None = None) -> None:
    """Write a whole model as the authors' code saves it: weights and adapters in one state dict, their keys.

    Their classes (Qwen3ForCausalLMDMS.from_pretrained) and ``load_model`` read it; ``cr`` is for the record.
    Raises ValueError for what their code cannot express.
    """
    keys, directory = _foreign_keys(model, cr), Path(directory)
    weights = {name: p for name, p in model.state_dict().items() if ".dms_gate." not in name}
    model.save_pretrained(directory, state_dict={**weights, **_foreign_gates(model)})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    _write_config(directory, read_json(directory / CONFIG), keys)


def _foreign_gates(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ours = {name: p for name, p in model.state_dict().items() if ".dms_gate." in name}
    return {foreign_name(name): p.detach().contiguous() for name, p in ours.items()}


def _foreign_keys(model: PreTrainedModel, cr: float | None) -> dict:
    """A DMSConfig in their keys.  Raises ValueError if their code would do something else with it."""
    config = model.dms.config
    if config.eviction != "delayed":
        raise ValueError(f"eviction {config.eviction!r}: the authors' code knows only 'delayed'")
    if config.gate == "neuron" and config.neuron % model.dms.head_dim != model.dms.head_dim - 1:
        raise ValueError(f"neuron {config.neuron}: the authors' code reads the last one, -1")
    if config.window <= BLOCK:
        needs = f"dms_window_size > dms_paged_attention_block_size, {BLOCK} by default"
        warnings.warn(f"window {config.window}: the authors' code requires {needs}", stacklevel=3)
    keys = {key: getattr(config, field) for key, (field, *_) in _KEYS.items() if field}
    keys |= {"dms_separate_alpha": config.gate == "adapter", "dms_disable_eviction": False}
    return keys if cr is None else {**keys, "dms_cr": cr}


def _write_config(directory: Path, config: dict, keys: dict) -> None:
    write_text(directory / CONFIG, json.dumps({**config, **keys}, indent=2, sort_keys=True) + "\n")
