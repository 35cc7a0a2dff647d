"""What a browser shows of a rendered book: each page in headless Chromium, from its file and over HTTP, offline.

``page.js`` is what runs in the pages.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from companion.book_check.files import Page, pages_of
from companion.printing import PROGRAMS

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
TIMEOUT, PATIENCE = 120_000, 20_000  # milliseconds: for what must come, for results of a search
LOCAL = ("file:", "data:", "blob:", "about:")
VIEWS = {  # of each way to open a page, the first as it loads, the others by resizing and by the system's setting
    "file": ((1280, "light"), (1280, "dark"), (390, "dark"), (390, "light")),
    "http": ((390, "dark"), (390, "light"), (1280, "light"), (1280, "dark")),
}
SETTLING = 800  # ms in which a page of another width has marked what scrolls; after 50 it sometimes has not
AXE_OPTIONS = {"iframes": False, "preload": False, "resultTypes": ["violations"]}
AXE_VIEWS = (  # all rules once, then those that depend on the colours and on the width
    (1280, "light", {"rules": {"label-content-name-mismatch": {"enabled": True}}}),
    (1280, "dark", {"runOnly": ["color-contrast"]}),
    (390, "dark", {"runOnly": ["scrollable-region-focusable"]}),
)
SCRIPT = Path(__file__).with_name("page.js").read_text().rstrip().removesuffix(";")


def _in_page(name: str) -> str:
    """The function of page.js as an expression."""
    return f"(given) =>\n{SCRIPT}.{name}(given)"


def sample_of(pages: list[Path]) -> list[Path]:
    """Pages that together have a part of every kind, and the live one: each next has most kinds that are missing."""
    kinds = {path: Page(path.read_text()).kinds for path in pages}
    chosen = [path for path in pages if path.parent.name == "live"]
    while missing := set().union(*kinds.values()) - set().union(*(kinds[path] for path in chosen)):
        chosen.append(max(pages, key=lambda path: len(kinds[path] & missing)))
    return chosen


def check_pages(html: Path, brief: bool = False) -> list[str]:
    """Faults of a rendered book that a browser shows.

    brief: pages are opened wide and light, then narrow and dark, over HTTP only the first and the live one; parts are
    tried out, and axe looks once, on a sample of pages that has every kind of part.
    Raises ValueError where Chromium, Playwright's client or axe is not installed: nothing was checked then.
    """
    faults, pages = [], list(filter(_stays, pages_of(html)))
    tried = sample_of(pages) if brief else pages
    with _chromium() as (browser, axe_file), _served(html) as address:
        for origin, views in VIEWS.items():
            base = address if origin == "http" else html.resolve().as_uri()
            context = browser.new_context(offline=origin == "file", reduced_motion="reduce")
            context.set_default_timeout(TIMEOUT)
            for path in pages:
                name = path.relative_to(html).as_posix()
                if brief and origin == "http" and name not in ("intro.html", "live/index.html"):
                    continue
                visit = _Visit(context, f"{base}/{name}", base, views[0])
                visit.look(views[::2] if brief else views)
                if origin == "file" and path in tried:
                    visit.try_out()
                    visit.ask_axe(axe_file, AXE_VIEWS[:1] if brief else AXE_VIEWS)
                faults += [f"{name} ({origin}): {fault}" for fault in visit.close()]
            visit = _Visit(context, f"{base}/search.html?q=delayed+eviction", base, views[0])
            visit.read_results(excerpts=origin == "http")
            faults += [f"search ({origin}): {fault}" for fault in visit.close()]
            context.close()
    return faults


def _stays(page: Path) -> bool:
    """Not one that only leads to another, as the first does to the introduction: what it names is among the links."""
    return 'http-equiv="refresh"' not in page.read_text().lower()


class _Visit:
    """One page in one tab, and what is wrong with it."""

    def __init__(self, context, url: str, base: str, view: tuple[int, str]) -> None:
        self.faults: list[str] = []
        self.tab = tab = context.new_page()
        tab.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        tab.on("console", lambda said: self.faults.append(f"console: {said.text}") if said.type == "error" else None)
        tab.on("requestfailed", lambda asked: self.faults.append(f"request failed: {asked.url}"))
        tab.on("response", lambda got: self.faults.append(f"{got.status}: {got.url}") if got.status >= 400 else None)
        inside = (*LOCAL, base)
        tab.on(
            "request",
            lambda asked: None if asked.url.startswith(inside) else self.faults.append(f"external: {asked.url}"),
        )
        self.show(*view)
        tab.goto(url)
        tab.wait_for_load_state()
        tab.evaluate(_in_page("settled"))

    def show(self, width: int, scheme: str) -> None:
        self.tab.set_viewport_size({"width": width, "height": 900})
        self.tab.emulate_media(color_scheme=scheme)

    def look(self, views) -> None:
        for width, scheme in views:
            self.show(width, scheme)
            self.tab.wait_for_timeout(50)
            self.faults += [f"{width} px, {scheme}: {fault}" for fault in self.tab.evaluate(_in_page("look"))]

    def try_out(self) -> None:
        """Focus what can have it, move each instrument's first slider, write a step of the live page."""
        tab = self.tab
        tab.keyboard.press("Tab")
        self.faults += tab.evaluate(_in_page("rings"))
        for number in range(tab.locator(".instrument").count()):
            one = tab.locator(".instrument").nth(number)
            before = " ".join(one.locator(".said").all_inner_texts())
            one.locator("input[type=range]").first.focus()
            tab.keyboard.press("ArrowRight")
            if len(before) < 50 or " ".join(one.locator(".said").all_inner_texts()) == before:
                self.faults.append(f"instrument {one.get_attribute('data-name')} does not answer")
        if tab.url.endswith("live/index.html"):
            tab.wait_for_function("window.DMS_PAGE && DMS_PAGE.race.sides.length === 2")
            tab.focus("#step")
            tab.keyboard.press("Enter")
            if tab.evaluate("DMS_PAGE.race.sides[0].made") < 1:
                self.faults.append("the live page does not answer")

    def ask_axe(self, file: Path, views) -> None:
        """Last in a visit, since it thins the page: contrast is looked at for each part, and code has thousands."""
        self.tab.add_script_tag(path=file)
        self.tab.evaluate(_in_page("thin"))
        for width, scheme, options in views:
            self.show(width, scheme)
            self.tab.wait_for_timeout(SETTLING)
            found = self.tab.evaluate(_in_page("axe"), AXE_OPTIONS | options)
            self.faults += [f"{width} px, {scheme}: {fault}" for fault in found]

    def read_results(self, excerpts: bool) -> None:
        try:
            self.tab.wait_for_selector("ul.search li" + (" p.context" if excerpts else ""), timeout=PATIENCE)
        except Exception as error:  # Playwright's, which is imported only where a browser starts
            self.faults.append(f"no results: {str(error).splitlines()[0]}")
            return
        said = " ".join(self.tab.locator("ul.search p.context" if excerpts else "ul.search").all_inner_texts())
        if not re.search(r"delayed\s+eviction", said, re.I):
            self.faults.append(f"results do not show what was searched: {said[:200]}")

    def close(self) -> list[str]:
        self.tab.close()
        return list(dict.fromkeys(self.faults))


@contextmanager
def _chromium():
    try:
        import axe_playwright_python
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError(f"NOT CHECKED IN A BROWSER: {error.name} is not installed (make setup)") from None
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise ValueError("NOT CHECKED IN A BROWSER: chromium is not installed (apt-get install chromium)")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=FLAGS)
        yield browser, Path(axe_playwright_python.__file__).with_name("axe.min.js")
        browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
