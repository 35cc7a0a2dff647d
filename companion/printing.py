"""The rendered book as one PDF: headless Chromium prints each page, in the order of the contents; pypdf joins them."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE = 20_000  # virtual milliseconds in which scripts may finish: formulas


def print_book(html: Path, toc: Path, out: Path) -> int:
    """Print the pages below ``html`` that the contents ``toc`` name; returns how many sheets ``out`` has.

    Raises ValueError without Chromium or pypdf, and for a page that is not there; RuntimeError if printing one fails.
    """
    try:
        from pypdf import PdfWriter
    except ImportError:
        raise ValueError("pypdf is not installed: pip install 'dms-companion[book]'") from None
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise ValueError(f"none of {', '.join(PROGRAMS)} is installed, and one must be (apt-get install chromium)")
    pages = [(title, html / f"{name}.html") for title, name in contents(yaml.safe_load(toc.read_text()))]
    if missing := [str(page) for _, page in pages if not page.exists()]:
        raise ValueError(f"{missing[0]}: no such page; render the book first (make book)")
    whole = PdfWriter()
    with tempfile.TemporaryDirectory() as folder:
        parent = None
        for number, (part, page) in enumerate(tqdm(pages, desc="pages", unit="page")):
            sheets = _printed(program, page, Path(folder) / f"{number}.pdf")
            first = len(whole.pages)
            whole.append(sheets, import_outline=False)
            if part:
                parent = whole.add_outline_item(part, first)
            whole.add_outline_item(_title(page), first, parent=parent)
        whole.compress_identical_objects()
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write(out)
    return len(whole.pages)


def contents(toc: dict) -> Iterator[tuple[str | None, str]]:
    """Each page of a Jupyter Book's _toc.yml in order: the part that begins with it, or None, and its name."""
    yield None, toc["root"]
    for part in toc.get("parts", [{"chapters": toc.get("chapters", [])}]):
        for number, chapter in enumerate(part["chapters"]):
            yield part.get("caption") if number == 0 else None, chapter["file"]


def _printed(program: str, page: Path, out: Path) -> Path:
    with tempfile.TemporaryDirectory() as profile:
        where = [f"--user-data-dir={profile}", f"--virtual-time-budget={PATIENCE}", "--no-pdf-header-footer"]
        command = [program, *FLAGS, *where, f"--print-to-pdf={out}", page.resolve().as_uri()]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not out.exists():
        raise RuntimeError(f"{page}: chromium exited with {done.returncode}:\n" + done.stdout[-2000:])
    return out


def _title(page: Path) -> str:
    """What the page calls itself, without the book's name behind it."""
    text = page.read_text(errors="replace")
    return text.partition("<title>")[2].partition("</title>")[0].partition(" — ")[0].strip() or page.stem
