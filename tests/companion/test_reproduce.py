"""The whole main job with the smoke profile: notebooks executed, book rendered."""

import re
import shutil
from functools import partial

import nbformat
import pytest

from companion.book import STAGELESS, execute, reproduce
from companion.book_check import check_files, check_pages, check_with_myst
from companion.paths import CHECKOUT as ROOT
from companion.side_by_side import prepare

EXTERNAL = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=.(?:https?:)?//|<link[^>]*\shref=.(?:https?:)?//|@import url\(.?https?:"
)


@pytest.mark.slow
def test_reproduce_smoke_executes_every_notebook_and_renders_the_book(tmp_path):
    """Slow: a retrofit, all records, nine chapters and a browser."""
    for part in ("notebooks", "book"):
        ignore = (
            shutil.ignore_patterns("_build") if part == "notebooks" else shutil.ignore_patterns("_build", "notebooks")
        )
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    prepare()
    result = reproduce("smoke", tmp_path / "runs", root=tmp_path)
    assert result["retrofit"]["cr_target"] == 3.0 and {"retrofit-dms", "summary", "05_retrofit"} <= set(result["parts"])
    pages = {path.stem for path in (tmp_path / "book" / "_build" / "html" / "notebooks").glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    check_network(tmp_path / "book" / "_build" / "html")
    check_book(tmp_path / "book")


def check_network(html) -> None:
    """Nothing comes from elsewhere; formulas are set by the book's own copy of MathJax, once a chapter."""
    pages = sorted(html.rglob("*.html"))
    assert {page.name: EXTERNAL.findall(page.read_text()) for page in pages if EXTERNAL.search(page.read_text())} == {}
    assert [path.relative_to(html).as_posix() for path in html.rglob("tex-*.js")] == ["_static/tex-svg-full.js"]
    for chapter in (html / "notebooks").glob("*.html"):
        text = chapter.read_text()
        assert text.count("tex-svg-full.js") == 1 and "unpkg" not in text and ".png" in text


def check_book(book) -> None:
    """The checks of `make book-check`; the brief ones in a browser.  Skips what cannot be had."""
    html = book / "_build" / "html"
    assert check_files(html) == []
    missing = []
    for check in (partial(check_with_myst, book), partial(check_pages, html, brief=True)):
        try:
            assert check() == []
        except ValueError as error:
            missing.append(str(error))
    if missing:
        pytest.skip("; ".join(missing))


def test_an_unknown_parameter_is_an_error(tmp_path):
    notebook = sorted((ROOT / "notebooks").glob("*.ipynb"))[0]
    with pytest.raises(ValueError, match="no_such_parameter"):
        execute(notebook, tmp_path / "out.ipynb", {"no_such_parameter": 1})


def test_chapters_that_run_before_the_stages_read_no_run():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        code = [re.sub(r"keep\(\s*run_dir", "", source) for source in code[1:]]  # the first cell holds the parameters
        reads = any("run_dir" in source for source in code)
        assert reads != (notebook.name[:2] in STAGELESS), notebook.name
