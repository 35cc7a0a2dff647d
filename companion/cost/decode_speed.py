"""Tokens a second and bytes of keys and values of a decoding model: transformers' own cache, or another.

``python -m companion.cost.decode_speed OUT.jsonl`` measures a whole model of random weights, dense and with gates that
evict 7 of 8 tokens, a line of JSON a case: the last but one step of ``make gpu-first-run``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig, pad_left, sample_chains

GATES = DMSConfig(window=256, scale=1.0, offset=-1.15)  # z > 0 in 7 of 8 cases, where x is a standard normal number
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
NO_WORDS = SimpleNamespace(pad_token_id=0, eos_token_id=None)  # a tokenizer
QUICK = {name: max(value // 24, 2) for name, value in QWEN_1_5B.items()} | {"num_attention_heads": 4}


@torch.inference_mode()
def decode_speed(model, prompts: Sequence[Sequence[int]], pad: int, tokens: int = 32, cache=None) -> dict:
    """Greedy decoding after a prefill, which is not timed: {"tokens_per_s", "kv_bytes"}.

    ``cache``: an empty one of the model's; by default a DynamicCache.  The rate is that of the median step, of all rows
    together.
    """
    ids, mask, positions = (x.to(model.device) for x in pad_left(prompts, pad))
    cache, seconds = DynamicCache() if cache is None else cache, []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)
        seconds.append(time.perf_counter() - began)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    held = cache.bytes_held() if hasattr(cache, "bytes_held") else sum(x.keys.nbytes * 2 for x in cache.layers)
    return {"tokens_per_s": len(prompts) / statistics.median(seconds[1:]), "kv_bytes": held}


def sampling_speed(model, prompts: Sequence[Sequence[int]], tokens: int = 64) -> dict:
    """``sample_chains``, from a long run's time minus a short one's: {"tokens_per_s"}."""
    seconds = []
    for length in (8, 8, 8 + tokens):  # the first compiles
        began = time.perf_counter()
        jobs = [(problem, 0) for problem in range(len(prompts))]
        config = SamplingConfig(length, batch=len(prompts))
        list(sample_chains(model, NO_WORDS, prompts, jobs, config, stop=()))
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_s": len(prompts) * tokens / (seconds[2] - seconds[1])}


def whole_model(shape: dict, batch: int, context: int, device: str):
    """Yields {"name", "batch", "context", ...}: the dense model, gates on by hand, and in ``sample_chains``."""
    torch.manual_seed(0)
    config = Qwen2Config(**shape, max_position_embeddings=2 * context, attn_implementation="sdpa")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    prompts = torch.randint(1, config.vocab_size, (batch, context)).tolist()
    facts = {"batch": batch, "context": context, "device": device}
    yield {"name": "dense", **facts, **decode_speed(model, prompts, 0)}
    attach(model, GATES)
    for gate in model.dms.gate_parameters():
        if gate.ndim == 2:
            torch.nn.init.normal_(gate, std=config.hidden_size**-0.5)
    yield {"name": "dms", **facts, **decode_speed(model, prompts, 0, cache=DMSCache.for_model(model, 64))}
    yield {"name": "dms, sample_chains", **facts, **sampling_speed(model, prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="a JSONL file; lines are added")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    given = parser.parse_args()
    for batch, context in ((1, 512), (2, 512)) if given.quick else ((1, 4096), (32, 4096), (32, 16384)):
        for row in whole_model(QUICK if given.quick else QWEN_1_5B, batch, context, given.device):
            print(json.dumps(row), flush=True)
            with open(given.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
