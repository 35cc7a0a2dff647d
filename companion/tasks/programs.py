"""Program traces: the embedded model's task, a CPU stand-in for AIME.

A problem is a shuffled straight-line program over digits modulo 10 with a goal variable and distractor
lines.  The model writes a depth-first evaluation trace, then the answer::

    ?j;T=4-I;e=I+8;I=3;q=j+2;j=T+e;!                                           prompt
    j=T+e>T;T=4-I>I;I=3<T;T=4-3=1<j;j=1+e>e;e=I+8>I;I=3<e;e=3+8=1<j;j=1+1=2<?;#2     trace

Every line names a variable and states what is known.  A first visit to ``X`` repeats its definition from the prompt;
a return repeats X's last line with the value just found in place of its name.  The line then goes down to an operand
that is still a name, ``X=1+b>b;``, or closes, ``X=1+3=4<P;``, and goes back to the line that asked for it (``?`` for
the goal).  Which operand comes first is drawn at random, so that the chains of one problem take different paths and
fail at different places.

Every problem is a pure function of ``(split, seed, index)``; splits never share a random stream.
"""

import random
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
OPERATORS = "+-"
PROMPT_END = "!"
ANSWER_MARK = "#"
ALPHABET = LETTERS + DIGITS + OPERATORS + "?;=<>" + PROMPT_END + ANSWER_MARK
SPLITS = ("train", "retrofit", "validation", "test")

TRAINING_MIX = (4, 18)  # needed variables, inclusive, of the documents that the reasoner learns from
DISTRACTORS = (2, 6)  # lines that the goal does not depend on, inclusive


@dataclass(frozen=True)
class Problem:
    """One problem: what the model reads, a correct trace, the answer digit, and its size."""

    prompt: str
    trace: str  # ends with "#" and the answer
    answer: str
    variables: int  # needed variables: the goal and everything it depends on


def make_problem(
    split: str, seed: int, index: int, variables: tuple[int, int] = TRAINING_MIX, letters: str = LETTERS
) -> Problem:
    """The ``index``-th problem of ``(split, seed)``, its needed variables uniform in ``variables``, named by letters.

    Raises ValueError for an unknown split or a range outside 1..40.
    """
    low, high = variables
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {SPLITS}")
    if not 1 <= low <= high <= 40:
        raise ValueError(f"variables {variables}: must satisfy 1 <= low <= high <= 40")
    rng = random.Random(f"{split}/{seed}/{index}")
    needed, extra = rng.randint(low, high), rng.randint(*DISTRACTORS)
    names = rng.sample(letters, needed + extra)
    lines = _needed_lines(rng, names[:needed])
    for i in range(needed, needed + extra):
        lines[names[i]] = _line(rng, rng.sample(names[:i], min(i, rng.choice((0, 1, 1, 2, 2)))))
    order = list(lines)
    rng.shuffle(order)
    program = "".join(f"{name}={''.join(lines[name])};" for name in order)
    trace, answer = _trace(names[0], lines, rng)
    return Problem(f"?{names[0]};{program}{PROMPT_END}", trace, answer, needed)


def grade(problem: Problem, completion: str) -> bool:
    """True if ``completion`` states the right answer; an unfinished trace is wrong."""
    return extract_answer(completion) == problem.answer


def extract_answer(completion: str) -> str | None:
    """The digit after the first ``#``, or None when the chain did not get there."""
    _, mark, rest = completion.partition(ANSWER_MARK)
    return rest[0] if mark and rest[:1] in DIGITS and rest else None


def _line(rng: random.Random, operands: list[str]) -> tuple[str, ...]:
    """A right-hand side that uses ``operands`` (0, 1 or 2 variable names), filled up with digits."""
    if not operands:
        return (rng.choice(DIGITS),)
    if len(operands) == 1:
        operands = [*operands, rng.choice(DIGITS)]
    rng.shuffle(operands)
    return (operands[0], rng.choice(OPERATORS), operands[1])


def _needed_lines(rng: random.Random, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Lines whose dependency graph reaches every name from ``names[0]``, edges from earlier to later names."""
    operands: list[list[str]] = [[] for _ in names]
    for i in range(1, len(names)):
        free = [p for p in range(i) if len(operands[p]) < 2]
        parent = free[-1] if rng.random() < 0.5 else rng.choice(free)
        operands[parent].append(names[i])
    leaves = [name for name, uses in zip(names, operands, strict=True) if not uses]
    for name, uses in zip(names, operands, strict=True):
        shared = [leaf for leaf in leaves if leaf not in uses and leaf != name]
        if len(uses) == 1 and shared and rng.random() < 0.5:
            uses.append(rng.choice(shared))  # a digit used twice
    return {name: _line(rng, uses) for name, uses in zip(names, operands, strict=True)}


def _trace(goal: str, lines: dict[str, tuple[str, ...]], rng: random.Random) -> tuple[str, str]:
    """A depth-first trace of ``goal``, operands in random order, and its value."""
    out: list[str] = []

    def expand(name: str, parent: str) -> str:
        right = list(lines[name])
        operands = [right[0], right[-1]] if rng.random() < 0.5 else [right[-1], right[0]]
        for term in operands:
            if term in right and term in lines:
                out.append(f"{name}={''.join(right)}>{term};")
                value = expand(term, name)
                right = [value if part == term else part for part in right]
        value = right[0]
        if len(right) == 3:
            a, sign, b = right
            value = str((int(a) + int(b) if sign == "+" else int(a) - int(b)) % 10)
            right += ["=", value]
        out.append(f"{name}={''.join(right)}<{parent};")
        return value

    answer = expand(goal, "?")
    return "".join(out) + ANSWER_MARK + answer, answer
