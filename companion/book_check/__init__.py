"""Does the rendered book work for its readers?  ``make book-check`` asks; CI asks of the book that it builds itself.

Sources: spelling, notebooks without outputs, an address for each reference.  Pages: links and anchors, sizes.  Each
page in headless Chromium, from its file and over HTTP, with no network, at 1280 and 390 px, light and dark: no error in
the console, no failed request and none that leaves the machine, formulas rendered, images loaded and described, nothing
wider than the window, a ring around what has the focus, no fault that axe finds; search, instruments and live page
answer.

A check returns its faults as lines, "page: what is wrong"; none is an empty list.  ``build_book`` itself is strict
about references and citations.
"""

import time
from functools import partial
from pathlib import Path

from companion.book_check.browser import check_pages
from companion.book_check.files import check_files
from companion.book_check.sources import check_sources, check_with_myst
from companion.paths import checkout

__all__ = ["check_files", "check_pages", "check_sources", "check_with_myst", "main"]


def main(folder: str | None = None) -> int:
    """Check a rendered book (default: that of ``make book``) and the sources; print the faults, return how many."""
    began, root = time.monotonic(), checkout("book_check")
    html = Path(folder) if folder else root / "book" / "_build" / "html"
    checks = (partial(check_sources, root), partial(check_files, html), partial(check_pages, html))
    faults = []
    for check in (*checks, partial(check_with_myst, html.resolve().parent.parent)):
        try:
            faults += check()
        except ValueError as error:
            faults.append(str(error))
    print("\n".join(faults), f"{len(faults)} faults; {time.monotonic() - began:.0f} s", sep="\n" if faults else "")
    return len(faults)
