"""What decoding a model costs, and what compression changes, before anything is downloaded (``dms plan``).

The roofline model of the paper's appendix I, with a device's memory and, for the models of the paper's Table 3, what
their retrofit took.  Those need neither torch nor transformers; the others are counted (companion.cost.count).
"""

import math
from dataclasses import replace
from pathlib import Path

from companion.cost import roofline
from companion.cost.roofline import ARCHITECTURES, DEVICES, Architecture, Hardware

RESERVED = 0.1  # share of a device's memory that is left to activations and the allocator
RETROFIT_HOURS = {  # H100-hours per unit of compression ratio (paper, Table 3)
    "llama-3.2-1b": 10,
    "llama-3.1-8b": 100,
    "qwen-r1-1.5b": 30,
    "qwen-r1-7b": 75,
    "qwen-r1-32b": 345,
    "qwen3-8b": 270,
}


def find_architecture(model: str) -> Architecture:
    """A name that the companion knows, or else a directory or hub id with a transformers config.json.

    Of a checkpoint of gates or adapters alone it is that of its base model.  Raises ValueError for a model that is
    neither, or whose layers cannot be counted.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    from companion.cost.count import MODELS, count, known

    if model in MODELS:
        return count(known(model))
    from huggingface_hub import snapshot_download

    from dms_core.checkpoint import SETTINGS, is_whole, read_settings

    local = Path(model).is_dir()
    alone = local and (Path(model) / SETTINGS).exists() and not is_whole(model)
    if alone and (base := read_settings(model).get("base")):
        return find_architecture(base)
    try:  # of a hub repository the configuration alone; without a network this fails at once
        directory = model if local else snapshot_download(model, allow_patterns=["config.json"])
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        names = ", ".join([*sorted(ARCHITECTURES), *MODELS])
        where = "directory" if local else "hub id that can be reached"
        raise ValueError(f"model {model!r}: neither one of {names}, nor a {where} with a config.json") from error
    return count(config)


def plan(model: str, batch: int, context: int, cr: float, device: str = "h100") -> dict:
    """Sizes in bytes, times in seconds; ``context`` in tokens, of which a KV head that evicts holds context / cr.

    ``parameters`` are all, ``active_parameters`` those that one token uses, ``weight_bytes`` what a step of this batch
    reads of them: no embedding apart from the output layer, and of experts those that some row takes.
    Raises ValueError for an unknown model or device, and for a number below 1.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r}: must be one of {sorted(DEVICES)}")
    for name, value in (("batch", batch), ("context", context), ("cr", cr)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} {value}: must be >= 1" + " and finite" * (value > 1))
    arch, hardware = find_architecture(model), DEVICES[device]
    one, seconds = roofline.kv_bytes(arch, 1, context, cr), roofline.latency(arch, batch, context, hardware, cr)
    room, hours = (1 - RESERVED) * hardware.memory - 2 * arch.parameters, RETROFIT_HOURS.get(model)
    step = dict(
        flops=roofline.flops(arch, batch, context, cr),
        read_bytes=roofline.reads(arch, batch, context, cr),
        latency_s=seconds,
        tokens_per_s=batch / seconds,
        kv_latency_share=roofline.kv_share(arch, batch, context, cr),
    )
    return dict(
        **dict(model=model, batch=batch, context=context, cr=cr, device=device),
        parameters=arch.parameters,
        active_parameters=arch.active_parameters,
        weight_bytes=roofline.weight_bytes(arch, batch),
        kv_bytes=batch * one,
        kv_bytes_dense=roofline.kv_bytes(arch, batch, context),
        kv_bytes_per_token=roofline.kv_bytes(arch, 1, context + 1) - roofline.kv_bytes(arch, 1, context),
        **step,
        largest_batch=max(int(room // one), 0),
        retrofit_h100_hours=None if hours is None else hours * (cr - 1),
        notes=notes(arch, batch),
    )


def sampling_hours(
    arch: Architecture,
    hardware: Hardware,
    gpus: int,
    length: int,
    chains: int,
    cr: float,
    memory_cr: float,
    shards: int = 1,
) -> tuple[float, int]:
    """GPU-hours of chains of ``length`` tokens, and how many ``gpus`` GPUs that split the weights decode at once.

    Chains are counted as if each went on to its end, which is too many, and steps as if arithmetic and reading
    overlapped perfectly, which is too fast.  memory_cr: what the cache holds less; 1 for a method such as Quest, that
    reads less but keeps everything.  shards: jobs that share the chains.  (inf, 0) if not one fits.
    """
    whole = replace(hardware, flops=gpus * hardware.flops, bandwidth=gpus * hardware.bandwidth)
    room = (1 - RESERVED) * gpus * hardware.memory - 2 * arch.parameters
    batch = min(int(room // roofline.kv_bytes(arch, 1, length, memory_cr)), -(-chains // shards))
    if batch < 1:
        return math.inf, 0
    seconds = roofline.latency(arch, batch, length / 2, whole, cr)  # a chain holds half its length on average
    return gpus * chains * length / batch * seconds / 3600, batch


def notes(arch: Architecture, batch: int) -> list[str]:
    """What the layers do that is not full attention or not dense, and what that leaves to DMS."""
    facts: dict[str, int] = {}
    for number, kind in arch.kinds:
        for fact in _notes(kind, batch):
            facts[fact] = facts.get(fact, 0) + number
    text = [f"{number} of {arch.layers} layers {fact}" for fact, number in facts.items()]
    if not any(kind.evicts for _, kind in arch.kinds):
        text.append("DMS has nothing to evict here: no CR changes any of these numbers")
    return text


def _notes(kind: roofline.Layer, batch: int):
    if kind.limit:
        yield f"hold at most {kind.limit} tokens (a sliding window or chunks): DMS leaves them as they are"
    elif kind.cached and not kind.evicts:
        yield "cache one latent vector for all heads: DMS has no keys of a head to evict"
    if kind.state:
        yield f"hold a state of {kind.state / 1e6:.2f} MB a sequence, whatever its length"
    if kind.experts:
        yield (
            f"have {kind.experts} experts, {kind.chosen} for each token: a step of batch {batch} reads "
            f"{kind.experts_read(batch):.1f} of them, expected if tokens choose evenly"
        )


def lines(result: dict) -> list[str]:
    """The plan as text."""
    r, hours = result, result["retrofit_h100_hours"]
    ramp = "not in the paper's Table 3" if hours is None else f"{hours:10.0f}      H100-hours (Table 3: no warm-up)"
    step = f"{r['read_bytes'] / 1e9:.2f} GB read, {1e3 * r['latency_s']:.2f} ms, {r['tokens_per_s']:.0f} tokens/s"
    active = "" if r["active_parameters"] == r["parameters"] else f", {r['active_parameters'] / 1e9:.1f} G active"
    growth, weights = f"a token more {r['kv_bytes_per_token'] / 1e3:.1f} kB", f"{r['weight_bytes'] / 1e9:.2f} GB"
    return [
        f"{r['model']} on one {r['device']}, batch {r['batch']}, context {r['context']}, CR {r['cr']:g}",
        f"weights      {r['parameters'] * 2 / 1e9:10.2f} GB   ({r['parameters'] / 1e9:.2f} G parameters{active})",
        f"KV cache     {r['kv_bytes'] / 1e9:10.2f} GB   ({r['kv_bytes_dense'] / 1e9:.2f} GB at CR 1, {growth})",
        f"a step       {r['flops'] / 1e12:10.3f} TFLOP, {step}",
        f"KV share     {100 * r['kv_latency_share']:10.0f} %    of the bytes read, beside {weights} of weights",
        f"fits         {r['largest_batch']:10d}      sequences of this context",
        f"retrofit     {ramp}",
        *r["notes"],
    ]
