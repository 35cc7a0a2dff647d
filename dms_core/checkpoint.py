"""Save and load retrofitted models: safetensors and JSON only.

A directory of ours holds ``dms.json`` (the settings and the shape of the model they belong to), for the adapter gate
``dms_gates.safetensors``, and for a whole model the usual transformers files, loadable without DMS as well, or in
``dms_difference.safetensors`` how its weights differ from the base model's, in few numbers.  Where there is no whole
model, ``base`` in ``dms.json`` names the one that gates and difference go on: a directory or a hub id.
``dms.json`` is written last and holds the SHA-256 of every safetensors file, so that what was damaged later, or half
written by a killed process, is refused.
Checkpoints of the authors' code load too: ``dms_core.interop`` knows their names.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dms_core import interop
from dms_core.config import DMSConfig
from dms_core.hub_files import HUB_OPTIONS, check_references, local_directory, read_safetensors, resolve
from dms_core.model import attach, detach
from dms_core.storage import read_json, replacing, sha256, write_json

SETTINGS, GATES, DIFFERENCE = "dms.json", "dms_gates.safetensors", "dms_difference.safetensors"


def model_shape(model: PreTrainedModel) -> dict:
    """What a set of gates must match."""
    text = model.config.get_text_config()
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    }


def save_gates(model: PreTrainedModel, directory: Path | str, state: dict | None = None, **facts) -> None:
    """Write the gates alone.  ``facts`` (such as cr, step) go into the JSON; ``state``: see save_model.

    >>> save_gates(attach(model, DMSConfig(window=16)), "gates", cr=8.0)
    >>> sorted(file.name for file in Path("gates").iterdir())
    ['dms.json', 'dms_gates.safetensors']
    """
    state = model.state_dict() if state is None else state
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    gates = {name: p.detach().contiguous() for name, p in state.items() if ".dms_gate." in name}
    if gates:
        _write_tensors(gates, directory / GATES)
    sums = {file.name: _sha256(file) for file in sorted(directory.glob("*.safetensors"))}
    settings = {"dms": model.dms.config.to_dict(), "model": model_shape(model), **facts, "sha256": sums}
    write_json(directory / SETTINGS, settings)
    for name in sums:  # safetensors leaves them to their owner alone
        (directory / name).chmod((directory / SETTINGS).stat().st_mode)


def save_model(
    model: PreTrainedModel, directory: Path | str, tokenizer=None, state: dict | None = None, **facts
) -> None:
    """Write weights, gates and settings.  ``state``: the state dict where the model holds only shards of it.

    >>> save_model(attach(model, DMSConfig(window=16)), "cr8", cr=8.0)
    >>> load_model("cr8").dms.config.window
    16
    """
    state = model.state_dict() if state is None else state
    weights = {name: p for name, p in state.items() if ".dms_gate." not in name}
    with writing(directory):
        model.save_pretrained(directory, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    save_gates(model, directory, state, **facts)


def write_difference(
    model: PreTrainedModel, parts: dict[str, torch.Tensor], directory: Path | str, state: dict | None = None, **facts
) -> None:
    """Write gates, and what is to be added to the base model's weights: NAME.up @ NAME.down, in fp16, or NAME itself.

    ``state``: see save_model.
    """
    held = {name: x.half() if name.endswith((".up", ".down")) else x for name, x in parts.items()}
    _write_tensors({name: x.contiguous().cpu() for name, x in held.items()}, Path(directory) / DIFFERENCE)
    save_gates(model, directory, state, **facts)


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """What torch and safetensors raise for a disk that is full, or fails, becomes an OSError that names ``place``."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{place}: cannot be written; is the disk full? ({str(error).splitlines()[0]})") from None


def _write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A safetensors file, whole or not at all."""
    with replacing(file) as part, writing(file):
        save_file(tensors, part)


def _check_sums(directory: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a file that is not the one that was saved; for those without a sum nothing is known."""
    sums = read_settings(directory).get("sha256", {}) if (directory / SETTINGS).exists() else {}
    for name in names:
        file = directory / name
        if name in sums and not (file.exists() and _sha256(file) == sums[name]):
            how = f"remove 'sha256' from {SETTINGS} if the change was meant"
            raise ValueError(f"{file}: not the file that was saved: damaged, or of an interrupted save; {how}")


@torch.no_grad()
def _add_difference(model: PreTrainedModel, file: Path) -> None:
    """Raises ValueError, with nothing changed, for a file that is not of this model."""
    parts, changes = read_safetensors(file), {}
    for name, p in model.named_parameters():
        if name in parts:
            changes[name] = parts.pop(name)
        elif f"{name}.up" in parts and f"{name}.down" in parts:
            changes[name] = parts.pop(f"{name}.up").float() @ parts.pop(f"{name}.down").float()
        if name in changes and changes[name].shape != p.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(changes[name].shape)}, must be {tuple(p.shape)}")
    if parts:
        raise ValueError(f"{file}: tensors {sorted(parts)[:4]} unknown")
    for name, p in model.named_parameters():
        if name in changes:
            change = changes[name].to(p.device)
            if isinstance(p, DTensor):  # a part of the weights, under tensor parallelism
                change = distribute_tensor(change, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(p.float() + change)


def read_settings(directory: Path | str) -> dict:
    """dms.json of a checkpoint.  Raises ValueError where there is none or it cannot be read."""
    file = Path(directory) / SETTINGS
    try:
        settings = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; {directory} is not a DMS checkpoint") from None
    if not {"dms", "model"} <= set(settings) or not isinstance(settings.get("sha256", {}), dict):
        raise ValueError(f"{file}: must hold an object with 'dms' and 'model', and 'sha256' must be an object")
    if not isinstance(settings.get("base", ""), str):
        raise ValueError(f"{file}: base {settings['base']!r} must be text, a directory or a hub id")
    return settings


def is_checkpoint(directory: Path | str) -> bool:
    """Does a directory hold a retrofitted model, ours or the authors'?  False for a plain model."""
    return (Path(directory) / SETTINGS).exists() or interop.is_foreign(directory)


def is_whole(directory: Path | str) -> bool:
    """Does a directory hold a model's own weights, so that no base model is needed?"""
    return any(Path(directory).glob("model*.safetensors"))


def load_gates(model: PreTrainedModel, directory: Path | str) -> PreTrainedModel:
    """Attach the gates saved in a directory or hub repository to ``model``, and add a difference of weights to its own.

    Raises ValueError if they belong to another model, or are damaged; ``model`` is then as it was.

    >>> save_gates(attach(model, DMSConfig(window=16)), "gates")
    >>> load_gates(detach(model), "gates").dms.config.window
    16
    """
    directory = local_directory(directory)
    foreign = interop.is_foreign(directory)
    if foreign:
        config, shape = interop.read_foreign_settings(directory), interop.read_foreign_shape(directory)
    else:
        settings = read_settings(directory)
        config, shape = DMSConfig.from_dict(settings["dms"]), settings["model"]
    if (given := model_shape(model)) != shape:
        raise ValueError(f"{directory} holds gates for {shape}: this model is {given}")
    spelling: Callable[[str], str]
    if foreign:
        (gates, place), spelling = interop.read_foreign_gates(directory), interop.foreign_name
    else:
        place, spelling = directory / GATES, str
        gates = read_safetensors(place) if config.gate == "adapter" else {}
    attach(model, config)
    try:
        _check_gates(gates, model, place, spelling)
        _check_sums(directory, (GATES, DIFFERENCE))
        if (directory / DIFFERENCE).exists():
            _add_difference(model, directory / DIFFERENCE)
    except ValueError:
        detach(model)
        raise
    ours = [name for name in model.state_dict() if ".dms_gate." in name]
    model.load_state_dict({name: gates[spelling(name)] for name in ours}, strict=False)
    return model


def _check_gates(gates: dict[str, torch.Tensor], model: PreTrainedModel, place: Path, spelling) -> None:
    """``spelling`` turns our name of a parameter into the one it has in ``place``."""
    expected = {spelling(name): tuple(p.shape) for name, p in model.state_dict().items() if ".dms_gate." in name}
    if set(gates) != set(expected):
        raise ValueError(f"{place}: tensors {sorted(set(gates) ^ set(expected))[:4]} missing or unknown")
    for name, tensor in gates.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{place}: {name} has shape {tuple(tensor.shape)}, must be {expected[name]}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{place}: {name} has NaN or infinite values")


def load_model(name: Path | str, **from_pretrained) -> PreTrainedModel:
    """A retrofitted model in eval mode, gates attached, from a directory or the hub; of gates alone their base, too.

    Ours, or one of the authors' (nvidia/Qwen3-8B-DMS-8x, whose licence is non-commercial; Model-Optimizer's student
    models), told apart by the keys of config.json; of the latter no code is executed, whatever ``trust_remote_code``
    says.
    Raises ValueError for a name out of reach, and for missing or damaged files.

    >>> save_model(attach(model, DMSConfig(window=16)), "cr8")
    >>> load_model("cr8", dtype=torch.bfloat16).dms.layers
    2
    """
    directory, options = resolve(name, from_pretrained)
    if interop.is_foreign(directory):
        interop.read_foreign_settings(directory)
        if not is_whole(directory):
            how = "load_gates(load_base(NAME OF THE BASE MODEL), directory)"
            raise ValueError(f"{directory}: no model*.safetensors; if it holds adapters alone, use {how}")
        with interop.gates_expected():
            model = load_base(directory, **{**options, "trust_remote_code": False})
        interop.forget_foreign_keys(model)
    else:
        read_settings(directory)
        hub = {key: x for key, x in from_pretrained.items() if key in HUB_OPTIONS}
        model = load_base(directory, **options, **hub)
    return load_gates(model, directory).eval()


def load_base(name: Path | str, **from_pretrained) -> PreTrainedModel:
    """A transformers model in eval mode from a directory or the hub; of gates alone the model that they go on.

    Safetensors only, and no remote code unless asked for.  ``from_pretrained``: options of that method of transformers.
    Raises ValueError for a name out of reach, for missing or damaged files and weights, and for a model that gates
    alone do not go on any more.

    >>> model.save_pretrained("base")
    >>> attach(load_base("base"), DMSConfig(window=16)).dms.layers
    2
    """
    directory, options = resolve(name, from_pretrained)
    settings = {} if is_whole(directory) or not (directory / SETTINGS).exists() else read_settings(directory)
    if settings.get("base"):
        return _load_named(settings, directory, from_pretrained)
    check_references(directory)
    files = sorted(directory.glob("model*.safetensors"))
    for file in files:
        read_safetensors(file, None)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, **options
        )
    except OSError as error:  # a file, or one of its shards, is not there
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name}: {len(missing)} weights are missing, such as {missing[:3]}; all must be there")
    _check_sums(directory, [file.name for file in files])
    model.config.name_or_path = Path(name).resolve() if Path(name).is_dir() else name  # not its place in a cache
    model.base_revision = from_pretrained.get("revision")
    return model.eval()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that weights are best held in on ``device``: bf16; fp32 on a CPU without instructions for it."""
    have = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.float32 if torch.device(device).type == "cpu" and not have else torch.bfloat16


def _load_named(settings: dict, directory: Path, from_pretrained: dict) -> PreTrainedModel:
    """The base model that a checkpoint names; without its code, since a name in a file is no reason to run any."""
    name = settings["base"]
    options = {**{key: x for key, x in from_pretrained.items() if key != "revision"}, "trust_remote_code": False}
    options |= {"revision": settings["base_revision"]} if settings.get("base_revision") else {}
    if settings.get("base_weights") != fingerprint(resolve(name, options)[0]):
        how = "load_gates(load_base(NAME), directory) if it is the right one"
        raise ValueError(f"{directory}: its base model {name} has changed since it was trained; {how}")
    return load_base(name, **options)


def load_tokenizer(name: Path | str, **from_pretrained) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory or the hub, where it is looked for as ``load_base`` looks for a model."""
    directory, options = resolve(name, from_pretrained)
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except OSError as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None


def fingerprint(directory: Path | str) -> str:
    """A hash of a checkpoint's weights and settings, as 16 hexadecimal digits, from its files alone.

    Raises ValueError if the directory holds no *.safetensors.
    """
    kinds, digest = ("*.safetensors", "config.json", SETTINGS), hashlib.sha256()
    files = [file for kind in kinds for file in sorted(Path(directory).glob(kind))]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{directory}: no *.safetensors; must hold a model")
    digest.update("".join(f"{file.name} {_sha256(file)}\n" for file in files).encode())
    return digest.hexdigest()[:16]


def _sha256(file: Path) -> str:
    """Of a file's bytes.  The hub's cache links to large files by this very name: those are not read."""
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob):
        return blob
    return sha256(file)
