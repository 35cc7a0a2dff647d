"""Tokens a second and bytes of keys and values of a whole model that decodes: ``dms bench e2e``.

The dense side is transformers' own: DynamicCache and SDPA, a plain loop.  The other side is a DMSCache at CR 1, 4 and
8 under the same loop; which tokens are evicted is drawn at random, as many as the ratio says, since time depends on how
many are kept and not on which.  Weights are random, of the embedded model's shape and of one about thirty times as
large.  ``expected`` is the ratio of the bytes that a step must read: weights once, and what is held.

``generate`` cases: transformers' ``generate`` with a DMSCache that evicts nothing against ``generate`` alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from companion.experiments.heldout import random_eviction
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_kernels.benchmarks.measure import copy_gbps

LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
MODELS = {
    "reasoner": {**LAYERS, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 73},
    "larger": {**LAYERS, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
}
SHAPES = {  # batch, context
    "reasoner": ((1, 512), (8, 512), (64, 512), (1, 4096), (8, 4096), (1, 16384), (8, 16384)),
    "larger": ((1, 512), (8, 512), (1, 4096), (8, 4096)),
}
GENERATE = {"reasoner": (1, 8, 64), "larger": (1, 8)}  # batches
PROMPT, TOKENS = 200, 33  # of the generate cases
RATIOS, WINDOW, PAGE = (1.0, 4.0, 8.0), 16, 16
BLOCK, ROUNDS = 4, 9  # steps that are timed together; rounds in which the methods take turns


def measure(
    device: str, names: Sequence[str] | None = None, repeats: int | None = None, quick: bool = False
) -> list[dict]:
    """One dict a model, batch, context and ratio, of the form that dms_kernels.benchmarks gives.

    Beside it "tokens_per_s", "held_bytes" and "expected".  Raises ValueError for names that do not exist and for
    ``repeats`` < 1.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats {repeats}: must be >= 1")
    shapes = {"reasoner": ((2, 96),)} if quick else SHAPES
    groups: dict[str, Callable[[], Iterator[dict]]] = {}
    rounds, copied = 1 if quick else repeats or ROUNDS, copy_gbps(device, 1 << 22 if quick else 1 << 28)
    for model, sizes in shapes.items():
        for batch, context in sizes:
            name = f"e2e-{model}-b{batch}-{context}"
            groups[name] = lambda name=name, of=(model, batch, context): _decode(name, *of, device, rounds, copied)
    for model, batches in ({"reasoner": (2,)} if quick else GENERATE).items():
        for batch in batches:
            name = f"e2e-generate-{model}-b{batch}"
            groups[name] = lambda name=name, of=(model, batch): _generate(name, *of, device, rounds, copied)
    if unknown := set(names or ()) - set(groups):
        raise ValueError(f"case {min(unknown)!r}: must be one of {', '.join(groups)}")
    return [row for name, run in groups.items() if not names or name in names for row in run()]


def make_models(shape: dict, longest: int, device: str) -> tuple:
    """The same random weights twice: transformers' own model, and one with gates that evict nothing by themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=longest, attn_implementation="sdpa", pad_token_id=0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    gated = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    gated.load_state_dict(plain.state_dict())
    return plain, attach(gated, DMSConfig(window=WINDOW))


class Decoder:
    """Rows of one context in a cache; each call decodes a token a row, greedily."""

    def __init__(self, model, cache, ids: torch.Tensor, cr: float | None) -> None:
        """ids (B, T); cr: of the tokens that are evicted; None: the model has no gates."""
        self.model, self.cache, self.ids, self.cr, self.position = model, cache, ids, cr, 0
        self()

    @torch.inference_mode()
    def __call__(self) -> None:
        end = self.position + self.ids.shape[1]
        places = torch.arange(self.position, end, device=self.ids.device).expand_as(self.ids)
        inputs = {"input_ids": self.ids, "position_ids": places, "past_key_values": self.cache}
        if self.cr is None:
            out = self.model(**inputs, logits_to_keep=1)
        else:
            with random_eviction(self.model, self.cr, seed=self.position):
                out = self.model(**inputs, logits_to_keep=1)
        self.ids, self.position = out.logits[:, -1].argmax(-1, keepdim=True), end

    @torch.inference_mode()
    def bytes_held(self) -> int:
        """Of keys and values, after pages without a token were given back."""
        if self.cr is None:
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        self.cache.trim()
        return self.cache.bytes_held()


def _decode(name: str, model: str, batch: int, context: int, device: str, rounds: int, copied: float) -> Iterator[dict]:
    plain, gated = make_models(MODELS[model], context + 2 * BLOCK * (rounds + 2), device)
    ids = torch.randint(1, plain.config.vocab_size, (batch, context), device=device)
    decoders = {"dynamic_cache": Decoder(plain, DynamicCache(config=plain.config), ids, None)}
    for cr in RATIOS:
        decoders[f"cr{cr:g}"] = Decoder(gated, DMSCache.for_model(gated, PAGE), ids, cr)

    def block(decoder: Decoder) -> None:
        for _ in range(BLOCK):
            decoder()

    times = _in_turns({which: lambda d=d: block(d) for which, d in decoders.items()}, name, rounds, BLOCK)
    held = {which: decoder.bytes_held() for which, decoder in decoders.items()}
    weights = sum(p.nbytes for p in plain.parameters())
    shape = {"model": model, "batch": batch, "context": context, "window": WINDOW, "threads": torch.get_num_threads()}
    flops = 2 * plain.num_parameters() * batch
    for cr in RATIOS:
        which = f"cr{cr:g}"
        row = _row(f"{name}-{which}", shape | {"cr": cr}, times, which, batch, copied)
        row |= {"flops": flops, "gbps": (weights + held[which]) / row["ours_ms"] / 1e6}
        row |= {"held_bytes": {"ours": held[which], "dynamic_cache": held["dynamic_cache"]}}
        yield row | {"expected": (weights + held["dynamic_cache"]) / (weights + held[which])}


def _generate(name: str, model: str, batch: int, device: str, rounds: int, copied: float) -> Iterator[dict]:
    plain, gated = make_models(MODELS[model], PROMPT + TOKENS, device)
    ids = torch.randint(2, plain.config.vocab_size, (batch, PROMPT), device=device)
    mask = torch.ones_like(ids)

    def generate(which, **more) -> None:
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        which.generate(ids, attention_mask=mask, **length, **more)

    calls = {
        "dynamic_cache": lambda: generate(plain),
        "cr1": lambda: generate(gated, past_key_values=DMSCache.for_model(gated)),
    }
    times = _in_turns(calls, name, rounds, TOKENS)
    shape = {"model": model, "batch": batch, "context": PROMPT, "window": WINDOW, "cr": 1.0}
    yield _row(f"{name}-cr1", shape | {"threads": torch.get_num_threads()}, times, "cr1", batch, copied)


def _in_turns(calls: dict[str, Callable], name: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a step, in each round of each call; the first round compiles and does not count."""
    times: dict[str, list[float]] = {which: [] for which in calls}
    for _ in tqdm(range(rounds + 1), desc=name, unit="round", leave=False):
        for which, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[which].append((time.perf_counter() - began) / steps * 1e3)
    return {which: values[1:] for which, values in times.items()}


def _row(name: str, shape: dict, times: dict[str, list[float]], which: str, batch: int, copied: float) -> dict:
    pair = {"ours": times[which], "dynamic_cache": times["dynamic_cache"]}
    median = {side: statistics.median(values) for side, values in pair.items()}
    quartiles = {side: statistics.quantiles(v, n=4)[::2] if len(v) > 1 else v * 2 for side, v in pair.items()}
    return {
        "name": name,
        "kind": "e2e",
        "shape": shape,
        "rounds": len(pair["ours"]),
        "ours_ms": median["ours"],
        "baseline_ms": {"dynamic_cache": median["dynamic_cache"]},
        "ratio": {"dynamic_cache": median["dynamic_cache"] / median["ours"]},
        "quartiles_ms": quartiles,
        "tokens_per_s": {side: 1e3 * batch / ms for side, ms in median.items()},
        "gbps": 0.0,
        "copy_gbps": copied,
        "flops": 0,
        "peak_bytes": {},
        "notes": {},
    }
