"""How closely a compressed cache follows the dense model on real text (``dms fidelity``).

A prompt is a long conversation and, in two branches of the same cache, its next question and a needle: a question
after a code that was told near the beginning.  The dense model answers the first greedily.  The same tokens are then
fed, one by one, to a model that decodes with another cache: at every token, is its first choice the dense one's (top-1
agreement), and how far is its distribution (KL, nats)?  Tokens after the end of the dense model's answer do not count.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from companion.cost.decode_speed import decode_speed
from dms_core.baselines import get_baseline
from dms_core.budgets import bootstrap
from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.chat import chat_ids
from dms_core.checkpoint import load_gates, read_settings
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.pick import padding_token, stop_tokens
from dms_core.train.losses import token_divergence

MakeCache = Callable[[object], RowCache]
BASELINES = ("tova", "streaming-llm")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation, of the question that continues it, and of the one after the needle."""

    context: list[int]
    question: list[int]
    needle: list[int]
    code: str


@dataclass
class Answers:
    """What a model with some cache says to N prompts, n tokens each; tensors on the CPU."""

    tokens: Tensor  # (N, n) fed
    logits: Tensor  # (N, n, V) before each
    recalled: list[bool]  # the code is in the answer to the needle
    seen: Tensor  # (N,) tokens of context, question and answer
    live: Tensor  # (N,) items held of them, mean over layers and heads
    cells: int  # recent tokens that are held in any case
    tokens_per_s: float  # of the median decode step of a full batch, both branches
    kv_bytes: int  # of the first batch's cache at the end


def make_prompts(tokenizer, conversations: Sequence[Sequence[dict]], longest: int, seed: int = 0) -> list[Prompt]:
    """One prompt a conversation; exchanges are left out from the front until it has at most ``longest`` tokens.

    A code is told within the first quarter of what remains.
    """
    random, prompts = np.random.default_rng(seed), []
    ids = partial(chat_ids, tokenizer)

    for number, messages in enumerate(conversations):
        code, owner = str(random.integers(1000, 10000)), ("red", "blue", "green", "black", "white")[number % 5]
        told = [
            {"role": "user", "content": f"Please remember: the code of the {owner} box is {code}."},
            {"role": "assistant", "content": f"The code of the {owner} box is {code}."},
        ]
        *past, question, _ = messages
        while len(past) > 2 and len(ids([*told, *past, question], True)) > longest:
            past = past[2:]
        at = 2 * int(random.integers(0, max(len(past) // 8, 1)))
        past = [*past[:at], *told, *past[at:]]
        context, needle = ids(past, False), {"role": "user", "content": f"What is the code of the {owner} box?"}
        asked = [ids([*past, last], True)[len(context) :] for last in (question, needle)]
        prompts.append(Prompt(context, *asked, code))
    return prompts


class Decoder:
    """Rows of one cache that are fed tokens: many a row at first, then one a row; ``logits`` (B, V) after the last."""

    def __init__(self, model, cache: RowCache, rows: Sequence[Sequence[int]], pad: int) -> None:
        self.model, self.cache, self.pad = model, cache, pad
        self.position = torch.zeros(len(rows), dtype=torch.long, device=model.device)
        self.prefill(rows)

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Token ids a row, padded on the left."""
        rows = [torch.tensor(row, device=self.model.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        self.feed(pad_sequence(rows, True, self.pad, "left"), mask)

    def branch(self, *questions: Sequence[Sequence[int]]) -> None:
        """Every row becomes as many as there are questions to it, neighbours together, and takes in its own."""
        self.cache.fork(len(questions))
        self.position = self.position.repeat_interleave(len(questions))
        rows = [question for row in zip(*questions, strict=True) for question in row]
        lengths = sorted(set(map(len, rows)))
        if len(lengths) == 1 or not self.model.dms.layout.mixes:
            return self.prefill(rows)
        parts = [self._part(rows, [i for i, row in enumerate(rows) if len(row) == length]) for length in lengths]
        for at, part in parts:
            self.cache.put_rows(at, part.cache, torch.arange(len(at), device=at.device))
            self.position[at] = part.position
        order = torch.cat([at for at, _ in parts]).argsort()
        self.logits = torch.cat([part.logits for _, part in parts])[order]

    def _part(self, rows: Sequence[Sequence[int]], which: list[int]) -> tuple[Tensor, "Decoder"]:
        """Rows of one length in a cache of their own: states would take in padding after a past."""
        at, part = torch.tensor(which, device=self.position.device), copy.copy(self)
        part.cache, part.position = copy.deepcopy(self.cache), self.position[at]
        part.cache.batch_select_indices(at)
        part.prefill([rows[i] for i in which])
        return at, part

    def feed(self, ids: Tensor, mask: Tensor) -> None:
        """ids (B, T), and mask (B, T): 0 for padding."""
        positions = self.position[:, None] + (mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "past_key_values": self.cache}
        self.logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.position = self.position + mask.sum(1)


@torch.inference_mode()
def answer(
    model, tokenizer, prompts: Sequence[Prompt], make_cache: MakeCache, tokens: int, said=None, batch=4, label=""
) -> Answers:
    """Answers of ``tokens`` tokens: greedy, or the tokens ``said`` (N, tokens).  Needles are answered greedily."""
    parts, recalled, seconds, held = [], [], [], 0
    for start in tqdm(range(0, len(prompts), batch), desc=label, unit="batch"):
        part = prompts[start : start + batch]
        decoder = Decoder(model, make_cache(model), [p.context for p in part], padding_token(model, tokenizer))
        decoder.branch([p.question for p in part], [p.needle for p in part])
        cache, steps, words = decoder.cache, [], []
        for i in range(tokens):
            steps.append(decoder.logits[::2])
            words.append(decoder.logits.argmax(-1))
            if said is not None:
                words[-1][::2] = said[start : start + batch, i]
            began = time.perf_counter()
            decoder.feed(words[-1][:, None], torch.ones_like(words[-1])[:, None])
            if len(part) == min(batch, len(prompts)):
                seconds.append(time.perf_counter() - began)
        words = torch.stack(words, 1)  # (2 B, n)
        texts = tokenizer.batch_decode(words[1::2])
        recalled += [p.code in text for p, text in zip(part, texts, strict=True)]
        live = cache.live_tokens().float().mean((0, 2))[::2]
        parts.append([x.cpu() for x in (words[::2], torch.stack(steps, 1), cache.tokens_seen()[::2], live)])
        if not held:
            cache.trim()
            held = cache.bytes_held()
    fed, logits, seen, live = map(torch.cat, zip(*parts, strict=True))
    cells = model.dms.config.window + 1 if model.dms.enabled else 0
    rate = 2 * min(batch, len(prompts)) / statistics.median(seconds)
    return Answers(fed, logits, recalled, seen, live, cells, rate, held)


def compare(answers: Answers, dense: Answers, stop: Sequence[int], resamples: int = 1000) -> dict:
    """``answers`` to the dense model's own words, which one of the tokens ``stop`` ends, beside that model's.

    ``agreement`` and ``kl`` over counted tokens; ``agreement_low`` and ``_high``: 95 % bootstrap over prompts;
    ``cr_live``: tokens seen over items held; ``cr_decisions``: the same outside the window;
    ``needles``: share of codes recalled; ``tokens_per_s`` of the median decode step, all rows together; ``kv_bytes``.
    """
    end = torch.isin(dense.tokens, torch.tensor(stop, dtype=torch.long)).long()
    counted = end.cumsum(1) - end == 0  # the end mark, too
    same = (answers.logits.argmax(-1) == dense.logits.argmax(-1)) & counted
    kl = token_divergence(answers.logits[counted], dense.logits[counted], "forward")
    hits, total = same.sum(1).numpy(), counted.sum(1).numpy()
    draws = bootstrap.indices(len(hits), resamples)
    low, high = bootstrap.interval(hits[draws].sum(1) / total[draws].sum(1))
    outside = [(x - answers.cells).clamp_min(1).sum() for x in (answers.seen, answers.live)]
    row = {"agreement": float(hits.sum() / total.sum()), "agreement_low": low, "agreement_high": high}
    row |= {"kl": float(kl.mean()), "cr_live": float(answers.seen.sum() / answers.live.sum())}
    row |= {"cr_decisions": float(outside[0] / outside[1]), "needles": sum(answers.recalled) / len(hits)}
    row |= {"tokens": int(total.sum()), "prompts": len(hits), "kv_bytes": answers.kv_bytes}
    return row | {"tokens_per_s": answers.tokens_per_s}


def report(
    model, tokenizer, checkpoints: Sequence, conversations: Sequence, tokens: int, longest: int, batch: int = 4
) -> dict:
    """Rows of ``compare`` for the gates in ``checkpoints``, and at the last one's ratio for ``BASELINES``.

    Their budget of items a KV head is (context + tokens) / CR.
    """
    prompts = make_prompts(tokenizer, conversations, longest)
    whole = sorted([[*p.context, *p.question] for p in prompts], key=len)
    plain = decode_speed(model, whole[-2 * batch :], padding_token(model, tokenizer))

    def measure(method: str, cr: float, make_cache: MakeCache, dense: Answers | None = None) -> Answers:
        said = dense and dense.tokens
        found = answer(model, tokenizer, prompts, make_cache, tokens, said, batch, f"{method} CR {cr:g}")
        rows.append({"method": method, "cr": cr} | compare(found, dense or found, stop_tokens(model, tokenizer)))
        return found

    rows, ratios = [], [float(read_settings(directory)["cr"]) for directory in checkpoints]
    attach(model, DMSConfig())
    with model.dms.disabled():
        dense = measure("vanilla", 1.0, DMSCache.for_model)
    detach(model)
    for cr, directory in zip(ratios, checkpoints, strict=True):
        load_gates(model, directory)
        measure("dms", cr, DMSCache.for_model, dense)
        detach(model)
    attach(model, DMSConfig())
    with model.dms.disabled():
        for name in BASELINES:
            method = get_baseline(name)(ratios[-1])
            measure(name, ratios[-1], lambda model, method=method: method(model, tokens), dense)
    detach(model)
    facts = {"prompts": len(prompts), "prompt_tokens": [len(whole[0]), len(whole[-1])], "continuation": tokens}
    return facts | {"rows": rows, "plain": {"rows": len(whole[-2 * batch :]), **plain}}
