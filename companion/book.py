"""``dms reproduce``: the long stages, the notebooks in order with papermill, then the rendered book."""

import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
import papermill
from tqdm import tqdm

from companion.bookbuild import build_book
from companion.experiments.main import Pipeline
from companion.experiments.profiles import get_profile
from companion.paths import checkout


def reproduce(profile: str, runs: Path, seed: int = 0, root: Path | None = None) -> dict:
    """Run the whole main job; a repeated call reuses what ``runs``/<profile> holds.  Returns what --json prints."""
    began, root = time.time(), root or checkout("dms reproduce")
    run_dir = (runs / profile).resolve()
    pipeline = Pipeline(get_profile(profile), run_dir, seed=seed)
    summary = pipeline.run()  # the long stages, with their progress on the terminal; the notebooks find them done
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    executed = root / "book" / "notebooks"
    executed.mkdir(exist_ok=True)
    for notebook in tqdm(notebooks, desc="notebooks", unit="notebook"):
        execute(notebook, executed / notebook.name, {"profile": profile, "seed": seed, "run_dir": str(run_dir)})
    page = build_book(root / "book")
    return {"seconds": round(time.time() - began, 1), "retrofit": summary["retrofit"], "book": str(page)}


def check_parameters(notebook: Path, parameters: Iterable[str]) -> None:
    """Raises ValueError for a parameter that the notebook does not have, naming it and those that it has."""
    known = set(papermill.inspect_notebook(notebook))
    if unknown := set(parameters) - known:
        raise ValueError(f"{notebook.name}: unknown parameters {sorted(unknown)}; it has {sorted(known)}")


def execute(notebook: Path, out: Path, parameters: dict) -> None:
    """Execute one notebook; an unknown parameter is an error.  A failed copy stays beside ``out`` for reading."""
    check_parameters(notebook, parameters)
    partial = out.with_suffix(".running.ipynb")
    papermill.execute_notebook(
        notebook, partial, parameters, cwd=notebook.parent, progress_bar=False, kernel_name="python3", log_output=False
    )
    content = nbformat.read(partial, 4)
    content.cells = [cell for cell in content.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    nbformat.write(content, out)
    partial.unlink()
