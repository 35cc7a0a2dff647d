"""Look-ups in the embedded model's documents: digits that are copied from far behind.  One token is one character.

A digit at position j, the source, is what is to be predicted at a later position, the query q.  Of kind "definition" is
a digit of the prompt that is copied for the first time, of kind "result" a value found in the trace and needed again.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from companion.tasks.choices import make_choice
from companion.tasks.mixture import LONGEST
from companion.tasks.programs import DIGITS, Problem, make_problem
from companion.tasks.puzzles import Puzzle, make_puzzle

KINDS = ("definition", "result")


@dataclass(frozen=True)
class Case:
    """One look-up: token ids up to and including the query, and what is exchanged."""

    ids: tuple[int, ...]
    source: int  # j
    right: int  # the digit's id, which is to be predicted at the query
    wrong: int  # the other digit's id
    kind: str
    other: int = 0  # position of another digit of the same part, prompt or trace, that the query does not need
    task: str = "traces"

    @property
    def query(self) -> int:
        return len(self.ids) - 1


Place = tuple[int, int, str]  # source, query, kind


def trace_lookups(problem: Problem, distance: int) -> list[Place]:
    """Every look-up at least ``distance`` tokens long of a program's trace, or of the trace of a choice.

    A first visit ``X=a+4>a;`` repeats the prompt's definition.  A return ``X=3+b=...`` repeats X's last line, whose 3
    is a value found before.
    """
    definitions, at = {}, 0
    for line in problem.prompt.split(";"):
        definitions[line[0]] = line, at
        at += len(line) + 1
    last, found, at = {}, [], len(problem.prompt)
    for line in problem.trace.split(";")[:-1]:
        first_visit = line[0] not in last
        before, start = definitions[line[0]] if first_visit else last[line[0]]
        for k in range(2, min(5, len(before), len(line))):  # X = a + b
            repeated = line[k] in DIGITS and before[k] == line[k]
            of_prompt = definitions[line[0]][0][k : k + 1] in tuple(DIGITS)
            if repeated and of_prompt == first_visit:
                found.append((start + k, at + k - 1, KINDS[not first_visit]))
        last[line[0]] = line, at
        at += len(line) + 1
    return _far(found, distance)


def puzzle_lookups(puzzle: Puzzle, distance: int) -> list[Place]:
    """The same of a puzzle's trace.

    The first trial of a block repeats the digits of the prompt's lines: the 4 of ``n=4-U;`` in ``n8=4-U>...``.  A
    value stands behind its name, ``n4``; where it is needed again, it is that of the name's last mention.  The list of
    a trial ``>n83;`` mentions no value.
    """
    text, found, values = puzzle.prompt + puzzle.trace, [], {}
    lines = {line[1]: line for line in re.finditer(r"([a-zA-Z])=(\w)[+-](\w);", puzzle.prompt)}
    for line in re.finditer(r"([a-zA-Z])\d=(\w)\d?[+-](\w)", text):
        if before := lines.pop(line[1], None):
            copied = [k for k in (2, 3) if line[k] in DIGITS]
            found += [(before.start(k), line.start(k) - 1, KINDS[0]) for k in copied]
    for mention in re.finditer(r"(?<!>)([a-zA-Z])(\d)", text):
        source, at = values.get(mention[1]), mention.start(2)
        if source is not None and text[source] == text[at]:
            found.append((source, at - 1, KINDS[1]))
        values[mention[1]] = at
    return _far(found, distance)


def _far(places: Sequence[Place], distance: int) -> list[Place]:
    return [place for place in places if place[1] - place[0] >= distance]


TASKS = {
    "traces": (make_problem, trace_lookups),
    "choice": (make_choice, trace_lookups),
    "search": (partial(make_puzzle, longest=LONGEST), puzzle_lookups),
}


def find_cases(
    tokenizer, documents: int, distance: int, seed: int = 0, tasks: Sequence[str] = tuple(TASKS)
) -> list[Case]:
    """At most one look-up of each kind a validation document of each task, drawn at random.

    Raises ValueError for an unknown task.
    """
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"tasks {unknown}: must be among {', '.join(TASKS)}")
    cases = []
    for task in tasks:
        make, lookups = TASKS[task]
        for index in range(documents):
            document, rng = make("validation", seed, index), random.Random(f"lookup/{task}/{seed}/{index}")
            text, start = document.prompt + document.trace, len(document.prompt)
            found = lookups(document, distance)
            for kind in KINDS:
                chosen = [p for p in found if p[2] == kind and _others(text, start, p, distance)]
                if chosen:
                    place = rng.choice(chosen)
                    other = rng.choice(_others(text, start, place, distance))
                    cases.append(_case(tokenizer, text, place, other, rng, task))
    return cases


def _others(text: str, start: int, place: Place, distance: int) -> list[int]:
    """Digits of the source's part of the document, as far from the query, that are not the source's digit."""
    source, query, _ = place
    part = range(start) if source < start else range(start, query)
    return [p for p in part if p <= query - distance and text[p] in DIGITS and text[p] != text[source]]


def _case(tokenizer, text: str, place: Place, other: int, rng: random.Random, task: str) -> Case:
    source, query, kind = place
    wrong = rng.choice([digit for digit in DIGITS if digit != text[source]])
    ids = tokenizer(text[: query + 1])["input_ids"]
    return Case(tuple(ids), source, *tokenizer.convert_tokens_to_ids([text[source], wrong]), kind, other, task)
