"""LiveCodeBench: the window of dates, packed tests, comparing outputs, and programs that run confined or not at all."""

import base64
import json
import os
import pickle
import zlib

import pytest
from benchmark_rows import CASES, ROWS

from companion.tasks.livecodebench import load_tests, same_output, unpack
from companion.tasks.sandbox import sandbox


def test_livecodebench_window_includes_both_end_days(load):
    days = ["2024-07-31", "2024-08-01T00:00:00", "2025-01-31T23:00:00", "2025-02-01"]
    rows = [ROWS["livecodebench"] | {"question_id": day, "contest_date": day} for day in days]
    assert [p.id for p in load("livecodebench", *rows).problems] == days[1:3]
    assert [p.id for p in load("livecodebench", *rows, start="2025-02-01", end="2025-02-01").problems] == days[3:]
    with pytest.raises(ValueError, match="no problem from 2026-01-01 to 2026-02-01; those given are from 2024-07-31"):
        load("livecodebench", *rows, start="2026-01-01", end="2026-02-01")
    with pytest.raises(ValueError, match="start 'August': must be a date"):
        load("livecodebench", *rows, start="August")


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil",)


def test_packed_tests_are_read_and_calling_pickles_rejected(load):
    row = ROWS["livecodebench"] | {"private_test_cases": packed(CASES)}
    (problem,) = load("livecodebench", row).problems
    assert load_tests(problem) == [{"input": "1 2\n", "output": "3\n"}] * 2
    with pytest.raises(pickle.UnpicklingError, match="system"):
        unpack(packed(Evil()))
    (problem,) = load("livecodebench", row | {"private_test_cases": packed(Evil())}).problems
    with pytest.raises(ValueError, match="problem abc1: private_test_cases cannot be read"):
        load_tests(problem)
    for broken in ("not base64!", base64.b64encode(b"no zlib").decode(), json.dumps([{"input": "1"}])):
        (problem,) = load("livecodebench", row | {"private_test_cases": broken}).problems
        with pytest.raises(ValueError, match="problem abc1: private_test_cases cannot be read"):
            load_tests(problem)


def test_outputs_are_compared_by_line_and_numbers_by_value():
    assert same_output(" 1 2 \n3\n\n", "1 2\n3") and same_output("1.0 2", "1 2.00") and same_output("Yes", "Yes\n")
    for printed in ("1 2", "1 2\n4", "1  2 3\n3", "yes\n3", ""):
        assert not same_output(printed, "1 2\n3")
    assert not same_output("50000000000000001", "50000000000000000") and not same_output("yes", "Yes")


@pytest.mark.sandbox
def test_programs_must_pass_every_test(load):
    more = json.dumps([{"input": "5 5\n", "output": "10\n"}])
    (problem,) = (task := load("livecodebench", ROWS["livecodebench"] | {"private_test_cases": packed(more)})).problems
    assert task.grade("print(sum(map(int, input().split())))", problem)
    assert (
        not task.grade("print(3)", problem) and not task.grade("print(sum(", problem) and not task.grade(None, problem)
    )
    tests = json.dumps([{"input": '"ab"\n2', "output": '["ab", "ab"]'}])
    row = ROWS["livecodebench"] | {"public_test_cases": tests, "metadata": '{"func_name": "twice"}'}
    row["starter_code"] = "class Solution:\n    def twice(self, s: str, n: int) -> List[str]:\n        "
    (problem,) = (task := load("livecodebench", row)).problems
    assert "You will use the following starter code" in problem.question and row["starter_code"] in problem.question
    assert task.grade(row["starter_code"] + "return (s,) * n", problem)
    assert not task.grade(row["starter_code"] + "return [s]", problem)


def test_programs_are_rejected_without_sandbox_unless_unsafe(load, monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "bwrap (bubblewrap) is not installed")
    task = load("livecodebench")
    with pytest.raises(ValueError, match="programs cannot be confined here"):
        task.grade("print(3)", task.problems[0])
    task = load("livecodebench", unsafe=True)
    assert task.grade("print(3)", task.problems[0]) and not task.grade("print(4)", task.problems[0])
