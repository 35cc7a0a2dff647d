"""Pages of 8 bits against pages of 16, on the main job's three tasks: distance, bytes, and accuracy against bytes.

``python -m companion.experiments.int8`` samples what the profile's run directory lacks and writes
data/results/int8.json.  The dense model and DMS, each with either kind of page, decode the same validation documents
(KL to the same model with pages in its own dtype) and the same test problems.  Bytes are those that a cache allots for
a token of one KV head, keys and values; the embedded model computes in fp32, whose pages count as half their size.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from companion.experiments import main as job
from companion.experiments.profiles import PROFILE_NAMES
from companion.experiments.summaries import merged
from companion.method import Method
from companion.paths import RESULTS, RUNS
from companion.provenance import describe
from companion.tasks.embedded import EMBEDDED
from companion.tasks.mixture import TraceDataset
from dms_core.budgets import bootstrap
from dms_core.budgets.curves import Pairs, summarise
from dms_core.cache.dms import DMSCache
from dms_core.sampling import pad_left
from dms_core.storage import write_json
from dms_core.train.losses import token_divergence

DOCUMENTS = 16  # of each task
SAME = ("problem", "chain", "answer", "tokens", "text")  # of a record: a chain says the same with both kinds of page
PAIRS = (("dms-int8", "dms"), ("vanilla-int8", "vanilla"), ("dms-int8", "vanilla"), ("dms-int8", "vanilla-int8"))


def bytes_per_token(model, kv_cache_dtype: str) -> float:
    """Bytes of a token's key and value in one KV head's pages, as allotted; 32-bit floats count as 16."""
    cache = DMSCache.for_model(model, 8, kv_cache_dtype=kv_cache_dtype)
    ids = torch.full((1, 16), 5, device=model.device)  # two whole pages in each head
    with model.dms.disabled():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.trim()
    held = cache.bytes_held() / cache.live_tokens().sum().item()
    return held if kv_cache_dtype == "int8" else held * 2 / model.dtype.itemsize


@torch.inference_mode()
def fidelity(model, documents: list[dict], pad: int) -> dict:
    """int8 against the model's own dtype, token by token: KL (nats, 95 % interval over documents) and agreement.

    documents: input_ids and labels; counted from the first labelled token on.
    """
    rows = [list(document["input_ids"]) for document in documents]
    first = [int(np.argmax(np.array(document["labels"]) != -100)) for document in documents]
    caches = [DMSCache.for_model(model, 8, kv_cache_dtype=dtype) for dtype in ("auto", "int8")]
    ids, mask, positions = pad_left([row[:start] for row, start in zip(rows, first, strict=True)], pad)
    logits = [_step(model, cache, ids, mask, positions) for cache in caches]
    kl, same, counted = [], [], []
    for t in range(max(len(row) - start for row, start in zip(rows, first, strict=True))):
        at = torch.tensor(first)[:, None] + t
        on = torch.tensor([start + t < len(row) for row, start in zip(rows, first, strict=True)])
        kl.append(token_divergence(logits[1], logits[0], "forward"))
        same.append(logits[1].argmax(-1) == logits[0].argmax(-1))
        counted.append(on)
        token = torch.tensor([row[min(int(place), len(row) - 1)] for row, place in zip(rows, at, strict=True)])[:, None]
        logits = [_step(model, cache, token, on[:, None].long(), at) for cache in caches]
    kl, same, counted = (torch.stack(x, 1).cpu() for x in (kl, same, counted))
    sums, tokens = (kl.double() * counted).sum(1).numpy(), counted.sum(1).numpy()
    draws = bootstrap.indices(len(rows), 2000)
    low, high = bootstrap.interval(sums[draws].sum(1) / tokens[draws].sum(1))
    found = {"kl": float(sums.sum() / tokens.sum()), "kl_low": low, "kl_high": high, "kl_max": float(kl[counted].max())}
    return found | {"agreement": float(same[counted].float().mean()), "tokens": int(tokens.sum())}


def _step(model, cache, ids, mask, positions) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def in_bytes(records: list[dict], name: str, size: float) -> list[dict]:
    """Chains under another name whose peak counts bytes of a KV head instead of tokens."""
    return [
        record
        | {"method": name, "live": [size * x for x in record["live"]]}
        | {key: size * record[key] for key in ("prompt_live", "prompt_kept") if key in record}
        for record in records
    ]


def compare_pages(run: job.Run, report: Callable[[str], None] = print) -> dict:
    """``kl``: a row a method; ``bytes``: a token's in one KV head; points, margins and pairs whose "peak" is bytes;
    ``same``: the share of chains that are equal with both kinds of page."""
    methods = [Method("vanilla", 1.0), *(Method("dms", cr) for cr in run.profile.crs)]
    documents = [
        TraceDataset(run.tokenizer, DOCUMENTS, 1, "validation", run.seed, [task])[i]
        for task in EMBEDDED
        for i in range(DOCUMENTS)
    ]
    rows, sizes = [], {}
    for method in methods:
        model, _ = job.model_of(run, method)
        sizes = sizes or {dtype: bytes_per_token(model, dtype) for dtype in ("auto", "int8")}
        model.dms.enabled = method.name != "vanilla"
        rows.append({"method": method.name, "cr": method.cr, **fidelity(model, documents, run.tokenizer.pad_token_id)})
        report("{method} CR {cr:g}: KL {kl:.2g} [{kl_low:.2g}, {kl_high:.2g}] nats".format(**rows[-1]))
    found = [_summarised(one, methods, sizes) for one in run.all_tasks]
    for row in (row for one in found for row in one["paired"]):
        report("{task}: {a} minus {b} at CR {cr:g}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row))
    facts = {"documents": len(documents), "bytes": sizes, "ratio": sizes["int8"] / sizes["auto"]}
    return {"kl": rows, **facts, **merged(found), "profile": job.profile_facts(run), "environment": describe()}


def _summarised(run: job.Run, methods: list[Method], sizes: dict[str, float]) -> dict:
    eight, chains, same = replace(run, profile=replace(run.profile, kv_cache_dtype="int8")), [], []
    for method in methods:
        wide, narrow = job.records(run, method), job.records(eight, method)
        chains += in_bytes(wide, method.name, sizes["auto"])
        chains += in_bytes(narrow, f"{method.name}-int8", sizes["int8"])
        equal = [all(a[key] == b[key] for key in SAME) for a, b in zip(wide, narrow, strict=True)]
        same.append({"task": run.task.name, "method": method.name, "cr": method.cr, "equal": float(np.mean(equal))})
    pairs = Pairs(list(PAIRS), [], list(PAIRS[:2]))
    lengths, widths = list(run.profile.lengths), list(run.profile.widths)
    return {**summarise(chains, lengths, widths, aggregate=run.task.aggregate, pairs=pairs), "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILE_NAMES, default="tiny")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where retrofits are kept, a directory a profile")
    parser.add_argument("--out", type=Path, default=RESULTS / "int8.json")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    given = parser.parse_args()
    run = job.Run.of(given.profile, given.runs, device=given.device)
    write_json(given.out, compare_pages(replace(run, profile=replace(run.profile, seeds=1))))


if __name__ == "__main__":
    main()
