"""The book: stages of the main job and notebooks side by side, then Jupyter Book over the executed notebooks."""

import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import nbformat
import papermill

from companion.experiments.run import Run
from companion.experiments.stages import run_stage, stages
from companion.forked_kernel import kernel_manager
from companion.paths import REASONER, checkout
from companion.side_by_side import run_side_by_side
from dms_core.storage import read_json, write_text

STAGELESS = ("01", "02", "03", "04", "08", "09")  # chapters that need no stage
TRAINED = ("05",)  # that need no records; all others need the summary


def reproduce(
    profile: str, runs: Path, seed: int = 0, root: Path | None = None, book: bool = True, base: Path = REASONER
) -> dict:
    """Run the whole main job, what does not wait for each other side by side; a repeated call reuses finished stages.

    book: also execute the chapters, which are of the embedded model, and render them.  base: without them, another
    model that knows the same tasks.  Returns {"seconds", "parts": {stage or notebook: seconds},
    "retrofit", "book"}, the last the first page or, without a book, the file of the curves.  Raises ValueError where
    there is no repository or no model, RuntimeError that names each stage and notebook that failed, after the
    others are done.
    """
    began, root = time.time(), root or (checkout("dms reproduce") if book else Path())
    run = Run.of(profile, Path(runs).resolve(), seed, base=base)
    needs = {name: list(stage.needs) for name, stage in stages(run).items()}
    calls = {stage: partial(run_stage, run, stage) for stage in needs}
    trained = [stage for stage in needs if stage.startswith(("retrofit-", "held-out-"))]
    values = {"profile": profile, "seed": seed, "run_dir": str(run.root)}
    for chapter in sorted((root / "notebooks").glob("[0-9]*.ipynb"), reverse=True) if book else ():  # 07 takes longest
        name, out = chapter.stem, root / "book" / "notebooks" / chapter.name
        needs[name] = [] if name[:2] in STAGELESS else trained if name[:2] in TRAINED else ["summary"]
        calls[name] = partial(execute, chapter, out, values)
    parts = run_side_by_side(calls, needs, run.root / "logs")
    page = build_book(root / "book") if book else run.root / "curves.json"
    facts = read_json(run.root / "curves.json")["retrofit"]
    return {"seconds": round(time.time() - began, 1), "parts": parts, "retrofit": facts, "book": str(page)}


def check_parameters(notebook: Path, parameters: Iterable[str]) -> None:
    """Raises ValueError for a parameter that the notebook does not have, naming it and those that it has."""
    known = set(papermill.inspect_notebook(notebook))
    if unknown := set(parameters) - known:
        raise ValueError(f"{notebook.name}: unknown parameters {sorted(unknown)}; it has {sorted(known)}")


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Execute one notebook; an unknown parameter is an error.  A failed copy stays beside ``out`` for reading."""
    check_parameters(notebook, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    running = out.with_suffix(".running.ipynb")
    options = {"cwd": notebook.parent, "kernel_name": "python3", "progress_bar": False, "log_output": False}
    with kernel_manager() as manager:
        papermill.execute_notebook(notebook, running, parameters, kernel_manager_class=manager, **options)
    content = nbformat.read(running, 4)
    content.cells = [cell for cell in content.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    write_text(out, nbformat.writes(content) + "\n")
    running.unlink()


def render_chapters(notebooks: Path, out: Path) -> Path:
    """Render the book from a directory of executed notebooks, in ``out``, whose contents are replaced.

    Returns its first page.  Raises ValueError without notebooks, and for a directory that is no copy of the book.
    """
    book = checkout("dms chapters") / "book"  # before anything is deleted
    chapters = [path for path in sorted(notebooks.glob("[0-9]*.ipynb")) if not path.stem.endswith(".running")]
    if not chapters:
        raise ValueError(f"{notebooks}: holds no executed notebooks (NN_name.ipynb)")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held - {"_build"} and "_toc.yml" not in held:
        raise ValueError(f"{out}: exists and is no copy of the book; name another directory")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(book, out, ignore=shutil.ignore_patterns("_build", "notebooks", "__pycache__"))
    (out / "notebooks").mkdir()
    for path in chapters:
        shutil.copy(path, out / "notebooks")
    return build_book(out)


def build_book(book_dir: Path) -> Path:
    """Build the HTML book in ``book_dir``, warnings as errors and without network, and return its first page.

    Expects executed copies of the notebooks in ``book_dir``/notebooks.  Every page is rebuilt, so that a warning hidden
    in a cached page cannot pass.  Raises RuntimeError with the end of the log when Jupyter Book fails or warns.
    """
    tool = Path(sysconfig.get_path("scripts")) / "jupyter-book"
    if not tool.exists():
        raise RuntimeError(f"{tool} not found: install the `book` extra (pip install 'dms-companion[book]')")
    command = [tool, "build", "--all", "-q", "-W", "-n", "--keep-going", book_dir]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryDirectory() as place:
        with subprocess.Popen(command, **pipes, text=True, errors="replace") as build:
            from companion.live import write_live  # imports torch, meanwhile

            live = write_live(Path(place) / "live").parent
            said, _ = build.communicate()
        if build.returncode:
            end = "\n".join(said.splitlines()[-60:])
            raise RuntimeError(f"jupyter-book exited with {build.returncode}:\n{end}")
        shutil.copytree(live, book_dir / "_build" / "html" / "live", dirs_exist_ok=True)
    return book_dir / "_build" / "html" / "index.html"
