"""Kernels that are forks: the same outputs as an ordinary one, the same end."""

import json
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest

from companion.book import execute
from companion.side_by_side import CONTEXT, FORKS, prepare, run_side_by_side

pytestmark = pytest.mark.skipif(not FORKS, reason="processes cannot be forked here")
EXECUTE = """
import os, signal, sys
from pathlib import Path
import matplotlib.pyplot, pandas  # what they decide at import is another thing in a kernel
from companion.book import execute
os.environ.update({environment!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.is_a_fork = os.getpid()  # only a copy of this process has it
print("call", os.getpid(), flush=True)
execute(Path({path!r}), Path({path!r}).with_name("out.ipynb"), {parameters!r})
"""
CELLS = (
    "import os, sys, warnings\nprint(os.getcwd(), __name__, then)",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2], label='a')\nplt.legend()\nplt.show()\nplt.get_backend()",
    "import pandas as pd\npd.DataFrame({f'column {i}': [1, 2] for i in range(25)})",
    "print('error', file=sys.stderr), warnings.warn('warned')",
    "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A, os.environ['OMP_NUM_THREADS']",
)


@pytest.fixture(scope="module", autouse=True)
def _imported_once():
    prepare(["companion.book", "ipykernel.kernelapp", "matplotlib.pyplot", "pandas"])


def written(path: Path, *cells: str) -> Path:
    """A notebook with a parameter ``then`` and these cells."""
    first = nbformat.v4.new_code_cell("then = 1", metadata={"tags": ["parameters"]})
    found = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    found.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(found, path)
    return path


def executing(path: Path, environment=(), **parameters) -> partial:
    """A call of run_side_by_side that executes a notebook into out.ipynb beside it."""
    return partial(exec, EXECUTE.format(path=str(path), environment=dict(environment), parameters=parameters), {})


def outputs(path: Path) -> list[dict]:
    """Of each code cell: what it printed, whatever the portions, and showed, without the id of the process."""
    found = []
    for cell in nbformat.read(path, 4).cells:
        streams = [output for output in cell.outputs if output.output_type == "stream"]
        shown = [output for output in cell.outputs if output.output_type != "stream"]
        printed = {name: "".join(part.text for part in streams if part.name == name) for name in ("stdout", "stderr")}
        found.append(json.loads(re.sub(r"ipykernel_\d+", "ipykernel", json.dumps({**printed, "shown": shown}))))
    return found


def ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(condition):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def test_kernel_is_a_fork_of_the_call_which_is_one_of_the_server(tmp_path):
    asked = "import os, sys\nprint(os.getppid(), sys.is_a_fork, os.getsid(0) == os.getpid())"
    path = written(tmp_path / "a.ipynb", asked)
    run_side_by_side({"a": executing(path)}, {"a": []}, tmp_path)
    call = (tmp_path / "a.log").read_text().split()[1]
    assert outputs(tmp_path / "out.ipynb")[1]["stdout"].split() == [call, call, "True"]


@pytest.mark.parametrize("environment", [{}, {"MPLBACKEND": "agg"}], ids=["inline", "agg"])
def test_outputs_are_those_of_an_ordinary_kernel(tmp_path, monkeypatch, environment):
    monkeypatch.setattr("companion.side_by_side._share", lambda: (1, 3))
    path = written(tmp_path / "a.ipynb", *CELLS)
    run_side_by_side({"a": executing(path, environment, then=7)}, {"a": []}, tmp_path)
    found = outputs(tmp_path / "out.ipynb")
    for name, value in {"OMP_NUM_THREADS": "3", **environment}.items():
        monkeypatch.setenv(name, value)
    execute(path, tmp_path / "ordinary.ipynb", {"then": 7})
    assert found == outputs(tmp_path / "ordinary.ipynb")
    assert found[1]["stdout"] == f"{tmp_path} __main__ 7\n"
    assert ("image/png" in str(found[2])) == (not environment)


def test_killed_kernel_is_an_error(tmp_path):
    path = written(tmp_path / "a.ipynb", "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="Kernel died"):
        run_side_by_side({"a": executing(path)}, {"a": []}, tmp_path)
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_call_leaves_no_kernel(tmp_path, number):
    log = tmp_path / "pid"
    path = written(
        tmp_path / "a.ipynb", f"import os, time\nopen({str(log)!r}, 'w').write(str(os.getpid()))", "time.sleep(600)"
    )
    process = CONTEXT.Process(target=executing(path))
    process.start()
    kernel = int(wait_for(lambda: log.exists() and log.read_text()))
    os.kill(process.pid, number)
    wait_for(lambda: process.exitcode)
    wait_for(lambda: ended(kernel))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("parent", ["goes on", "is killed"])
def test_copy_that_gets_no_notebook_ends(tmp_path, parent):
    log = tmp_path / "pid"
    code = f"""
import os, time
from companion.forked_kernel import kernel_manager
with kernel_manager() as manager:
    open({str(log)!r}, "w").write(str(manager(kernel_name="python3").provisioner.copy.pid))
    if {parent == "is killed"}:
        os.kill(os.getpid(), 9)
time.sleep(600)
"""
    process = CONTEXT.Process(target=exec, args=(code, {}))
    process.start()
    copy = int(wait_for(lambda: log.exists() and log.read_text()))
    wait_for(lambda: ended(copy))
    assert process.is_alive() == (parent == "goes on")
    process.kill()
    process.join()


def test_interrupt_reaches_the_cell(tmp_path):
    path = written(tmp_path / "a.ipynb", "import time\nprint('begun')\ntime.sleep(600)")
    code = f"""
import nbclient, nbformat
from companion.forked_kernel import kernel_manager
notebook = nbformat.read({str(path)!r}, 4)
with kernel_manager() as manager:
    nbclient.NotebookClient(notebook, timeout=3, interrupt_on_timeout=True, kernel_manager_class=manager).execute()
"""
    with pytest.raises(RuntimeError, match=r"CellExecutionError(.|\n)*begun(.|\n)*KeyboardInterrupt"):
        run_side_by_side({"a": partial(exec, code, {})}, {"a": []}, tmp_path)
