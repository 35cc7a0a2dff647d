"""A long run of continuous batching in one process: memory stays where it is, and no page is lost.

``python -m companion.experiments.soak`` lets the embedded model write half a million tokens on its three tasks, rows
refilled as chains end, and writes data/results/soak.json: resident memory along the way and its slope over the second
half, what is left of keys and values after the last chain, and pages that are neither owned nor free.
"""

import argparse
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from companion.paths import REASONER, RESULTS
from companion.provenance import describe
from companion.tasks import get_task
from companion.tasks.embedded import EMBEDDED
from companion.tasks.reasoner import load_tokenizer
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_model
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.storage import write_json

CHAINS, BATCH, LENGTH, CR = 1600, 64, 640, 8
PROBLEMS = 64  # a task
EVERY = 1000  # tokens between two looks
BLOCKS, STUDENT = 10, 2.306  # parts of the second half, and the 97.5 % point of Student's t with BLOCKS - 2


class Watched(DMSCache):
    """A cache that can be found from outside ``sample_chains``, as long as it is alive."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.alive.add(self)

    @classmethod
    def make(cls, model, max_new_tokens: int) -> "Watched":
        made = DMSCache.for_model(model, page=8)
        return cls(made.config, len(made.layers), made.page, made.slack, made.others, made.kv_cache_dtype)


def lost_pages(cache: DMSCache) -> int:
    """Pages that hold no token and are not free, or both, over all layers."""
    lost = 0
    for layer in cache.held:
        rows = layer.rows
        filled = (-(-rows.length // rows.page)).tolist()
        owned = {page for pages, n in zip(rows.table.tolist(), filled, strict=True) for page in pages[:n]}
        free = rows.free[: int(rows.free_count)].tolist()
        lost += abs(len(rows.keys) - len(owned) - len(free)) + len(owned & set(free))
    return lost


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares over the means of BLOCKS equal parts, since neighbours in time are alike, with a 95 % interval."""
    parts = np.array_split(np.column_stack([x, y]).astype(float), BLOCKS)
    at, means = np.array([part.mean(0) for part in parts]).T
    from_mean = at - at.mean()
    value = from_mean @ means / (from_mean @ from_mean)
    rest = means - means.mean() - value * from_mean
    error = STUDENT * np.sqrt(rest @ rest / (BLOCKS - 2) / (from_mean @ from_mean))
    return {"slope": float(value), "low": float(value - error), "high": float(value + error)}


def soak(chains: int = CHAINS, batch: int = BATCH, length: int = LENGTH, every: int = EVERY, cr: int = CR) -> dict:
    """Sample ``chains`` chains of at most ``length`` tokens and report; ``series``: tokens, resident and held bytes."""
    model, tokenizer = load_model(REASONER / f"dms-cr{cr}"), load_tokenizer(REASONER)
    tasks = [get_task(name, size=PROBLEMS, split="validation") for name in EMBEDDED]
    prompts = [task.prompt_ids(tokenizer, task.problems[i]) for i in range(PROBLEMS) for task in tasks]
    jobs = [(i % len(prompts), i // len(prompts)) for i in range(chains)]
    Watched.alive.clear()
    tokens, looks, lost, cache, began = 0, 0, 0, None, time.perf_counter()
    series = np.full((chains * length // every + 1, 3), -1)  # in memory from the start, as it is part of what is seen
    for chain in sample_chains(model, tokenizer, prompts, jobs, SamplingConfig(length, batch=batch), Watched.make):
        cache = cache or max(Watched.alive, key=lambda one: one.batch_size)
        tokens += len(chain.tokens) + chain.finished
        if tokens >= looks * every:
            lost = max(lost, lost_pages(cache))
            series[looks] = tokens, resident(), cache.bytes_held()
            looks += 1
    seconds, live = time.perf_counter() - began, int(cache.live_tokens().sum())
    lost = max(lost, lost_pages(cache))
    with torch.inference_mode():  # as sampling is
        cache.trim()
    series = series[:looks]
    half = series[series[:, 0] >= tokens / 2]
    return {
        "tokens": tokens,
        "chains": chains,
        "batch": batch,
        "length": length,
        "cr": cr,
        "seconds": seconds,
        "resident": {"first": int(series[0, 1]), "most": int(series[:, 1].max()), "last": int(series[-1, 1])},
        "resident_bytes_per_token": slope(half[:, 0], half[:, 1]),
        "most_bytes_held": int(series[:, 2].max()),
        "at_the_end": {"live_tokens": live, "bytes_held": cache.bytes_held(), "caches": len(Watched.alive)},
        "pages_lost": lost,
        "series": series.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=CHAINS, help="1600 write half a million tokens")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(given.chains, given.batch)
    write_json(given.out, found | {"environment": describe()})
    print("{tokens} tokens in {seconds:.0f} s, {pages_lost} pages lost, at the end {at_the_end}".format(**found))
    print(
        "resident memory: {slope:+.2f} bytes a token [{low:+.2f}, {high:+.2f}]".format(
            **found["resident_bytes_per_token"]
        )
    )


if __name__ == "__main__":
    main()
