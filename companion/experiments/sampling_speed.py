"""Tokens a second of ``sample_chains`` on the embedded model, beside the dense model with transformers' own cache.

The dense side is a plain loop over a DynamicCache and SDPA with the same sampler and no refills.  The time of a step is
the difference between a long and a short run, so that prefill is in neither.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm
from transformers import DynamicCache

from companion.paths import REASONER
from companion.tasks.mixture import TraceDataset
from dms_core.checkpoint import load_base, load_model, load_tokenizer
from dms_core.sampling import SamplingConfig, pad_left, pick_tokens, sample_chains
from dms_kernels.benchmarks.measure import copy_gbps

BATCHES = (1, 32, 128)
CONTEXT, TOKENS = 200, 40  # tokens of a prompt; decode steps that are timed
CR, ROUNDS = 8, 7


def measure(
    device: str, names: Sequence[str] | None = None, repeats: int | None = None, quick: bool = False
) -> list[dict]:
    """One dict a batch size, of the form that dms_kernels.benchmarks gives, with "tokens_per_s"; on a CPU one thread.

    Raises ValueError for names that do not exist and for ``repeats`` < 1.
    """
    known = {f"sampling-b{batch}": batch for batch in ((1, 2) if quick else BATCHES)}
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"case {min(unknown)!r}: must be one of {', '.join(known)}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats {repeats}: must be >= 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dense, sparse = load_base(REASONER).to(device), load_model(REASONER / f"dms-cr{CR}").to(device)
        tokenizer = load_tokenizer(REASONER)
        prompts, copied = _prompts(max(known.values())), copy_gbps(device, 1 << 22 if quick else 1 << 28)
        tokens, rounds = (4, 1) if quick else (TOKENS, repeats or ROUNDS)
        return [
            _case(name, dense, sparse, tokenizer, prompts[:batch], tokens, rounds, copied)
            for name, batch in known.items()
            if not names or name in names
        ]
    finally:
        torch.set_num_threads(threads)


def _prompts(count: int) -> list[list[int]]:
    """The first tokens of validation traces that are long enough."""
    documents = TraceDataset(load_tokenizer(REASONER), 8 * count + 64, 1, "validation")
    found = (documents[index]["input_ids"][:CONTEXT] for index in range(len(documents)))
    return [list(ids) for ids in found if len(ids) == CONTEXT][:count]


def _case(name, dense, sparse, tokenizer, prompts, tokens: int, rounds: int, copied: float) -> dict:
    reads: list[float] = []

    def ours(steps: int) -> None:
        jobs = [(problem, 0) for problem in range(len(prompts))]
        config = SamplingConfig(steps, batch=len(prompts))
        reads[:] = [chain.reads[-1] for chain in sample_chains(sparse, tokenizer, prompts, jobs, config, stop=())]

    calls = {"ours": ours, "dynamic_cache": lambda steps: _dense_loop(dense, tokenizer, prompts, steps)}
    times: dict[str, list[float]] = {which: [] for which in calls}
    for call in calls.values():
        call(2)  # compiles
    for _ in tqdm(range(rounds), desc=name, unit="round", leave=False):
        for which, call in calls.items():
            times[which].append((_seconds(call, tokens + 1) - _seconds(call, 1)) / tokens * 1e3)
    ours(tokens + 1)
    median = {which: statistics.median(values) for which, values in times.items()}
    dms, text = sparse.dms, sparse.config.get_text_config()
    read = sum(reads) / tokens * dms.layers * dms.heads * 2 * dms.head_dim * sparse.dtype.itemsize  # bytes a step
    quartiles = {which: statistics.quantiles(v, n=4)[::2] if len(v) > 1 else v * 2 for which, v in times.items()}
    shape = {
        "batch": len(prompts),
        "prompt": CONTEXT,
        "tokens": tokens,
        "cr": CR,
        "threads": 1,
        "width": text.hidden_size,
    }
    return {
        "name": name,
        "kind": "sampling",
        "shape": shape,
        "rounds": rounds,
        "ours_ms": median["ours"],
        "baseline_ms": {"dynamic_cache": median["dynamic_cache"]},
        "ratio": {"dynamic_cache": median["dynamic_cache"] / median["ours"]},
        "quartiles_ms": quartiles,
        "tokens_per_s": {which: 1e3 * len(prompts) / ms for which, ms in median.items()},
        "gbps": read / median["ours"] / 1e6,
        "copy_gbps": copied,
        "flops": 2 * sparse.num_parameters() * len(prompts),
        "peak_bytes": {},
        "notes": {},
    }


def _seconds(call: Callable[[int], None], steps: int) -> float:
    began = time.perf_counter()
    call(steps)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def _dense_loop(model, tokenizer, prompts, steps: int) -> None:
    """Sample ``steps`` tokens a row with a DynamicCache."""
    config = SamplingConfig(steps)
    ids, mask, positions = (x.to(model.device) for x in pad_left(prompts, tokenizer.pad_token_id))
    uniforms = torch.rand(len(prompts), steps, device=model.device)
    cache = DynamicCache(config=model.config)
    for step in range(steps):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        ids = pick_tokens(out.logits[:, -1], uniforms[:, step], config.temperature, config.top_p)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
