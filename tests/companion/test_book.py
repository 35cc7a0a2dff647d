"""The build of the book is strict; test_reproduce.py builds the whole one."""

import shutil
from pathlib import Path

import nbformat
import pytest

from companion.book import build_book

BOOK = Path(__file__).parents[2] / "book"
INTRO = "# A book\n\n```{bibliography}\n```\n"
TOC = "format: jb-book\nroot: intro\nchapters:\n  - file: notebooks/01_a\n"


@pytest.fixture
def book(tmp_path):
    """A function that makes the book's settings and styles a book of one chapter, with this text."""

    def make(text: str) -> Path:
        hidden = shutil.ignore_patterns("_build", "notebooks", "__pycache__", "*.md")
        shutil.copytree(BOOK, tmp_path / "book", ignore=hidden, dirs_exist_ok=True)
        (tmp_path / "book" / "intro.md").write_text(INTRO)
        (tmp_path / "book" / "_toc.yml").write_text(TOC)
        (tmp_path / "book" / "notebooks").mkdir(exist_ok=True)
        cells = [nbformat.v4.new_markdown_cell(f"# A chapter\n\n{text}")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "book" / "notebooks" / "01_a.ipynb")
        return tmp_path / "book"

    return make


@pytest.mark.slow
def test_a_warning_fails_the_build_and_is_quoted(book):
    place = book("A gate $\\boldsymbol{z}$, {cite:p}`lancucki2025dms`. Cited: {cite:p}`nobody1900`.")
    with pytest.raises(RuntimeError, match="nobody1900") as error:
        build_book(place)
    assert str(error.value).count("WARNING") == 1  # of the rest nothing is said
    assert r"\boldsymbol" in (place / "_build" / "html" / "notebooks" / "01_a.html").read_text()
