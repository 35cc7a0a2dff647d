"""The pages' last touches, and the checks of a rendered book: each fault is found where it was put, nowhere else."""

import importlib.util

import pytest
import yaml

from companion.book_check import browser, check_files, check_pages, check_sources, files
from companion.book_check.browser import sample_of
from companion.book_check.files import pages_of
from companion.paths import CHECKOUT as ROOT

SPEC = importlib.util.spec_from_file_location("pages", ROOT / "book" / "_ext" / "pages.py")
pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pages)

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><main role="main"><article><h1>{title}</h1>{body}</article></main></body></html>"""
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
RESULTS = '<ul class="search"><li><a href="index.html">A page</a><p class="context">Delayed eviction is</p></li></ul>'
FAULTS = {  # what is put into a page: what the check says of it
    '<img src="missing.png" alt="A curve that rises">': "image not loaded: ",
    f'<img src="{PIXEL}" alt="_images/curve.png">': "image without alt text: _images/curve.png",
    '<p class="math">\\(a\\)</p>': "formula not rendered: ",
    "<p>an {term}`eviction`</p>": "markup left as text: an {term}`eviction`",
    '<p style="width: 1500px">a long line</p>': "px wide: p.",
    '<a href="index.html" style="outline: none">a link that hides its focus</a>': "no focus ring: <a ",
    "<script>nothing.at.all()</script>": "error: nothing is not defined",
    "<script>console.error('a warning')</script>": "console: a warning",
    f'<img src="http://127.0.0.1:9/{"x" * 8}.png" alt="A picture elsewhere">': "external: http://127.0.0.1:9/",
    '<p style="color: #aaaaaa; background: #bbbbbb">pale</p>': "axe serious color-contrast: 1 times",
    '<div class="instrument" data-name="m"><input type="range" aria-label="w"><p class="said"></p></div>': "m does not",
}


@pytest.fixture
def book(tmp_path):
    """A function that writes a book of one page and its search: (body, results) -> folder."""

    def write(body: str, results: str = RESULTS):
        for name, title, text in (("index", "A page", body), ("search", "Search", results)):
            (tmp_path / f"{name}.html").write_text(PAGE.format(title=title, body=text))
        return tmp_path

    return write


def test_sources_of_the_book_have_no_fault():
    assert check_sources(ROOT) == []


def test_a_misspelt_word_outputs_and_a_reference_without_address_are_found(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "book" / "intro.md").write_text("# It occ" + "ured\n")
    (tmp_path / "book" / "references.bib").write_text("@misc{a, url = {https://a.b}}\n@misc{b,\n  title = {T}}\n")
    cell = '{"cell_type": "code", "id": "a", "source": "1", "metadata": {}, "outputs": [], "execution_count": 1}'
    notebook = f'{{"cells": [{cell}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 5}}'
    (tmp_path / "notebooks" / "01.ipynb").write_text(notebook)
    found = check_sources(tmp_path)
    assert [fault.split(":")[0] for fault in found] == ["notebooks/01.ipynb", "references.bib", "book/intro.md"]


def test_both_tables_of_contents_name_the_same_pages():
    first, second = (yaml.safe_load((ROOT / "book" / name).read_text()) for name in ("_toc.yml", "myst.yml"))
    parts = [part for part in second["project"]["toc"] if "title" in part]
    found = [(part["title"], [page["file"].rpartition(".")[0] for page in part["children"]]) for part in parts]
    assert found == [(part["caption"], [page["file"] for page in part["chapters"]]) for part in first["parts"]]


def test_links_and_anchors_that_lead_nowhere_and_large_pages_are_found(book, monkeypatch):
    links = ("#here", "search.html", "search.html#none", "none.html", "https://a.b/c", "index.html#here", "#none")
    html = book('<p id="here"></p>' + "".join(f'<a href="{link}">x</a>' for link in links))
    wrong = [
        "search.html#none names no part of search.html",
        "none.html leads nowhere",
        "#none names no part of index.html",
    ]
    assert check_files(html) == [f"index.html: {fault}" for fault in wrong]
    monkeypatch.setattr(files, "LARGEST", 100)
    assert any("MB with its images" in fault for fault in check_files(html))


def test_sample_of_pages_has_every_kind_of_part_and_the_live_page(tmp_path):
    texts = {"a": "<p>x</p><table></table>", "b": "<p>x</p>", "c": '<p class="note">x</p>', "live/index": "<p>x</p>"}
    (tmp_path / "live").mkdir()
    for name, text in texts.items():
        (tmp_path / f"{name}.html").write_text(text)
    assert {path.stem for path in sample_of(pages_of(tmp_path))} == {"a", "c", "index"}


@pytest.mark.slow
def test_each_fault_in_a_page_is_found_and_a_good_page_has_none(book, monkeypatch):
    good = f'<p>An <a href="search.html">evicted</a> token.</p><img src="{PIXEL}" alt="A curve that rises">'
    try:
        assert check_pages(book(good)) == check_pages(book(good), brief=True) == []
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(browser, "PATIENCE", 2000)
    bare = '<ul class="search"><li>Delayed eviction, without an excerpt</li></ul>'
    found = check_pages(book("".join(FAULTS), results=bare))
    assert [said for said in FAULTS.values() if said not in "\n".join(found)] == []
    assert [fault for fault in found if "no results" in fault] == [found[-1]]
    for where in ("index.html (file): 1280 px, light", "index.html (http): 390 px, dark"):
        assert any(fault.startswith(f"{where}: markup left as text") for fault in found)


TABLE = """<table border="1" class="dataframe"><thead>
<tr style="text-align: right;"><th></th><th>loss</th><th>kind</th></tr>
<tr><th>method</th><th></th><th></th></tr></thead><tbody><tr><th>W-4</th><td>-0.4 [-1.5, +0.6]</td><td>a-1</td></tr>
<tr><th>b</th><td>3e-05</td><td>4-8</td></tr></tbody></table>"""


def test_tables_have_one_header_row_and_numbers_to_the_right_with_true_minus_signs():
    found = pages.finish(TABLE)
    assert found.count("<tr") == 3 and "border" not in found and "style" not in found
    assert '<th>method</th><th class="number">loss</th><th>kind</th>' in found
    assert '<td class="number">−0.4 [−1.5, +0.6]</td><td>a-1</td>' in found
    assert '<td class="number">3e−05</td><td>4-8</td>' in found and "<th>W-4</th>" in found


def test_header_of_a_table_with_named_columns_stays():
    named = TABLE.replace("<th></th><th>loss", "<th>axis</th><th>loss")
    assert pages.finish(named).count("<tr") == 4


def test_percent_signs_stay_with_their_numbers_outside_code():
    assert pages.finish("<p>95 % of <code>95 %</code></p>") == "<p>95\N{NO-BREAK SPACE}% of <code>95 %</code></p>"
    assert (
        pages.finish('<pre>5 %<b>6 %</b></pre>7 %<img alt="8 %">')
        == '<pre>5 %<b>6 %</b></pre>7\N{NO-BREAK SPACE}%<img alt="8 %">'
    )


def test_entries_of_a_bibliography_are_items_of_its_list():
    entry = '<div role="list"><div class="citation" role="doc-biblioentry">x</div></div>'
    assert 'role="listitem"' in pages.finish(entry) and "doc-" not in pages.finish(entry)
