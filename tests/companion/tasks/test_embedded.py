"""The embedded benchmarks: generated problems have right answers, held-out prompts stay out, files are read alike."""

import json
import random

import pytest

from companion.tasks import get_task
from companion.tasks.choices import NAMES, OPTIONS, line_values, make_choice
from companion.tasks.embedded import EMBEDDED, MIX
from companion.tasks.mixture import MAKERS, SHORT, TraceDataset, documents, size_of
from companion.tasks.programs import SPLITS, TRAINING_MIX
from companion.tasks.puzzles import extract_assignment, make_puzzle
from companion.tasks.reasoner import make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_correct_trace_is_graded_as_right_and_complete_before_its_end(name):
    task = get_task(name, size=8, split="validation")
    for index, problem in enumerate(task.problems):
        made = {"choice": make_choice}.get(name, MAKERS[name])("validation", 0, index, MIX.get(name))
        assert made.prompt == problem.question
        tokens = TOKENIZER(made.trace)["input_ids"]
        assert task.grade(task.extract(made.trace), problem)
        assert task.complete_at(tokens, TOKENIZER) == len(tokens)
        assert task.extract(made.trace[:-1]) is None


def test_the_gold_letter_holds_the_value_and_the_others_are_values_of_other_lines():
    letters, from_lines = [], 0
    for index in range(300):
        made = make_choice("test", 0, index)
        options = made.prompt.removesuffix(";!").rpartition(";")[2]
        values = dict(zip(options[0::2], options[1::2], strict=True))
        assert list(values) == list(OPTIONS) and len(set(values.values())) == 4
        assert made.trace.count(f"={values[made.answer]}<?;") >= 1
        assert not set(OPTIONS) & {line[0] for line in made.prompt.split(";")[1:-2]} and not set(OPTIONS) & set(NAMES)
        letters.append(made.answer)
        from_lines += len(
            (set(values.values()) - {values[made.answer]}) & set(line_values(made.prompt.replace(options, "")))
        )
    assert from_lines > 2.9 * 300  # nearly always there are three other values
    assert all(50 < letters.count(letter) < 100 for letter in OPTIONS)


@pytest.mark.parametrize("bad", ["", "n4", "n4U0x1", "n4n4", "nxU0", "n４U0"])
def test_a_malformed_assignment_is_refused_by_the_checker(bad):
    task = get_task("search", size=1)
    assert not task.grade(bad, task.problems[0])


def test_the_checker_accepts_exactly_the_solutions():
    task = get_task("search", size=6, split="validation")
    for index, problem in enumerate(task.problems):
        right = extract_assignment(make_puzzle("validation", 0, index).trace)
        assert task.grade(right, problem)
        shuffled = [right[i : i + 2] for i in range(0, len(right), 2)]
        random.Random(index).shuffle(shuffled)
        assert task.grade("".join(shuffled), problem)
        digit = str((int(right[-1]) + 1) % 10)
        wrong = right[:-1] + digit
        lines = problem.question.partition(";")[2]
        assert f"{right[-2]}=" in lines and not task.grade(wrong, problem)


@pytest.mark.parametrize("name", EMBEDDED)
def test_problems_from_a_file_are_those_generated(name, tmp_path):
    task, file = get_task(name, size=3), tmp_path / "rows.jsonl"
    rows = [{"prompt": p.question, **p.metadata, **({"answer": p.gold} if p.gold else {})} for p in task.problems]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = get_task(name, file)
    assert [(p.question, p.gold, p.metadata) for p in read.problems] == [
        (p.question, p.gold, p.metadata) for p in task.problems
    ]
    file.write_text(json.dumps({"prompt": rows[0]["prompt"]}) + "\n")
    with pytest.raises(ValueError, match="line 1: field"):
        get_task(name, file)


def test_tasks_have_their_shares_of_the_tokens():
    shares = {"traces": 0.2, "choice": 0.3, "search": 0.5}
    for task, share in shares.items():
        held = sum(map(size_of, documents("train", 0, 0, 30_000, {task: share})))
        assert 30_000 * share <= held < 30_000 * share + 1100
    both = documents("train", 0, 0, 30_000, shares)
    assert len({document.prompt for document in both}) == len(both)


def test_splits_of_a_task_share_no_prompt():
    for make in MAKERS.values():
        prompts = {split: {make(split, 0, i, TRAINING_MIX).prompt for i in range(200)} for split in SPLITS}
        assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


def test_documents_of_a_retrofit_take_the_tasks_in_their_turns_and_fit_the_context():
    data = TraceDataset(TOKENIZER, 48, 2, "validation")
    texts = [TOKENIZER.decode(data[i]["input_ids"]) for i in range(len(data))]
    assert [sum(text[0] == mark for text in texts) for mark in "?<>"] == [20, 19, 9]
    assert max(len(data[i]["input_ids"]) for i in range(len(data))) <= 1024
    with pytest.raises(ValueError, match="nothing"):
        TraceDataset(TOKENIZER, 4, 2, tasks=["nothing"])


def test_half_of_the_choices_in_training_are_short():
    sizes = [MAKERS["choice"]("train", 0, i, TRAINING_MIX).variables for i in range(60)]
    assert max(sizes[1::2]) <= SHORT[1] and max(sizes[0::2]) > TRAINING_MIX[1] // 2
