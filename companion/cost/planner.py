"""``dms plan``: what decoding a model costs, and what compression changes, before anything is downloaded.

The roofline model of the paper's appendix I (``latency``), with a device's memory and, for the models of the paper's
Table 3, what their retrofit took.
"""

from pathlib import Path

from companion.cost import latency
from companion.cost.latency import ARCHITECTURES, DEVICES, Architecture

RESERVED = 0.1  # share of a device's memory that is left to activations and the allocator
RETROFIT_HOURS = {  # H100-hours per unit of compression ratio (paper, Table 3)
    "llama-3.2-1b": 10, "llama-3.1-8b": 100, "qwen-r1-1.5b": 30, "qwen-r1-7b": 75, "qwen-r1-32b": 345, "qwen3-8b": 270,
}  # fmt: skip


def find_architecture(model: str) -> Architecture:
    """A built-in name, or else a directory or hub id with a transformers config.json.

    Raises ValueError for a model that is neither, or whose query heads do not span its hidden width.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(ARCHITECTURES))
        where = "directory" if Path(model).is_dir() else "hub id that can be reached"
        raise ValueError(f"model {model!r}: neither one of {known}, nor a {where} with a config.json") from error
    width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads
    if width and width != config.hidden_size:
        raise ValueError(f"{model}: query heads span {width}, hidden width {config.hidden_size}: must be the same")
    return Architecture.from_config(config)


def plan(model: str, batch: int, context: int, cr: float, device: str = "h100") -> dict:
    """Sizes in bytes, times in seconds; ``context`` in tokens, of which each KV head holds context / cr.

    Weights and parameters are those that every step reads: an embedding apart from the output layer is not counted.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r}: must be one of {sorted(DEVICES)}")
    for name, value in (("batch", batch), ("context", context), ("cr", cr)):
        if not value >= 1:
            raise ValueError(f"{name} {value}: must be >= 1")
    arch, hardware = find_architecture(model), DEVICES[device]
    held, weights = context / cr, latency.weight_bytes(arch)
    one = latency.kv_bytes(arch, 1, held)
    room = (1 - RESERVED) * hardware.memory - weights
    hours = RETROFIT_HOURS.get(model)
    return {
        "model": model, "batch": batch, "context": context, "cr": cr, "device": device,
        "parameters": weights / 2, "weight_bytes": weights, "kv_bytes": batch * one,
        "kv_bytes_per_token": latency.kv_bytes(arch, 1, 1), "flops": latency.flops(arch, batch, held),
        "read_bytes": latency.reads(arch, batch, held), "latency_s": latency.latency(arch, batch, held, hardware),
        "tokens_per_s": batch / latency.latency(arch, batch, held, hardware),
        "kv_latency_share": latency.kv_share(arch, batch, context, cr), "largest_batch": max(int(room // one), 0),
        "retrofit_h100_hours": None if hours is None else hours * (cr - 1),
    }  # fmt: skip


def lines(result: dict) -> list[str]:
    """The plan as text."""
    hours = result["retrofit_h100_hours"]
    return [
        f"{result['model']} on one {result['device']}, batch {result['batch']}, context {result['context']}, "
        f"CR {result['cr']:g}",
        f"weights      {result['weight_bytes'] / 1e9:10.2f} GB   ({result['parameters'] / 1e9:.2f} G parameters)",
        f"KV cache     {result['kv_bytes'] / 1e9:10.2f} GB   ({result['kv_bytes_per_token'] / 1e3:.1f} kB a token)",
        f"a step       {result['flops'] / 1e12:10.3f} TFLOP, {result['read_bytes'] / 1e9:.2f} GB read, "
        f"{1e3 * result['latency_s']:.2f} ms, {result['tokens_per_s']:.0f} tokens/s",
        f"KV share     {100 * result['kv_latency_share']:10.0f} %    of the bytes read",
        f"fits         {result['largest_batch']:10d}      sequences of this context",
        "retrofit     "
        + ("not in the paper's Table 3" if hours is None else f"{hours:10.0f}      H100-hours (Table 3)"),
    ]
