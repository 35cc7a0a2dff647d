"""A needle of the reader's own: told, buried under other exchanges, and asked for (chapter 8).

The other exchanges are questions of the kinds that the gates were trained on, with their right answers, so that
nothing but the needle and the last answer is the reader's or the model's own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from dms_core.cache.base import RowCache
from dms_core.cache.dms import DMSCache
from dms_core.chat import chat_ids
from dms_core.train.self_distill import QUESTIONS


@dataclass(frozen=True)
class Needle:
    """What is told and replied to it, what is asked later, and what the answer then has to contain."""

    told: str
    reply: str
    question: str
    secret: str


def exchanges(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """``count`` questions and their answers, the kinds in turn.  Raises ValueError without reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("exchanges come from reasoning-gym: pip install reasoning-gym") from None
    each = -(-count // len(QUESTIONS))
    kinds = [reasoning_gym.create_dataset(name, size=each, seed=seed) for name in QUESTIONS]
    entries = (kinds[i % len(kinds)][i // len(kinds)] for i in range(count))
    return [(entry["question"], str(entry["answer"])) for entry in entries]


def buried(needle: Needle, others: Sequence[tuple[str, str]], depth: int) -> list[dict]:
    """Messages: ``depth`` of the other exchanges, the needle, the rest of them, and the question, which waits.

    Raises ValueError for a depth that is not within them.
    """
    if not 0 <= depth <= len(others):
        raise ValueError(f"depth {depth}: must be 0 to {len(others)}, the number of other exchanges")
    pairs = [*others[:depth], (needle.told, needle.reply), *others[depth:]]
    said = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*said, {"role": "user", "content": needle.question}]


@torch.inference_mode()
def ask(model, tokenizer, messages: Sequence[dict], tokens: int = 24) -> tuple[str, RowCache]:
    """The model's greedy answer of at most ``tokens`` tokens, and the cache that it leaves."""
    ids, cache = torch.tensor([chat_ids(tokenizer, messages)], device=model.device), DMSCache.for_model(model)
    settings = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip(), cache


def told_and_asked(model, tokenizer, needle: Needle, others: Sequence[tuple[str, str]], depths: Sequence[int]) -> dict:
    """The needle told at each depth and asked for, with ``model``'s gates off and on.

    Returns the needle's fields; "rows": depth, method, what was said, whether the secret is in it, tokens seen and held
    a KV head; and "messages": the conversation of the first depth, with what the model with gates said.
    """
    rows, first = [], []
    for depth in depths:
        messages = buried(needle, others, depth)
        with model.dms.disabled():
            dense = ask(model, tokenizer, messages)
        ours = ask(model, tokenizer, messages)
        for method, (said, cache) in (("vanilla", dense), ("dms", ours)):
            held = {"seen": int(cache.tokens_seen()[0]), "live": float(cache.live_tokens().float().mean())}
            rows.append({"depth": depth, "method": method, "said": said, "right": needle.secret in said, **held})
        first = first or [*messages, {"role": "assistant", "content": ours[0]}]
    return {**asdict(needle), "rows": rows, "messages": first}


def places(tokens: Sequence[str], secret: str) -> list[int]:
    """The tokens that overlap with the first place in the text where the secret stands; none if it does not."""
    at, ends, end = "".join(tokens).find(secret), [], 0
    for token in tokens:
        ends.append(end := end + len(token))
    return [i for i, end in enumerate(ends) if at >= 0 and end > at and end - len(tokens[i]) < at + len(secret)]
