"""Faults on purpose, each survived as book/faults.md says.  ``pytest --write-page tests/test_faults.py`` writes it."""

import re
from pathlib import Path

import faults_of_data  # noqa: F401  they register their faults
import faults_of_training  # noqa: F401
import pytest
from faulty import FAULTS
from forks import in_child

PAGE = Path(__file__).parents[1] / "book" / "faults.md"
HEAD = """# What can go wrong

A run of days is killed, a disk fills up, a file is damaged. `tests/test_faults.py` does these things on purpose and
checks that nothing is lost, and that nothing wrong is taken for right. It also writes this page: *says* is what the
library said, with `DIR` for the directory.

Settings and gates are replaced as a whole, records grow by whole lines; transformers writes weights in place.
`dms.json` and each checkpoint of the trainer hold the SHA-256 of the files beside them, which is compared when they are
loaded; two checkpoints of the trainer are kept. A power cut is another matter: nothing forces files to the disk.
"""
GROUPS = ("Training", "Checkpoints", "Sampling", "Notebooks", "Data", "Answers")
ROWS: dict[str, str] = {}  # what was seen


def without_details(row: str) -> str:
    """What other libraries say, in parentheses, is left out."""
    return re.sub(r"\(.*?\)", "", row)


@pytest.mark.forks
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_survived_as_the_page_says(name, tmp_path, tiny_model, request):
    said = in_child(lambda: FAULTS[name].run(tmp_path, tiny_model))  # so that this process trains nothing itself
    ROWS[name] = FAULTS[name].row(said, tmp_path)
    if not request.config.getoption("write_page"):
        assert without_details(ROWS[name]) in without_details(PAGE.read_text()).splitlines()


def test_page_tells_of_these_faults_alone(request):
    if request.config.getoption("write_page"):
        PAGE.write_text(page())
    head, *rest = PAGE.read_text().partition("\n## ")
    rows = [line for line in "".join(rest).splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    listed = [each.what for group in GROUPS for each in FAULTS.values() if each.group == group]
    assert head == HEAD and [row.split(" | ")[0] for row in rows] == [f"| {what}" for what in listed]


def page() -> str:
    text = HEAD
    for group in GROUPS:
        text += f"\n## {group}\n\n| fault | what happens | says |\n|---|---|---|\n"
        text += "".join(ROWS[name] + "\n" for name, each in FAULTS.items() if each.group == group)
    return text
