"""Program traces as a task: the raw prompt, one digit, compared."""

from collections.abc import Iterator
from pathlib import Path

from companion.tasks.base import Task, TaskProblem
from companion.tasks.programs import ANSWER_MARK, EVALUATION_MIX, extract_answer, make_problem
from companion.tasks.source import HubData, read_rows

DATA = HubData("program traces", {"prompt": str, "answer": str, "variables": int})


class ProgramTraces(Task):
    """The first ``size`` problems of (split, seed), or those of a JSONL file with prompt, answer and variables."""

    name = "programs"

    def __init__(
        self, source: Path | str | None = None, size: int = 256, split: str = "test", seed: int = 0,
        variables: tuple[int, int] = EVALUATION_MIX,
    ) -> None:  # fmt: skip
        if source is not None:
            facts = [(row["prompt"], row["answer"], row["variables"]) for row in read_rows(DATA, source)]
            place = "file"
        else:
            made = [make_problem(split, seed, i, variables) for i in range(size)]
            facts = [(problem.prompt, problem.answer, problem.variables) for problem in made]
            place = f"{split}/{seed}"
        self.problems = [
            TaskProblem(f"{place}/{i}", prompt, answer, {"variables": needed})
            for i, (prompt, answer, needed) in enumerate(facts)
        ]

    def prompt_ids(self, tokenizer, problem: TaskProblem) -> list[int]:
        return tokenizer(problem.question)["input_ids"]

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        answer = extract_answer(text)
        if answer is not None:
            yield text.index(ANSWER_MARK) + 2, answer

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        return answer == problem.gold
