"""Replicas: seeds change a retrofit's documents and noise and nothing else; the first is the main job's own."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from companion.experiments.main import Pipeline
from companion.experiments.profiles import SMOKE
from companion.experiments.seeds import Replicas, bootstrap_mean

QUICK = replace(
    SMOKE, recipe=replace(SMOKE.recipe, final_cr=2.0, steps_per_unit=1, rests=((2.0, 1),), batch=2),
    compare_cr=2.0, crs=(2.0,), problems=3, chains=1, lengths=(8,), batch=6, held_out=2,
)  # fmt: skip


def test_a_seed_changes_the_retrofit_and_nothing_else(tmp_path):
    replicas = Replicas(SMOKE, tmp_path, (0, 5))
    assert set(replicas.variants) == {"dms", "dms-immediate", "dms-seed5", "dms-immediate-seed5"}
    for name in ("dms", "dms-immediate"):
        first, other = replicas.variants[name], replicas.variants[f"{name}-seed5"]
        assert other.dms == first.dms and asdict(other.recipe) == {**asdict(first.recipe), "seed": 5}


def test_the_first_seed_is_the_main_jobs_own_retrofit(tmp_path):
    replicas, pipeline = Replicas(SMOKE, tmp_path, (3, 0)), Pipeline(SMOKE, tmp_path)
    assert replicas.checkpoint("dms", 3.0) == pipeline.checkpoint("dms", 3.0)
    assert replicas.checkpoint("dms-seed3", 3.0) != pipeline.checkpoint("dms", 3.0)


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_repeat_or_are_missing_are_refused(tmp_path, seeds):
    with pytest.raises(ValueError, match="must be one or more different integers >= 0"):
        Replicas(SMOKE, tmp_path, seeds)


def test_the_interval_of_a_mean_counts_seeds_as_well_as_problems():
    rng = np.random.default_rng(0)
    problems = rng.normal(0, 0.1, 300)
    same = np.stack([problems] * 3)
    apart = same + np.array([[-0.1], [0.0], [0.1]])
    assert bootstrap_mean(same)[0] == pytest.approx(bootstrap_mean(apart)[0])
    narrow, wide = (high - low for _, low, high in (bootstrap_mean(same), bootstrap_mean(apart)))
    assert wide > 3 * narrow > 0
    assert bootstrap_mean(np.full((1, 5), 0.5)) == (50, 50, 50)


@pytest.mark.slow
def test_every_seed_meets_the_same_problems(tmp_path):
    result = Replicas(QUICK, tmp_path, (0, 1)).result()
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        ("dms", 0), ("dms", 1), ("dms-immediate", 0), ("dms-immediate", 1),
    ]  # fmt: skip
    assert result["rows"][0]["kl"] != result["rows"][1]["kl"]
    assert [(mean["a"], mean["b"]) for mean in result["means"]] == [
        ("dms", "vanilla"), ("dms-immediate", "vanilla"), ("dms", "dms-immediate"),
    ]  # fmt: skip
    mean = np.mean([row["difference"] for row in result["rows"][:2]])
    assert result["means"][0]["difference"] == pytest.approx(mean)
    assert len(list((tmp_path / "records").glob("vanilla-*.jsonl"))) == 1
    assert Replicas(QUICK, tmp_path, (0, 1)).result()["rows"] == result["rows"]  # read, not run again
