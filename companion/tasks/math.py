"""AIME, HMMT and MATH-500: the answer is the last closed ``\\boxed{...}``, compared by value."""

import re
from collections.abc import Iterator
from functools import lru_cache

from companion.tasks.base import Task, TaskProblem
from companion.tasks.sandbox.worker import math_worker
from companion.tasks.source import HubData, Source, read_rows
from companion.tasks.templates import fill

TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
LONGEST = 10_000  # characters of answers that are compared by value
NAMED = {"percent": r"\s*\\?%\s*$", "base": r"(?<=[\dA-F)])_\s*(\{[^{}]*\}|\w)\s*$"}  # in a question: in an answer
MATHARENA = {"problem_idx": (int, str), "problem": str, "answer": (str, int)}  # fields


class MathTask(Task):
    """Free-form mathematics; subclasses set ``data`` and ``problem``."""

    data: HubData

    def __init__(self, source: Source = None) -> None:
        self.problems = [self.problem(row) for row in read_rows(self.data, source)]

    def problem(self, row: dict) -> TaskProblem:
        raise NotImplementedError

    def ready(self) -> None:
        math_worker()

    def messages(self, problem: TaskProblem) -> list[dict]:
        return [{"role": "user", "content": fill("MATH", QUESTION=problem.question)}]

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        return boxes(text)

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        """Whether it is the gold answer; a percent sign or a base may be added if the question names it."""
        gold, question = problem.gold, problem.question.casefold()
        added = [mark for word, mark in NAMED.items() if word in question and not re.search(mark, gold)]
        return equal(gold, answer) or any(equal(gold, re.sub(mark, "", answer)) for mark in added)

    @classmethod
    def same(cls, one: str, other: str) -> bool:
        return equal(one, other) or equal(other, one)  # Math-Verify is not symmetric


class AIME24(MathTask):
    """AIME 2024: thirty problems, answers 0 to 999."""

    name = "aime24"
    data = HubData("HuggingFaceH4/aime_2024", {"id": (int, str), "problem": str, "answer": (str, int)})

    def problem(self, row: dict) -> TaskProblem:
        return TaskProblem(str(row["id"]), row["problem"], str(row["answer"]))


class AIME25(AIME24):
    name = "aime25"
    data = HubData("yentinglin/aime_2025", AIME24.data.fields)  # the set that open-r1 evaluates on


class MathArena(MathTask):
    """A competition as MathArena publishes it: fields problem_idx, problem, answer, but for AIME also problem_type.

    Names, fields, split and number of problems are those of the cards of aime_2026 and hmmt_feb_2026 on the hub (each
    with an eval.yaml: config default, split train), and for the other two those of evalscope's hmmt25 and hmmt_nov25.
    """

    def problem(self, row: dict) -> TaskProblem:
        types = {"types": row["problem_type"]} if row.get("problem_type") else {}
        return TaskProblem(str(row["problem_idx"]), row["problem"], str(row["answer"]), types)


class AIME26(MathArena):
    """AIME 2026, both parts: thirty problems, integers."""

    name = "aime26"
    data = HubData("MathArena/aime_2026", MATHARENA)


class HMMTFeb25(MathArena):
    """Harvard-MIT tournament, February 2025: thirty problems; answers are fractions, radicals, several values."""

    name = "hmmt_feb25"
    data = HubData("MathArena/hmmt_feb_2025", MATHARENA)


class HMMTNov25(MathArena):
    """November 2025: thirty problems."""

    name = "hmmt_nov25"
    data = HubData("MathArena/hmmt_nov_2025", MATHARENA)


class HMMTFeb26(MathArena):
    """February 2026: 33 problems."""

    name = "hmmt_feb26"
    data = HubData("MathArena/hmmt_feb_2026", MATHARENA)


class MATH500(MathTask):
    """500 problems of the MATH test set."""

    name = "math500"
    fields = dict.fromkeys(("unique_id", "problem", "answer", "subject"), str) | {"level": (int, str)}
    data = HubData("HuggingFaceH4/MATH-500", fields, split="test")

    def problem(self, row: dict) -> TaskProblem:
        metadata = {"subject": row["subject"], "level": row["level"]}
        return TaskProblem(row["unique_id"], row["problem"], row["answer"], metadata)


def boxes(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of every closed, non-empty ``\\boxed{}`` or ``\\fbox{}``; braces may nest and be escaped."""
    opened: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for match in TOKENS.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None and (content := text[start : match.start()].strip()):
                yield match.end(), content
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())


@lru_cache(maxsize=65536)
def equal(gold: str, answer: str) -> bool:
    """Whether ``answer`` is equal to ``gold`` (see sandbox.math_answers); False where that takes too long, or would."""
    same = gold.strip() == answer.strip()
    if same or max(len(gold), len(answer)) > LONGEST:
        return same
    return bool(math_worker().ask({"gold": gold, "answer": answer}))
