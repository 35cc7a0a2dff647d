import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from companion.book import build_book

BOOK = Path(__file__).parents[2] / "book"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
EXTERNAL = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=.(?:https?:)?//|<link[^>]*\shref=.(?:https?:)?//|@import url\(.?https?:"
)
TEXT = "A gate $\\boldsymbol{z}$, {cite:p}`lancucki2025dms`.\n\n$$\\beta = \\log(1-\\alpha)$$"


def _chapter(title: str) -> nbformat.NotebookNode:
    v4 = nbformat.v4
    figure = v4.new_output("display_data", data={"image/png": PIXEL, "text/plain": "<Figure>"})
    cells = [
        v4.new_markdown_cell(f"# {title}\n\n{TEXT}"),
        v4.new_code_cell("draw()", execution_count=1, outputs=[figure]),
    ]
    return v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}})


def _copy_with_chapters(target: Path, make=_chapter) -> Path:
    shutil.copytree(BOOK, target, ignore=shutil.ignore_patterns("_build", "notebooks", "__pycache__"))
    (target / "notebooks").mkdir()
    for part in yaml.safe_load((BOOK / "_toc.yml").read_text())["parts"]:
        for chapter in part["chapters"]:
            if chapter["file"].startswith("notebooks/"):
                nbformat.write(make(chapter["file"]), target / f"{chapter['file']}.ipynb")
    return target


@pytest.mark.slow
def test_book_builds_without_warnings_and_needs_no_network(tmp_path):
    book = _copy_with_chapters(tmp_path / "book")
    index = build_book(book)
    pages = sorted(index.parent.rglob("*.html"))
    assert index in pages and len(pages) >= 10
    assert {page.name: EXTERNAL.findall(page.read_text()) for page in pages if EXTERNAL.search(page.read_text())} == {}
    copies = [path.relative_to(index.parent).as_posix() for path in index.parent.rglob("tex-*.js")]
    assert copies == ["_static/tex-svg-full.js"]
    for chapter in (index.parent / "notebooks").glob("*.html"):
        text = chapter.read_text()
        assert text.count("tex-svg-full.js") == 1 and "unpkg" not in text and r"\boldsymbol" in text and ".png" in text


@pytest.mark.slow
def test_a_warning_fails_the_build_and_is_quoted(tmp_path):
    def dangling(title):
        chapter = _chapter(title)
        chapter.cells[0].source += "\n\n{cite:p}`nobody1900`"
        return chapter

    with pytest.raises(RuntimeError, match="nobody1900"):
        build_book(_copy_with_chapters(tmp_path / "book", dangling))
