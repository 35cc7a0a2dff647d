"""The live page as it is written, and headless Chromium that opens it."""

import shutil
from pathlib import Path

import pytest

from companion import live

LOCAL = ("file:", "data:")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return live.write_live(tmp_path_factory.mktemp("live")).parent


@pytest.fixture(scope="module")
def browser(page):
    """A function that opens the page in Chromium: (**options of a context) -> tab; tab.problems: errors, requests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="NOT RUN IN A BROWSER: playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("NOT RUN IN A BROWSER: chromium is not installed")
    with sync_api.sync_playwright() as play:
        program = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_page(part="#still", **options):
            tab = program.new_context(offline=True, **options).new_page()
            tab.problems = []
            tab.on("pageerror", lambda error: tab.problems.append(str(error)))
            tab.on("console", lambda said: tab.problems.append(said.text) if said.type == "error" else None)
            tab.on("request", lambda asked: tab.problems.append(asked.url) if asked.url[:5] not in LOCAL else None)
            tab.on("requestfailed", lambda asked: tab.problems.append(asked.url))
            tab.goto((page / "index.html").as_uri() + part)
            tab.wait_for_function("window.DMS_PAGE && DMS_PAGE.race.sides.length === 2")
            return tab

        yield open_page
        program.close()
