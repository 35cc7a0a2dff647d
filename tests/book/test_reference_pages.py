"""Notation points at sections that exist, and the colophon names what rendered the book."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import versions  # noqa: E402

GLOSSARY = (ROOT / "book" / "glossary.md").read_text()
ROW = re.compile(r"^\* - (.+)\n  - (.+)\n  - \[chapter (\d)\]\((notebooks/\w+)\), (.+)$", re.M)


def headings(chapter: str) -> set[str]:
    cells = json.loads((ROOT / f"{chapter}.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return set(re.findall(r"^#{2,3} (.+)$", text, re.M))


def begins(headings: set[str], section: str) -> bool:
    return any(heading.partition(":")[0] == section.partition(":")[0] for heading in headings)


def test_every_symbol_has_a_meaning_and_the_section_that_defines_it():
    rows, tables = ROW.findall(GLOSSARY), GLOSSARY.count("```{list-table}")
    assert len(rows) == GLOSSARY.count("\n* - ") - tables >= 25  # but for the tables' heads
    known = {chapter: headings(chapter) for *_, chapter, _ in rows}
    for symbol, meaning, number, chapter, section in rows:
        assert chapter.startswith(f"notebooks/0{number}_"), symbol
        assert begins(known[chapter], section), (symbol, chapter, section)
        assert len(meaning.split()) >= 3, symbol


def test_glossary_is_one_page_with_one_title():
    assert re.findall(r"^# (.+)$", GLOSSARY, re.M) == ["Glossary and notation"]
    assert "Glossary" not in "".join(re.findall(r"^##+ (.+)$", GLOSSARY, re.M))
    words = re.findall(r"^(\w[^\n]*)\n  \S", GLOSSARY.partition("```{glossary}")[2], re.M)
    assert words == sorted(words, key=str.lower) and len(words) > 30


def test_colophon_names_versions_and_is_in_the_book():
    assert f"NumPy {np.__version__}" in versions.versions() and versions.versions().startswith("Python 3.")
    assert "{{ versions }}" in (ROOT / "book" / "colophon.md").read_text()
    assert "colophon" in (ROOT / "book" / "_toc.yml").read_text()
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
    assert config["sphinx"]["local_extensions"]["versions"] == "_ext"


@pytest.mark.parametrize("page", sorted((ROOT / "book").glob("*.md")), ids=lambda path: path.stem)
def test_paragraphs_are_short(page):
    text = re.sub(r"^```.*?^```|^\|.*?$", "", page.read_text(), flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. )", text):
        assert len(paragraph.split()) <= 120, paragraph
