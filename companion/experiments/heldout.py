"""What a retrofitted model does on held-out documents: compression, retention per head, distance to its teacher."""

import contextlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dms_core.cache.dms import DMSCache
from dms_core.config import target_fraction
from dms_core.train.losses import token_divergence
from dms_core.train.retrofit import pad_collate


@torch.inference_mode()
def held_out(model, teacher, documents: Sequence[dict] | Dataset, pad: int, batch: int = 32) -> dict:
    """Hard decisions on whole documents (input_ids, labels).

    Returns ``cr_decisions`` = 1 / (1 - evicted fraction), ``cr_live`` (window included: tokens over live items at
    the document's end), ``retention`` (layers, heads), and over labelled tokens ``kl`` (nats, teacher || student)
    and ``agreement`` of the most likely token.
    """
    collate, window = pad_collate(pad), model.dms.config.window
    kept, live, tokens, labelled, kl, same = 0.0, 0.0, 0, 0, 0.0, 0
    ordered = sorted((documents[i] for i in range(len(documents))), key=lambda document: len(document["input_ids"]))
    for start in tqdm(range(0, len(ordered), batch), desc="held-out", mininterval=2):
        inputs = {name: x.to(model.device) for name, x in collate(ordered[start : start + batch]).items()}
        labels, mask = inputs.pop("labels"), inputs["attention_mask"].bool()
        logits = model(**inputs, use_cache=False).logits
        stays = ~torch.stack([e.bool() for e in model.dms.step.evicted.values()]) & mask[:, None]  # (L, B, H, T)
        kept = kept + stays.sum((1, 3)).float()
        length = mask.sum(1, keepdim=True)
        recent = mask & (torch.arange(mask.shape[1], device=mask.device) >= length - 1 - window)
        live += (stays | recent[:, None]).sum().item() / stays.shape[0] / stays.shape[2]
        tokens += int(mask.sum())
        wanted = labels[:, 1:] != -100
        ours, theirs = logits[:, :-1][wanted], teacher(**inputs, use_cache=False).logits[:, :-1][wanted]
        kl += token_divergence(ours, theirs, "forward").sum().item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        labelled += len(ours)
    retention = kept / tokens
    compression = {"cr_decisions": 1 / retention.mean().item(), "cr_live": tokens / live}
    distance = {"kl": kl / labelled, "agreement": same / labelled}
    facts = {"documents": len(ordered), "tokens": tokens, "labelled": labelled}
    return {**facts, **compression, "retention": retention.tolist(), **distance}


def together(parts: Iterable[dict]) -> dict:
    """What ``held_out`` finds on the documents of all ``parts`` together."""
    parts = list(parts)
    documents, tokens, labelled = (sum(part[name] for part in parts) for name in ("documents", "tokens", "labelled"))
    retention = sum(np.array(part["retention"]) * part["tokens"] for part in parts) / tokens
    live = sum(part["tokens"] / part["cr_live"] for part in parts)
    mean = {name: sum(part[name] * part["labelled"] for part in parts) / labelled for name in ("kl", "agreement")}
    facts = {"documents": documents, "tokens": tokens, "labelled": labelled}
    compression = {"cr_decisions": 1 / retention.mean(), "cr_live": tokens / live}
    return {**facts, **compression, "retention": retention.tolist(), **mean}


@torch.inference_mode()
def kept_tokens(model, ids: Sequence[int]) -> Tensor:
    """Which tokens of one document each head keeps by its decisions, window aside: boolean (layers, KV heads, T).

    On the CPU, wherever the model is: pictures and tables are made of it.
    """
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return ~torch.cat([e.bool() for e in model.dms.step.evicted.values()]).cpu()


def retention_by_position(kept: Sequence[Tensor], edges: Sequence[int], lag: int, window: int) -> list[dict]:
    """Retention and measured compression along the sequence, for each layer and KV head (paper Fig. 6).

    kept: documents as of ``kept_tokens``.  A row for each bucket edges[i] <= position < edges[i + 1]: ``from``, ``to``,
    ``tokens``; ``retention`` (layers, heads), the share kept of the bucket's tokens that have a decision (a document's
    last ``lag`` have none); ``documents`` that reach its end, and over those ``cr`` and ``cr_live`` (layers, heads), up
    to there, window aside and included, or None without such a document.  Buckets without any decision get no row.
    Raises ValueError for edges that do not ascend from >= 0.
    """
    if len(edges) < 2 or edges[0] < 0 or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges {list(edges)}: must be two or more ascending integers from 0 on")
    rows = []
    for low, high in itertools.pairwise(edges):
        parts = [k[..., low : min(high, max(k.shape[-1] - lag, 0))] for k in kept]
        tokens = sum(part.shape[-1] for part in parts)
        if not tokens:
            continue
        whole = [k for k in kept if k.shape[-1] >= high + lag]
        row = {"from": low, "to": high, "tokens": tokens, "documents": len(whole), "cr": None, "cr_live": None}
        row["retention"] = (sum(part.sum(-1) for part in parts) / tokens).tolist()
        if whole:
            outside = max(high - 1 - window, 0)
            held = sum(k[..., :high].sum(-1) for k in whole) / len(whole)
            live = sum(k[..., :outside].sum(-1) for k in whole) / len(whole) + min(high, window + 1)
            row |= {"cr": (high / held).tolist(), "cr_live": (high / live).tolist()}
        rows.append(row)
    return rows


def live_cr(kept: Sequence[Tensor], window: int) -> float:
    """Tokens over items held at the documents' ends if ``kept``, as of ``kept_tokens``, met this window."""
    tokens = sum(k.shape[-1] for k in kept)
    outside = sum(k[..., : max(k.shape[-1] - 1 - window, 0)].float().sum(-1).mean().item() for k in kept)
    return tokens / (outside + sum(min(k.shape[-1], window + 1) for k in kept))


@contextlib.contextmanager
def random_eviction(model, cr: float, seed: int = 0):
    """Inside, every token is evicted with probability 1 - 1/``cr``, whatever the gates say: a floor for comparison."""
    generator, share = torch.Generator().manual_seed(seed), target_fraction(cr)

    def put(index: int, gate) -> None:
        z = gate()
        model.dms.step.logits[index] = share - torch.rand(z.shape, generator=generator).to(z.device)

    model.dms._put = put
    try:
        yield model
    finally:
        del model.dms._put


@torch.inference_mode()
def cache_report(model, tokenizer, prompt: str, cr: float, page: int = 4, max_new_tokens: int = 512) -> dict:
    """One greedy generation with a DMSCache; bytes are the sizes of the tensors that hold keys and values.

    ``ratio_excluding_window`` compares like with like: dense bytes of the tokens outside the window over the bytes
    held for them (whole pages, so a row's last page counts in full).
    """
    cache = DMSCache.for_model(model, page)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    cache.trim()
    tokens = int(cache.tokens_seen()[0])
    window = min(model.dms.config.window + 1, tokens)
    live = cache.live_tokens()[:, 0]  # (layers, heads)
    keys = cache.layers[0].rows.keys
    token_bytes = 2 * keys.shape[-1] * keys.element_size() * live.numel()  # one token, all layers and heads
    dense, held, in_window = tokens * token_bytes, cache.bytes_held(), window * token_bytes
    generated = ids.shape[1] - inputs["input_ids"].shape[1]
    report = {"cr": cr, "tokens": tokens, "generated": generated, "window": window - 1}
    report |= {"bytes_dense": dense, "bytes_held": held, "bytes_window": in_window, "ratio": dense / held}
    report["ratio_excluding_window"] = (dense - in_window) / max(held - in_window, 1)
    return report | {"live_per_layer_head": live.tolist(), "text": tokenizer.decode(ids[0])}
