"""Conversations in which later turns ask about earlier ones: data for a retrofit that is to remember, and for measures.

A fact (``memory.yaml`` has its kinds) is told in exchanges of its own, between others that a model has answered itself
(``dms converse``), and asked for later.  What the assistant then says is right by construction, not the model's own:
the loss is the divergence from the dense model's distribution at every token of the text.  Where that model remembers,
its target is the same; where it does not, its uncertainty is the target, and a wrong answer of its own would have
nothing to do with the fact.  So facts are new in every document and cost no sampling.

Each sentence that tells a fact belongs to one split by its hash: splits share none.  Kinds held out are in ``test``
alone.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}  # remainders of a sentence's hash by 10
TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
KINDS: dict[str, dict] = TABLE["kinds"]
HELD_OUT = tuple(name for name, kind in KINDS.items() if kind.get("held_out"))
SUBJECTS = ("animal", "name", "thing")
NUMBERS = {"digits": (1000, 9999), "few": (2, 9), "hour": (6, 22), "minute": (10, 59)}
NOTED = ("Noted.", "I will remember that.", "All right, I have noted it.", "Thank you, I will keep that in mind.")
TRIES = 10_000  # draws in a row that give no new fact, after which there is none
OVERHEAD = 11  # tokens of the template around an exchange, and some of its system message
SPAN = re.compile(r"\[([^\]]*)\]")

Exchange = tuple[str, str]  # what the user says, and the assistant


@dataclass(frozen=True)
class Fact:
    """What is told, one exchange each, and the question; what has to be remembered stands in brackets in ``reply``."""

    kind: str
    told: tuple[str, ...]
    asked: str
    reply: str
    subjects: frozenset[str]  # whom and what it is about: two facts of a conversation share none

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters of ``plain`` that have to be remembered."""
        return [(m.start() - 2 * i, m.end() - 2 * i - 2) for i, m in enumerate(SPAN.finditer(self.reply))]

    @property
    def plain(self) -> str:
        return SPAN.sub(r"\1", self.reply)


def kinds_of(split: str) -> list[str]:
    """Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    return [name for name in KINDS if split == "test" or name not in HELD_OUT]


def draw_fact(rng: random.Random, kind: str, split: str) -> Fact:
    """A fact of that kind, each of whose sentences belongs to the split."""
    texts = KINDS[kind]
    while (values := _draw_values(rng, texts["told"], split)) is None:
        pass
    subjects = frozenset(value for slot, value in values.items() if slot.rstrip("0123456789") in SUBJECTS)
    told = tuple(sentence.format(**values) for sentence in texts["told"])
    return Fact(kind, told, texts["asked"].format(**values), texts["reply"].format(**values), subjects)


def _draw_values(rng: random.Random, told: Sequence[str], split: str) -> dict[str, str] | None:
    """Words for the slots of ``told``, sentence by sentence; None where one found no words of the split."""
    values: dict[str, str] = {}
    for sentence in told:
        slots = [slot for slot in re.findall(r"{(\w+)}", sentence) if slot not in values]
        for _ in range(99):
            trial = dict(values)
            for slot in slots:
                trial[slot] = _draw(rng, slot, trial)
            if _bucket(sentence.format(**trial)) in SPLITS[split]:
                break
        else:
            return None
        values = trial
    return values


def _draw(rng: random.Random, slot: str, values: dict[str, str]) -> str:
    """A value that no slot of the same words has yet."""
    words = slot.rstrip("0123456789")
    if words in NUMBERS:
        return str(rng.randint(*NUMBERS[words]))
    taken = {value for other, value in values.items() if other.rstrip("0123456789") == words}
    return rng.choice([word for word in TABLE["words"][words] if word not in taken])


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10


def draw_facts(rng: random.Random, count: int, split: str) -> list[Fact]:
    """``count`` facts whose questions and subjects differ, the kinds in a random order in turn.

    Raises ValueError where there are not so many.
    """
    kinds, facts, missed = kinds_of(split), [], 0
    order = rng.sample(kinds, len(kinds))
    while len(facts) < count:
        if missed > TRIES or not order:
            raise ValueError(f"{count} facts: only about {len(facts)} differ; a conversation must have fewer tokens")
        kind = order[0]
        order = [*order[1:], *([] if KINDS[kind].get("once") else [kind])]
        fact = draw_fact(rng, kind, split)
        known = {word for other in facts for word in (other.asked, *other.subjects)}
        if known.isdisjoint((fact.asked, *fact.subjects)):
            facts.append(fact)
            missed = 0
        else:
            missed += 1
    return facts


def compose(
    exchanges: Sequence[Exchange],
    split: str,
    seed: int,
    index: int,
    tokens: int,
    count: Callable[[str], int],
    late: bool,
) -> dict:
    """Conversation ``index`` of (split, seed), of about ``tokens`` tokens: {"messages", "learn", "asked"}.

    exchanges: those that a model has answered, drawn without replacement.  count: tokens of a text.  late: all
    questions at the end, about facts told at even depths, as measures want it; else each some time after its fact.
    ``asked``: of each question its kind, the numbers of the messages that tell and that answer, and the characters of
    the answer that have to be remembered.
    """
    rng = random.Random(f"memory/{split}/{seed}/{index}")
    facts = draw_facts(rng, max(3, tokens // 190), split)
    events: list[tuple[float, Exchange, Fact | None]] = []  # when; the fact that it asks for, if any
    for number, fact in enumerate(facts):
        first = (number + rng.random()) / len(facts) if late else 0.9 * rng.random()
        asked = 1 + rng.random() if late else first + (1 - first) * rng.random()
        times = [first, *sorted(first + (min(asked, 1) - first) * rng.random() for _ in fact.told[1:])]
        told = zip(times, fact.told, strict=True)
        events += [(when, (text, rng.choice(NOTED)), None) for when, text in told]
        events.append((asked, (fact.asked, fact.plain), fact))
    room = tokens - sum(count(" ".join(texts)) + OVERHEAD for _, texts, _ in events)
    for exchange in rng.sample(exchanges, len(exchanges)):
        room -= count(" ".join(exchange)) + OVERHEAD
        if room < 0:
            break
        events.append((rng.random(), exchange, None))
    events.sort(key=lambda event: event[0])
    messages = [
        {"role": role, "content": text}
        for _, texts, _ in events
        for role, text in zip(("user", "assistant"), texts, strict=True)
    ]
    place = {message["content"]: 2 * (number // 2) for number, message in enumerate(messages) if number % 2 == 0}
    asked = [
        {"kind": f.kind, "told": [place[text] for text in f.told], "answer": 2 * number + 1, "spans": f.spans}
        for number, (_, _, f) in enumerate(events)
        if f is not None
    ]
    return {"messages": messages, "learn": "all", "asked": asked}


def exchanges_of(rows: Sequence[dict], avoid: Sequence[dict] = ()) -> list[Exchange]:
    """The exchanges of conversations, each question once, without those in the conversations ``avoid``."""
    seen, found = {text for row in avoid for text, _ in _pairs(row)}, []
    for row in rows:
        for question, answer in _pairs(row):
            if question not in seen:
                seen.add(question)
                found.append((question, answer))
    return found


def shared(rows: Sequence[dict], others: Sequence[dict]) -> list[str]:
    """What some conversation of ``rows`` says and one of ``others`` does too: questions by themselves, what is told for
    a question together, and whole conversations up to an answer.  Empty: no prompt is in both."""
    return sorted(set(_prompts(rows)) & set(_prompts(others)))


def _prompts(rows: Sequence[dict]) -> Iterator[str]:
    for row in rows:
        texts = [message["content"] for message in row["messages"]]
        of_facts = {at for fact in row.get("asked", ()) for at in (*fact["told"], fact["answer"] - 1)}
        for at in range(0, len(texts), 2):
            yield "\n".join(texts[: at + 1])
            if at not in of_facts:
                yield texts[at]
        for fact in row.get("asked", ()):
            yield " ".join(texts[at] for at in fact["told"])


def _pairs(row: dict) -> Iterator[Exchange]:
    texts = [message["content"] for message in row["messages"]]
    yield from zip(texts[::2], texts[1::2], strict=True)
