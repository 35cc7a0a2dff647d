"""MATH-500: 500 problems of the MATH test set."""

from pathlib import Path

from companion.tasks.base import TaskProblem
from companion.tasks.boxed import MathTask
from companion.tasks.source import HubData, read_rows

DATA = HubData(
    "HuggingFaceH4/MATH-500",
    {"unique_id": str, "problem": str, "answer": str, "subject": str, "level": (int, str)},
    split="test",
)


class MATH500(MathTask):
    name = "math500"

    def __init__(self, source: Path | str | None = None) -> None:
        self.problems = [
            TaskProblem(
                row["unique_id"], row["problem"], row["answer"], {"subject": row["subject"], "level": row["level"]}
            )
            for row in read_rows(DATA, source)
        ]
