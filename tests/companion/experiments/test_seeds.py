"""Replicas: seeds change a retrofit's documents and noise and nothing else; the first is the main job's own."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from companion.experiments import main as job
from companion.experiments.profiles import get_profile
from companion.experiments.seeds import open_replicas, replicate
from dms_core.budgets.bootstrap import nested_mean

SMOKE = get_profile("smoke")

SHORT = {"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2}
QUICK = replace(
    SMOKE,
    recipe=SMOKE.recipe.changed(retrofit=SHORT),
    compare_cr=2.0,
    crs=(2.0,),
    problems=3,
    chains=1,
    lengths=(8,),
    batch=6,
    held_out=2,
)


def test_seed_changes_documents_and_noise_only(tmp_path):
    variants = open_replicas(SMOKE, tmp_path, (0, 5)).variants
    assert set(variants) == {"dms", "dms-immediate", "dms-seed5", "dms-immediate-seed5"}
    for name in ("dms", "dms-immediate"):
        first, other = variants[name], variants[f"{name}-seed5"]
        assert other.dms == first.dms and asdict(other.retrofit) == {**asdict(first.retrofit), "seed": 5}


def test_first_seed_is_the_main_jobs_retrofit(tmp_path):
    replicas, run = open_replicas(SMOKE, tmp_path, (3, 0)), job.Run(SMOKE, tmp_path)
    assert job.checkpoint(replicas, "dms", 3.0) == job.checkpoint(run, "dms", 3.0)
    assert job.checkpoint(replicas, "dms-seed3", 3.0) != job.checkpoint(run, "dms", 3.0)


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_repeated_missing_or_negative_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(ValueError, match="must be one or more different integers >= 0"):
        open_replicas(SMOKE, tmp_path, seeds)


def test_interval_of_a_mean_counts_seeds_and_problems():
    rng = np.random.default_rng(0)
    problems = rng.normal(0, 0.1, 300)
    same = np.stack([problems] * 3)
    apart = same + np.array([[-0.1], [0.0], [0.1]])
    assert nested_mean(same)[0] == pytest.approx(nested_mean(apart)[0])
    narrow, wide = (high - low for _, low, high in (nested_mean(same), nested_mean(apart)))
    assert wide > 3 * narrow > 0
    assert nested_mean(np.full((1, 5), 0.5)) == (50, 50, 50)


@pytest.mark.slow
def test_every_seed_is_measured_on_the_same_problems(tmp_path):
    result = replicate(QUICK, tmp_path, (0, 1))
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        ("dms", 0),
        ("dms", 1),
        ("dms-immediate", 0),
        ("dms-immediate", 1),
    ]
    assert result["rows"][0]["kl"] != result["rows"][1]["kl"]
    assert [(mean["a"], mean["b"]) for mean in result["means"]] == [
        ("dms", "vanilla"),
        ("dms-immediate", "vanilla"),
        ("dms", "dms-immediate"),
    ]
    mean = np.mean([row["difference"] for row in result["rows"][:2]])
    assert result["means"][0]["difference"] == pytest.approx(mean)
    assert len(list((tmp_path / "records").glob("vanilla-*.jsonl"))) == 1
    assert replicate(QUICK, tmp_path, (0, 1))["rows"] == result["rows"]  # read, not run again
