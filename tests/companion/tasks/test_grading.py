"""Records graded again, answers spelled alike, and the commands from sampling to curves."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from companion.cli.main import main
from companion.paths import REASONER
from companion.tasks import get_task
from companion.tasks.grading import canonical, grade, grade_file
from companion.tasks.programs import make_problem
from companion.tasks.sandbox import sandbox
from dms_core.budgets.curves import summarise
from dms_core.budgets.voting import RECORD_KEYS
from dms_core.storage import read_jsonl

needs_math_verify = pytest.mark.skipif(not find_spec("math_verify"), reason="math-verify is not installed")


def record(chain, answer, *, gold="33", correct=False, problem=0, task="aime24", **more):
    told = {"task": task, "id": str(problem), "method": "vanilla", "cr": 1.0, "problem": problem, "chain": chain}
    told |= {"answer": answer, "gold": gold, "correct": correct, "finished_at": None if answer is None else 4}
    told |= {"tokens": 4, "stride": 4, "live": [9, 13], "reads": [0, 40], "prompt_tokens": 9, "prompt_live": 9}
    return told | {"text": "", **more}


@pytest.fixture
def aime(tmp_path):
    file = tmp_path / "aime.jsonl"
    rows = [{"id": i, "problem": f"What is ${i} + 1$?", "answer": str(i + 1)} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@needs_math_verify
def test_equal_answers_vote_as_one():
    answers = ["1/2", "0.5", "\\frac{1}{2}", "33", "33.0", None, "7"]
    records = [record(c, a, correct=a in ("33", "33.0")) for c, a in enumerate(answers)]
    spelled = canonical(records)
    assert [r["answer"] for r in spelled] == ["1/2", "1/2", "1/2", "33", "33", None, "7"]
    assert canonical(reversed(records)) == spelled
    assert summarise(spelled, [4], [7])["points"][0]["accuracy"] == 0
    assert summarise(records, [4], [7])["points"][0]["accuracy"] == 100  # each spelling alone is fewer than two right


def test_records_without_task_are_left_unchanged():
    old = {key: record(0, "3", gold="3")[key] for key in RECORD_KEYS}
    assert canonical([old]) == [old]
    assert summarise([old], [4], [1])["points"][0]["accuracy"] == 100


@needs_math_verify
def test_regrading_sets_correct_alone_and_asks_once_an_answer(aime, tmp_path, monkeypatch):
    task, asked = get_task("aime24", aime), []
    records = [record(c, a, problem=1, correct=None, gold="2") for c, a in enumerate(["2.0", "2.0", "3", None])]
    plain = task.correct
    monkeypatch.setattr(task, "correct", lambda answer, problem: asked.append(answer) or plain(answer, problem))
    graded = grade(records, task, workers=2)
    assert [r["correct"] for r in graded] == [True, True, False, False] and sorted(asked) == ["2.0", "3"]
    assert [{**r, "correct": None} for r in graded] == records
    assert [r["correct"] for r in grade([graded[0] | {"correct": False}], task, missing=True)] == [False]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"cut')
    assert grade_file(file, task) == graded == [json.loads(line) for line in file.read_text().splitlines()]
    with pytest.raises(ValueError, match="a record of task 'math500'; allowed: 'aime24'"):
        grade([record(0, "1", task="math500")], task)
    with pytest.raises(ValueError, match="a record of problem '9', which aime24 lacks"):
        grade([record(0, "1", problem=9)], task)


@needs_math_verify
def test_what_was_graded_before_an_interruption_stays(aime, tmp_path, monkeypatch):
    task, file = get_task("aime24", aime), tmp_path / "records.jsonl"
    records = [record(c, a, problem=1, correct=None, gold="2") for c, a in enumerate(["2", "3", "4"])]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    plain, asked = task.grade, []

    def cut(answer, problem):
        asked.append(answer)
        if answer == "3":
            raise KeyboardInterrupt
        return plain(answer, problem)

    monkeypatch.setattr(task, "grade", cut)
    with pytest.raises(KeyboardInterrupt):
        grade_file(file, task)
    assert [r["correct"] for r in read_jsonl(file)] == [True, None, None]
    monkeypatch.setattr(task, "grade", lambda answer, problem: asked.append(answer) or plain(answer, problem))
    asked.clear()
    assert [r["correct"] for r in grade_file(file, task, missing=True)] == [True, False, False]
    assert asked == ["3", "4"]


@pytest.fixture
def programs(tmp_path):
    file = tmp_path / "programs.jsonl"
    made = [make_problem("validation", 3, i, (4, 6)) for i in range(4)]
    rows = [{"prompt": m.prompt, "answer": m.answer, "variables": m.variables} for m in made]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(capsys, *arguments) -> dict:
    assert main([*(str(a) for a in arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_from_sampling_to_curves_with_the_embedded_model(programs, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--task", "traces", "--source", programs, "--chains", 2, "--length", 160, "--out", out]
    vanilla = command(capsys, "sample", "--model", REASONER, "--method", "vanilla", *common)
    dms = command(capsys, "sample", "--model", REASONER / "dms-cr8", "--method", "dms", *common)
    assert (vanilla["cr"], dms["cr"], dms["records"]) == (1, 8, 8)
    assert vanilla["pass_at_1"]["accuracy"] > 20  # an untrained model has 10
    note = json.loads((out / "run.json").read_text())
    assert (note["task"], note["lengths"], note["widths"]) == ("traces", [40, 80, 160], [1, 2])
    before = {file: file.read_text() for file in (out / "records").iterdir()}
    assert len(before) == 2 and set(note["records"].values()) == {file.name for file in before}
    assert command(capsys, "sample", "--model", REASONER, "--method", "vanilla", *common) == vanilla
    graded = command(capsys, "grade", *before, "--task", "traces", "--source", programs)
    assert sum(file["records"] for file in graded["files"]) == 16
    assert {file: file.read_text() for file in (out / "records").iterdir()} == before

    summary = command(capsys, "curves", "--results", out)
    assert {(p["method"], p["L"], p["W"]) for p in summary["points"]} == {
        (m, length, w) for m in ("vanilla", "dms") for length in (40, 80, 160) for w in (1, 2)
    }
    assert summary["pass_at_1"][2] == vanilla["pass_at_1"]
    assert main(["curves", "--results", str(out), "--lengths", "161"]) == 2
    assert "lengths 161: must be <= 160, up to which vanilla-cr1 is sampled here" in capsys.readouterr().err
    assert (
        main(["summarise", str(out / "records"), "--lengths", "161", "--widths", "1", "--out", str(out / "s.json")])
        == 2
    )
    assert "lengths 161: must be <= 160, up to which vanilla-cr1 is sampled here" in capsys.readouterr().err
    points = command(capsys, "curves", "--results", out, "--lengths", 100, "--widths", 1)["points"]
    assert [(p["method"], p["L"], p["W"]) for p in points] == [("vanilla", 100, 1), ("dms", 100, 1)]
    assert points[1]["reads"] < points[0]["reads"]


@needs_math_verify
def test_sample_runs_on_unsolvable_benchmark_and_rejects_another_task(aime, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--task", "aime24", "--source", aime, "--limit", 2, "--length", 12, "--out", out]
    result = command(capsys, "sample", "--model", REASONER / "dms-cr8", "--method", "dms", *arguments)
    assert (result["cr"], result["records"], result["pass_at_1"]["accuracy"]) == (8, 2, 0)
    records = read_jsonl(Path(result["file"]))
    assert {r["id"] for r in records} == {"0", "1"} and all(set(RECORD_KEYS) <= set(r) for r in records)
    other = ["sample", "--model", str(REASONER), "--method", "vanilla", "--length", "8", "--out", str(out)]
    assert main([*other, "--task", "traces"]) == 2
    assert "holds records of 'aime24'" in capsys.readouterr().err
    assert main([*other, "--task", "aime24", "--source", str(aime), "--option", "seed=1"]) == 2
    assert "has no option ['seed']" in capsys.readouterr().err


def test_records_of_gpqa_hold_no_text(tmp_path, capsys):
    file, word = tmp_path / "gpqa.jsonl", "distinctive"
    row = {"Record ID": "rec1", "Question": f"Which {word}?", "Correct Answer": word, "Incorrect Answer 1": "b"}
    file.write_text(json.dumps(row | {"Incorrect Answer 2": "c", "Incorrect Answer 3": "d"}) + "\n")
    arguments = ["--task", "gpqa_diamond", "--source", file, "--option", "seed=2", "--length", 8]
    arguments += ["--model", REASONER, "--method", "vanilla", "--out", tmp_path / "o"]
    result = command(capsys, "sample", *arguments)
    written = Path(result["file"]).read_text() + (tmp_path / "o" / "run.json").read_text()
    assert word not in written
    (found,) = read_jsonl(Path(result["file"]))
    assert found["text"] is None and found["shuffle"] == 2 and sorted(found["order"]) == [0, 1, 2, 3]


def test_programs_are_graded_after_sampling_in_the_sandbox(tmp_path, capsys, monkeypatch, need_sandbox):
    case = json.dumps([{"input": "4\n", "output": "42\n"}])
    texts = dict.fromkeys(("question_id", "question_content", "platform", "difficulty"), "x")
    row = texts | {"starter_code": "", "public_test_cases": case, "private_test_cases": "[]", "metadata": "{}"}
    file = tmp_path / "lcb.jsonl"
    file.write_text(json.dumps(row | {"contest_date": "2024-09-01"}) + "\n")
    out = tmp_path / "out"
    arguments = ["sample", "--model", REASONER, "--method", "vanilla", "--task", "livecodebench", "--source", file]
    arguments += ["--length", 4, "--chains", 2, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "why_not", lambda: "bwrap (bubblewrap) is not installed")
        result = command(capsys, *arguments)
    assert result["pass_at_1"] is None
    assert main(["curves", "--results", str(out)]) == 2
    assert "correct None (method vanilla, problem 0, chain 0): must be true or false" in capsys.readouterr().err
    records = read_jsonl(Path(result["file"]))
    programs = ["print(int(input()) + 38)", "print(41)"]  # what a better model would have written
    records = [r | {"answer": program, "finished_at": 4} for r, program in zip(records, programs, strict=True)]
    Path(result["file"]).write_text("".join(json.dumps(r) + "\n" for r in records))
    need_sandbox()
    shard = command(capsys, *arguments, "--shard", "1/2")  # of chains that the whole file has already
    assert shard["records"] == 1 and shard["pass_at_1"]["accuracy"] == 100
    assert [r["correct"] for r in read_jsonl(Path(result["file"]))] == [True, False]
    graded = command(capsys, "grade", result["file"], "--task", "livecodebench", "--source", file, "--workers", 2)
    assert graded["files"][0]["correct"] == 1
    points = command(capsys, "curves", "--results", out, "--lengths", 4, "--widths", 1, 2)["points"]
    assert [p["accuracy"] for p in points] == [50, 100]


def test_curves_read_committed_results_and_directories_without_run_json(programs, tmp_path, capsys):
    stored = command(capsys, "curves")
    assert stored["points"] and "margins" in stored
    old = [{k: record(c, "3", gold="3", problem=p)[k] for k in RECORD_KEYS} for p in range(3) for c in range(2)]
    (tmp_path / "run" / "records").mkdir(parents=True)
    (tmp_path / "run" / "records" / "vanilla-cr1-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    summary = command(capsys, "curves", "--results", tmp_path / "run")
    assert {p["accuracy"] for p in summary["points"]} == {100}
    shutil.rmtree(tmp_path / "run" / "records")
    assert main(["curves", "--results", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize("method", ["tova", "quest"])
def test_training_free_method_samples_and_requires_cr(method, tmp_path, capsys):
    arguments = ["sample", "--model", str(REASONER), "--task", "traces", "--limit", "2", "--method", method]
    arguments += ["--length", "12", "--out", str(tmp_path)]
    assert main(arguments) == 2 and "needs --cr" in capsys.readouterr().err
    assert main([*arguments, "--cr", "4"]) == 0
    (file,) = (tmp_path / "records").iterdir()
    assert file.name.startswith(f"{method}-cr4-") and len(file.read_text().splitlines()) == 2
