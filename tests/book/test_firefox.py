"""The live page and the instruments in Debian's Firefox, from file:// and with no network."""

import pytest
from firefox import open_live

from companion.figures.instruments import TITLES

ENTER, RIGHT = "\ue007", "\ue014"  # as WebDriver names these keys
RESOURCES = "return performance.getEntriesByType('resource').map((entry) => entry.name)"


@pytest.mark.slow
def test_race_runs_to_its_verdict(firefox, page):
    open_live(firefox, page)
    firefox.run("document.querySelector('#speed input[value=Fast]').click(); document.getElementById('run').focus()")
    firefox.press(ENTER)
    firefox.wait_for("DMS_PAGE.over() && document.querySelector('#verdict').textContent", 120)
    said = firefox.run("return document.querySelector('#verdict').textContent")
    assert "Dense wrote" in said and "DMS at CR 8 wrote" in said
    dense, sparse = firefox.run("return DMS_PAGE.race.sides.map((side) => side.made / side.reads)")
    assert sparse > 2 * dense
    assert all(name.startswith("file:") for name in firefox.run(RESOURCES))
    assert firefox.run("return document.documentElement.scrollWidth <= innerWidth")
    assert firefox.errors(page.as_uri()) == []


def test_errors_in_a_page_are_noticed(firefox, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<!DOCTYPE html><title>wrong</title><script>nothing.at.all()</script>")
    firefox.open(wrong.as_uri())
    assert "nothing is not defined" in firefox.errors(wrong.as_uri())[0]


@pytest.mark.parametrize("name", TITLES)
def test_instrument_answers_to_keys(firefox, pages, name):
    address = (pages / f"{name}.html").as_uri()
    firefox.open(address)
    firefox.wait_for("document.querySelector('.instrument[data-ready] svg')")
    said = "return [...document.querySelectorAll('.said')].map((part) => part.textContent).join(' ')"
    before = firefox.run(said)
    firefox.run("document.querySelector('.instrument input[type=range]').focus()")
    firefox.press(RIGHT)
    assert len(before) > 50 and firefox.run(said) != before
    assert firefox.run("return document.documentElement.scrollWidth <= innerWidth")
    assert firefox.run(RESOURCES) == []
    assert firefox.errors(address) == []
