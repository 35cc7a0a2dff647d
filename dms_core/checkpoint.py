"""Save and load retrofitted models: safetensors and JSON only.

A directory holds ``dms.json`` (the settings and the shape of the model they belong to), for the adapter gate
``dms_gates.safetensors``, and for a whole model the usual transformers files, loadable without DMS as well.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dms_core.config import DMSConfig
from dms_core.model import attach, detach

SETTINGS, GATES = "dms.json", "dms_gates.safetensors"


def model_shape(model: PreTrainedModel) -> dict:
    """What a set of gates must match."""
    text = model.config.get_text_config()
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    }


def save_gates(model: PreTrainedModel, directory: Path | str, **facts) -> None:
    """Write the gates alone.  ``facts`` (such as cr, step) go into the JSON."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    gates = {name: p.detach().contiguous() for name, p in model.state_dict().items() if ".dms_gate." in name}
    if gates:
        save_file(gates, directory / GATES)
    settings = {"dms": model.dms.config.to_dict(), "model": model_shape(model), **facts}
    (directory / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def save_model(model: PreTrainedModel, directory: Path | str, tokenizer=None, **facts) -> None:
    """Write weights, gates and settings."""
    weights = {name: p for name, p in model.state_dict().items() if ".dms_gate." not in name}
    model.save_pretrained(directory, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    save_gates(model, directory, **facts)


def read_settings(directory: Path | str) -> dict:
    """dms.json of a checkpoint.  Raises ValueError where there is none or it cannot be read."""
    file = Path(directory) / SETTINGS
    try:
        settings = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; {directory} is not a DMS checkpoint") from None
    except ValueError as error:  # JSON, or its encoding
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(settings, dict) or not {"dms", "model"} <= set(settings):
        raise ValueError(f"{file}: must hold an object with 'dms' and 'model'")
    return settings


def load_gates(model: PreTrainedModel, directory: Path | str) -> PreTrainedModel:
    """Attach the gates saved in ``directory`` to ``model``.  Raises ValueError if they belong to another model."""
    settings = read_settings(directory)
    if (shape := model_shape(model)) != settings["model"]:
        raise ValueError(f"{directory} holds gates for {settings['model']}: this model is {shape}")
    config = DMSConfig.from_dict(settings["dms"])
    gates = read_safetensors(Path(directory) / GATES) if config.gate == "adapter" else {}
    attach(model, config)
    try:
        _check_gates(gates, model, Path(directory) / GATES)
    except ValueError:
        detach(model)
        raise
    model.load_state_dict(gates, strict=False)
    return model


def _check_gates(gates: dict[str, torch.Tensor], model: PreTrainedModel, file: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items() if ".dms_gate." in name}
    if set(gates) != set(expected):
        raise ValueError(f"{file}: tensors {sorted(set(gates) ^ set(expected))[:4]} missing or unknown")
    for name, tensor in gates.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, must be {expected[name]}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} has NaN or infinite values")


def load_model(directory: Path | str, **from_pretrained) -> PreTrainedModel:
    """A retrofitted model in eval mode, gates attached."""
    read_settings(directory)
    return load_gates(load_base(directory, **from_pretrained), directory).eval()


def load_base(name: Path | str, **from_pretrained) -> PreTrainedModel:
    """A transformers model from a directory or the hub, safetensors only, no remote code unless asked for."""
    for file in sorted(Path(name).glob("model*.safetensors")) if Path(name).is_dir() else []:
        read_safetensors(file)
    model, report = AutoModelForCausalLM.from_pretrained(
        name, use_safetensors=True, output_loading_info=True, **from_pretrained
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, such as {missing[:3]}; all must be there")
    return model.eval()


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file.  Raises ValueError that names a missing, truncated or damaged one."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged ({error})") from None
