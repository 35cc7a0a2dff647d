"""The embedded model's three benchmarks, each graded as the one that it stands for.

    traces   AIME            one digit; chains vote
    choice   GPQA            one of four letters; chains vote
    search   LiveCodeBench   an assignment that a checking program accepts; one right chain is enough (pass@all)

Prompts are raw text, a token a character.  Problems are those of (split, seed), or of a JSONL file.  Traces and choices
go beyond the 18 needed variables of the training documents: up to there the model is right in 99 of 100 chains, and
neither length nor width would matter.
"""

import re
from collections.abc import Iterator

from companion.tasks.base import Task, TaskProblem
from companion.tasks.choices import OPTIONS, make_choice
from companion.tasks.programs import ANSWER_MARK, extract_answer, make_problem
from companion.tasks.puzzles import checker, extract_assignment, make_puzzle
from companion.tasks.sandbox.worker import check_worker
from companion.tasks.source import HubData, Source, read_rows

EMBEDDED = ("traces", "choice", "search")
MIX = {"traces": (8, 22), "choice": (8, 24)}  # needed variables, inclusive; what reported accuracies refer to


class _Embedded(Task):
    """A subclass has ``data``, the fields of a row, ``_row``, a generated row, and how an answer is read."""

    data: HubData

    def __init__(self, source: Source = None, size: int = 256, split: str = "test", seed: int = 0, **options) -> None:
        if source is not None:
            place, rows = "file", read_rows(self.data, source)
        else:
            place, rows = f"{split}/{seed}", [self._row(split, seed, i, **options) for i in range(size)]
        facts = set(self.data.fields) - {"prompt", "answer"}
        self.problems = [
            TaskProblem(f"{place}/{i}", row["prompt"], row.get("answer"), {name: row[name] for name in facts})
            for i, row in enumerate(rows)
        ]

    def prompt_ids(self, tokenizer, problem: TaskProblem) -> list[int]:
        return tokenizer(problem.question)["input_ids"]


class Traces(_Embedded):
    """Program traces: the value of the goal.  ``variables``: needed ones, from and to."""

    name = "traces"
    data = HubData("program traces", {"prompt": str, "answer": str, "variables": int})

    def __init__(
        self, source: Source = None, size: int = 256, split: str = "test", seed: int = 0, variables=MIX["traces"]
    ) -> None:
        super().__init__(source, size, split, seed, variables=variables)

    def _row(self, split: str, seed: int, index: int, variables: tuple[int, int]) -> dict:
        made = make_problem(split, seed, index, variables)
        return {"prompt": made.prompt, "answer": made.answer, "variables": made.variables}

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        if (answer := extract_answer(text)) is not None:
            yield text.index(ANSWER_MARK) + 2, answer


class Choice(_Embedded):
    """The option that holds the value of the goal.  ``variables``: needed ones, from and to."""

    name = "choice"
    data = HubData("multiple choice", {"prompt": str, "answer": str, "variables": int})

    def __init__(
        self, source: Source = None, size: int = 256, split: str = "test", seed: int = 0, variables=MIX["choice"]
    ) -> None:
        super().__init__(source, size, split, seed, variables=variables)

    def _row(self, split: str, seed: int, index: int, variables: tuple[int, int]) -> dict:
        made = make_choice(split, seed, index, variables)
        return {"prompt": made.prompt, "answer": made.answer, "variables": made.variables}

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        """The letter after the first ``#``."""
        if found := re.match(f"[^{ANSWER_MARK}]*{ANSWER_MARK}([{OPTIONS}])", text):
            yield found.end(), found[1]


class Search(_Embedded):
    """Digits for all unknowns of a puzzle: any that its checker accepts."""

    name = "search"
    aggregate = "any"
    data = HubData("digit puzzles", {"prompt": str, "unknowns": int})

    def __init__(self, source: Source = None, size: int = 256, split: str = "test", seed: int = 0) -> None:
        super().__init__(source, size, split, seed)

    def _row(self, split: str, seed: int, index: int) -> dict:
        made = make_puzzle(split, seed, index)
        return {"prompt": made.prompt, "unknowns": made.unknowns}

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        if (answer := extract_assignment(text)) is not None:
            yield text.index(ANSWER_MARK) + 1, answer

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        """What the puzzle's checker says, run in the sandbox; without one where there is none, since it is ours.

        Raises RuntimeError where it says nothing, twice: every checker ends at once, so the machine is to blame.
        """
        request = {"program": checker(problem.question), "answer": answer}
        if (said := check_worker().ask(request)) is None and (said := check_worker().ask(request)) is None:
            raise RuntimeError(
                f"problem {problem.id}: its checker gave no verdict on {answer!r} within its time, twice"
            )
        return said
