"""LiveCodeBench, code generation: programs that must pass every public and private test; W chains score by pass@all.

A test gives its input on standard input, or calls a function; outputs are compared here, outside the sandbox, line by
line after stripping (numbers as decimals) or as JSON values, as LiveCodeBench's own checker does.
"""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from companion.tasks.base import Task, TaskProblem
from companion.tasks.sandbox import sandbox
from companion.tasks.source import HubData, Source, read_rows
from companion.tasks.templates import fill

TESTS = ("public_test_cases", "private_test_cases")
TEXTS = ("question_id", "question_content", "platform", "difficulty", "starter_code", *TESTS, "metadata")
FIELDS = dict.fromkeys(TEXTS, str) | {"contest_date": (str, datetime)}
FILES = ("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7)))  # its loading script, `datasets` runs no longer
WINDOW = ("2024-08-01", "2025-01-31")  # the paper's; both days belong to it
FENCE = re.compile(r"^.*```.*$", re.MULTILINE)
OPENING = re.compile(r"\s*```+\s*\w+\s*$")  # names a language
LARGEST = 1 << 30  # bytes of one problem's unpacked tests


class LiveCodeBench(Task):
    """Problems whose contest lies between the days ``start`` and ``end``.

    unsafe: grade without a sandbox where there is none; limits: those of each test (see tasks.sandbox).
    """

    name = "livecodebench"
    version = 2
    system = "CODE_SYSTEM"
    aggregate = "any"
    grades_later = True
    data = HubData("livecodebench/code_generation_lite", FIELDS, split="test", files=FILES)

    def __init__(
        self, source: Source = None, start=WINDOW[0], end=WINDOW[1], unsafe=False, limits: sandbox.Limits | None = None
    ) -> None:
        self.unsafe, self.limits = unsafe, limits or sandbox.Limits()
        first, last = _day("start", start), _day("end", end)
        rows = [(str(row["contest_date"])[:10], row) for row in read_rows(self.data, source)]
        self.problems = [_problem(row, day) for day, row in rows if first <= day <= last]
        if not self.problems:
            days = sorted(day for day, _ in rows)
            raise ValueError(f"no problem from {start} to {end}; those given are from {days[0]} to {days[-1]}")

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        """What stands between two lines with a fence, as in LiveCodeBench; but none ends where the next one opens."""
        for opening, closing in pairwise(FENCE.finditer(text)):
            if OPENING.match(closing[0]):
                continue
            program = text[opening.end() + 1 : max(closing.start() - 1, opening.end() + 1)]
            if program.strip():
                yield text.index("```", closing.start()) + 3, program

    def correct(self, answer: str, problem: TaskProblem) -> bool:
        """Whether the program passes every test; the first failure decides.  SandboxError where it may not run."""
        function = problem.secret["function"]
        for test in load_tests(problem):
            ran = sandbox.run(answer, test["input"], function, self.limits, self.unsafe)
            if ran.status != "ok" or not (same_value if function else same_output)(ran.stdout, test["output"]):
                return False
        return True


def load_tests(problem: TaskProblem) -> list[dict]:
    """Public and private tests: [{"input", "output", ...}, ...].  ValueError where they cannot be read."""
    tests = []
    for name in TESTS:
        try:
            tests += [{"input": case["input"], "output": case["output"]} for case in unpack(problem.secret[name])]
        except (ValueError, KeyError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"problem {problem.id}: {name} cannot be read ({error})") from error
    if not tests:
        raise ValueError(f"problem {problem.id} has no tests")
    return tests


def unpack(cases: str) -> list[dict]:
    """Tests from JSON, or from JSON in a pickled string, compressed, in base 64: the form of the original."""
    try:
        return json.loads(cases)
    except json.JSONDecodeError:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(cases, validate=True), LARGEST)
        if stream.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes") from None
        return json.loads(_Plain(io.BytesIO(data)).load())


class _Plain(pickle.Unpickler):
    """Strings, numbers and containers; a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def same_output(printed: str, expected: str) -> bool:
    """Equal line by line, stripped; lines of numbers by value."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    try:
        return ours == theirs or _value(ours) == _value(theirs)
    except ArithmeticError:  # a signalling NaN does not compare
        return False


def same_value(returned: str, expected: str) -> bool:
    """Equal as JSON values."""
    try:
        ours, theirs = (json.loads(text, parse_int=Decimal) for text in (returned, expected))  # however many digits
        return ours == theirs
    except (ValueError, RecursionError):
        return False


def _value(line: str) -> list[Decimal] | str:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return line


def _problem(row: dict, day: str) -> TaskProblem:
    starter = row["starter_code"]
    layout = fill("CODE_FUNCTION", STARTER=starter) if starter else fill("CODE_STDIN")
    question = fill("CODE", QUESTION=row["question_content"], FORMAT=layout)
    secret = {name: row[name] for name in TESTS} | {"function": json.loads(row["metadata"] or "{}").get("func_name")}
    metadata = {"platform": row["platform"], "difficulty": row["difficulty"], "date": day}
    return TaskProblem(row["question_id"], question, None, metadata, secret)


def _day(name: str, value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"{name} {value!r}: must be a date such as 2024-08-01") from None
