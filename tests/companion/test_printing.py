"""The book as one PDF, from pages of a book of two."""

import shutil

import pytest

from companion import printing
from companion.printing import contents, print_book

TOC = {"root": "intro", "parts": [{"caption": "Part", "chapters": [{"file": "a"}, {"file": "notebooks/b"}]}]}


@pytest.fixture
def book(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("intro", "a", "notebooks/b"):
        text = "".join(f"<p style='break-after: page'>{name} {n}</p>" for n in range(2)) + "end"
        (tmp_path / f"{name}.html").write_text(f"<title>Title {name[-1]} — Book</title><h1>{name}</h1>{text}")
    (tmp_path / "_toc.yml").write_text(str(TOC))
    return tmp_path


def test_order_and_parts_are_those_of_the_contents():
    assert list(contents(TOC)) == [(None, "intro"), ("Part", "a"), (None, "notebooks/b")]
    assert list(contents({"root": "x", "chapters": [{"file": "y"}]})) == [(None, "x"), (None, "y")]


@pytest.mark.slow
def test_sheets_follow_each_other_and_the_outline_leads_to_them(book):
    pypdf = pytest.importorskip("pypdf")
    if not any(map(shutil.which, printing.PROGRAMS)):
        pytest.skip("NOT PRINTED: chromium is not installed")
    out = book / "out" / "book.pdf"
    assert print_book(book, book / "_toc.yml", out) == 9
    found = pypdf.PdfReader(out)
    assert [sheet.extract_text().split()[0] for sheet in found.pages[::3]] == ["intro", "a", "notebooks/b"]
    intro, part, (a, b) = found.outline
    assert [item.title for item in (intro, part, a, b)] == ["Title o", "Part", "Title a", "Title b"]
    assert [found.get_destination_page_number(item) for item in (intro, a, b)] == [0, 3, 6]


def test_what_is_missing_is_named(book, monkeypatch):
    monkeypatch.setattr(printing.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install chromium"):
        print_book(book, book / "_toc.yml", book / "x.pdf")
    monkeypatch.setattr(printing.shutil, "which", lambda name: name)
    (book / "a.html").unlink()
    with pytest.raises(ValueError, match=r"a\.html: no such page; render the book first"):
        print_book(book, book / "_toc.yml", book / "x.pdf")
