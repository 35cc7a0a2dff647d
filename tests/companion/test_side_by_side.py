"""Commands run side by side: order, threads, failures, interruption."""

import sys
import time

import pytest

from companion.side_by_side import run_side_by_side


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def note(path, name: str) -> list[str]:
    return python(f"open({str(path)!r}, 'a').write({name!r} + ' ')")


def test_a_command_runs_after_those_that_it_needs_and_each_once(tmp_path):
    log = tmp_path / "order"
    needs = {"last": ["middle", "first"], "middle": ["first"], "first": []}
    seconds = run_side_by_side({name: note(log, name) for name in needs}, needs, tmp_path / "logs")
    assert log.read_text().split() == ["first", "middle", "last"] and set(seconds) == set(needs)


def test_a_failure_names_itself_and_stops_only_what_needs_it(tmp_path):
    commands = {"bad": python("print('why it failed'); raise SystemExit(3)"), "after": note(tmp_path / "after", "")}
    commands["other"] = note(tmp_path / "other", "ran")
    needs = {"bad": [], "after": ["bad"], "other": []}
    with pytest.raises(RuntimeError, match=r"failed: bad; not run: after\n(.|\n)*bad.log:\nwhy it failed"):
        run_side_by_side(commands, needs, tmp_path / "logs")
    assert (tmp_path / "other").read_text().strip() == "ran" and not (tmp_path / "after").exists()


def test_an_interrupt_ends_the_commands(tmp_path, monkeypatch):
    commands = {"long": python("import time; time.sleep(60)")}

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.side_by_side.time.sleep", interrupt)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(commands, {"long": []}, tmp_path / "logs")
    assert time.time() - began < 30


def test_cores_are_shared_out_among_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.side_by_side.os.sched_getaffinity", lambda _: set(range(9)), raising=False)
    show = python("import os; print(os.environ['OMP_NUM_THREADS'])")
    run_side_by_side({"one": show}, {"one": []}, tmp_path)
    assert (tmp_path / "one.log").read_text() == "2\n"
