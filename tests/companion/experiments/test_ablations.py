"""Ablations: variants differ in what they are named after and in nothing else; finished ones are not run again."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from companion.cli import studies
from companion.cli.main import main
from companion.experiments import ablations
from companion.experiments import main as job
from companion.experiments.ablations import (
    ABLATIONS,
    CR,
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

SHORT = {"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2, "device_batch": None, "warmup": 0}
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


def plant(run: job.Run, name: str, right: list[float], kl: float, seed: int = 0, **held) -> None:
    """What ``measure`` keeps of a finished variant."""
    held = {"cr_decisions": 4.0, "cr_live": 3.5, "kl": kl, "agreement": 0.99, "documents": 64, **held}
    file = facts_file(run, name, seed)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"held_out": held, "seconds": 1.0, "tokens": 200.0, "right": right}))


def test_variants_differ_from_the_reference_in_what_their_ablation_is_about():
    variants = make_variants(PROFILE.recipe)
    allowed = {
        "window": {"window", "eviction"},
        "loss": {"direction"},
        "weights": {"train"},
        "steps": {"steps_per_unit", "rests", "decay"},
        "neuron": {"gate", "gate_lr", "neuron_warmup", "neuron_zero"},
        "teachers": {"train", "direction"},
    }
    reference = {**asdict(variants[REFERENCE].dms), **asdict(variants[REFERENCE].retrofit)}
    for name, study in ABLATIONS.items():
        for variant in study.variants[1:]:
            settings = {**asdict(variants[variant].dms), **asdict(variants[variant].retrofit)}
            changed = {field for field in settings if settings[field] != reference[field]}
            assert bool(changed) == (variant != "vanilla") and changed <= allowed[name], variant
        assert {v for pair in study.pairs for v in pair} == set(study.variants)
    warmed = {name: variant.retrofit.neuron_warmup for name, variant in variants.items()}
    equal = {name: v.retrofit.steps - warmed[name] for name, v in variants.items() if not name.startswith("steps-")}
    assert set(equal.values()) == {120} and set(warmed.values()) == {0, 40}
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


def test_the_two_ramps_without_a_rest_and_the_constant_rest_part_steps_at_one_ratio_from_a_falling_rate():
    plans = {name: variant.retrofit.schedule for name, variant in make_variants(PROFILE.recipe).items()}
    at_last_ratio = {name: sum(plan.cr(t) == CR for t in range(120)) for name, plan in plans.items()}
    falling = {name: sum(plan.rate(t) < 1 for t in range(20, 120)) for name, plan in plans.items()}
    names = ("dms", "no-rest", "no-rest-decay", "rest-constant")
    assert [at_last_ratio[name] for name in names] == [60, 0, 0, 60]
    assert [falling[name] for name in names] == [59, 0, 59, 0]  # the first of 60 is still at its peak
    assert all(plans[name].rate(119) == pytest.approx(1 / 60) for name in ("dms", "no-rest-decay"))


def test_rows_and_pairs_over_seeds_equal_a_slow_transcription(tmp_path):
    """Seeds and problems drawn again, one draw after the other, deviations of seeds scaled to their full variance."""
    run, rng = open_ablations(tmp_path, seeds=3), np.random.default_rng(2)
    right = {name: rng.integers(0, 3, (3, 200)) / 2 - 0.1 * np.arange(3)[:, None] for name in ("dms", "reverse-kl")}
    for seed in range(3):
        for name, shares in right.items():
            plant(run, name, shares[seed].tolist(), 0.01 * (seed + 1), seed, cr_decisions=4.0 + seed)
    result = ablation("loss", run, finished_only=True, report=list)
    assert result["missing"] == ["lm-loss"]
    (row,) = (row for row in result["rows"] if row["variant"] == "dms")
    (pair,) = result["pairs"]
    problems, seeds = bootstrap.weights(200, 1000, 0), bootstrap.weights(3, 1000, 2**32)
    for found, shares in ((row, right["dms"]), (pair, right["reverse-kl"] - right["dms"])):
        drawn = []
        for over_problems, over_seeds in zip(problems[1:], seeds[1:], strict=True):
            of_seed = [sum(w * x for w, x in zip(over_problems, one, strict=True)) for one in shares]
            mean = sum(of_seed) / 3
            scaled = [mean + (3 / 2) ** 0.5 * 3 * w * (x - mean) for w, x in zip(over_seeds, of_seed, strict=True)]
            drawn.append(100 * sum(scaled) / 3)
        value = found["accuracy"] if found is row else found["difference"]
        assert value == pytest.approx(100 * shares.mean())
        assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))))
        assert found["seeds"] == 3 and list(found["by_seed"]) == ["0", "1", "2"]
    assert (row["kl"], row["cr_decisions"]) == pytest.approx((0.02, 5.0))
    assert row["by_seed"]["2"] == pytest.approx({"accuracy": 100 * right["dms"][2].mean()} | SEED_2)
    expected = {str(s): 100 * (right["reverse-kl"][s] - right["dms"][s]).mean() for s in range(3)}
    assert pair["by_seed"] == pytest.approx(expected)


SEED_2 = {"cr_decisions": 6.0, "cr_live": 3.5, "kl": 0.03, "agreement": 0.99}


def test_a_variant_counts_as_finished_with_all_its_seeds_and_the_dense_model_with_one(tmp_path):
    run = open_ablations(tmp_path, seeds=2)
    for name, seeds in (("dms", (0, 1)), ("neuron-all", (0,)), ("vanilla", (0,))):
        for seed in seeds:
            plant(run, name, [1.0] * 200, 0.01, seed)
    result = ablation("neuron", run, finished_only=True, report=list)
    assert [row["variant"] for row in result["rows"]] == ["dms", "vanilla"] and "neuron-all" in result["missing"]
    (pair,) = result["pairs"]
    assert (pair["a"], pair["b"], pair["difference"], pair["seeds"]) == ("dms", "vanilla", 0, 2)
    dense = result["rows"][1]
    assert (dense["cr"], dense["steps"], dense["loss"], dense["seeds"]) == (1.0, 0, "none", 1)


def test_variants_without_training_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "FITTED", 8)
    run = open_ablations(tmp_path, QUICK)
    future, dense = (measure(run, name) for name in ("gates-future", "vanilla"))
    assert 1.5 < future["held_out"]["cr_decisions"] < 2.5 and future["held_out"]["kl"] > 1e-4
    assert dense["held_out"]["cr_decisions"] == pytest.approx(1) and dense["held_out"]["kl"] < 1e-6
    assert not list(tmp_path.glob("*/trainer"))


def test_what_is_not_finished_is_named_and_not_run(tmp_path):
    run = open_ablations(tmp_path)
    plant(run, "delayed-w4", [1.0] * 200, 0.01)
    result = ablation("window", run, finished_only=True)
    assert [row["variant"] for row in result["rows"]] == ["delayed-w4"] and result["pairs"] == []
    assert result["missing"] == [v for v in ABLATIONS["window"].variants if v != "delayed-w4"]
    assert len(list(tmp_path.iterdir())) == 1  # nothing was trained


def test_saving_keeps_other_entries(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    (tmp_path / "ablations.json").write_text('{"loss": 1}')
    assert main(["ablate", "window", "--finished", "--save", "--runs", str(tmp_path / "runs"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "ablations.json").read_text()) == {"loss": 1, "window": printed}


def test_an_unknown_name_is_refused_with_what_is_allowed(capsys):
    assert main(["ablate", "windows"]) == 2
    assert "ablation 'windows': must be one of window, steps, loss, weights" in capsys.readouterr().err


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
