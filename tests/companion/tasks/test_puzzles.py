"""The generators of the search and choice tasks: traces are right, answers are checked by their definition."""

import re
from itertools import pairwise

import pytest

from companion.tasks.choices import OPTIONS, line_values, make_choice
from companion.tasks.mixture import LONGEST
from companion.tasks.programs import ALPHABET, make_problem
from companion.tasks.puzzles import WORKING, extract_assignment, make_puzzle, solves

PUZZLES = [make_puzzle("validation", 0, i, LONGEST) for i in range(200)]
CHOICES = [make_choice("validation", 0, i) for i in range(200)]


def test_trace_of_a_puzzle_ends_with_an_assignment_that_fulfils_every_line():
    for puzzle in PUZZLES:
        answer = extract_assignment(puzzle.trace)
        assert solves(puzzle.prompt, answer) and len(answer) == 2 * puzzle.unknowns
        for at in range(1, len(answer), 2):
            wrong = answer[:at] + str((int(answer[at]) + 1) % 10) + answer[at + 1 :]
            assert not solves(puzzle.prompt, wrong)
        assert not solves(puzzle.prompt, answer[:-2]) and not solves(puzzle.prompt, answer + "x1")
        assert len(puzzle.trace) <= LONGEST and set(puzzle.prompt + puzzle.trace) <= set(ALPHABET)


def test_guesses_of_a_puzzle_are_tried_in_turn_until_one_works():
    for puzzle in PUZZLES:
        for head in re.findall(">([a-zA-Z])", puzzle.prompt):
            tries = re.findall(f">{head}([0-9]+);", puzzle.trace)
            assert [len(tried) for tried in tries] == list(range(1, len(tries) + 1))
            assert all(after.startswith(before) for before, after in pairwise(tries))
            assert len(set(tries[-1])) == len(tries) <= 11 - WORKING[0]


def test_every_step_of_a_trace_is_arithmetic_modulo_ten():
    for puzzle in PUZZLES:
        for a, b, value in re.findall("[>?]([0-9])-([0-9])=([0-9])", puzzle.trace):
            assert (int(a) - int(b)) % 10 == int(value)


def test_choice_has_one_right_option_and_its_letter_ends_the_trace():
    letters = []
    for choice in CHOICES:
        options = dict(re.findall("([A-D])([0-9])", choice.prompt[-10:]))
        value = re.search("=([0-9])<[?];", choice.trace)[1] if "<?;" in choice.trace else None
        goal = choice.prompt[1]
        lines = re.findall("([a-zA-Z])=[^;]+;", choice.prompt)
        assert list(options) == list(OPTIONS) and len(set(options.values())) == 4
        assert options[choice.answer] == line_values(choice.prompt)[lines.index(goal)]
        assert value in (None, options[choice.answer]) and choice.trace.endswith(f"<#{choice.answer}")
        letters.append(choice.answer)
    assert min(map(letters.count, OPTIONS)) > 30


def test_values_of_lines_are_those_of_the_trace():
    for i in range(100):
        problem = make_problem("validation", 0, i)
        lines = re.findall("([a-zA-Z])=[^;]+;", problem.prompt)
        assert line_values(problem.prompt)[lines.index(problem.prompt[1])] == problem.answer


def test_problems_are_functions_of_split_seed_and_index():
    assert make_puzzle("test", 1, 5) == make_puzzle("test", 1, 5) != make_puzzle("train", 1, 5)
    assert make_choice("test", 1, 5) == make_choice("test", 1, 5) != make_choice("test", 2, 5)
    with pytest.raises(ValueError, match="split 'dev': must be one of"):
        make_puzzle("dev", 0, 0)


@pytest.mark.parametrize("text", ["", "#", "<n4U0;", "<n4U0#", "n4U0;#", "<n4U;#"])
def test_text_without_a_closed_list_has_no_answer(text):
    assert extract_assignment(text) is None
