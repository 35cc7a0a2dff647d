"""The race keeps its budget, and its picture shows what was written."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from companion.figures.race import Letter, Side, draw, made, main, run_side, take_turns
from companion.paths import CHECKOUT, REASONER
from companion.tasks.puzzles import make_puzzle, solves
from dms_core.sampling import Chain

SVG = "{http://www.w3.org/2000/svg}"


def chain(number: int, tokens: int, read: float, finished: bool = True) -> Chain:
    """One that reads ``read`` items a token after the first."""
    reads = [0.0, *(read * i for i in range(tokens + finished))]
    return Chain(0, number, list(range(tokens)), finished, 5, 5.0, [], [*reads, reads[-1]])


def test_chains_take_turns_until_the_budget_is_used_up():
    order, cut = take_turns([chain(0, 9, 2.0), chain(1, 2, 1.0)], 5.0, [False, False])
    assert order == [(0, 0.0), (1, 0.0), (0, 2.0), (1, 3.0), (0, 5.0)] and cut
    assert made(chain(1, 2, 1.0)) == 3


def test_race_ends_with_the_first_right_chain():
    order, cut = take_turns([chain(0, 9, 2.0), chain(1, 1, 1.0)], 100.0, [True, True])
    assert order == [(0, 0.0), (1, 0.0), (0, 2.0), (1, 3.0)] and not cut
    order, cut = take_turns([chain(0, 1, 2.0)], 100.0, [False])
    assert len(order) == 2 and not cut


@pytest.fixture(scope="module")
def drawn():
    left = Side("Dense <1>", [[Letter("<", 0.0, 2.0, 1.0), Letter("a", 1.0, 2.0, 1.0)]], 1.0, True, None, False)
    right = Side(
        "DMS", [[Letter(c, i / 99, i / 99 + 0.1, 0.25) for i, c in enumerate("x" * 60)]], 0.6, False, "n4U0", True
    )
    return draw(">n;n=4-U;U=n-4;!", [left, right])


def test_picture_has_every_letter_once_and_its_times(drawn):
    tree = ElementTree.fromstring(drawn)
    letters = [span for span in tree.iter(f"{SVG}tspan") if span.get("class", "").startswith("k")]
    assert "".join(span.text for span in letters) == "<a" + "x" * 60
    rules = "".join(style.text for style in tree.iter(f"{SVG}style"))
    named = {name for element in tree.iter() for name in re.findall(r"\bk\d+", element.get("class", ""))}
    assert named == set(re.findall(r"@keyframes (k\d+)\{", rules))
    assert "opacity:0.4" in rules and "prefers-reduced-motion:reduce" in rules
    said = tree.find(f"{SVG}title").text
    assert "Dense <1>: no answer ✗  (budget used up)" in said and "DMS: n4 U0 ✓  (40 % of the budget left)" in said


def test_stored_picture_is_small_and_complete_in_itself():
    text = (CHECKOUT / "book" / "_static" / "race.svg").read_text()
    assert len(text.encode()) < 1e6
    assert not re.search(r"<script|href|url\(|@import", text)
    assert "no answer ✗" in text and "✓" in text.partition("</title>")[0]
    ElementTree.fromstring(text)


def test_dense_side_writes_what_the_budget_holds():
    prompt, tokens = make_puzzle("validation", 17, 1).prompt, 60
    budget = (tokens - 1) * (2 * len(prompt) + tokens) / 2
    side = run_side("Dense", REASONER, prompt, 1, budget, most=64)
    (letters,) = side.chains
    assert len(letters) == tokens and side.cut and side.read == pytest.approx(1) and not side.right
    assert all(letter.held == 1 for letter in letters)


def test_compressed_side_writes_more_and_forgets():
    prompt, tokens = make_puzzle("validation", 17, 1).prompt, 60
    budget = (tokens - 1) * (2 * len(prompt) + tokens) / 2
    side = run_side("DMS", REASONER / "dms-cr8", prompt, 1, budget, most=240)
    (letters,) = side.chains
    assert len(letters) > 1.5 * tokens and side.read <= 1
    assert min(letter.held for letter in letters) == 0
    assert all(letter.fades > letter.appears for letter in letters[:-20])
    assert side.answer is None or side.right == solves(prompt, side.answer)


def test_command_writes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("companion.figures.race.race", lambda: "<svg/>")
    main([str(tmp_path / "a.svg")])
    assert (tmp_path / "a.svg").read_text() == "<svg/>" and "0 kB" in capsys.readouterr().out
