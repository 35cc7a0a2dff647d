"""Mark, favicon and card are those that the script draws, and the pages name them."""

import importlib.util
from types import SimpleNamespace

import matplotlib.image as image
import pytest

from companion.figures.brand import mark_svg, write
from companion.paths import CHECKOUT

STATIC = CHECKOUT / "book" / "_static"


@pytest.fixture(scope="module")
def hosted():
    found = importlib.util.spec_from_file_location("hosted", CHECKOUT / "book" / "_ext" / "hosted.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_stored_files_are_drawn_by_the_script(tmp_path):
    write(tmp_path)
    for name in ("logo.svg", "favicon.svg"):
        assert (tmp_path / name).read_text() == (STATIC / name).read_text()
    new, stored = (image.imread(folder / "social.png") for folder in (tmp_path, STATIC))
    assert new.shape[:2] == stored.shape[:2] == (630, 1200)
    assert (STATIC / "social.png").stat().st_size < 100_000
    assert abs(new - stored).mean() < 0.02  # fonts may be drawn otherwise elsewhere


def test_mark_has_one_evicted_token_of_ten():
    assert mark_svg().count("<rect") == 10 and mark_svg().count("stroke=") == 1


def app(**citation) -> SimpleNamespace:
    config = SimpleNamespace(html_theme_options={}, html_baseurl="", html_title="The book")
    return SimpleNamespace(config=config, citation=citation)


@pytest.mark.parametrize("address", ["", "https://book.example/dms/"])
def test_card_is_named_absolutely_once_the_book_has_an_address(hosted, address):
    context = {"title": "The <em>gate</em> &amp; more", "pathto": lambda name, _: f"../{name}"}
    made = app()
    made.config.html_baseurl = address
    hosted._add_card(made, "notebooks/02_gate", "page.html", context, None)
    where = "https://book.example/dms/_static/social.png" if address else "../_static/social.png"
    assert f'<meta property="og:image" content="{where}" />' in context["metatags"]
    assert 'content="The gate &amp; more"' in context["metatags"]


@pytest.mark.parametrize("repository", ["", "https://github.com/someone/dms"])
def test_launch_buttons_appear_with_the_repositorys_address(hosted, repository, tmp_path, monkeypatch):
    (tmp_path / "CITATION.cff").write_text(f"title: x\nrepository-code: {repository}\n" if repository else "title: x\n")
    monkeypatch.setattr(hosted, "checkout", lambda what: tmp_path)
    made = app()
    hosted._read_addresses(made, made.config)
    options = made.config.html_theme_options
    assert ("launch_buttons" in options) == bool(repository) and options.get("repository_url", "") == repository
