"""How closely a compressed cache follows the dense model on real text.

A prompt is a long conversation and, in two branches of the same cache, its next question and a needle: a question
after a code that was told near the beginning.  The dense model answers the first greedily.  The same tokens are then
fed, one by one, to a model that decodes with another cache: at every token, is its first choice the dense one's (top-1
agreement), and how far is its distribution (KL, nats)?  Tokens after the end of the dense model's answer do not count.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.train.losses import token_divergence

MakeCache = Callable[[object], RowCache]


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation, of the question that continues it, and of the one after the needle."""

    context: list[int]
    question: list[int]
    needle: list[int]
    code: str


@dataclass
class Answers:
    """What a model with some cache says to N prompts, n tokens each."""

    tokens: Tensor  # (N, n) fed
    logits: Tensor  # (N, n, V) before each
    recalled: list[bool]  # the code is in the answer to the needle
    seen: Tensor  # (N,) tokens of context, question and answer
    live: Tensor  # (N,) items held of them, mean over layers and heads
    cells: int  # recent tokens that are held in any case
    step_seconds: list[float]  # of every decode step of a batch of ``rows``
    rows: int  # decoded together, both branches
    kv_bytes: int  # of the first batch's cache at the end


def make_prompts(tokenizer, conversations: Sequence[Sequence[dict]], longest: int, seed: int = 0) -> list[Prompt]:
    """One prompt a conversation; exchanges are left out from the front until it has at most ``longest`` tokens.

    A code is told within the first quarter of what remains.
    """
    random, prompts = np.random.default_rng(seed), []

    def ids(messages: Sequence[dict], waiting: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=waiting, return_dict=True)["input_ids"]

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
    """Rows of one cache that are fed tokens: many a row at first, then one a row."""

    def __init__(self, model, cache: RowCache, rows: Sequence[Sequence[int]], pad: int) -> None:
        self.model, self.cache, self.pad = model, cache, pad
        self.position = torch.zeros(len(rows), dtype=torch.long)
        self.logits = self.prefill(rows)

    def prefill(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids a row, padded on the left; returns the logits after the last, (B, V)."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = self.position[:, None] + (mask.cumsum(1) - 1).clamp_min(0)
        self.position = self.position + torch.tensor([len(row) for row in rows])
        return self._forward(ids, positions, mask)

    def branch(self, *questions: Sequence[Sequence[int]]) -> None:
        """Every row becomes as many as there are questions to it, neighbours together, and takes in its own."""
        self.cache.fork(len(questions))
        self.position = self.position.repeat_interleave(len(questions))
        self.logits = self.prefill([question for row in zip(*questions, strict=True) for question in row])

    def feed(self, token: Tensor) -> None:
        """token (B,): one a row."""
        self.logits = self._forward(token[:, None], self.position[:, None], torch.ones_like(token)[:, None])
        self.position = self.position + 1

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]


@torch.inference_mode()
def answer(
    model, tokenizer, prompts: Sequence[Prompt], make_cache: MakeCache, tokens: int, said: Tensor | None = None,
    batch: int = 4, label: str = "",
) -> Answers:  # fmt: skip
    """Answers of ``tokens`` tokens: greedy, or ``said`` (N, tokens) word by word.  Needles are answered greedily."""
    fed, logits, recalled, seen, live, seconds, held = [], [], [], [], [], [], 0
    for start in tqdm(range(0, len(prompts), batch), desc=label, unit="batch"):
        part = prompts[start : start + batch]
        decoder = Decoder(model, make_cache(model), [p.context for p in part], tokenizer.pad_token_id)
        decoder.branch([p.question for p in part], [p.needle for p in part])
        steps, words = [], []
        for i in range(tokens):
            steps.append(decoder.logits[::2])
            words.append(decoder.logits.argmax(-1))
            if said is not None:
                words[-1][::2] = said[start : start + batch, i]
            began = time.perf_counter()
            decoder.feed(words[-1])
            if len(part) == min(batch, len(prompts)):
                seconds.append(time.perf_counter() - began)
        words = torch.stack(words, 1)
        texts = tokenizer.batch_decode(words[1::2])
        recalled += [p.code in text for p, text in zip(part, texts, strict=True)]
        fed.append(words[::2])
        logits.append(torch.stack(steps, 1))
        seen.append(decoder.cache.tokens_seen()[::2])
        live.append(decoder.cache.live_tokens().float().mean((0, 2))[::2])
        if not held:
            decoder.cache.trim()
            held = decoder.cache.bytes_held()
    cells = model.dms.config.window + 1 if model.dms.enabled else 0
    rows = 2 * min(batch, len(prompts))
    return Answers(
        torch.cat(fed), torch.cat(logits), recalled, torch.cat(seen), torch.cat(live), cells, seconds, rows, held
    )


def compare(answers: Answers, dense: Answers, eos: int, resamples: int = 1000) -> dict:
    """``answers`` to the dense model's own words beside that model's.

    ``agreement`` and ``kl`` over counted tokens; ``agreement_low`` and ``_high``: 95 % bootstrap over prompts;
    ``cr_live``: tokens seen over items held; ``cr_decisions``: the same outside the window;
    ``needles``: share of codes recalled; ``tokens_per_s`` of the median decode step, all rows together; ``kv_bytes``.
    """
    end = (dense.tokens == eos).long()
    counted = end.cumsum(1) - end == 0  # the end mark, too
    same = (answers.logits.argmax(-1) == dense.logits.argmax(-1)) & counted
    kl = token_divergence(answers.logits[counted], dense.logits[counted], "forward")
    hits, total = same.sum(1).numpy(), counted.sum(1).numpy()
    draws = np.random.default_rng(0).integers(len(hits), size=(resamples, len(hits)))
    low, high = np.quantile(hits[draws].sum(1) / total[draws].sum(1), (0.025, 0.975))
    outside = [(x - answers.cells).clamp_min(1).sum() for x in (answers.seen, answers.live)]
    return {
        "agreement": float(hits.sum() / total.sum()), "agreement_low": float(low), "agreement_high": float(high),
        "kl": float(kl.mean()), "cr_live": float(answers.seen.sum() / answers.live.sum()),
        "cr_decisions": float(outside[0] / outside[1]), "needles": sum(answers.recalled) / len(hits),
        "tokens": int(total.sum()), "prompts": len(hits), "kv_bytes": answers.kv_bytes,
        "tokens_per_s": answers.rows / float(np.median(answers.step_seconds)),
    }  # fmt: skip


def own_cache(model) -> DMSCache:
    return DMSCache.for_model(model)
