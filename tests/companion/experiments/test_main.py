"""The main job at its smallest: every stage runs, is reused, and is kept apart from other settings."""

import json
import time
from dataclasses import replace

import pytest

from companion.cli.main import main
from companion.experiments import controls
from companion.experiments import main as job
from companion.experiments.profiles import get_profile

SMOKE = get_profile("smoke")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = job.Run(SMOKE, tmp_path_factory.mktemp("run"))
    return run, job.run_all(run)


def test_summary_has_every_method_and_both_axes(finished):
    _, summary = finished
    assert {(p["method"], p["cr"]) for p in summary["points"]} == {
        ("vanilla", 1.0),
        ("dms", 2.0),
        ("dms", 3.0),
        ("dms-immediate", 2.0),
    }
    assert {(m["axis"], m["scale"]) for m in summary["margins"] if m["a"] == "dms" and m["b"] == "vanilla"} == {
        (axis, scale) for axis in ("reads", "peak") for scale in ("linear", "log2")
    }
    assert {(p["a"], p["b"]) for p in summary["paired"]} >= {("dms", "vanilla"), ("dms", "dms-immediate")}
    assert summary["retrofit"]["steps"] == SMOKE.recipe.retrofit.steps


def test_a_second_call_reuses_every_stage(finished):
    run, summary = finished
    again = job.Run(SMOKE, run.root)
    began = time.time()
    assert job.retrofit(again)["seconds"] == job.retrofit(run)["seconds"]
    assert job.summary(again)["points"] == summary["points"]
    assert time.time() - began < 10


def test_another_recipe_gets_another_directory(finished):
    run, _ = finished
    other = job.Run(replace(SMOKE, recipe=SMOKE.recipe.changed(retrofit={"lr": 1e-4})), run.root)
    assert job.checkpoint(other, "dms", 2.0) != job.checkpoint(run, "dms", 2.0)
    assert not job.checkpoint(other, "dms", 2.0).exists()


def test_curves_command_prints_the_stored_summary_last(finished, capsys):
    run, summary = finished
    assert main(["curves", "--json", "--results", str(run.root)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["points"] == json.loads(json.dumps(summary["points"]))


def test_cache_report_measures_tensors(finished, capsys):
    run, _ = finished
    assert main(["cache-report", "--json", "--checkpoint", str(job.checkpoint(run, "dms", 3.0))]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    live = [items for heads in report["live_per_layer_head"] for items in heads]
    one = report["bytes_dense"] / report["tokens"] / len(live)  # bytes of one live item
    assert sum(live) * one <= report["bytes_held"] <= (sum(live) + 4 * len(live)) * one


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["curves", "--results", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["cache-report", "--checkpoint", str(tmp_path)]) == 2
    assert "dms.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nano"):
        get_profile("nano")


@pytest.mark.slow
def test_the_grid_trains_and_samples_what_is_not_there_yet(tmp_path):
    recipe = SMOKE.recipe.changed(retrofit={"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2})
    quick = replace(SMOKE, recipe=recipe, crs=(2.0,), problems=2, chains=1, lengths=(8,), widths=(1,), held_out=2)
    quick = replace(quick, lengths=(2, 4, 6, 8))
    result = controls.grid(job.Run(quick, tmp_path))
    methods = {"vanilla", "dms", *controls.CONTROLS, *controls.LIGHT}
    assert {point["method"] for point in result["points"]} == methods
    lengths = {name: {p["L"] for p in result["points"] if p["method"] == name} for name in ("tova", "tova-protected")}
    assert lengths == {"tova": {8}, "tova-protected": {2, 8}}
    assert {row["b"] for row in result["margins"] if row["a"] == "dms"} == methods - {"dms"}
    assert (tmp_path / "grid.json").exists()
