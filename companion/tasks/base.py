"""A benchmark: its problems and prompts, how an answer is read, when it was complete, and what grades it.

A chain's text holds *candidates*: closed answers, each with the place where it ends (the brace that closes
``\\boxed{``, the fence that closes a program).  The last one is the answer.  A chain cut at L tokens (paper section
5.1) has answered if the shortest prefix whose answer is the final one lies within L; that prefix is ``complete_at``.
A chain that changes its mind and comes back is so counted from the first time; in between it had another answer.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from companion.tasks.templates import fill
from dms_core.chat import chat_ids


def short_name(task: str) -> str:
    """A task's name without the package that it comes from and how it is asked.

    >>> short_name("reasoning_gym:lcm:number")
    'lcm'
    """
    return task.removeprefix("reasoning_gym:").removesuffix(":number")


@dataclass(frozen=True)
class TaskProblem:
    """One problem of a benchmark."""

    id: str
    question: str  # what the prompt template wraps
    gold: str | None  # None where tests decide
    metadata: dict = field(default_factory=dict)  # stands in every record; never the question
    secret: object = None  # for the grader alone: tests, options of a generator


class Task:
    """A benchmark: subclasses set the class attributes, ``problems`` and ``candidates``, most of them ``correct``."""

    name = ""
    version = 1  # of templates and extraction; part of the name of a file of records
    aggregate = "vote"  # W chains vote; "any": one correct chain is enough (pass@all)
    system: str | None = None  # the template of the system message
    template: Mapping = MappingProxyType({})  # arguments of the chat template, such as enable_thinking
    keeps_text = True  # records hold what chains wrote
    grades_later = False  # grading takes long: `correct` stays None until `grading.grade`
    problems: Sequence[TaskProblem] = ()

    def ready(self) -> None:
        """Raise ValueError where the grader is missing: before anything is sampled."""

    def messages(self, problem: TaskProblem) -> list[dict]:
        """The conversation that the model continues: [{"role", "content"}, ...]."""
        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": problem.question}]

    def prompt_ids(self, tokenizer, problem: TaskProblem) -> list[int]:
        """Token ids of the prompt: by the family's chat template, or the bare text where there is none."""
        messages = self.messages(problem)
        if getattr(tokenizer, "chat_template", None):
            return chat_ids(tokenizer, messages, **self.template)
        return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]

    def candidates(self, text: str) -> Iterable[tuple[int, str]]:
        """(end, answer) of every closed answer in ``text``, in the order of their ends."""
        raise NotImplementedError

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        """Whether the grader accepts ``answer``; without one of its own, whether it is the gold answer."""
        return answer == problem.gold

    @classmethod
    def same(cls, one: str, other: str) -> bool:
        """Whether two answers count as one when chains vote."""
        return one == other

    def extract(self, text: str) -> str | None:
        """The answer that ``text`` gives, or None."""
        answers = [answer for _, answer in self.candidates(text)]
        return answers[-1] if answers else None

    def complete_at(self, tokens: Sequence[int], tokenizer) -> int | None:
        """How many tokens the shortest prefix with the final answer has; None without an answer."""
        text = decode(tokenizer, tokens)
        if (answer := self.extract(text)) is None:
            return None
        start = text[: next(end for end, candidate in self.candidates(text) if candidate == answer)]

        def complete(length: int) -> bool:  # a longer prefix decodes to a longer text
            return decode(tokenizer, tokens[:length]).startswith(start)

        return 1 + bisect_left(range(1, len(tokens)), True, key=complete)

    def grade(self, answer: str | None, problem: TaskProblem) -> bool:
        """``correct``, and False without an answer."""
        return answer is not None and bool(self.correct(answer, problem))


def decode(tokenizer, tokens: Sequence[int]) -> str:
    """The text of generated tokens, special ones included, spaces unchanged."""
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
