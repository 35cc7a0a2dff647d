"""README.md and CONTRIBUTING.md: the example runs as pasted, links lead to files, and the table names what exists."""

import re
from pathlib import Path

import pytest

from companion.tasks.puzzles import extract_assignment, solves

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def test_example_solves_its_puzzle_with_less_than_half_of_the_cache(monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(code.strip().splitlines()) <= 11
    monkeypatch.chdir(ROOT)
    exec(code, space := {})
    text, counts = capsys.readouterr().out.strip().splitlines()
    prompt = text.partition("!")[0] + "!"
    assert solves(prompt, extract_assignment(text.removeprefix(prompt)))
    tokens = int(counts.split()[0])
    assert tokens == space["answer"].shape[1]
    assert space["cache"].live_tokens().float().mean() < tokens / 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            headings = re.findall(r"^#+ (.+)$", text, re.M)
            assert link[1:] in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:\w+/)+(?:[\w.-]+)?)`", text)
    assert len(paths) > 25
    for path in paths:
        if not re.search("NAME|NN_", path):
            assert any(
                (ROOT / base / path).exists() for base in ("", "dms_core", "companion", "kernels/dms_kernels")
            ), path
