"""What a machine with a card runs, without one: the order of the first run, and which tests may use the card."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from forks import program

ROOT = Path(__file__).resolve().parents[1]


def module(file: str):
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def first_run():
    return module("kernels/first_run.py")


def test_first_run_goes_on_after_failures_and_keeps_what_was_found(first_run, tmp_path, capsys):
    first_run.STEPS = {
        "fine": (30, ["-c", "print('measured')"]),
        "failing": (30, ["-c", "print('half', flush=True); raise SystemExit(3)"]),
        "endless": (2, ["-c", "import time; print('begun', flush=True); time.sleep(60)"]),
        "last": (30, ["-c", "open(r'{out}/result.json', 'w').write('1')"]),
    }
    assert first_run.main(tmp_path, []) == 1
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert [(step["step"], step["exit"]) for step in steps] == [
        ("fine", 0), ("failing", 3), ("endless", None), ("last", 0),
    ]  # fmt: skip
    logs = {name: (tmp_path / f"{name}.log").read_text().strip() for name in first_run.STEPS}
    assert logs == {"fine": "measured", "failing": "half", "endless": "begun", "last": ""}
    assert (tmp_path / "result.json").exists() and len(capsys.readouterr().out.splitlines()) == 4
    assert first_run.main(tmp_path, ["fine"]) == 0


def test_first_run_has_the_order_that_loses_least_and_files_that_exist(first_run):
    assert list(first_run.STEPS)[:3] == ["smoke", "append-decode", "attention-model"]
    assert list(first_run.STEPS)[-1] == "sanitizer"
    for limit, arguments in first_run.STEPS.values():
        assert 0 < limit <= 600
        assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/"))


def test_first_run_without_a_sanitizer_says_so(first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(first_run.shutil, "which", lambda name: None)
    assert first_run.main(tmp_path, ["sanitizer"]) == 0
    assert "no compute-sanitizer" in (tmp_path / "steps.json").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu-check", "gpu-first-run"])
def test_gpu_targets_install_nothing_and_use_the_given_python(target):
    command = ["make", "-n", "--no-print-directory", target, "PYTHON=/some/python"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert len(lines) == 1 and " /some/python " in lines[0] and "pip" not in lines[0]


def test_gpu_targets_name_every_file_with_gpu_tests():
    marked = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if _has_gpu_tests(file)}
    named = set(re.findall(r"tests/\S*/test_\w+\.py", (ROOT / "Makefile").read_text()))
    assert named == marked


def _has_gpu_tests(file: Path) -> bool:
    return "mark.gpu" in file.read_text() and file != Path(__file__).resolve()


@pytest.mark.parametrize("expression, wanted", [
    ("", False), ("not gpu", False), ("gpu", True), ("gpu and not slow", True), ("not gpu and slow", False),
    ("slow", False),
])  # fmt: skip
def test_card_is_hidden_unless_its_tests_are_asked_for(expression, wanted):
    assert module("tests/conftest.py").wants_card(expression) == wanted


def test_other_tests_run_without_the_card(tmp_path):
    (tmp_path / "test_card.py").write_text(
        "import os\n\ndef test_hidden():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
        "    assert os.environ['TRITON_INTERPRET'] == '1'\n"
    )
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)

    def run() -> int:
        for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"):  # as on a machine with a card
            os.environ.pop(name, None)
        os.chdir(tmp_path)
        return pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not gpu", "--rootdir", str(tmp_path), str(tmp_path)])

    status, said = program(run)
    assert status == 0 and "1 passed" in said, said
