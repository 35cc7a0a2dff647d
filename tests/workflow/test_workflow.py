"""Batch reproduction: configurations resolve, errors name what is wrong, only what a change touches runs again."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import forks
import nbformat
import pytest
import snakemake_calls
import yaml

from companion.cli.main import main
from companion.experiments import main as job
from companion.experiments.profiles import get_profile
from companion.experiments.stages import run_stage, stages

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "workflow" / "config").glob("*.yaml"))
LARGE = [path for path in CONFIGS if "model" in yaml.safe_load(path.read_text())]
sys.path.insert(0, str(ROOT / "workflow"))

estimate, settings, files = map(importlib.import_module, ("estimate", "settings", "sources"))
digest, sources = files.digest, files.sources
pytest.importorskip("snakemake")


def snakemake(directory, config, *options, root=ROOT):
    """Run Snakemake in a directory of its own, with the local profile; returns status and output."""
    flow = root / "workflow"
    place = ["-s", flow / "Snakefile", "--profile", flow / "profiles" / "local", "--directory", directory]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return snakemake_calls.snakemake(
        [*place, "--cores", "1", *options, "--configfile", config], cwd=root, environment=environment
    )


def jobs(output):
    """The table of jobs of a run: {rule: count}."""
    table = output.partition("Job stats:")[2].partition("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^([a-z_]+) +(\d+)$", table, re.M) if name != "total"}


def write(path, **changes):
    path.write_text(yaml.safe_dump({"profile": "smoke", **changes}))
    return path


@pytest.mark.parametrize("config", LARGE, ids=lambda path: path.stem)
def test_dag_of_a_real_model_has_a_grid_for_every_task_and_ratio(config, tmp_path):
    status, output = snakemake(tmp_path, config, "-n", "-q", "rules")
    facts = yaml.safe_load(config.read_text())
    grids = len(facts["tasks"]) * sum(map(len, facts["methods"].values()))
    samples = grids * facts.get("shards", 1)
    assert status == 0, output
    assert jobs(output) | {"sample": samples, "retrofit": 1, "curves": len(facts["tasks"])} == jobs(output)
    assert not any(tmp_path.glob("runs/**/*.json"))


def test_dag_of_the_book_has_every_stage_and_chapter(tmp_path):
    status, output = snakemake(tmp_path, ROOT / "workflow" / "config" / "tiny.yaml", "-n", "-q", "rules")
    assert status == 0, output
    chapters = len(list((ROOT / "notebooks").glob("[0-9]*.ipynb")))
    found = jobs(output)
    assert found["notebook"] == chapters and found["book"] == found["summary"] == 1
    parts = 8, 8, 12  # a retrofit in seven parts and one in one; checkpoints of the first at CR 2 to 8, and the other's
    assert (found["retrofit"], found["held_out"], found["records"]) == parts


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"notebooks": {"06_hyperscaling": {"resample": 5}}}, ["resample", "resamples", "run_dir"]),
        ({"notebooks": {"99_missing": {}}}, ["99_missing", "06_hyperscaling"]),
        ({"sead": 1}, ["sead", "seed"]),
        ({"seed": "8e-3"}, ["seed '8e-3': must be a whole number >= 0"]),
    ],
    ids=["notebook parameter", "notebook", "key", "value"],
)
def test_an_unknown_name_in_a_configuration_stops_everything_and_is_named(changes, named, tmp_path):
    status, output = snakemake(tmp_path, write(tmp_path / "config.yaml", **changes))
    assert status != 0
    assert all(re.search(rf"\b{name}\b", output) for name in named), output
    assert not (tmp_path / "runs").exists()


def test_settings_refuse_a_configuration_that_is_half_a_model():
    with pytest.raises(ValueError, match="methods, tasks"):
        settings.settings({"model": "m", "name": "n", "recipe": "r"})
    with pytest.raises(ValueError, match="either"):
        settings.settings({"model": "m", "profile": "smoke"})
    model = {"model": "m", "name": "n", "recipe": "r", "methods": {"vanilla": [1]}, "tasks": {"traces": {}}}
    with pytest.raises(ValueError, match="shards 0: must be"):
        settings.settings({**model, "shards": 0})
    with pytest.raises(ValueError, match="unknown gpu"):
        settings.settings({"profile": "smoke", "resources": {"default": {"gpu": 1}}})


def test_no_gpus_are_asked_for_where_there_are_none():
    filled = settings.settings(
        {"profile": "smoke", "resources": {"default": {"gpus": 0, "mem": "1GB", "partition": ""}}}
    )
    assert settings.resources(filled, "retrofit") == {"mem": "1GB"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the repository, a directory in which all outputs of the smoke configuration count as made, its
    configuration, and the list of its jobs."""
    root, directory = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("work")
    for part in ("book", "notebooks", "data", "companion", "dms_core", "kernels", "workflow"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    shutil.copy(ROOT / "README.md", root)
    config = write(directory / "config.yaml", notebooks={"06_hyperscaling": {"resamples": 5}})
    _, listing = snakemake(directory, config, "-n", root=root)
    for line in re.findall(r"^    output: (.*)$", listing, re.M):
        for name in line.split(", "):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("made\n")
    status, output = snakemake(directory, config, "--touch", "--forceall", root=root)
    assert status == 0, output
    return root, directory, config, listing


@pytest.fixture(scope="module")
def warm():
    """The command ``dms`` in copies of this process, for a shell."""
    with forks.command(main) as words:
        yield words


def planned(finished):
    root, directory, config, _ = finished
    status, output = snakemake(directory, config, "-n", "-q", "rules", root=root)
    assert status == 0, output
    return {name: count for name, count in jobs(output).items() if name != "all"}


def edited(path, old="", new=""):
    text = path.read_text()
    path.write_text(text.replace(old, new, 1) if old else text + "\n# edited\n")
    return path, text


@pytest.mark.slow
def test_only_what_a_change_touches_runs_again(finished):
    root, _, config, _ = finished
    evidence = {"notebook": 2, "book": 1}  # chapters 06 and 07

    edited(root / "README.md")
    (root / "dms_core" / "sampling.py").touch()  # newer, but the same
    (root / "data" / "reasoner" / "model.safetensors").touch()
    assert planned(finished) == {}

    write(config, notebooks={"06_hyperscaling": {"resamples": 6}})
    assert planned(finished) == {"notebook": 1, "book": 1}
    write(config, notebooks={"06_hyperscaling": {"resamples": 5}})

    path, before = edited(root / "notebooks" / "02_gate.ipynb", "steps = 500", "steps = 501")
    assert planned(finished) == {"notebook": 1, "book": 1}
    path.write_text(before)

    path, before = edited(root / "dms_core" / "budgets" / "curves.py")
    assert planned(finished) == {"summary": 1, "curves": 1, "published": 1, **evidence, "notebook": 4}  # 05 to 08
    path.write_text(before)

    path, before = edited(root / "companion" / "experiments" / "profiles.py", "problems=6", "problems=7")
    again = planned(finished)
    assert again["records"] == 12 and "retrofit" not in again and "held_out" not in again
    path.write_text(before)

    write(config, seed=1, notebooks={"06_hyperscaling": {"resamples": 5}})
    assert planned(finished)["retrofit"] == 3  # DMS to CR 4 and on, immediate


def test_sources_follow_imports_and_nothing_else():
    names = {path.name for path in sources(["dms_core.budgets.curves"])}
    assert names == {"bootstrap.py", "curves.py", "headline.py", "pareto.py", "voting.py"}
    retrofit = {path.relative_to(ROOT).as_posix() for path in sources(["dms_core.train.retrofit"])}
    assert {"dms_core/gate.py", "dms_core/train/schedule.py", "kernels/dms_kernels/gpu/forward.py"} <= retrofit
    assert not {"companion/figures/style.py", "dms_core/sampling.py", "kernels/dms_kernels/aot.py"} & retrofit
    with pytest.raises(ValueError, match="no_such"):
        sources(["dms_core.no_such"])


@pytest.mark.parametrize("chapter", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_sources_of_a_chapter_are_what_it_imports(chapter):
    named = set()
    for cell in nbformat.read(chapter, 4).cells:
        if cell.cell_type == "code":
            found = re.findall(r"^\s*from ((?:companion|dms_core)\.[a-z_.]+) import ([a-z_]+)?", cell.source, re.M)
            paths = [(module.replace(".", "/"), name) for module, name in found]
            named |= {f"{path}/{name}" if (ROOT / path).is_dir() else path for path, name in paths}
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in sources([chapter])}
    assert named and named <= files


def test_digest_changes_with_a_sources_content_and_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text("x = 1\n")
    two.write_text("x = 1\n")
    first = digest([one])
    assert first == digest([one]) != digest([two])
    one.write_text("x = 2\n")
    assert digest([one]) != first


@pytest.mark.slow
def test_stage_names_are_those_of_the_workflow(finished, tmp_path):
    *_, listing = finished
    names = re.findall(r"^    output: .*/stages/([a-z0-9-]+)\.json$", listing, re.M)
    assert set(names) == set(stages(job.Run(get_profile("smoke"), tmp_path)))


@pytest.mark.slow
def test_results_of_other_sources_are_deleted_and_those_of_the_same_reused(tmp_path):
    run = job.Run(get_profile("smoke"), tmp_path)
    name = "records-traces-vanilla-cr1"
    first = run_stage(run, name, "aaaa")
    (file,) = (tmp_path / "records" / "traces").glob("vanilla-cr1-*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")  # interrupted before the last chain
    assert run_stage(run, name, "aaaa")["result"] == first["result"]
    assert file.read_text().splitlines()[:-1] == lines[:-1]  # gone on with, not begun again

    spoilt = [json.dumps({**json.loads(line), "answer": None, "correct": False}) for line in lines]
    file.write_text("\n".join(spoilt) + "\n")
    assert run_stage(run, name, "aaaa")["result"]["right"] == 0
    assert run_stage(run, name, "bbbb")["result"] == first["result"]
    with pytest.raises(ValueError, match="records-traces-vanilla-cr1"):
        run_stage(run, "records-traces-vanilla-cr2")


@pytest.mark.forks
@pytest.mark.slow
def test_a_failed_job_is_tried_again_and_others_go_on(tmp_path, warm):
    """The command fails on the first call for one stage, and always for another."""
    once, broken = tmp_path / "failed_once", "records-search-dms-cr2"
    command = tmp_path / "dms"
    command.write_text(
        f'#!/bin/bash\nif [ "$2" = {broken} ]; then exit 1; fi\n'
        f'if [ "$2" = retrofit-dms ] && [ ! -e {once} ]; then touch {once}; exit 1; fi\n'
        f'exec {warm} "$@"\n'
    )
    command.chmod(0o755)
    targets = [f"runs/smoke/stages/{name}.json" for name in (broken, "held-out-dms-cr2", "held-out-dms-cr3")]
    status, output = snakemake(tmp_path, write(tmp_path / "config.yaml", dms=str(command)), *targets)
    assert status != 0 and once.exists()
    assert [(tmp_path / target).exists() for target in targets] == [False, True, True]
    assert len(re.findall(r"^(?:local)?rule records:", output, re.M)) == 2, output


@pytest.mark.slow
def test_shards_of_which_one_is_lost_give_the_records_and_curves_of_one_job(tmp_path, warm):
    """The second of two shards fails the first time, and alone is tried again."""
    command, lost = tmp_path / "dms", tmp_path / "lost"
    command.write_text(
        f'#!/bin/bash\nif [[ "$*" == *"--shard 2/2"* && ! -e {lost} ]]; then touch {lost}; exit 1; fi\n'
        f'exec {warm} "$@"\n'
    )
    command.chmod(0o755)
    task = {"chains": 2, "lengths": [16, 32], "widths": [1, 2], "options": "--limit 3 --batch 4"}
    facts = {"model": str(ROOT / "data" / "reasoner"), "recipe": "none", "methods": {"vanilla": [1]}}
    records, curves = [], []
    for shards in (1, 2):
        values = {**facts, "name": f"of-{shards}", "shards": shards, "tasks": {"traces": task}, "dms": str(command)}
        config = tmp_path / f"{shards}.yaml"
        config.write_text(yaml.safe_dump(values))
        status, output = snakemake(tmp_path, config, f"runs/of-{shards}/traces/curves.json")
        assert status == 0, output
        assert len(re.findall(r"^(?:local)?rule sample:", output, re.M)) == (1 if shards == 1 else 3), output
        files = list((tmp_path / "runs" / f"of-{shards}").rglob("records/*.jsonl"))
        assert len(files) == shards
        records.append(sorted(line for file in files for line in file.read_text().splitlines()))
        curves.append(json.loads((tmp_path / "runs" / f"of-{shards}" / "traces" / "curves.json").read_text())["points"])
    assert records[0] == records[1] and len(records[0]) == 6
    assert curves[0] == curves[1]


def test_notebook_command_reports_an_unknown_parameter(tmp_path, capsys):
    chapter = str(ROOT / "notebooks" / "02_gate.ipynb")
    assert main(["notebook", chapter, str(tmp_path / "out.ipynb"), "-p", "windows", "[1, 2]"]) == 2
    message = capsys.readouterr().err
    assert "windows" in message and "samples" in message
    assert not (tmp_path / "out.ipynb").exists()


def test_notebook_command_reads_values_as_yaml(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("sizes = []\nword = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(sum(sizes), word)"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    source, out = tmp_path / "a.ipynb", tmp_path / "made" / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), source)
    assert main(["notebook", str(source), str(out), "-p", "sizes", "[1, 2]", "-p", "word", "tiny"]) == 0
    assert nbformat.read(out, 4).cells[-1].outputs[0]["text"] == "3 tiny\n"


def test_chapters_command_leaves_a_directory_alone_that_is_no_book(tmp_path, capsys):
    shutil.copy(ROOT / "notebooks" / "02_gate.ipynb", tmp_path)
    precious = tmp_path / "out" / "precious"
    precious.parent.mkdir()
    precious.write_text("x")
    assert main(["chapters", str(tmp_path), str(precious.parent)]) == 2
    assert precious.exists() and "no copy of the book" in capsys.readouterr().err


def test_summarise_command_writes_curves_with_model_and_task(tmp_path):
    record = {
        "method": "vanilla",
        "cr": 1.0,
        "problem": 0,
        "chain": 0,
        "answer": "1",
        "gold": "1",
        "finished_at": 20,
        "tokens": 20,
        "stride": 16,
        "live": [5, 21, 25],
        "reads": [0.0, 200.0, 300.0],
        "prompt_tokens": 5,
        "prompt_live": 5.0,
    }
    for method, cr in (("vanilla", 1.0), ("dms", 4.0)):
        directory = tmp_path / f"{method}-cr{cr:g}"
        directory.mkdir()
        (directory / "x.jsonl").write_text(json.dumps({**record, "method": method, "cr": cr}) + "\n")
    out = tmp_path / "task" / "curves.json"
    command = ["summarise", str(tmp_path), "--lengths", "16", "32", "--widths", "1", "--model", "M", "--task", "T"]
    assert main([*command, "--out", str(out)]) == 0
    summary = json.loads(out.read_text())
    assert (summary["model"], summary["task"], len(summary["points"])) == ("M", "T", 4)


def test_estimate_is_table_3_and_grows_with_chains_and_shrinks_with_cr():
    from companion.cost.planner import sampling_hours
    from companion.cost.roofline import ARCHITECTURES, DEVICES

    arch, h100 = ARCHITECTURES["qwen-r1-7b"], DEVICES["h100"]
    dense, batch = sampling_hours(arch, h100, 1, 32768, 4000, 1, 1)
    more, _ = sampling_hours(arch, h100, 1, 32768, 8000, 1, 1)
    small, larger = sampling_hours(arch, h100, 1, 32768, 4000, 8, 8)
    assert more == pytest.approx(2 * dense) and small < dense / 4 and larger > 4 * batch
    assert sampling_hours(ARCHITECTURES["qwen-r1-32b"], h100, 1, 32768, 4000, 1, 1) == (float("inf"), 0)
    text = estimate.lines(settings.settings(yaml.safe_load((ROOT / "workflow/config/qwen-r1-7b.yaml").read_text())))
    assert "525 GPU-hours (paper, Table 3)" in text[1]


@pytest.mark.parametrize(
    "resources, gpus", [(None, 1), ({"sample": {"mem": "16GB"}}, 1), ({"default": {"gpus": 2}}, 2)]
)
def test_estimate_takes_the_gpus_of_the_rule_else_of_the_default_else_one(resources, gpus):
    given = yaml.safe_load((ROOT / "workflow/config/qwen-r1-7b.yaml").read_text())
    given.pop("resources")
    text = estimate.lines(settings.settings({**given, **({"resources": resources} if resources else {})}))
    assert f"of {gpus} GPU{'s' * (gpus > 1)} each" in text[0]
