"""Digit puzzles: the embedded model's search task, a CPU stand-in for LiveCodeBench.

Unknown digits fulfil a list of lines modulo 10; they are found by guessing, propagating, checking, and guessing again::

    >n>I;n=4-U;I=n+g;g=U-5;U=n-4;!                                                              prompt
    >n8;n8=4-U>4-8=6;U6=n8-4=4?6-4=2>n83;n3=4-U>4-3=1;U1=n3-4=9?1-9=2>n834;...<n4U0;>I5;...#     trace

A prompt names the unknowns to be guessed, each the head of a block, then the shuffled lines.  Every unknown defines one
line.  A letter right after ``=`` is known by then, one after the operator is found from the line; a line in which only
a digit follows the operator closes its block and is the check.

A trial ``>n83;`` lists the values tried so far, the guess last.  Each line follows with what it gives, the check as a
difference: 0 means success, ``<`` restates all that is solved, anything else a new trial.  The last list before ``#``
is the answer: any assignment that fulfils all lines is right.
"""

import random
import re
from dataclasses import dataclass
from itertools import pairwise

from companion.tasks.programs import DIGITS, LETTERS, OPERATORS, PROMPT_END, SPLITS

BLOCKS, UNKNOWNS = (1, 3), (2, 3)  # of a puzzle, of a block; inclusive
WORKING = (1, 2)  # of the ten guesses in a block, inclusive
CHECKER = """\
names, digits = answer[0::2], answer[1::2]
well_formed = sorted(names) == {names} and len(digits) == len(names) and set(digits) <= set("0123456789")
v = dict(zip(names, map(int, digits))) if well_formed else dict()
holds = well_formed and all([
    {tests},
])
"""


@dataclass(frozen=True)
class Puzzle:
    """What the model reads, a correct trace, and the number of unknowns."""

    prompt: str
    trace: str  # ends with "#"
    unknowns: int


@dataclass(frozen=True)
class _Line:
    """``name = known operator other``: ``other`` is an unknown that the line gives, or in a check a digit."""

    name: str
    known: str  # a digit, or a name known by then
    operator: str
    other: str


def make_puzzle(split: str, seed: int, index: int, longest: int | None = None) -> Puzzle:
    """The ``index``-th puzzle of (split, seed).  ``longest``: guesses are drawn again until the trace is no longer.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {SPLITS}")
    rng = random.Random(f"puzzles/{split}/{seed}/{index}")
    blocks, names = [], iter(rng.sample(LETTERS, 12))
    for _ in range(rng.randint(*BLOCKS)):
        blocks.append(_block(rng, [next(names) for _ in range(rng.randint(*UNKNOWNS))], blocks))
    lines = [line for block in blocks for line in block]
    shuffled = rng.sample(lines, len(lines))
    prompt = "".join(f">{block[0].name}" for block in blocks) + ";"
    prompt += "".join(f"{x.name}={x.known}{x.operator}{x.other};" for x in shuffled) + PROMPT_END
    while len(trace := _trace(rng, blocks)) > (longest or 10**6):
        pass
    return Puzzle(prompt, trace, len(lines))


def checker(prompt: str) -> str:
    """A Python program that sets ``holds``: whether ``answer``, such as "n4U0", gives each unknown of ``prompt`` one
    digit so that every line holds."""
    lines = re.findall(r"([a-zA-Z])=(\w)([+-])(\w);", prompt)
    term = {letter: f'v["{letter}"]' for letter in LETTERS}
    tests = [f"v[{x!r}] == ({term.get(a, a)} {sign} {term.get(b, b)}) % 10" for x, a, sign, b in lines]
    return CHECKER.format(names=sorted(name for name, *_ in lines), tests=",\n    ".join(tests))


def solves(prompt: str, answer: str) -> bool:
    """Whether ``checker``'s program accepts ``answer``, run here."""
    space = {"answer": answer}
    exec(checker(prompt), space)
    return space["holds"]


def extract_assignment(text: str) -> str | None:
    """The last list before the first ``#``, or None where there is no ``#`` or no list."""
    before, mark, _ = text.partition("#")
    found = re.findall("<((?:[a-zA-Z][0-9])+);$", before)
    return found[0] if mark and found else None


def _compute(a: str, sign: str, b: str) -> int:
    return (int(a) + int(b) if sign == "+" else int(a) - int(b)) % 10


def _block(rng: random.Random, names: list[str], before: list[list[_Line]]) -> list[_Line]:
    """Lines for ``names``, the head first, of which one or two guesses work with any solution of ``before``."""
    solved = [line.name for block in before for line in block]
    while True:
        lines = []
        for name, other in pairwise(names):
            known = rng.choice(solved) if solved and rng.random() < 0.5 else rng.choice(DIGITS)
            lines.append(_Line(name, known, rng.choice(OPERATORS), other))
        known = rng.choice([*names[:-1], *solved])
        lines.append(_Line(names[-1], known, rng.choice(OPERATORS), rng.choice(DIGITS)))
        working = [_working(lines, values) for values in _solutions(before)]
        if all(WORKING[0] <= len(guesses) <= WORKING[1] for guesses in working):
            return lines


def _working(lines: list[_Line], values: dict[str, str]) -> list[dict[str, str]]:
    """The assignments that fulfil a block, after ``values``."""
    tried = [_propagate(lines, guess, values) for guess in DIGITS]
    return [got for got, holds in tried if holds]


def _solutions(blocks: list[list[_Line]]) -> list[dict[str, str]]:
    found = [{}]
    for block in blocks:
        found = [got for values in found for got in _working(block, values)]
    return found


def _propagate(lines: list[_Line], guess: str, values: dict[str, str]) -> tuple[dict[str, str], bool]:
    """All values after a guess for a block's head, and whether its check holds."""
    values = {**values, lines[0].name: guess}
    for line in lines[:-1]:
        values[line.other] = str(_found(line, values)[2])
    line = lines[-1]
    return values, int(values[line.name]) == _compute(values.get(line.known, line.known), line.operator, line.other)


def _found(line: _Line, values: dict[str, str]) -> tuple[str, str, int]:
    """The unknown of a line as a difference a - b, and its value."""
    value, known = values[line.name], values.get(line.known, line.known)
    a, b = (value, known) if line.operator == "+" else (known, value)
    return a, b, _compute(a, "-", b)


def _trace(rng: random.Random, blocks: list[list[_Line]]) -> str:
    """Guesses without replacement, block by block, until all checks hold."""
    out, values = [], {}
    for lines in blocks:
        tried = ""
        for guess in rng.sample(DIGITS, 10):
            tried += guess
            out.append(f">{lines[0].name}{tried};")
            got, holds = _propagate(lines, guess, values)
            out += [_step(line, got) for line in lines]
            if holds:
                break
        values = got
        out.append("<" + "".join(name + digit for name, digit in values.items()) + ";")
    return "".join(out) + "#"


def _step(line: _Line, values: dict[str, str]) -> str:
    """A line of the trace: what a line gives, or the check."""
    known = line.known + values.get(line.known, "")
    left = f"{line.name}{values[line.name]}={known}{line.operator}{line.other}"
    if line.other in LETTERS:
        a, b, value = _found(line, values)
        return f"{left}>{a}-{b}={value};"
    right = _compute(values.get(line.known, line.known), line.operator, line.other)
    return f"{left}={right}?{values[line.name]}-{right}={_compute(values[line.name], '-', str(right))}"
