"""How closely a compressed cache follows the dense model on real text.

The dense model continues each prompt greedily.  The same tokens are then fed, one by one, to a model that decodes with
another cache, after the same prefill: at every token, is its first choice the dense one's (top-1 agreement), and how
far is its distribution (KL, nats)?  Tokens after the end of the dense model's answer do not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dms_core.cache import DMSCache
from dms_core.checkpoint import load_gates, read_settings
from dms_core.completions import prompt_ids
from dms_core.config import DMSConfig
from dms_core.decode_speed import decode_speed
from dms_core.distill import token_divergence
from dms_core.model import attach, detach

MakeCache = Callable[[object, Sequence[int]], DMSCache]  # (model, prompt lengths) -> an empty cache


@dataclass
class Reference:
    """What the dense model says after each prompt: tokens (N, n), logits (N, n, V) before each, counted (N, n)."""

    prompts: list[list[int]]
    tokens: Tensor
    logits: Tensor
    counted: Tensor


class _Decoder:
    """Left-padded prompts of one batch in one cache, fed a token a row at a time."""

    def __init__(self, model, cache: DMSCache, prompts: Sequence[Sequence[int]], pad: int) -> None:
        self.model, self.cache = model, cache
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.logits = self._forward(ids, (mask.cumsum(1) - 1).clamp_min(0), mask)
        self.position = torch.tensor([len(p) for p in prompts])

    def feed(self, token: Tensor) -> Tensor:
        """token (B,); returns the logits after it, (B, V)."""
        self.logits = self._forward(token[:, None], self.position[:, None], torch.ones_like(token)[:, None])
        self.position += 1
        return self.logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]


@torch.inference_mode()
def dense_reference(model, tokenizer, prompts: Sequence[Sequence[int]], tokens: int, batch: int = 8) -> Reference:
    """Greedy continuations by the dense model.  ``model`` has DMS gates; they are off here."""
    said, logits = [], []
    with model.dms.disabled():
        for start in tqdm(range(0, len(prompts), batch), desc="dense", unit="batch"):
            rows = prompts[start : start + batch]
            decoder = _Decoder(model, DMSCache.for_model(model), rows, tokenizer.pad_token_id)
            steps = []
            for _ in range(tokens):
                steps.append(decoder.logits)
                decoder.feed(decoder.logits.argmax(-1))
            logits.append(torch.stack(steps, 1))
            said.append(logits[-1].argmax(-1))
    said = torch.cat(said)
    end = (said == tokenizer.eos_token_id).long()
    counted = end.cumsum(1) - end == 0  # the end mark, too
    return Reference([list(p) for p in prompts], said, torch.cat(logits), counted)


@torch.inference_mode()
def follow(
    model, tokenizer, reference: Reference, make_cache: MakeCache, batch: int = 8, resamples: int = 1000
) -> dict:
    """Feed the reference's tokens to ``model`` with the caches that ``make_cache`` makes.

    Returns ``agreement`` and ``kl`` over counted tokens, with ``agreement_low`` and ``agreement_high`` (95 % bootstrap
    over prompts), ``cr_live``: tokens seen over items held at the end, mean over layers and heads of all rows, and
    ``tokens``, the number counted.
    """
    same, divergence, seen, live = [], [], 0, 0.0
    for start in tqdm(range(0, len(reference.prompts), batch), desc="follow", unit="batch"):
        rows = slice(start, start + batch)
        prompts = reference.prompts[rows]
        cache = make_cache(model, [len(p) for p in prompts])
        decoder = _Decoder(model, cache, prompts, tokenizer.pad_token_id)
        for i in range(reference.tokens.shape[1]):
            dense = reference.logits[rows, i]
            same.append(decoder.logits.argmax(-1) == dense.argmax(-1))
            divergence.append(token_divergence(decoder.logits, dense, "forward"))
            decoder.feed(reference.tokens[rows, i])
        steps = reference.tokens.shape[1]
        same[-steps:] = [torch.stack(same[-steps:], 1)]
        divergence[-steps:] = [torch.stack(divergence[-steps:], 1)]
        seen += int(cache.tokens_seen().sum())
        live += float(cache.live_tokens().float().mean((0, 2)).sum())
    counted = reference.counted
    hits, total = (torch.cat(same) & counted).sum(1).numpy(), counted.sum(1).numpy()
    draws = np.random.default_rng(0).integers(len(hits), size=(resamples, len(hits)))
    shares = hits[draws].sum(1) / total[draws].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return {
        "agreement": float(hits.sum() / total.sum()), "agreement_low": float(low), "agreement_high": float(high),
        "kl": float(torch.cat(divergence)[counted].mean()), "cr_live": seen / live, "tokens": int(total.sum()),
        "prompts": len(hits),
    }  # fmt: skip


@torch.inference_mode()
def decisions_cr(model, prompts: Sequence[Sequence[int]]) -> float:
    """1 / (1 - evicted fraction) of the gates' decisions on whole prompts, window aside."""
    kept = tokens = 0.0
    for ids in prompts:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
        evicted = torch.stack([e.float().mean() for e in model.dms.step.evicted.values()]).mean()
        kept, tokens = kept + (1 - float(evicted)) * len(ids), tokens + len(ids)
    return tokens / kept


def needle_prompts(tokenizer, conversations: Sequence[Sequence[dict]], seed: int = 0) -> list[tuple[list[int], str]]:
    """(prompt, code): each conversation with a code told in its first quarter and asked for at its end."""
    random = np.random.default_rng(seed)
    found = []
    for number, messages in enumerate(conversations):
        code, owner = str(random.integers(1000, 10000)), ("red", "blue", "green", "black", "white")[number % 5]
        told = [
            {"role": "user", "content": f"Please remember: the code of the {owner} box is {code}."},
            {"role": "assistant", "content": f"The code of the {owner} box is {code}."},
        ]
        at = 2 * int(random.integers(0, max(len(messages) // 8, 1)))
        asked = {"role": "user", "content": f"What is the code of the {owner} box?"}
        found.append((prompt_ids(tokenizer, [*messages[:at], *told, *messages[at:], asked]), code))
    return found


@torch.inference_mode()
def needle_recall(model, tokenizer, needles: Sequence[tuple[list[int], str]], make_cache: MakeCache, tokens: int = 24,
                  batch: int = 8) -> float:  # fmt: skip
    """The share of codes that a greedy answer of ``tokens`` tokens contains."""
    found = 0
    for start in tqdm(range(0, len(needles), batch), desc="needles", unit="batch"):
        rows = needles[start : start + batch]
        prompts = [prompt for prompt, _ in rows]
        decoder = _Decoder(model, make_cache(model, [len(p) for p in prompts]), prompts, tokenizer.pad_token_id)
        said = []
        for _ in range(tokens):
            said.append(decoder.logits.argmax(-1))
            decoder.feed(said[-1])
        texts = tokenizer.batch_decode(torch.stack(said, 1))
        found += sum(code in text for text, (_, code) in zip(texts, rows, strict=True))
    return found / len(needles)


def report(model, tokenizer, checkpoints: Sequence, conversations: Sequence, tokens: int, longest: int) -> dict:
    """Every comparison for the gates in ``checkpoints`` and for the training-free methods at their compression ratios.

    Prompts are the conversations up to their last question, shortened from the front until they have at most
    ``longest`` tokens.
    """
    prompts = [_shortened(tokenizer, messages, longest) for messages in conversations]
    ids = [prompt_ids(tokenizer, messages) for messages in prompts]
    needles = needle_prompts(tokenizer, [messages[2:-1] for messages in prompts])
    batch, pad = sorted(ids, key=len)[-8:], tokenizer.pad_token_id
    speed = [{"name": "dense"} | decode_speed(model, batch, pad)]
    attach(model, DMSConfig())
    reference = dense_reference(model, tokenizer, ids, tokens)
    with model.dms.disabled():
        rows = [{"method": "dense", "cr": 1.0, "cr_decisions": 1.0} | _row(model, tokenizer, reference, needles)]
    detach(model)
    for directory in checkpoints:
        cr = read_settings(directory)["cr"]
        load_gates(model, directory)
        facts = {"method": "dms", "cr": cr, "cr_decisions": decisions_cr(model, ids)}
        rows.append(facts | _row(model, tokenizer, reference, needles))
        speed.append({"name": f"dms CR {cr:g}"} | decode_speed(model, batch, pad))
        detach(model)
    lengths = [len(p) for p in ids]
    return {
        "prompts": len(ids), "prompt_tokens": [min(lengths), max(lengths)], "continuation": tokens, "rows": rows,
        "speed_batch": [len(p) for p in batch], "speed": speed,
    }  # fmt: skip


def _own_cache(model, lengths: Sequence[int]) -> DMSCache:
    return DMSCache.for_model(model)


def _row(model, tokenizer, reference: Reference, needles: Sequence, make_cache: MakeCache = _own_cache) -> dict:
    recall = needle_recall(model, tokenizer, needles, make_cache)
    return follow(model, tokenizer, reference, make_cache) | {"needles": recall}


def _shortened(tokenizer, messages: Sequence[dict], longest: int) -> list[dict]:
    """A conversation without its last answer, and without its first exchanges if they are too many."""
    messages = list(messages[:-1])
    while len(messages) > 1 and len(prompt_ids(tokenizer, messages)) > longest:
        messages = messages[2:]
    return messages
