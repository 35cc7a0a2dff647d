"""Benchmarks: rows from local files, prompts, reading an answer, when it was complete, and who grades it."""

import json
import threading
import time

import pytest
from benchmark_rows import AIME, HMMT, ROWS
from transformers import PreTrainedTokenizerFast

from companion.tasks import TASKS, get_task, task_class
from companion.tasks.base import TaskProblem
from companion.tasks.embedded import Traces
from companion.tasks.gpqa import GPQADiamond
from companion.tasks.livecodebench import LiveCodeBench
from companion.tasks.math import boxes
from companion.tasks.reasoner import make_tokenizer
from companion.tasks.sandbox import sandbox


@pytest.mark.parametrize("name", ROWS)
def test_local_file_gives_task_and_prompt(load, name):
    task = load(name)
    (problem,) = task.problems
    assert task.name == name and problem.id and task.messages(problem)[-1]["role"] == "user"
    assert task.prompt_ids(make_tokenizer(), problem)
    assert problem.question not in json.dumps([problem.id, problem.gold, problem.metadata])


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_name_file_line_and_field(load, tmp_path, name):
    for field in task_class(name).data.fields:
        short = {key: value for key, value in ROWS[name].items() if key != field}
        with pytest.raises(ValueError, match=rf"{name}.jsonl, line 2: field '{field}' is missing; required"):
            load(name, ROWS[name], short)
        with pytest.raises(ValueError, match=rf"{name}.jsonl, line 1: field '{field}' is \[\]; allowed: (str|int)"):
            load(name, ROWS[name] | {field: []})
    for text, message in (
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: a list; expected an object"),
        ("", "no rows"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            get_task(name, tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        get_task(name, tmp_path / "none.jsonl")


def test_local_file_with_byte_order_mark_or_without_last_line_end_is_read(tmp_path):
    text = "\n".join(json.dumps(AIME | {"id": i, "problem": "Grüße"}, ensure_ascii=False) for i in (1, 2))
    (tmp_path / "aime.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [p.id for p in get_task("aime24", tmp_path / "aime.jsonl").problems] == ["1", "2"]
    (tmp_path / "aime.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"aime\.jsonl, line 1: not valid JSON"):
        get_task("aime24", tmp_path / "aime.jsonl")


@pytest.mark.parametrize("name", [name for name in ROWS if name != "traces"])
def test_unreachable_hub_error_names_dataset_and_source_option(monkeypatch, name):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot fetch dataset .*Couldn't reach.*local JSONL file \(source=") as error:
        get_task(name)
    assert ("gated: accept its terms" in str(error.value)) == (name == "gpqa_diamond")


def test_get_task_rejects_unknown_name_option_limit_and_duplicate(load):
    with pytest.raises(ValueError, match=r"task 'aime99': must be one of \['aime24'.*reasoning_gym:DATASET"):
        get_task("aime99")
    with pytest.raises(ValueError, match=r"task 'gpqa_diamond' has no option \['sede'\]; allowed: \['seed'\]"):
        load("gpqa_diamond", sede=1)
    with pytest.raises(ValueError, match="limit 0: must be >= 1"):
        load("aime24", limit=0)
    assert len(load("aime24", AIME, AIME | {"id": 61}, limit=1).problems) == 1
    with pytest.raises(ValueError, match=r"problems \['60'\] occur more than once"):
        load("aime24", AIME, AIME)
    assert all(task_class(name).name == name for name in TASKS if name != "reasoning_gym")


def test_chat_template_wraps_prompt_once_with_special_tokens():
    class Tokenizer:
        chat_template = "yes"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            assert add_generation_prompt and not tokenize
            return "<bos>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": (["<bos>"] if add_special_tokens else []) + [text]}

    task = object.__new__(LiveCodeBench)
    (ids,) = task.prompt_ids(Tokenizer(), TaskProblem("1", "Q", None))
    assert ids.startswith("<bos>[system]A conversation between") and ids.endswith("[user]Q[assistant]")


# Reading answers.


@pytest.mark.parametrize(
    "text, answer",
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{ 7 } and \\boxed{8", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\fbox {a}", "a"),
        ("} { \\boxed{3}", "3"),
        ("\\boxed{}", None),
        ("the answer is 7", None),
        ("\\boxed{\\text{a \\boxed{b}}}", "\\text{a \\boxed{b}}"),
    ],
)
def test_last_closed_box_is_extracted(load, text, answer):
    assert load("aime24").extract(text) == answer


def test_nested_boxes_take_linear_time():
    began = time.process_time()
    assert list(boxes("\\boxed{" * 50_000 + "}")) == []
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Answer: B", "B"),
        ("answer: $C$", "C"),
        ("**Answer:** D", "D"),
        ("**Answer: (A)**", "A"),
        ("The final answer is $\\boxed{\\text{B}}$", "B"),
        ("Answer: A. No, wait. Answer: C", "C"),
        ("Answer: $\\boxed{D}$.", "D"),
        ("Answer: Butane", None),
        ("Option B is wrong", None),
        ("Answer: E", None),
    ],
)
def test_last_stated_letter_is_extracted(text, answer):
    assert object.__new__(GPQADiamond).extract(text) == answer


def test_last_closed_program_is_extracted(load):
    task = load("livecodebench")
    text = "```python\na = 1\n```\nBetter:\n```python\nb = 2\nc = 3\n```\nDone.\n```python\nd"
    assert task.extract(text) == "b = 2\nc = 3"
    assert [text[:end].count("```") for end, _ in task.candidates(text)] == [2, 4]
    assert task.extract("```python\nx") is None and task.extract("```\n```") is None


@pytest.mark.parametrize(
    "name, text, closing",
    [
        ("aime24", "\\boxed{3} no \\boxed{33} so \\boxed{33} end", "\\boxed{33}"),
        ("gpqa_diamond", "Answer: A or Answer: B, that is Answer: B", "Answer: B"),
        ("livecodebench", "```\nx\n```\nor\n```\ny\n```\nbye", "y\n```"),
        ("traces", "a=3;#7;#8", "#7"),
    ],
)
def test_complete_at_is_the_shortest_prefix_with_the_final_answer(load, name, text, closing):
    for tokenizer in (byte_tokenizer(), byte_tokenizer({"{3", "33", "``", "er", "7;", "B,"})):
        task, tokens = load(name), tokenizer(text)["input_ids"]
        complete = task.complete_at(tokens, tokenizer)
        final = task.extract(tokenizer.decode(tokens))
        shortest = next(n for n in range(len(tokens) + 1) if task.extract(tokenizer.decode(tokens[:n])) == final)
        assert complete == shortest
        assert closing in tokenizer.decode(tokens[:complete])
    assert task.complete_at(tokenizer("none")["input_ids"], tokenizer) is None


def test_complete_at_handles_characters_of_several_tokens(load):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("für 7 € gilt \\boxed{7} €€€")["input_ids"]
    place = load("aime24").complete_at(tokens, tokenizer)
    assert tokenizer.decode(tokens[:place]).endswith("\\boxed{7}")


def byte_tokenizer(merged=()):
    """One token a byte, and some of two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, *sorted(merged)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in sorted(merged)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# Grading.


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("033", "33", True),
        ("33", "\\text{33}", True),
        ("(3, \\frac{\\pi}{2})", "(3,\\pi/2)", True),
        ("11\\sqrt2", "11\\sqrt{2}", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("p - q", "p-q", True),
        ("33", "34", False),
        ("\\frac{1}{2}", "0.51", False),
        ("2", "", False),
        ("2", "\\frac{", False),
    ],
)
def test_math_answers_are_graded_by_value(load, gold, answer, right):
    pytest.importorskip("math_verify")
    assert load("math500").grade(answer, TaskProblem("1", "", gold)) is right


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("\\frac{7}{18}", "7/18", True),
        ("\\frac{7}{18}", "\\dfrac{14}{36}", True),
        ("\\frac{7}{18}", "0.389", False),
        ("\\frac{3\\sqrt{15}}{5}", "\\frac{9}{\\sqrt{15}}", True),
        ("\\sqrt{29}-\\sqrt{5}", "-\\sqrt{5} + \\sqrt{29}", True),
        ("\\sqrt{29}-\\sqrt{5}", "\\sqrt{24}", False),
        ("2^{12} \\cdot 13!", "4096 \\cdot 13!", True),
        ("-84, -1, 22", "22, -84, -1", True),
        ("-84, -1, 22", "-84, 22", False),
        ("\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}", "\\frac{-1\\pm\\sqrt{17}}{2}", True),
        ("1-\\frac{2}{\\pi}", "\\frac{\\pi-2}{\\pi}", True),
    ],
)
def test_answers_of_competitions_are_fractions_radicals_and_several_values(load, gold, answer, right):
    pytest.importorskip("math_verify")
    task = load("hmmt_feb26", HMMT | {"answer": gold})
    (problem,) = task.problems
    assert (problem.id, problem.gold, problem.metadata) == ("7", gold, {"types": ["Algebra"]})
    text = f"Perhaps \\boxed{{12345}}, or rather \\boxed{{{answer}}}."
    assert task.grade(task.extract(text), problem) is right


def test_hanging_grader_is_stopped_in_any_thread_and_restarts():
    pytest.importorskip("math_verify")
    from companion.tasks.sandbox.worker import math_worker

    worker, answers = math_worker(), []
    usual, worker.seconds = worker.seconds, 1.5
    thread = threading.Thread(target=lambda: answers.append(worker.ask({"gold": "3", "answer": "9^{9^{9^{9^9}}}"})))
    thread.start()
    thread.join(60)
    worker.seconds = usual
    assert answers == [None]
    assert worker.ask({"gold": "3", "answer": "3.0"}) is True


def test_gpqa_options_follow_recorded_seed(load):
    rows = [ROWS["gpqa_diamond"] | {"Record ID": f"rec{i}"} for i in range(40)]
    task, other = load("gpqa_diamond", *rows), load("gpqa_diamond", *rows, seed=1)
    assert [p.gold for p in task.problems] == [p.gold for p in load("gpqa_diamond", *rows).problems]
    assert [p.gold for p in task.problems] != [p.gold for p in other.problems]
    assert {p.gold for p in task.problems} == set("ABCD")
    for problem in task.problems:
        assert f"\n{problem.gold}) yes" in problem.question + "\n"
        assert problem.metadata == {"order": problem.metadata["order"], "shuffle": 0}
        assert task.grade(problem.gold, problem) and not task.grade(None, problem)


def test_reasoning_gym_scores_inside_the_sandbox_only(tmp_path, need_sandbox):
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:chain_sum", limit=2, size=5, seed=3)
    again = get_task("reasoning_gym", dataset="chain_sum", size=5, seed=3)
    assert [p.question for p in task.problems] == [p.question for p in again.problems[:2]]
    assert task.extract("<answer>1</answer> <answer> 2\n</answer> <answer>3") == "2"
    with pytest.raises(ValueError, match=r"dataset 'sums': must be one of \["):
        get_task("reasoning_gym:sums")
    with pytest.raises(ValueError, match="takes no file"):
        get_task("reasoning_gym", tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="refuses"):
        get_task("reasoning_gym", config={"no_such": 1})
    need_sandbox()
    assert task.grade(task.problems[0].gold, task.problems[0]) and not task.grade("1", task.problems[0])
    mark = tmp_path / "mark"
    task = get_task("reasoning_gym:countdown", size=1)
    assert not task.grade(f"__import__('pathlib').Path({str(mark)!r}).write_text('x')", task.problems[0])
    assert not mark.exists()


def test_missing_grader_is_reported_before_sampling(load, monkeypatch):
    from companion.tasks.sandbox import worker

    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    worker.math_worker.cache_clear()
    with pytest.raises(ValueError, match=r"math-verify is not installed.*\[eval\]"):
        load("aime24").ready()
    worker.math_worker.cache_clear()


def test_reasoning_gym_reads_the_last_number_where_asked():
    pytest.importorskip("reasoning_gym")
    task = get_task("reasoning_gym:gcd", size=1, answer="number", unsafe=True)
    assert task.name == "reasoning_gym:gcd:number" and [m["role"] for m in task.messages(task.problems[0])] == ["user"]
    text = "The divisors of 12 are 1, 2, 3. So it is 3.5, no: -4."
    assert task.extract(text) == "-4" and list(task.candidates(text))[-2:] == [(44, "3.5"), (52, "-4")]
    with pytest.raises(ValueError, match="answer 'letter': must be tagged or number"):
        get_task("reasoning_gym:gcd", answer="letter")


def test_reasoning_gym_grades_later_without_sandbox(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(sandbox, "why_not", lambda: "bwrap (bubblewrap) is not installed")
    assert get_task("reasoning_gym", size=1).grades_later
    assert not get_task("reasoning_gym", size=1, unsafe=True).grades_later


def test_program_traces_match_generated_problems():
    from companion.tasks.embedded import MIX
    from companion.tasks.programs import make_problem

    task, made = Traces(size=3, seed=5), [make_problem("test", 5, i, MIX["traces"]) for i in range(3)]
    assert [(p.question, p.gold, p.metadata["variables"]) for p in task.problems] == [
        (m.prompt, m.answer, m.variables) for m in made
    ]
    tokenizer = make_tokenizer()
    for problem, program in zip(task.problems, made, strict=True):
        tokens = tokenizer(program.trace)["input_ids"]
        assert task.prompt_ids(tokenizer, problem) == tokenizer(program.prompt)["input_ids"]
        assert task.complete_at(tokens, tokenizer) == len(tokens) and task.grade(program.answer, problem)
