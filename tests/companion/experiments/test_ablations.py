"""Ablations: variants differ in what they are named after and in nothing else; finished ones are not run again."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from companion.cli import studies
from companion.cli.main import main
from companion.experiments import main as job
from companion.experiments.ablations import (
    ABLATIONS,
    REFERENCE,
    ablation,
    ablation_profile,
    facts_file,
    make_variants,
    measure,
    open_ablations,
)
from dms_core.budgets import bootstrap

PROFILE = ablation_profile()

SHORT = {"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2, "warmup": 0}
QUICK = replace(
    PROFILE,
    recipe=PROFILE.recipe.changed(retrofit=SHORT),
    compare_cr=2.0,
    crs=(2.0,),
    problems=3,
    lengths=(8,),
    batch=6,
    held_out=3,
)


def plant(run: job.Run, name: str, right: list[float], kl: float) -> None:
    """What ``measure`` keeps of a finished variant."""
    held = {"cr_decisions": 4.0, "cr_live": 3.5, "kl": kl, "agreement": 0.99, "documents": 64}
    file = facts_file(run, name)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"held_out": held, "seconds": 1.0, "tokens": 200.0, "right": right}))


def test_variants_differ_from_the_reference_in_what_their_ablation_is_about():
    variants = make_variants(PROFILE.recipe)
    allowed = {
        "window": {"window", "eviction"},
        "loss": {"direction"},
        "weights": {"train", "gate"},
        "steps": {"steps_per_unit", "rests"},
    }
    reference = {**asdict(variants[REFERENCE].dms), **asdict(variants[REFERENCE].retrofit)}
    for name, study in ABLATIONS.items():
        for variant in study.variants[1:]:
            settings = {**asdict(variants[variant].dms), **asdict(variants[variant].retrofit)}
            changed = {field for field in settings if settings[field] != reference[field]}
            assert changed and changed <= allowed[name], variant
        assert {v for pair in study.pairs for v in pair} == set(study.variants)
    equal = [variant for name, variant in variants.items() if not name.startswith("steps-")]
    assert {variant.retrofit.steps for variant in equal} == {120}
    assert {variant.retrofit.batch for variant in variants.values()} == {12}


def test_pairs_follow_from_the_planted_accuracies(tmp_path):
    run = open_ablations(tmp_path)
    rng = np.random.default_rng(1)
    right = rng.integers(0, 2, 200).astype(float)
    plant(run, "dms", right.tolist(), 0.01)
    plant(run, "reverse-kl", right.tolist(), 0.02)
    plant(run, "lm-loss", (right * 0).tolist(), 0.03)
    result = ablation("loss", run, finished_only=True)
    same, worse = result["pairs"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)  # paired: equal answers, no uncertainty
    assert worse["difference"] == pytest.approx(-100 * right.mean()) and worse["high"] < 0
    assert [row["kl"] for row in result["rows"]] == [0.01, 0.02, 0.03] and result["missing"] == []


def test_what_is_not_finished_is_named_and_not_run(tmp_path):
    run = open_ablations(tmp_path)
    plant(run, "delayed-w4", [1.0] * 200, 0.01)
    result = ablation("window", run, finished_only=True)
    assert [row["variant"] for row in result["rows"]] == ["delayed-w4"] and result["pairs"] == []
    assert result["missing"] == [v for v in ABLATIONS["window"].variants if v != "delayed-w4"]
    assert len(list(tmp_path.iterdir())) == 1  # nothing was trained


def test_interval_covers_the_mean_and_shrinks_to_it_without_spread():
    mean, low, high = bootstrap.mean([0.0, 1.0] * 30)
    assert low < mean == 50 < high and low > 30 and high < 70
    assert bootstrap.mean([0.5] * 7) == (50, 50, 50)


def test_saving_keeps_other_entries(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    (tmp_path / "ablations.json").write_text('{"loss": 1}')
    assert main(["ablate", "window", "--finished", "--save", "--runs", str(tmp_path / "runs"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "ablations.json").read_text()) == {"loss": 1, "window": printed}


def test_an_unknown_name_is_refused_with_what_is_allowed(capsys):
    assert main(["ablate", "windows"]) == 2
    assert "ablation 'windows': must be one of window, steps, loss, weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_variant_is_trained_measured_and_then_read(tmp_path):
    run = open_ablations(tmp_path, QUICK)
    facts = measure(run, "reverse-kl")
    assert len(facts["right"]) == 3 and facts["held_out"]["documents"] == 3
    trained = json.loads((job.checkpoint(run, "reverse-kl", 2.0).parent / "retrofit.json").read_text())
    assert trained["recipe"]["direction"] == "reverse" and trained["recipe"]["steps"] == 2
    stamp = facts_file(run, "reverse-kl").stat().st_mtime_ns
    assert measure(open_ablations(tmp_path, QUICK), "reverse-kl") == facts
    assert facts_file(run, "reverse-kl").stat().st_mtime_ns == stamp


def test_methods_of_an_ablation_run_have_a_variant_or_are_the_dense_model(tmp_path):
    run = open_ablations(tmp_path, QUICK)
    names = {method.name for method in job.methods(run)}
    assert names == {"vanilla", "dms"} and names - {"vanilla"} <= set(run.variants)
