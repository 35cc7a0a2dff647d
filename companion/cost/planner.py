"""What decoding a model costs, and what compression changes, before anything is downloaded (``dms plan``).

The roofline model of the paper's appendix I, with a device's memory and, for the models of the paper's Table 3, what
their retrofit took.  A built-in model needs neither torch nor transformers.
"""

import math
from pathlib import Path

from companion.cost import roofline
from companion.cost.roofline import ARCHITECTURES, DEVICES, Architecture

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
    """A built-in name, or else a directory or hub id with a transformers config.json.

    Raises ValueError for a model that is neither, or whose query heads do not span its hidden width.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    from huggingface_hub import snapshot_download

    local = Path(model).is_dir()
    try:  # of a hub repository the configuration alone; without a network this fails at once
        directory = model if local else snapshot_download(model, allow_patterns=["config.json"])
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory).get_text_config()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(ARCHITECTURES))
        where = "directory" if local else "hub id that can be reached"
        raise ValueError(f"model {model!r}: neither one of {known}, nor a {where} with a config.json") from error
    width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads
    if width and width != config.hidden_size:
        raise ValueError(f"{model}: query heads span {width}, hidden width {config.hidden_size}: must be the same")
    return Architecture.from_config(config)


def plan(model: str, batch: int, context: int, cr: float, device: str = "h100") -> dict:
    """Sizes in bytes, times in seconds; ``context`` in tokens, of which each KV head holds context / cr.

    Weights and parameters are those that every step reads: an embedding apart from the output layer is not counted.
    Raises ValueError for an unknown model or device, and for a number below 1.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r}: must be one of {sorted(DEVICES)}")
    for name, value in (("batch", batch), ("context", context), ("cr", cr)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} {value}: must be >= 1" + " and finite" * (value > 1))
    arch, hardware = find_architecture(model), DEVICES[device]
    held, weights, one = context / cr, roofline.weight_bytes(arch), roofline.kv_bytes(arch, 1, context / cr)
    operations, read = roofline.flops(arch, batch, held), roofline.reads(arch, batch, held)
    seconds, share = roofline.latency(arch, batch, held, hardware), roofline.kv_share(arch, batch, context, cr)
    room, hours = (1 - RESERVED) * hardware.memory - weights, RETROFIT_HOURS.get(model)
    asked = dict(model=model, batch=batch, context=context, cr=cr, device=device)
    sizes = dict(parameters=weights / 2, weight_bytes=weights, kv_bytes=batch * one)
    sizes["kv_bytes_per_token"] = roofline.kv_bytes(arch, 1, 1)
    step = dict(flops=operations, read_bytes=read, latency_s=seconds, tokens_per_s=batch / seconds)
    step["kv_latency_share"] = share
    retrofit = dict(retrofit_h100_hours=None if hours is None else hours * (cr - 1))
    return asked | sizes | step | dict(largest_batch=max(int(room // one), 0)) | retrofit


def lines(result: dict) -> list[str]:
    """The plan as text."""
    r, hours = result, result["retrofit_h100_hours"]
    retrofit = "not in the paper's Table 3" if hours is None else f"{hours:10.0f}      H100-hours (Table 3)"
    step = f"{r['read_bytes'] / 1e9:.2f} GB read, {1e3 * r['latency_s']:.2f} ms, {r['tokens_per_s']:.0f} tokens/s"
    return [
        f"{r['model']} on one {r['device']}, batch {r['batch']}, context {r['context']}, CR {r['cr']:g}",
        f"weights      {r['weight_bytes'] / 1e9:10.2f} GB   ({r['parameters'] / 1e9:.2f} G parameters)",
        f"KV cache     {r['kv_bytes'] / 1e9:10.2f} GB   ({r['kv_bytes_per_token'] / 1e3:.1f} kB a token)",
        f"a step       {r['flops'] / 1e12:10.3f} TFLOP, {step}",
        f"KV share     {100 * r['kv_latency_share']:10.0f} %    of the bytes read",
        f"fits         {r['largest_batch']:10d}      sequences of this context",
        f"retrofit     {retrofit}",
    ]
