"""AIME 2024 and 2025: thirty problems each, answers 0 to 999."""

from pathlib import Path

from companion.tasks.base import TaskProblem
from companion.tasks.boxed import MathTask
from companion.tasks.source import HubData, read_rows

FIELDS = {"id": (int, str), "problem": str, "answer": (str, int)}


class AIME24(MathTask):
    name = "aime24"
    data = HubData("HuggingFaceH4/aime_2024", FIELDS)

    def __init__(self, source: Path | str | None = None) -> None:
        rows = read_rows(self.data, source)
        self.problems = [TaskProblem(str(row["id"]), row["problem"], str(row["answer"])) for row in rows]


class AIME25(AIME24):
    name = "aime25"
    data = HubData("yentinglin/aime_2025", FIELDS)  # the set that open-r1 evaluates on
