"""Calls run side by side: order, threads, failures, interruption, imports."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from companion.side_by_side import run_side_by_side


def python(code: str) -> partial:
    return partial(exec, code, {})


def note(path, name: str) -> partial:
    return python(f"open({str(path)!r}, 'a').write({name!r} + ' ')")


def test_a_call_runs_after_those_that_it_needs_and_each_once(tmp_path):
    log = tmp_path / "order"
    needs = {"last": ["middle", "first"], "middle": ["first"], "first": []}
    seconds = run_side_by_side({name: note(log, name) for name in needs}, needs, tmp_path / "logs")
    assert log.read_text().split() == ["first", "middle", "last"] and set(seconds) == set(needs)


def test_a_failure_names_itself_and_stops_only_what_needs_it(tmp_path):
    calls = {"bad": python("print('why it failed'); raise SystemExit(3)"), "after": note(tmp_path / "after", "")}
    calls["other"] = note(tmp_path / "other", "ran")
    needs = {"bad": [], "after": ["bad"], "other": []}
    with pytest.raises(RuntimeError, match=r"failed: bad; not run: after\n(.|\n)*bad.log:\nwhy it failed"):
        run_side_by_side(calls, needs, tmp_path / "logs")
    assert (tmp_path / "other").read_text().strip() == "ran" and not (tmp_path / "after").exists()


def test_an_interrupt_ends_the_calls(tmp_path, monkeypatch):
    calls = {"long": python("import time; time.sleep(60)")}

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.side_by_side.time.sleep", interrupt)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(calls, {"long": []}, tmp_path / "logs")
    assert time.time() - began < 30


def test_cores_are_shared_out_among_calls(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.side_by_side.os.sched_getaffinity", lambda _: set(range(9)), raising=False)
    show = python("import os; print(os.environ['OMP_NUM_THREADS'])")
    run_side_by_side({"one": show}, {"one": []}, tmp_path)
    assert (tmp_path / "one.log").read_text() == "2\n"


def test_preloaded_modules_are_imported_once_for_all_calls(tmp_path, monkeypatch):
    module = tmp_path / "slow_to_import.py"
    module.write_text(f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n")
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import sys
from functools import partial
from pathlib import Path
from pathlib import Path


from companion.side_by_side import prepare, run_side_by_side

if __name__ == "__main__":
    prepare(["slow_to_import"])
    calls = {{name: partial(exec, "import slow_to_import", {{}}) for name in "abc"}}
    run_side_by_side(calls, dict.fromkeys(calls, ()), Path({str(tmp_path)!r}))
"""
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    subprocess.run([sys.executable, program], check=True, env=environment)
    assert (tmp_path / "imports").read_text() == "x"
