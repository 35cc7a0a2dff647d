"""GPQA Diamond: 198 multiple-choice questions; gated, and its authors ask that no text of it be published.

So nothing of it is bundled and records hold letters only: what a chain wrote may quote the question.
"""

import random
import re
from collections.abc import Iterator

from companion.tasks.base import Task, TaskProblem
from companion.tasks.source import HubData, Source, read_rows
from companion.tasks.templates import fill

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
FIELDS = dict.fromkeys(("Record ID", "Question", *CHOICES), str)
LETTERS = "ABCD"
OPENING = r"(?:\*\*|\$|\\boxed\{|\\text\{|\\mathrm\{|\(|\s)*"
ANSWER = re.compile(rf"(?:\b(?i:answer)\**\s*(?::|(?i:is)\b\s*:?){OPENING}|\\boxed\{{{OPENING})([A-D])(?![A-Za-z0-9])")


class GPQADiamond(Task):
    """Options in the order that ``seed`` draws for each question; ``order`` in the records says which came first."""

    name = "gpqa_diamond"
    keeps_text = False
    data = HubData("Idavidrein/gpqa", FIELDS, config="gpqa_diamond", gated=True)

    def __init__(self, source: Source = None, seed: int = 0) -> None:
        self.seed = seed
        self.problems = [self._problem(row) for row in read_rows(self.data, source)]

    def _problem(self, row: dict) -> TaskProblem:
        order = random.Random(f"gpqa/{self.seed}/{row['Record ID']}").sample(range(4), 4)
        options = {letter: row[CHOICES[i]].strip() for letter, i in zip(LETTERS, order, strict=True)}
        question = fill("MULTIPLE_CHOICE", QUESTION=row["Question"].strip(), **options)
        return TaskProblem(row["Record ID"], question, LETTERS[order.index(0)], {"order": order, "shuffle": self.seed})

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        """Letters after "answer:", "answer is" or in a box, in the formats that models give them."""
        return ((match.end(), match[1]) for match in ANSWER.finditer(text))
