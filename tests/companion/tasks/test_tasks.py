import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from companion.tasks.mixture import RETROFIT_MIX, TraceDataset
from companion.tasks.programs import ALPHABET, DISTRACTORS, SPLITS, TRAINING_MIX, extract_answer, grade, make_problem
from companion.tasks.reasoner import encode_problem, make_model, make_tokenizer


def program(prompt: str) -> tuple[str, dict[str, str]]:
    """Goal and right-hand sides, from the prompt alone."""
    goal, *lines = re.fullmatch(r"\?(\w);((?:\w=\w(?:[+-]\w)?;)+)!", prompt).expand(r"\1;\2").rstrip(";").split(";")
    sides = dict(line.split("=") for line in lines)
    assert len(sides) == len(lines)  # every variable is defined once
    return goal, sides


def value(name: str, sides: dict[str, str]) -> int:
    """Python's own arithmetic on the substituted text."""
    if name.isdigit():
        return int(name)
    return eval(re.sub(r"\w", lambda m: str(value(m[0], sides)), sides[name])) % 10


def follow(trace: str, goal: str, sides: dict[str, str]) -> None:
    """Walk the trace as a machine with a stack; every line must be a legal move of the docstring's procedure."""
    stack, visited = [["?", goal, sides[goal]]], {goal}  # who asked, for which variable, what its line knows so far
    for line in trace.split(";"):
        parent, name, known = stack[-1]
        assert line.startswith(f"{name}={known}")
        rest = line[len(f"{name}={known}") :]
        if rest[0] == ">":
            operand = rest[1:]
            assert operand.isalpha() and operand in known
            visited.add(operand)
            stack.append([name, operand, sides[operand]])
            continue
        assert not re.search("[A-Za-z]", known)
        found = str(value(name, sides))
        assert rest == ("" if len(known) == 1 else f"={found}") + f"<{parent}"
        stack.pop()
        if not stack:
            break
        stack[-1][2] = stack[-1][2].replace(name, found)
    assert not stack and visited == needed(goal, sides)


def needed(name: str, sides: dict[str, str]) -> set[str]:
    return {name}.union(*(needed(x, sides) for x in re.findall("[A-Za-z]", sides[name])))


@given(st.sampled_from(SPLITS), st.integers(0, 5), st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 8))
def test_traces_and_answers_match_independent_evaluator(split, seed, index, low, more):
    high = low + more
    problem = make_problem(split, seed, index, (low, high))
    goal, sides = program(problem.prompt)
    assert problem.answer == str(value(goal, sides))
    trace, answer = problem.trace.split(";#")
    follow(trace, goal, sides)
    assert answer == problem.answer
    assert len(needed(goal, sides)) == problem.variables and low <= problem.variables <= high
    assert DISTRACTORS[0] <= len(sides) - problem.variables <= DISTRACTORS[1]
    assert set(problem.prompt + problem.trace) <= set(ALPHABET)
    assert grade(problem, problem.trace) and extract_answer(problem.trace) == problem.answer


def test_problems_are_a_function_of_split_seed_and_index():
    assert make_problem("test", 0, 7) == make_problem("test", 0, 7)
    keys = [(s, seed, i) for s in SPLITS for seed in (0, 1) for i in range(50)]
    assert len({make_problem(*key).prompt for key in keys}) == len(keys)


def test_splits_share_no_evaluation_prompt():
    evaluation = {make_problem("test", 0, i).prompt for i in range(500)}
    assert len(evaluation) == 500
    for split in ("train", "retrofit", "validation"):
        for variables in (TRAINING_MIX, (2, 8)):
            assert not evaluation & {make_problem(split, 0, i, variables).prompt for i in range(1500)}


def test_evaluation_mix_is_uniform_over_needed_variables():
    low, high = TRAINING_MIX
    counts = [0] * (high + 1)
    for i in range(200 * (high - low + 1)):
        counts[make_problem("validation", 3, i).variables] += 1
    assert all(n == 0 for n in counts[:low]) and all(140 < n < 260 for n in counts[low:])


@pytest.mark.parametrize(
    "completion, answer",
    [("a=3;#7", "7"), ("#7#8", "7"), ("#7x", "7"), ("a=7;", None), ("#", None), ("", None), ("#x", None), ("7", None)],
)
def test_extract_answer_returns_digit_after_first_mark(completion, answer):
    assert extract_answer(completion) == answer


def test_wrong_and_unfinished_traces_are_graded_wrong():
    problem = make_problem("validation", 0, 0)
    assert not grade(problem, problem.trace[:-1])
    assert not grade(problem, problem.trace[:-1] + str((int(problem.answer) + 1) % 10))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("exam", 0, 0), "split 'exam': must be one of .*train.*test"),
        (("test", 0, 0, (0, 3)), r"variables \(0, 3\): must satisfy 1 <= low <= high <= 40"),
        (("test", 0, 0, (4, 3)), r"variables \(4, 3\)"),
        (("test", 0, 0, (4, 41)), r"variables \(4, 41\)"),
    ],
)
def test_make_problem_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_problem(*arguments)


def test_largest_programs_have_enough_names():
    assert all(make_problem("test", 0, i, (40, 40)).variables == 40 for i in range(20))


def test_tokenizer_round_trip_is_identity_with_one_token_a_character():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == len(ALPHABET) + 2
    ids = tokenizer(ALPHABET)["input_ids"]
    assert len(ids) == len(set(ids)) == len(ALPHABET) and not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == ALPHABET
    for i in range(50):
        problem = make_problem("validation", 0, i)
        tokens, prompt = encode_problem(tokenizer, problem)
        assert tokenizer.decode(tokens[:prompt]) == problem.prompt
        assert tokenizer.decode(tokens[prompt:], skip_special_tokens=True) == problem.trace
        assert tokens[-1] == tokenizer.eos_token_id and tokens.count(tokenizer.eos_token_id) == 1


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    loaded, made = AutoTokenizer.from_pretrained(tmp_path), make_tokenizer()
    assert loaded(ALPHABET)["input_ids"] == made(ALPHABET)["input_ids"] and loaded.padding_side == "left"
    assert (loaded.pad_token_id, loaded.eos_token_id) == (made.pad_token_id, made.eos_token_id) == (0, 1)


def test_trace_dataset_labels_the_trace_and_groups_similar_lengths():
    tokenizer = make_tokenizer()
    data = TraceDataset(tokenizer, 64, 4, tasks=["traces"])
    assert len(data) == 64 and data[3] == data[3]
    lengths = [len(data[i]["input_ids"]) for i in range(64)]
    for i in range(64):
        item = data[i]
        prompt = item["labels"].count(-100)
        assert item["labels"][prompt:] == item["input_ids"][prompt:]
        goal, sides = program(tokenizer.decode(item["input_ids"][:prompt]))
        assert RETROFIT_MIX[0] <= len(needed(goal, sides)) <= RETROFIT_MIX[1]
    groups = [lengths[i : i + 4] for i in range(0, 64, 4)]
    padded = sum(4 * max(group) for group in groups)
    assert padded < 1.15 * sum(lengths)
    assert sorted(groups) != groups  # batches are shuffled: no curriculum
    for index in (-1, 64):
        with pytest.raises(IndexError):
            data[index]


def test_reasoner_is_small_and_its_seed_determines_its_weights():
    model = make_model(len(make_tokenizer()))
    assert sum(p.numel() for p in model.parameters()) < 2_500_000
    assert model.config.vocab_size == len(make_tokenizer())
    assert all(
        (a == b).all() for a, b in zip(model.parameters(), make_model(len(make_tokenizer())).parameters(), strict=True)
    )
