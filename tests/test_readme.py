"""README.md and CONTRIBUTING.md: the examples run as pasted, links lead to files, and the table names what exists."""

import re
from pathlib import Path

import pytest

from companion.paths import REASONER
from companion.tasks.puzzles import extract_assignment, solves
from dms_core import load_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_example_solves_its_puzzle_with_less_than_half_of_the_cache(monkeypatch, capsys):
    code, _ = examples()
    assert len(code.strip().splitlines()) <= 11
    monkeypatch.chdir(ROOT)
    exec(code, space := {})
    text, counts = capsys.readouterr().out.strip().splitlines()
    prompt = text.partition("!")[0] + "!"
    assert solves(prompt, extract_assignment(text.removeprefix(prompt)))
    tokens = int(counts.split()[0])
    assert tokens == space["answer"].shape[1]
    assert space["cache"].live_tokens().float().mean() < tokens / 2


def test_example_of_a_retrofit_leaves_checkpoints_that_load(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = examples()[1].replace("final_cr=4.0", "final_cr=2.0, steps_per_unit=1, batch=2")
    exec(code, {"NAME": REASONER, "TEXTS": ["?j;T=4-I;e=I+8;I=3;!", "?j;j=T+e;!"]})
    assert load_model("runs/gates/cr2").dms.config.window == 256


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
