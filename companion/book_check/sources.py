"""What a checkout makes the book from: spelling, notebooks without outputs, an address for each reference; and what
Jupyter Book 2 says of it."""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import nbformat


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
