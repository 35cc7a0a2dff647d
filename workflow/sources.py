"""Which files of this repository a module or a notebook runs, found by reading its imports; nothing is executed.

A rule takes them as input, so that it runs again when one of them has changed, and does not when any other file has.
An import of a package's own name stands for its ``__init__``; of ``dms_kernels``, which picks implementations by device
while it runs, all files count but its benchmarks and its compiler driver.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dms_core": ROOT / "dms_core",
    "companion": ROOT / "companion",
    "dms_kernels": ROOT / "kernels" / "dms_kernels",
}
ASIDE = ("benchmarks", "aot.py")  # of dms_kernels: part of a run only where imported by name


def sources(entries: Iterable[str | Path]) -> list[Path]:
    """The entries' files (module names, or paths of .py and .ipynb files) and all that they import, directly or not.

    Raises ValueError for a module that this repository does not have.
    """
    done, todo = set(), []
    for entry in entries:
        file = entry if isinstance(entry, Path) else _file(entry)
        if file is None:
            raise ValueError(f"module {entry!r}: not in {', '.join(PACKAGES)}")
        todo.append(file)
    while todo:
        file = todo.pop()
        if file not in done:
            done.add(file)
            todo.extend(_imported(file))
    return sorted(done)


def digest(files: Iterable[Path]) -> str:
    """A hash of names and contents."""
    facts = hashlib.sha256()
    for file in sorted(files):
        facts.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return facts.hexdigest()[:16]


@cache
def _imported(file: Path) -> tuple[Path, ...]:
    """Files that one file imports, at its top or inside a function."""
    if ROOT / "kernels" in file.parents and file.name == "__init__.py" and file.parent.name == "dms_kernels":
        return tuple(f for f in file.parent.rglob("*.py") if not set(ASIDE) & set(f.relative_to(file.parent).parts))
    names = set()
    for node in ast.walk(ast.parse(_code(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found = {name for name in submodules if _file(name)}
            names |= found | ({node.module} if found != submodules else set())
    return tuple(path for path in map(_file, sorted(names)) if path)


def _code(file: Path) -> str:
    if file.suffix != ".ipynb":
        return file.read_text()
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def _file(module: str) -> Path | None:
    """The file of a module of this repository, else None."""
    package, *rest = module.split(".")
    if package not in PACKAGES:
        return None
    path = PACKAGES[package].joinpath(*rest)
    candidates = [path / "__init__.py", path.with_suffix(".py")]
    return next((file for file in candidates if file.exists()), None)
