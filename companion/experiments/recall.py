"""What a model with some cache remembers of long texts (``dms recall``), by one forward pass a text and method.

Texts are conversations whose last questions ask about facts told before (``companion.tasks.memory``), and prose.  The
text is given, whatever a model would have said: at each counted token, how far is the distribution from the dense
model's (KL, nats), is the first choice the same, and is it the text's token?  A fact is recalled where at every token
that has to be remembered the first choice is that token, so that greedy decoding would have written it.

*Far-dependent* tokens are those at which the dense model itself needs the distant past: its distribution on the whole
text is FAR nats or more away from its distribution on the prompt and the last CUT to CUT + BLOCK - 1 tokens alone.

DMS attends in one pass to what its cache would hold at each token.  A control's cache takes in the prompt (the first
exchange), then every token as one that was generated; its budget is what DMS holds at the end of the same texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from companion.tasks.memory import KINDS
from dms_core.baselines import BASELINE_NAMES, Baseline, Quest, get_baseline
from dms_core.baselines.quest import QuestLayer
from dms_core.cache.base import RowCache
from dms_core.chat import chat_text
from dms_core.probe import decoder_of
from dms_core.train.data import encode_conversation
from dms_core.train.heads import logits_of
from dms_core.train.losses import token_divergence

CUT, BLOCK = 256, 128  # tokens
FAR = 0.5  # nats
CHUNK = 256  # tokens whose logits are held at once


class EachTokenQuestLayer(QuestLayer):
    """Tokens after the first call select their pages one by one, also where several come at once."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, evict, valid: Tensor | None, scale: float, sinks=None) -> Tensor:
        if not self.capacity:
            return super().attend(q, k, v, evict, valid, scale, sinks)
        parts = []
        for t in range(q.shape[2]):
            token, one = (x[:, :, t : t + 1] for x in (q, k, v)), valid if valid is None else valid[:, t : t + 1]
            parts.append(super().attend(*token, evict, one, scale, sinks))
        return torch.cat(parts, 2)


class EachTokenQuest(Quest):
    layer = EachTokenQuestLayer


CONTROLS: dict[str, Callable[..., Baseline]] = {
    **{name: get_baseline(name) for name in BASELINE_NAMES if name != "snapkv"},  # evicts nothing but of the prompt
    "quest": EachTokenQuest,
    "quest-protected": partial(EachTokenQuest, protect=True),
}


@dataclass(frozen=True)
class Document:
    """A text: token ids, how many are the prompt, which tokens count, and the questions about facts."""

    ids: list[int]
    prompt: int
    counted: np.ndarray  # (T,) bool: behind the prompt; of conversations what the assistant says
    asked: list[dict] = field(default_factory=list)  # kind, distance (tokens since it was told first), tokens: (n,)

    @property
    def at(self) -> np.ndarray:
        """Positions that count, ascending."""
        return np.flatnonzero(self.counted)


def conversation(tokenizer, row: dict) -> Document:
    """A row of ``memory.compose``, by the tokenizer's chat template."""
    messages = row["messages"]
    text = chat_text(tokenizer, messages, waiting=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, learnt = encode_conversation(tokenizer, messages)
    if ids != list(coded["input_ids"]):
        raise ValueError("the chat template renders earlier turns otherwise once others follow")
    first, last = np.array(coded["offset_mapping"]).T
    prompt = len(encode_conversation(tokenizer, messages[:2])[0])
    asked = []
    for fact in row["asked"]:
        begins = len(chat_text(tokenizer, messages[: fact["answer"]]))
        tokens = [np.flatnonzero((first < begins + b) & (last > begins + a)) for a, b in fact["spans"]]
        tokens = np.concatenate(tokens)
        told = len(chat_text(tokenizer, messages[: fact["told"][0]], waiting=False)) if fact["told"][0] else 0
        distance = int(tokens[0] - np.searchsorted(first, told))
        asked.append({"kind": fact["kind"], "distance": distance, "tokens": tokens})
    counted = np.array(learnt) & (np.arange(len(ids)) >= prompt)
    return Document(ids, prompt, counted, asked)


def prose(tokenizer, text: str, tokens: int, prompt: int = 64) -> Document:
    """The beginning of a text; all tokens behind the first ``prompt`` count."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return Document(ids, prompt, np.arange(len(ids)) >= prompt)


def topics(count: int) -> list[str]:
    """The longest topics of Python's language reference as ``pydoc`` carries it (PSF licence), by name."""
    from pydoc_data.topics import topics as found

    return [found[name] for name in sorted(sorted(found, key=lambda name: -len(found[name]))[:count])]


# Passes: the decoder's last hidden states, (T, d) a document.


def whole(model, rows: Sequence[list[int]]) -> list[Tensor]:
    """Without a cache: the dense model inside ``dms.disabled()``, else what DMS lets each token see."""
    ids = [torch.tensor(row, device=model.device) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True)
    hidden = decoder_of(model)(input_ids=pad_sequence(ids, True), attention_mask=mask, use_cache=False)
    return [states[: len(row)] for states, row in zip(hidden.last_hidden_state, rows, strict=True)]


def through(model, cache: RowCache, documents: Sequence[Document]) -> tuple[list[Tensor], Tensor]:
    """Through a cache: the prompt, what follows, and the last token as a decode step, whose KV reads (B,) come, too."""
    parts, before, position = [], 0, torch.zeros(len(documents), dtype=torch.long, device=model.device)
    pieces = zip(*([d.ids[: d.prompt], d.ids[d.prompt : -1], d.ids[-1:]] for d in documents), strict=True)
    for rows in pieces:
        ids = [torch.tensor(row, device=model.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, "left")
        before = cache.kv_reads() if parts else 0
        places = position[:, None] + (mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": pad_sequence(ids, True, 0, "left"), "attention_mask": mask, "position_ids": places}
        hidden = decoder_of(model)(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        parts.append([states[len(states) - len(row) :] for states, row in zip(hidden, rows, strict=True)])
        position += mask.sum(1)
    reads = (cache.kv_reads() - before).float().mean((0, 2))
    return [torch.cat(states) for states in zip(*parts, strict=True)], reads


def live_tokens(model, lengths: Sequence[int]) -> list[float]:
    """What DMS's cache would hold at the end of the rows of the last pass: tokens a KV head, mean over all heads."""
    evicted = torch.stack(list(model.dms.step.evicted.values()))  # (layers, B, H, T)
    cells = model.dms.config.window + 1
    kept = [(~evicted[:, row, :, : max(n - cells, 0)]).sum(-1).float().mean() for row, n in enumerate(lengths)]
    return [float(k) + min(n, cells) for k, n in zip(kept, lengths, strict=True)]


class Head:
    """A model's output layer in fp32: bf16 logits are a sixteenth of a nat apart where they are 8 to 16."""

    def __init__(self, model) -> None:
        """Raises ValueError for a model that scales, shifts or caps its logits."""
        layer = model.get_output_embeddings()
        self.weight = layer.weight.detach().float()
        probe = torch.randn(4, self.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(layer.weight)
        theirs, ours = logits_of(model, probe).float(), self(probe)
        if not torch.allclose(theirs, ours, rtol=0.02, atol=0.02 * float(ours.abs().max())):
            raise ValueError(f"{type(model).__name__}: its logits must be its output layer's, unscaled")

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight.T


def scores(hidden: Tensor, head: Head, dense: Tensor, dense_head: Head, document: Document) -> dict[str, np.ndarray]:
    """At each counted token: kl from the dense model, same first choice, logp of the text's, which is right first."""
    at = torch.from_numpy(document.at).to(hidden.device)
    tokens, found = torch.tensor(document.ids, device=hidden.device), []
    for part in at.split(CHUNK):
        ours, theirs = head(hidden[part - 1]), dense_head(dense[part - 1])
        kl, first, token = token_divergence(ours, theirs, "forward"), ours.argmax(-1), tokens[part]
        logp = ours.log_softmax(-1).gather(1, token[:, None])[:, 0]
        found.append(torch.stack([kl, (first == theirs.argmax(-1)).float(), logp, (first == token).float()]))
    return dict(zip(("kl", "same", "logp", "right"), torch.cat(found, 1).double().cpu().numpy(), strict=True))


def far_tokens(model, head: Head, dense: Tensor, document: Document, batch: int = 8) -> np.ndarray:
    """Which counted tokens depend on the far past, (n,) bool; none of prose.  ``model`` is the dense one, gates off."""
    ids, prompt, at = document.ids, document.prompt, document.at
    starts = range(prompt + CUT + 1, len(ids) if document.asked else 0, BLOCK)
    rows = [ids[:prompt] + ids[start - CUT : start + BLOCK] for start in starts]
    hidden = [states for i in range(0, len(rows), batch) for states in whole(model, rows[i : i + batch])]
    change = np.zeros(len(ids))
    for start, states in zip(starts, hidden, strict=True):
        here = at[(at >= start) & (at < start + BLOCK)]
        if len(here):
            place = torch.from_numpy(here)
            cut, full = head(states[place - start + prompt + CUT - 1]), head(dense[place - 1])
            change[here] = token_divergence(cut, full, "forward").double().cpu().numpy()
    return change[at] >= FAR


def record(document: Document, found: dict[str, np.ndarray], far: np.ndarray, **facts: float) -> dict:
    """Sums over the counted and over the far-dependent tokens, and each question's outcome."""
    place = {int(token): number for number, token in enumerate(document.at)}
    asked = []
    for question in document.asked:
        here = [place[int(token)] for token in question["tokens"]]
        facts_of = {
            "kind": question["kind"],
            "distance": question["distance"],
            "right": bool(found["right"][here].all()),
        }
        asked.append(facts_of | {"logp": float(found["logp"][here].sum())})
    sums = {name: float(found[name].sum()) for name in ("kl", "same", "logp")}
    of_far = {f"far_{name}": float(found[name][far].sum()) for name in ("kl", "same")}
    counts = {"tokens": len(document.ids), "counted": len(far), "far": int(far.sum())}
    return {**counts, **sums, **of_far, "asked": asked, **facts}


def control(name: str, documents: Sequence[Document], live: float) -> Callable:
    """``make(model)``: an empty cache of a control that holds ``live`` tokens a KV head at the end of the documents."""
    prompt = sum(d.prompt for d in documents) / len(documents)
    rest = max(len(d.ids) - d.prompt for d in documents)
    cr = max((prompt + rest) / live, 1.0)
    return lambda model: CONTROLS[name](cr)(model, rest)


def group_of(kind: str) -> tuple[str, bool]:
    """What kind of memory a fact asks for, and whether its kind is held out."""
    return KINDS[kind]["group"], bool(KINDS[kind].get("held_out"))
