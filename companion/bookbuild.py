"""Render the book: Jupyter Book over the executed notebooks, warnings as errors, no network."""

import subprocess
import sysconfig
from pathlib import Path


def build_book(book_dir: Path) -> Path:
    """Build the HTML book in `book_dir` and return the path of its first page.

    Expects executed copies of the notebooks in `book_dir`/notebooks. Every page is rebuilt, so that a warning hidden
    in a cached page cannot pass. Raises RuntimeError with the end of the log when Jupyter Book fails or warns.
    """
    tool = Path(sysconfig.get_path("scripts")) / "jupyter-book"
    if not tool.exists():
        raise RuntimeError(f"{tool} not found: install the `book` extra (pip install 'dms-companion[book]')")
    command = [tool, "build", "--all", "-q", "-W", "-n", "--keep-going", book_dir]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"jupyter-book exited with {done.returncode}:\n" + "\n".join(done.stdout.splitlines()[-60:]))
    return book_dir / "_build" / "html" / "index.html"
