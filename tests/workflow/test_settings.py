"""Every field of a workflow configuration is read or refused before anything runs; a checkout may lie anywhere."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from dms_core.baselines import BASELINE_NAMES
from dms_core.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "workflow"))
settings = importlib.import_module("settings")
TASK = {"chains": 4, "lengths": [64, 128], "widths": [1, 4]}
MODEL = {"model": "m", "name": "n", "recipe": "smollm2-135m", "methods": {"vanilla": [1], "dms": [2, 4]}}
MODEL |= {"tasks": {"traces": TASK}}


def read(text: str) -> dict:
    """Fields of YAML text, over those of a model that is complete."""
    return settings.settings({**MODEL, **yaml.safe_load(text)})


def test_exponents_that_yaml_reads_as_text_are_numbers():
    filled = read("tasks: {traces: {chains: 1e1, lengths: [8e3, 1.6e4], widths: [1]}}\nshards: '2'")
    assert filled["tasks"]["traces"] | {"chains": 10, "lengths": [8000, 16000]} == filled["tasks"]["traces"]
    assert filled["shards"] == 2
    assert read("methods: {vanilla: [1], dms: [2e0]}")["methods"]["dms"] == [2.0]
    filled = settings.settings(yaml.safe_load("profile: smoke\nseed: 1e1\nnotebooks: {06: {a: 2e2, b: [1e-4], c: e5}}"))
    assert filled["seed"] == 10 and filled["notebooks"] == {"6": {"a": 200, "b": [1e-4], "c": "e5"}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: {p: {chains: 4, lengths: [8k], widths: [1]}}", "p: lengths: item 1 '8k': must be a whole number >= 1"),
        ("tasks: {p: {chains: 4, lengths: [0.5], widths: [1]}}", "lengths: item 1 0.5: must be a whole number >= 1"),
        ("tasks: {p: {chains: 4, lengths: 64, widths: [1]}}", "p: lengths 64: must be a list of one or more"),
        ("tasks: {p: {chains: yes, lengths: [64], widths: [1]}}", "p: chains True: must be a whole number >= 1"),
        ("tasks: {p: {chains: 4, lengths: [64], widths: [8]}}", r"p: widths \[8\]: must be <= chains, 4"),
        ("tasks: {p: {chains: 4, lengths: [64]}}", "p: also needs widths"),
        ("tasks: {p: {chain: 4}}", "p: unknown chain; allowed: chains, lengths"),
        ("tasks: {a b: {chains: 4}}", "tasks: 'a b': must match"),
        ("tasks: [p]", "tasks .*must be a mapping"),
        ("methods: {dms: [5]}", "methods: dms: CR 5: recipe smollm2-135m makes checkpoints at 2, 3, 4"),
        ("methods: {dms: [.nan]}", "dms: item 1 nan: must be a number >= 1"),
        ("methods: {dmc: [4]}", "methods: dmc: must be one of dms, vanilla"),
        ("recipe: smollm3", "recipe 'smollm3': must be a YAML file or one of"),
        ("architecture: {layers: 2}", "architecture: hidden, mlp, kv_width, vocabulary missing"),
        ("architecture: {layers: two}", "architecture: layers 'two': must be a whole number >= 1"),
        ("resources: {sample: {gpus: one}}", "sample: gpus 'one': must be a whole number >= 0"),
        ("resources: {sample: {mem: 16}}", "sample: mem 16: must be text such as 16GB"),
        ("resources: {sample: {runtime: soon}}", "runtime 'soon': must be minutes, or text such as"),
        ("resources: {samples: {gpus: 1}}", "resources: 'samples': must match default"),
        ("notebooks: {06_hyperscaling: 3}", "06_hyperscaling 3: must be a mapping of parameters"),
        ("name: 3", "name 3: must be text"),
    ],
)
def test_value_that_a_field_may_not_have_is_named_with_what_it_may(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_every_field_has_a_default_and_a_reader():
    for table in (settings.EMBEDDED, settings.MODEL, settings.TASK, settings.RESOURCE):
        assert all(callable(reader) for _, reader in table.values())
    assert set(settings.METHODS) == {"dms", "vanilla", *BASELINE_NAMES}
    assert load_recipe("smollm2-135m").retrofit.schedule.saves()


def copy_of_the_checkout(where: Path) -> Path:
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, where / name)
    kernels = Path("kernels", "dms_kernels", "cpu", "__pycache__")
    for compiled in (ROOT / kernels).glob("*.nb?"):  # by numba, for sources of that time and size
        (where / kernels).mkdir(exist_ok=True)
        shutil.copy2(compiled, where / kernels)
    return where


@pytest.mark.slow
def test_checkout_in_a_directory_with_a_space_samples_summarises_and_executes_a_notebook(tmp_path):
    pytest.importorskip("snakemake")
    pytest.importorskip("papermill")
    root = copy_of_the_checkout(tmp_path / "my dir" / "a checkout")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}

    def snakemake(*words):
        command = [sys.executable, "-m", "snakemake", *words]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    local = ["--profile", "workflow/profiles/local", "--cores", "1", "--configfile"]
    task = {"chains": 2, "lengths": ["1.6e1", 32], "widths": [1, 2], "options": "--limit 2 --batch 4"}
    facts = {"model": "data/reasoner", "name": "a name", "recipe": "none", "methods": {"vanilla": [1]}}
    parameters = nbformat.v4.new_code_cell("word = ''", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters], metadata=kernel), root / "notebooks" / "99_small.ipynb")
    facts |= {"runs": "the runs", "tasks": {"traces": task}, "notebooks": {"99_small": {"word": "two words"}}}
    (root / "my config.yaml").write_text(yaml.safe_dump(facts))
    targets = ["the runs/a name/traces/published.md", "the runs/a name/notebooks/99_small.ipynb"]
    snakemake(*targets, *local, "my config.yaml")
    assert all((root / target).stat().st_size for target in targets)
