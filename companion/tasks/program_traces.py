"""Program traces as a task (the raw prompt, one digit, compared) and as training documents for the retrofit."""

import random
from collections.abc import Iterator
from functools import lru_cache

from torch.utils.data import Dataset

from companion.tasks.base import Task, TaskProblem
from companion.tasks.programs import ANSWER_MARK, EVALUATION_MIX, Problem, extract_answer, make_problem
from companion.tasks.reasoner import encode_problem
from companion.tasks.source import HubData, Source, read_rows

POOL = 8  # batches whose documents are sorted by length together


class ProgramTraces(Task):
    """The first ``size`` problems of (split, seed), or those of a JSONL file with prompt, answer and variables."""

    name = "programs"
    data = HubData("program traces", {"prompt": str, "answer": str, "variables": int})

    def __init__(
        self, source: Source = None, size: int = 256, split: str = "test", seed: int = 0, variables=EVALUATION_MIX
    ) -> None:
        if source is not None:
            place, rows = "file", read_rows(self.data, source)
            made = [Problem(row["prompt"], "", row["answer"], row["variables"]) for row in rows]
        else:
            place, made = f"{split}/{seed}", [make_problem(split, seed, i, variables) for i in range(size)]
        self.problems = [
            TaskProblem(f"{place}/{i}", p.prompt, p.answer, {"variables": p.variables}) for i, p in enumerate(made)
        ]

    def prompt_ids(self, tokenizer, problem: TaskProblem) -> list[int]:
        return tokenizer(problem.question)["input_ids"]

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        if (answer := extract_answer(text)) is not None:
            yield text.index(ANSWER_MARK) + 2, answer


class TraceDataset(Dataset):
    """``size`` correct traces of one split, from the evaluation mix; labels cover the trace, not the prompt.

    Every run of ``group`` documents is of like length: taken in order, a batch of that size pads little.
    """

    def __init__(self, tokenizer, size: int, group: int, split: str = "retrofit", seed: int = 0) -> None:
        if size < 1 or group < 1:
            raise ValueError(f"size {size}, group {group}: both must be >= 1")
        self.tokenizer, self.size, self.group, self.split, self.seed = tokenizer, size, group, split, seed
        self._pool = lru_cache(maxsize=2)(self._make_pool)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        pool, place = divmod(index, POOL * self.group)
        ids, prompt = encode_problem(self.tokenizer, self._pool(pool)[place])
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    def _make_pool(self, number: int) -> list[Problem]:
        """Documents of POOL batches: sorted by length, cut into batches, the batches shuffled."""
        first = number * POOL * self.group
        problems = [make_problem(self.split, self.seed, first + i) for i in range(POOL * self.group)]
        problems.sort(key=lambda problem: len(problem.prompt) + len(problem.trace))
        batches = [problems[start : start + self.group] for start in range(0, len(problems), self.group)]
        random.Random(f"batches/{self.seed}/{number}").shuffle(batches)
        return [problem for batch in batches for problem in batch]
