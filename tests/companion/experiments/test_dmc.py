"""DMC against DMS: accuracies at an equal ratio follow from planted checkpoints, and every arm trains."""

from dataclasses import replace

import numpy as np
import pytest

from companion.experiments import main as job
from companion.experiments.ablations import ablation_profile, facts_file
from companion.experiments.dmc import ARMS, at_ratio, compare_dmc, open_comparison
from dms_core.checkpoint import read_settings
from dms_core.storage import write_json

PROFILE = ablation_profile()
SHORT = {"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2, "device_batch": None, "warmup": 0}
QUICK = replace(
    PROFILE,
    recipe=PROFILE.recipe.changed(retrofit=SHORT),
    compare_cr=2.0,
    problems=3,
    lengths=(8,),
    held_out=3,
)


def plant(run, arm: str, cr: float, ratio: float, right: list[float], seed: int = 0) -> None:
    held = {"cr_decisions": ratio, "cr_live": ratio / 2 + 0.5, "kl": 0.01, "agreement": 0.99, "documents": 3}
    write_json(facts_file(run, arm, seed, cr), {"held_out": held, "seconds": 1.0, "tokens": 9.0, "right": right})


def test_shares_between_checkpoints_are_linear_in_the_measured_ratio():
    shares = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    assert at_ratio([1.0, 4.0, 2.0], shares, 3.0) == pytest.approx([0.25, 0.75])
    assert at_ratio([1.0, 4.0, 2.0], shares, 4.0) == pytest.approx([0.0, 1.0])


def test_equal_ratio_is_the_largest_that_both_arms_reach_with_all_seeds(tmp_path):
    run = open_comparison(tmp_path, seeds=2)
    plant(run, "vanilla", 1.0, 1.0, [1.0] * 200)
    reached = {"dms": [(2.0, 0.9), (3.0, 0.8), (4.4, 0.7)], "neuron-all": [(2.0, 0.8), (3.0, 0.8), (4.0, 0.8)]}
    reached["dmc"] = reached["dmc-pressed"] = [(1.5, 0.9), (2.5, 0.5), (3.7, 0.2)]
    for arm, points in reached.items():
        for cr, (ratio, share) in zip((2.0, 3.0, 4.0), points, strict=True):
            for seed in range(2):
                plant(run, arm, cr, ratio - 0.2 * seed * (cr == 4), [share] * 200, seed)
    result = compare_dmc(run, report=list)
    pairs = {(pair["a"], pair["b"], pair["at"]): pair for pair in result["pairs"]}
    tokens, ratio = (pairs["dms", "dmc", at] for at in ("equal tokens", "equal cr_decisions"))
    assert (tokens["difference"], tokens["low"], tokens["high"]) == pytest.approx((50, 50, 50))
    assert ratio["cr"] == pytest.approx(3.5)  # of dmc with seed 1
    of_dms = [np.interp(3.5, [3.0, last], [0.8, 0.7]) for last in (4.4, 4.2)]
    of_dmc = [np.interp(3.5, [2.5, last], [0.5, 0.2]) for last in (3.7, 3.5)]
    differences = 100 * (np.array(of_dms) - of_dmc)
    assert ratio["difference"] == pytest.approx(differences.mean())
    assert list(ratio["by_seed"].values()) == pytest.approx(differences)
    assert ratio["accuracy_a"] == pytest.approx(100 * np.mean(of_dms)) and ratio["seeds"] == 2
    assert pairs["neuron-all", "dmc", "equal cr_live"]["cr"] == pytest.approx(3.5 / 2 + 0.5)
    rows = {(row["variant"], row["cr"]): row for row in result["rows"]}
    assert rows["dmc", 4.0]["cr_decisions"] == pytest.approx(3.6) and rows["dmc", 4.0]["eviction"] == "merging"
    assert [rows[arm, 4.0]["steps"] for arm in ARMS] == [120, 160, 160, 160]
    assert [rows[arm, 2.0]["steps"] for arm in ARMS] == [20, 60, 60, 60]


def open_quickly(root):
    """A warm-up of one step where there is one."""
    run = open_comparison(root, profile=QUICK)
    warmed = {name: min(variant.retrofit.neuron_warmup, 1) for name, variant in run.variants.items()}
    variants = {name: run.variants[name].changed(retrofit={"neuron_warmup": steps}) for name, steps in warmed.items()}
    return replace(run, variants=variants)


@pytest.mark.slow
def test_every_arm_trains_and_is_measured_at_each_ratio(tmp_path):
    run = open_quickly(tmp_path)
    result = compare_dmc(run, report=list)
    assert [(row["variant"], row["cr"]) for row in result["rows"]] == [("vanilla", 1.0), *((arm, 2.0) for arm in ARMS)]
    assert len(result["pairs"]) == 15
    assert read_settings(job.checkpoint(run, "dmc", 2.0))["dms"]["method"] == "dmc"
    training, pressed = (run.variants[name].retrofit for name in ("dmc", "dmc-pressed"))
    assert pressed == replace(training, aux_weight=10 * training.aux_weight)
    assert (training.neuron_zero, training.neuron_warmup, training.gate_lr) == (True, 1, 2e-3)
    assert compare_dmc(open_quickly(tmp_path), report=list) == result  # nothing is left to do
