"""Chapter 6 for any model: the interface of the embedded model's run, and a clear word where nothing can be had."""

import json

import pytest

from companion.book import execute
from companion.experiments import main as job
from companion.experiments.real_model import open_run
from companion.paths import CHECKOUT as ROOT
from companion.paths import REASONER
from companion.tasks.programs import make_problem
from dms_core.budgets.curves import summarise

CR4 = str(REASONER / "dms-cr4")


@pytest.fixture
def source(tmp_path):
    """Two easy problems as a local file."""
    problems = [make_problem("validation", 1, i, (4, 5)) for i in range(2)]
    rows = [{"prompt": p.prompt, "answer": p.answer, "variables": p.variables} for p in problems]
    file = tmp_path / "programs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_run_samples_the_model_and_its_retrofits(tmp_path, source):
    run = open_run("smoke", tmp_path, 0, str(REASONER), [CR4], "traces", source, [128, 64], 2)
    assert run.benchmark is not None
    assert [(m.name, m.cr) for m in job.methods(run)] == [("vanilla", 1.0), ("dms", 4.0)]
    assert (run.profile.lengths, run.profile.widths, run.profile.problems) == ((64, 128), (1, 2), 2)
    records = [record for method in job.methods(run) for record in job.records(run, method)]
    assert len(records) == 2 * 2 * 2 and all(record["correct"] for record in records if record["tokens"] < 128)
    points = summarise(records, [64, 128], [1, 2], 20, aggregate=run.task.aggregate)["points"]
    reads = {p["method"]: p["reads"] for p in points if (p["L"], p["W"]) == (128, 2)}
    assert reads["dms"] < reads["vanilla"]
    files = sorted((tmp_path / "records").glob("*/*.jsonl"))
    before = [file.read_text() for file in files]
    assert job.records(run, job.methods(run)[1]) == [
        r for r in records if r["method"] == "dms"
    ]  # read, not sampled again
    assert [file.read_text() for file in files] == before


def test_without_a_model_the_profile_runs(tmp_path):
    assert open_run("smoke", tmp_path).benchmark is None


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"model": "no/such-model", "task": "traces"},
            "'no/such-model': neither a directory nor a hub id",
        ),
        ({"model": str(REASONER), "task": "aime24"}, "cannot fetch dataset HuggingFaceH4/aime_2024"),
    ],
)
def test_what_is_out_of_reach_is_named_and_replaced_only_if_asked(tmp_path, source, capsys, settings, message):
    settings = {"checkpoints": [CR4], "source": source if settings["task"] == "traces" else "", **settings}
    with pytest.raises(ValueError, match=f"{message}.*Set fallback"):
        open_run("smoke", tmp_path, **settings)
    run = open_run("smoke", tmp_path, **settings, fallback=True)
    assert run.benchmark is None and run.root == tmp_path / "embedded"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"checkpoints": []}, "must be one or more retrofits"),
        ({"lengths": []}, "must be one or more lengths"),
        ({"chains": 0}, "chains 0"),
        ({"checkpoints": [str(REASONER)]}, "not a DMS checkpoint|compression ratio"),
    ],
)
def test_bad_settings_are_named(tmp_path, source, settings, message):
    settings = {"checkpoints": [CR4], "lengths": [8], "chains": 1, **settings}
    with pytest.raises(ValueError, match=message):
        open_run("smoke", tmp_path, 0, str(REASONER), task="traces", source=source, **settings)


@pytest.mark.slow
def test_chapter_6_draws_the_curves_of_another_model(tmp_path, source):
    parameters = {
        "model": str(REASONER),
        "checkpoints": [CR4, str(REASONER / "dms-cr8")],
        "task": "traces",
        "source": source,
        "lengths": [64, 128],
        "chains": 2,
        "run_dir": str(tmp_path),
        "resamples": 20,
    }
    out = tmp_path / "out.ipynb"
    execute(ROOT / "notebooks" / "06_hyperscaling.ipynb", out, parameters)
    noted = json.loads((tmp_path / "chapters" / "06_hyperscaling.json").read_text())
    assert (noted["problems"], set(noted["gains"])) == (2, {"traces reads", "traces peak"})
    assert len(list((tmp_path / "records").glob("*/*.jsonl"))) == 3
