"""Tasks of the PyPI package reasoning-gym: problems from a seed, offline, scored by the package's own functions."""

import re
from collections.abc import Iterator

from companion.tasks.base import Task, TaskProblem
from companion.tasks.sandbox import sandbox
from companion.tasks.sandbox.worker import gym_worker

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


class ReasoningGym(Task):
    """``size`` problems of one dataset; an answer is right if its score is 1.

    config: further settings of that dataset.  answer: "tagged", as reasoning-gym's own prompt asks, or "number", the
    question alone, whose answer is the last number: for models that do not follow a format.  unsafe: score without a
    sandbox where there is none: some scorers evaluate the answer as an expression.
    """

    def __init__(
        self,
        source=None,
        dataset="chain_sum",
        size: int = 100,
        seed: int = 0,
        config: dict | None = None,
        answer="tagged",
        unsafe=False,
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
        if answer not in ("tagged", "number"):
            raise ValueError(f"answer {answer!r}: must be tagged or number")
        self.name, self.unsafe, self.tagged = f"reasoning_gym:{dataset}", unsafe, answer == "tagged"
        if self.tagged:
            self.system = "TAGGED_SYSTEM"
        else:
            self.name += ":number"
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
        if not self.tagged:
            return ((match.end(), match[0]) for match in NUMBER.finditer(text))
        return ((match.end(), match[1].strip()) for match in ANSWER.finditer(text) if match[1].strip())

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        return gym_worker(self.unsafe).ask({"answer": answer, **problem.secret}) == 1.0
