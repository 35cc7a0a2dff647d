import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from forks import program

from companion.tasks.sandbox import sandbox

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_kernels_imported_from_the_repository_root_is_the_distribution():
    script = "import kernels, transformers, dms_kernels, dms_core; assert 'site-packages' in kernels.__file__"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("required", [False, True])
def test_missing_bubblewrap_is_reported_last_and_fails_if_required(required):
    options = ["--require-sandbox"] if required else []
    file = ROOT / "tests" / "companion" / "tasks" / "test_livecodebench.py"

    def run() -> int:
        sandbox.why_not.cache_clear()
        os.environ["PATH"] = str(Path(sys.executable).parent)
        return pytest.main(["-q", "-m", "sandbox", str(file), *options])

    status, said = program(run)
    assert status == required, said
    line = "NOT RUN: 1 tests (no sandbox here: bwrap (bubblewrap) is not installed). To run them: "
    assert required or said.splitlines()[-2] == line + "apt-get install bubblewrap"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_is_tagged_parameters(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", [])
