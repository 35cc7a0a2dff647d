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
from dms_core.model import attach

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
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; {directory} is not a DMS checkpoint") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None


def load_gates(model: PreTrainedModel, directory: Path | str) -> PreTrainedModel:
    """Attach the gates saved in ``directory`` to ``model``.  Raises ValueError if they belong to another model."""
    settings = read_settings(directory)
    if (shape := model_shape(model)) != settings["model"]:
        raise ValueError(f"{directory} holds gates for {settings['model']}: this model is {shape}")
    config = DMSConfig.from_dict(settings["dms"])
    gates = read_safetensors(Path(directory) / GATES) if config.gate == "adapter" else {}
    attach(model, config)
    expected = {name for name in model.state_dict() if ".dms_gate." in name}
    if set(gates) != expected:
        raise ValueError(f"{directory}/{GATES}: tensors {sorted(set(gates) ^ expected)[:4]} missing or unknown")
    for name, tensor in gates.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{directory}/{GATES}: {name} has NaN or infinite values")
    model.load_state_dict(gates, strict=False)
    return model


def load_model(directory: Path | str, **from_pretrained) -> PreTrainedModel:
    """A retrofitted model in eval mode, gates attached."""
    read_settings(directory)
    return load_gates(load_base(directory, **from_pretrained), directory).eval()


def load_base(name: Path | str, **from_pretrained) -> PreTrainedModel:
    """A transformers model from a directory or the hub, safetensors only, no remote code unless asked for."""
    for file in sorted(Path(name).glob("model*.safetensors")) if Path(name).is_dir() else []:
        read_safetensors(file)
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **from_pretrained).eval()


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file.  Raises ValueError that names a missing, truncated or damaged one."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged ({error})") from None
