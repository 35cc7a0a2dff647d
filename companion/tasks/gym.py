"""Tasks of the PyPI package reasoning-gym: problems from a seed, offline, scored by the package's own functions."""

import re
from collections.abc import Iterator

from companion.tasks.base import Task, TaskProblem
from companion.tasks.sandbox import sandbox
from companion.tasks.sandbox.worker import gym_worker

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


class ReasoningGym(Task):
    """``size`` problems of one dataset; an answer is right if its score is 1.

    config: further settings of that dataset.  unsafe: score without a sandbox where there is none: some scorers
    evaluate the answer as an expression.
    """

    system = "TAGGED_SYSTEM"

    def __init__(
        self, source=None, dataset="chain_sum", size: int = 100, seed: int = 0, config: dict | None = None, unsafe=False
    ) -> None:
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError("reasoning-gym is not installed: pip install reasoning-gym") from None
        known = sorted(reasoning_gym.factory.DATASETS)
        if source is not None:
            raise ValueError(f"source {source}: reasoning_gym generates its problems and takes no file")
        if dataset not in known:
            raise ValueError(f"dataset {dataset!r}: must be one of {known}")
        self.name, self.unsafe = f"reasoning_gym:{dataset}", unsafe
        self.grades_later = not unsafe and sandbox.why_not() is not None
        options = {"size": size, "seed": seed, **(config or {})}
        try:
            data = reasoning_gym.create_dataset(dataset, **options)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"dataset {dataset!r} refuses {options}: {error}") from error
        self.problems = []
        for i in range(size):
            entry, secret = data[i], {"dataset": dataset, "options": options, "index": i}
            problem = TaskProblem(f"{dataset}/{seed}/{i}", entry["question"], str(entry["answer"]), secret=secret)
            self.problems.append(problem)

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        return ((match.end(), match[1].strip()) for match in ANSWER.finditer(text) if match[1].strip())

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        return gym_worker(self.unsafe).ask({"answer": answer, **problem.secret}) == 1.0
