"""Does the rendered book work for its readers?  ``make book-check`` asks; CI asks of the book that it builds itself.

Sources: spelling, notebooks without outputs, an address for each reference.  Pages: links and anchors, sizes.  Each
page in headless Chromium, from its file and over HTTP, with no network, at 1280 and 390 px, light and dark: no error in
the console, no failed request and none that leaves the machine, formulas rendered, images loaded and described, nothing
wider than the window, a ring around what has the focus, no fault that axe finds; search, instruments and live page
answer.

A check returns its faults as lines, "page: what is wrong"; none is an empty list.  ``build_book`` itself is strict
about references and citations.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import nbformat

from companion.paths import checkout
from companion.printing import PROGRAMS

MEGABYTE = 1 << 20
LARGEST, LARGEST_LIVE = 3 * MEGABYTE, 5 * MEGABYTE  # a page with its images; the live page with its models
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
TIMEOUT, PATIENCE = 120_000, 20_000  # milliseconds: for what must come, for results of a search
LOCAL = ("file:", "data:", "blob:", "about:")
VIEWS = {  # of each way to open a page, the first as it loads, the others by resizing and by the system's setting
    "file": ((1280, "light"), (1280, "dark"), (390, "dark"), (390, "light")),
    "http": ((390, "dark"), (390, "light"), (1280, "light"), (1280, "dark")),
}
SETTLED = """async () => {
  for (const picture of document.images) picture.loading = "eager";
  if (window.MathJax && document.querySelector("script[src*=tex-svg]")) {
    while (!MathJax.startup?.promise) await new Promise((done) => setTimeout(done, 20));
    await MathJax.startup.promise;
  }
  await document.fonts.ready;
  await Promise.all([...document.images].map((picture) => picture.decode().catch(() => {})));
}"""
LOOK = """() => {
  const faults = [], wide = innerWidth + 1, clipped = (part) => {
    for (let above = part.parentElement; above; above = above.parentElement)
      if (getComputedStyle(above).overflowX !== "visible") return true;
    return false;
  };
  if (document.documentElement.scrollWidth > innerWidth) {
    const parts = [...document.body.querySelectorAll("*")].filter((part) =>
      part.getBoundingClientRect().right > wide && !clipped(part));
    const name = (part) => `${part.tagName.toLowerCase()}.${part.getAttribute("class") || ""}`;
    faults.push(`${document.documentElement.scrollWidth} px wide: ${parts.slice(0, 3).map(name).join(", ")}`);
  }
  for (const formula of document.querySelectorAll(".math"))
    if (!formula.querySelector("mjx-container"))
      faults.push(`formula not rendered: ${formula.textContent.slice(0, 60)}`);
  for (const error of document.querySelectorAll("mjx-merror, [data-mml-node=merror], [data-mjx-error]"))
    faults.push(`formula with an error: ${error.closest("mjx-container").textContent.slice(0, 60)}`);
  for (const formula of document.querySelectorAll("mjx-container[tabindex='0']"))
    if (formula.scrollWidth <= formula.clientWidth) faults.push("a formula that does not scroll is a tab stop");
  for (const formula of document.querySelectorAll(".math:has(svg)"))
    if (formula.querySelector("svg").getBoundingClientRect().width > formula.clientWidth + 2
        && ![formula, ...formula.children].some((part) => getComputedStyle(part).overflowX === "auto"))
      faults.push(`formula cut off: ${formula.textContent.slice(0, 60)}`);
  const read = document.createTreeWalker(document.querySelector("article") || document.body, NodeFilter.SHOW_TEXT);
  while (read.nextNode())
    if (/\\\\[(\\[]|\\$\\$|\\{(cite|ref|numref|term|doc)(:\\w)?\\}/.test(read.currentNode.data)
        && !read.currentNode.parentElement.closest("pre, code, script, style, mjx-container"))
      faults.push(`markup left as text: ${read.currentNode.data.trim().slice(0, 60)}`);
  for (const picture of document.images) {
    const alt = picture.getAttribute("alt");
    if (!picture.naturalWidth) faults.push(`image not loaded: ${picture.src.slice(-60)}`);
    const decorates = alt === "" && !picture.closest("article");  // the logo beside the book's name
    if (!decorates && (!alt || /_images\\/|\\.(png|svg|jpe?g|gif|webp)$/i.test(alt)))
      faults.push(`image without alt text: ${alt}`);
  }
  return faults;
}"""
RINGS = """() => {
  const bare = [];
  for (const part of document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")) {
    if (!part.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    const around = [part, part.nextElementSibling, ...part.children].filter(Boolean);
    const rings = () => around.map((one) => {
      const { boxShadow, outlineStyle, outlineWidth } = getComputedStyle(one);
      return boxShadow + (parseFloat(outlineWidth) >= 1 ? outlineStyle : "none");
    }).join();
    document.activeElement.blur();
    const before = rings();
    part.focus();
    if (document.activeElement === part && rings() === before)
      bare.push(`no focus ring: ${part.outerHTML.slice(0, 80)}`);
  }
  document.activeElement.blur();
  return bare;
}"""
SETTLING = 800  # ms in which a page of another width has marked what scrolls; after 50 it sometimes has not
AXE_OPTIONS = {"iframes": False, "preload": False, "resultTypes": ["violations"]}
AXE_VIEWS = (  # all rules once, then those that depend on the colours and on the width
    (1280, "light", {"rules": {"label-content-name-mismatch": {"enabled": True}}}),
    (1280, "dark", {"runOnly": ["color-contrast"]}),
    (390, "dark", {"runOnly": ["scrollable-region-focusable"]}),
)
THIN = """() => {
  const seen = new Set();
  for (const part of document.querySelectorAll(".highlight span, .sig span, mjx-container"))
    if (seen.has(part.tagName + part.className)) part.replaceWith(part.textContent);
    else seen.add(part.tagName + part.className);
}"""  # one part of a kind stays
AXE = """async (options) => (await axe.run(document, options)).violations.map((fault) =>
  `axe ${fault.impact} ${fault.id}: ${fault.nodes.length} times, first ${fault.nodes[0].html.slice(0, 90)}`)"""


# Sources.


def check_sources(root: Path) -> list[str]:
    """Faults of what a checkout makes the book from: spelling, outputs in notebooks, references without address."""
    faults = [f"{path.relative_to(root)}: {what}" for path, what in _stored_outputs(root)]
    entries = re.split(r"^(?=@)", (root / "book" / "references.bib").read_text(), flags=re.M)[1:]
    addressed = re.compile(r"[,\s](doi|eprint|url)\s*=", re.I)
    faults += [
        f"references.bib: {entry.splitlines()[0]} has no DOI, eprint or URL"
        for entry in entries
        if not addressed.search(entry)
    ]
    return faults + _misspelt(root)


def _stored_outputs(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        if any(cell.outputs or cell.execution_count for cell in cells):
            yield path, "holds outputs (nbstripout removes them)"


def _misspelt(root: Path) -> list[str]:
    """What codespell finds in the repository's text; the words that it may not know are in pyproject.toml."""
    names = ("book/*.md", "notebooks/*.ipynb", "*.md", "companion/**/*.py", "dms_core/**/*.py", "kernels/**/*.py")
    files = sorted(path for name in names for path in root.glob(name))
    command = [sys.executable, "-m", "codespell_lib", "--toml", root / "pyproject.toml", *files]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [line.replace(f"{root}/", "") for line in done.stdout.splitlines()]


def check_with_myst(book: Path) -> list[str]:
    """What Jupyter Book 2, whose engine is mystmd, finds wrong with a book's sources (``myst.yml``).

    Raises ValueError where it is not installed.
    """
    tool = Path(sysconfig.get_path("scripts")) / "myst"
    if not tool.exists() or shutil.which("node") is None:
        raise ValueError("NOT CHECKED WITH JUPYTER BOOK 2: mystmd and node must be installed (apt-get install nodejs)")
    command = [tool, "build", "--site"]
    done = subprocess.run(command, cwd=book, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wrong = re.compile("^(?:\N{NO ENTRY}|.*(?:Could not link|target was not found)).*", re.M)
    said = wrong.findall(done.stdout) or (done.stdout.splitlines()[-3:] if done.returncode else [])
    return [f"Jupyter Book 2: {line.strip()}" for line in dict.fromkeys(said)]


# Pages as files.


class _Page(HTMLParser):
    """What a page names, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.images: list[str] = []
        self.kinds: set[tuple[str, str]] = set()  # of its parts, by tag and class; those of a line of code are one
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.kinds |= {(tag, name) for name in (found.get("class") or "").split() or [""] if tag != "span"}
        self.links += [found[key] for key in ("href", "src") if found.get(key) is not None]
        self.images += [found["src"]] if tag == "img" and found.get("src") else []
        if tag == "meta" and (found.get("http-equiv") or "").lower() == "refresh":
            self.links.append(found["content"].partition("url=")[2])


def pages_of(html: Path) -> list[Path]:
    """The pages of a rendered book, without what its theme keeps and without the part that the first page embeds."""
    found = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts and path.name != "embed.html"]
    if not found:
        raise ValueError(f"{html}: holds no pages; render the book first (make book)")
    return found


def check_files(html: Path) -> list[str]:
    """Faults of a rendered book that its files tell: links and anchors that lead nowhere, pages that are too large."""
    pages, faults = {path.resolve(): _Page(path.read_text()) for path in pages_of(html)}, []
    for path, page in pages.items():
        name = path.relative_to(html.resolve())
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                faults.append(f"{name}: {link} leads nowhere")
            elif anchor and target in pages and anchor not in pages[target].names:
                faults.append(f"{name}: {link} names no part of {target.name}")
        images = {(path.parent / unquote(link)).resolve() for link in page.images if not urlsplit(link).scheme}
        live = path.parent.name == "live"
        parts = path.parent.iterdir() if live else {path} | images
        size = sum(part.stat().st_size for part in parts if part.is_file())
        if size > (LARGEST_LIVE if live else LARGEST):
            faults.append(f"{name}: {size / MEGABYTE:.1f} MB with its images")
    return faults


# Pages in a browser.


def sample_of(pages: list[Path]) -> list[Path]:
    """Pages that together have a part of every kind, and the live one: each next has most kinds that are missing."""
    kinds = {path: _Page(path.read_text()).kinds for path in pages}
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
        tab.evaluate(SETTLED)

    def show(self, width: int, scheme: str) -> None:
        self.tab.set_viewport_size({"width": width, "height": 900})
        self.tab.emulate_media(color_scheme=scheme)

    def look(self, views) -> None:
        for width, scheme in views:
            self.show(width, scheme)
            self.tab.wait_for_timeout(50)
            self.faults += [f"{width} px, {scheme}: {fault}" for fault in self.tab.evaluate(LOOK)]

    def try_out(self) -> None:
        """Focus what can have it, move each instrument's first slider, write a step of the live page."""
        tab = self.tab
        tab.keyboard.press("Tab")
        self.faults += tab.evaluate(RINGS)
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
        self.tab.evaluate(THIN)
        for width, scheme, options in views:
            self.show(width, scheme)
            self.tab.wait_for_timeout(SETTLING)
            found = self.tab.evaluate(AXE, AXE_OPTIONS | options)
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


def main(folder: str | None = None) -> int:
    """Check a rendered book (default: that of ``make book``) and the sources; print the faults, return how many."""
    began, root = time.monotonic(), checkout("book_check")
    html = Path(folder) if folder else root / "book" / "_build" / "html"
    checks = (partial(check_sources, root), partial(check_files, html), partial(check_pages, html))
    faults = []
    for check in (*checks, partial(check_with_myst, html.parents[1])):
        try:
            faults += check()
        except ValueError as error:
            faults.append(str(error))
    print("\n".join(faults), f"{len(faults)} faults; {time.monotonic() - began:.0f} s", sep="\n" if faults else "")
    return len(faults)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
