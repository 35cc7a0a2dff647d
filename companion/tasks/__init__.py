"""Benchmarks by name.  A task is loaded from the hub, from a local file of the same schema, or generated."""

import inspect
from collections import Counter
from importlib import import_module

from companion.tasks.base import Task, TaskProblem
from companion.tasks.source import Source

TASKS = {  # name: module and class, imported when asked for
    "traces": ("embedded", "Traces"),
    "choice": ("embedded", "Choice"),
    "search": ("embedded", "Search"),
    "aime24": ("math", "AIME24"),
    "aime25": ("math", "AIME25"),
    "aime26": ("math", "AIME26"),
    "hmmt_feb25": ("math", "HMMTFeb25"),
    "hmmt_nov25": ("math", "HMMTNov25"),
    "hmmt_feb26": ("math", "HMMTFeb26"),
    "math500": ("math", "MATH500"),
    "gpqa_diamond": ("gpqa", "GPQADiamond"),
    "livecodebench": ("livecodebench", "LiveCodeBench"),
    "reasoning_gym": ("gym", "ReasoningGym"),
}

__all__ = ["TASKS", "Task", "TaskProblem", "get_task", "task_class"]


def task_class(name: str) -> type[Task]:
    """The class of a task; of ``reasoning_gym:chain_sum`` that of reasoning_gym.  ValueError for an unknown name."""
    module, cls = TASKS.get(name.partition(":")[0], (None, None))
    if module is None:
        raise ValueError(f"task {name!r}: must be one of {sorted(TASKS)}, or reasoning_gym:DATASET")
    return getattr(import_module(f"companion.tasks.{module}"), cls)


def get_task(name: str, source: Source = None, limit: int | None = None, **options) -> Task:
    """Load a task.

    source: a local JSONL file in place of the hub.  limit: the first so many problems only.  options: the task's own,
    such as seed, start and end, dataset and size.  Raises ValueError for an unknown name or option, for a bad row
    (naming file, line and field), and where the hub cannot be reached.
    """
    cls = task_class(name)
    if ":" in name:
        options = {"dataset": name.partition(":")[2], **options}
    allowed = [key for key in inspect.signature(cls).parameters if key != "source"]
    if unknown := [key for key in options if key not in allowed]:
        raise ValueError(f"task {name!r} has no option {unknown}; allowed: {allowed}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: must be >= 1")
    task = cls(source, **options)
    if twice := [key for key, count in Counter(problem.id for problem in task.problems).items() if count > 1]:
        raise ValueError(f"task {name!r}: problems {twice[:3]} occur more than once; identifiers must differ")
    task.problems = task.problems[:limit]
    return task
