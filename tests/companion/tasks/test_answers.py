"""What is read from an answer and what it is worth: endings of chains, pairs of LaTeX answers, fenced programs."""

import json
import time
from pathlib import Path

import pytest

from companion.tasks.base import TaskProblem
from companion.tasks.gpqa import GPQADiamond
from companion.tasks.livecodebench import LiveCodeBench, same_output, same_value
from companion.tasks.math import MATH500, equal
from companion.tasks.sandbox import sandbox

CASES = Path(__file__).parent / "cases"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["gpqa_endings.jsonl", "gpqa_endings_more.jsonl"])
def test_letters_are_read_and_none_is_invented(name):
    task = object.__new__(GPQADiamond)
    wrong = [(row, found) for row in rows(name) if (found := task.extract(row["text"])) != row["letter"]]
    assert not wrong


@pytest.mark.parametrize("text", ["answer: ", "answer\n", "\\boxed{", "\n", "answer is **", "answer:the option "])
def test_letters_are_looked_for_in_linear_time(text):
    began = time.process_time()
    object.__new__(GPQADiamond).extract(text * 20_000)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["math_pairs.jsonl", "math_pairs_more.jsonl"])
def test_answers_are_equal_by_value_and_by_how_many_they_are(name):
    pytest.importorskip("math_verify")
    wrong = [row for row in rows(name) if equal(row["gold"], row["answer"]) is not row["equal"]]
    assert not wrong


@pytest.mark.parametrize(
    "question, gold, answer, right",
    [
        ("What percent of them", "28", "28\\%", True),
        ("How many of them", "28", "28\\%", False),
        ("What percent of them", "28", "29\\%", False),
        ("Write it in base 8.", "52", "52_8", True),
        ("Write it in base 8.", "52_8", "52_9", False),
        ("Write it.", "52", "52_8", False),
    ],
)
def test_mark_that_the_question_names_may_be_added(question, gold, answer, right):
    pytest.importorskip("math_verify")
    assert object.__new__(MATH500).grade(answer, TaskProblem("1", question, gold)) is right


PROGRAM = "```python\nprint(3)\n```\nIt prints 3."


@pytest.mark.parametrize(
    "reasoning",
    [
        "I will put it between ``` marks.\n",
        "```python\nx = 1\nNo, that is wrong.\n\n",
        "Call it as ```print(x)``` then.\n",
        "so it ends\n```\nand begins anew:\n",
        "```\nprint(2)\n```\nBetter:\n",
        "",
    ],
)
def test_program_stands_between_the_last_two_lines_with_a_fence(reasoning):
    task = object.__new__(LiveCodeBench)
    assert task.extract(reasoning + PROGRAM) == "print(3)"
    assert task.extract(reasoning + PROGRAM + "\nAgain:\n```python\nprint(") == "print(3)"


def test_output_that_cannot_be_compared_is_wrong():
    assert not same_output("sNaN", "1") and not same_output("1 sNaN", "1 NaN")
    assert not same_value("[" * 100_000 + "]" * 100_000, "[]")


def test_programs_may_write_long_integers():
    assert same_output("1" * 5001, "1" * 5001) and not same_output("1" * 5001, "1" * 5000 + "2")
    assert same_value("1" * 5001, "1" * 5001) and same_value("[1, 2.5]", "[1.0, 2.5]") and not same_value("1", '"1"')
    ran = sandbox.run("print(10**5000)", unsafe=True)
    assert ran.status == "ok" and ran.stdout.strip() == "1" + "0" * 5000
