"""A wheel, built and installed into an environment of its own, works where there is no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from companion.cli.main import main

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "gguf",
    "lm_eval",
    "math_verify",
    "matplotlib",
    "nbformat",
    "papermill",
    "reasoning_gym",
    "seaborn",
    "triton",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs a command of the new environment in an empty directory.

    The dependencies come from the environment of the tests, by a .pth file: the editable install's own is not read so.
    Packages of the optional groups cannot be imported.
    """
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([programs / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))")
    (empty := folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *arguments):
        command = [programs / program, *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    return run


def test_packages_and_data_are_imported_from_the_wheel(installed):
    script = """
import sys, companion, dms_core, dms_kernels
from companion.paths import CHECKOUT, DATA
assert CHECKOUT is None
assert all(str(package.__path__[0]).startswith(sys.prefix) for package in (companion, dms_core, dms_kernels))
print(*sorted(str(path.relative_to(DATA)) for path in DATA.rglob("*") if path.is_file()), sep="\\n")
"""
    done = installed("python", "-c", script)
    assert done.returncode == 0, done.stderr
    files = [path for path in (ROOT / "data").rglob("*.*") if path.suffix not in (".py", ".pyc", ".png")]
    assert done.stdout.split() == sorted(str(path.relative_to(ROOT / "data")) for path in files)


def test_embedded_model_generates_with_a_dms_cache(installed):
    script = """
import torch
from companion.paths import REASONER
from dms_core import DMSCache, load_model
model = load_model(str(REASONER / "dms-cr4"))
cache = DMSCache.for_model(model)
out = model.generate(torch.arange(1, 40)[None], past_key_values=cache, min_new_tokens=20, max_new_tokens=20)
print(out.shape[1], cache.get_seq_length())
"""
    done = installed("python", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["59", "58"]


@pytest.mark.parametrize(
    "arguments, shown",
    [
        ("plan --model qwen-r1-32b --batch 64 --context 32768 --cr 8", "qwen-r1-32b"),
        ("retrofit --list", "smollm2-135m"),
        ("curves", "margin"),
        ("published", "|"),
    ],
    ids=lambda value: value.split()[0],
)
def test_command_prints_what_it_prints_in_the_checkout(installed, arguments, shown, monkeypatch, capsys):
    done = installed("dms", *arguments.split())
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    monkeypatch.chdir(ROOT)
    assert main(arguments.split()) == 0
    assert done.stdout == capsys.readouterr().out


def test_curves_as_json_hold_margins(installed):
    done = installed("dms", "curves", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["margins"]


@pytest.mark.parametrize("command", ["reproduce", "chapters"])
def test_command_that_needs_the_repository_says_so_in_one_line(installed, command):
    arguments = ["--profile", "smoke"] if command == "reproduce" else [".", "book"]
    done = installed("dms", command, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"dms {command} needs the repository" in done.stderr
