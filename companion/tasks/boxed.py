"""Mathematics: the answer is the last closed ``\\boxed{...}``, graded by Math-Verify."""

import re
from collections.abc import Iterator
from functools import lru_cache

from companion.tasks.base import Task, TaskProblem
from companion.tasks.sandbox.worker import math_worker
from companion.tasks.templates import MATH, fill

TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of every closed, non-empty ``\\boxed{}`` or ``\\fbox{}``; braces may nest and be escaped."""
    opened: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for match in TOKENS.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            content = "" if start is None else text[start : match.start()].strip()
            if content:
                yield match.end(), content
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())


@lru_cache(maxsize=65536)
def equal(gold: str, answer: str) -> bool:
    """Whether Math-Verify holds ``answer`` equal to ``gold``; False where it does not decide in time."""
    if gold.strip() == answer.strip():
        return True
    return bool(math_worker().ask({"gold": gold, "answer": answer}))


class MathTask(Task):
    """Free-form mathematics."""

    def ready(self) -> None:
        math_worker()

    def messages(self, problem: TaskProblem) -> list[dict]:
        return [{"role": "user", "content": fill(MATH, QUESTION=problem.question)}]

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        return boxes(text)

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        return equal(problem.gold, answer)

    @classmethod
    def same(cls, one: str, other: str) -> bool:
        return equal(one, other) or equal(other, one)  # Math-Verify is not symmetric
