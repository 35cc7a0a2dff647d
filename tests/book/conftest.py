"""The live page and the instruments as they are written, and headless browsers that open them from files."""

import shutil
from pathlib import Path

import pytest
from firefox import PROGRAM, Firefox

from companion import live
from companion.figures.instruments import TITLES, instrument
from companion.paths import RESULTS
from dms_core.storage import read_json

LOCAL = ("file:", "data:")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
ALONE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>An instrument</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body style="margin: 0"><main style="max-width: 720px"><h1>An instrument</h1>{}</main></body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return live.write_live(tmp_path_factory.mktemp("live")).parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder with a page NAME.html for each instrument."""
    folder = tmp_path_factory.mktemp("instruments")
    data = {"budget": read_json(RESULTS / "full" / "curves.json")}
    data["tokens"] = read_json(RESULTS / "smollm2-tokens.json")["example"] | {"marked": [3, 4]}
    for name in TITLES:
        shown = instrument(name, data.get(name))
        (folder / f"{name}.html").write_text(ALONE.format(shown.data))
    return folder


@pytest.fixture(scope="module")
def open_file():
    """A function that opens a file in Chromium: (path, part, **options of a context) -> tab.

    tab.problems: errors, and requests that fail or that leave the machine.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="NOT RUN IN A BROWSER: playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("NOT RUN IN A BROWSER: chromium is not installed")
    with sync_api.sync_playwright() as play:
        program = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_file(path, part="", **options):
            tab = program.new_context(offline=True, **options).new_page()
            tab.problems = []
            tab.on("pageerror", lambda error: tab.problems.append(str(error)))
            tab.on("console", lambda said: tab.problems.append(said.text) if said.type == "error" else None)
            tab.on("request", lambda asked: tab.problems.append(asked.url) if asked.url[:5] not in LOCAL else None)
            tab.on("requestfailed", lambda asked: tab.problems.append(asked.url))
            tab.goto(path.as_uri() + part)
            return tab

        yield open_file
        program.close()


@pytest.fixture(scope="module")
def browser(page, open_file):
    """A function that opens the live page: (part, **options of a context) -> tab."""

    def open_page(part="#still", **options):
        tab = open_file(page / "index.html", part, **options)
        tab.wait_for_function("window.DMS_PAGE && DMS_PAGE.race.sides.length === 2")
        return tab

    return open_page


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    """Debian's Firefox, headless."""
    if PROGRAM is None:
        pytest.skip("NOT RUN IN FIREFOX: firefox is not installed")
    program = Firefox(tmp_path_factory.mktemp("profile"))
    yield program
    program.close()
