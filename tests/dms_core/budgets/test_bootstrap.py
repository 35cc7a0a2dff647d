"""Intervals in simulations with known truth: which draws count what, and what few problems and few seeds allow."""

import numpy as np
import pytest

from dms_core.budgets.bootstrap import beta_binomial, detectable, interval, means, seed_weights, weights


def shares(p, chains, rng):
    return rng.binomial(chains, p) / chains


def test_drawing_chains_again_counts_their_variance_twice():
    rng = np.random.default_rng(0)
    problems, chains, truth, replicas = 60, 4, -0.1 * 2 / 3, 300
    covered, width = np.zeros((2, 2))
    for _ in range(replicas):
        p = rng.beta(2, 1, problems)
        dense, ours = shares(p, chains, rng), shares(0.9 * p, chains, rng)
        again = rng.integers(problems, size=(300, problems))
        nested = (shares(ours[again], chains, rng) - shares(dense[again], chains, rng)).mean(1)
        for i, drawn in enumerate((means((ours - dense)[None, :, None], 300, 0)[1:, 0], nested)):
            low, high = interval(drawn)
            covered[i] += (low <= truth <= high) / replicas
            width[i] += (high - low) / replicas
    assert 0.91 <= covered[0] <= 0.97 and covered[1] > covered[0] + 0.02, covered
    assert width[1] > 1.2 * width[0], width


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_redrawn_seeds_have_the_variance_of_a_mean_of_seeds(seeds):
    drawn = seed_weights(seeds, 20000, 1)
    assert drawn[0] == pytest.approx(1 / seeds) and drawn.sum(1) == pytest.approx(1)
    values = np.random.default_rng(2).normal(size=seeds)
    assert np.var(drawn[1:] @ values) == pytest.approx(np.var(values, ddof=1) / seeds, rel=0.05)
    assert not np.array_equal(drawn[1:], seed_weights(seeds, 20000, 2)[1:])


def test_scaled_seeds_cover_better_than_unscaled_ones_and_less_than_95_percent_where_seeds_are_all():
    rng = np.random.default_rng(3)
    spreads = (0.0, 0.03, 0.1)
    covered = np.zeros((len(spreads), 2))
    for _ in range(300):
        dense = rng.uniform(0.4, 0.6, 100)
        for row, spread in enumerate(spreads):
            ours = shares((dense + rng.normal(0, spread, (3, 1))).clip(0, 1), 8, rng)
            difference = (ours - shares(dense, 8, rng))[..., None]
            scaled = means(difference, 300, 0)[1:, 0]
            unscaled = np.einsum("rs,srk->rk", weights(3, 300, 2**32), weights(100, 300, 0) @ difference)[1:, 0]
            covered[row] += [low <= 0 <= high for low, high in map(interval, (scaled, unscaled))]
    covered /= 300
    assert (covered[1:, 0] > covered[1:, 1] + 0.01).all(), covered
    assert covered[0, 0] > 0.93 and covered[1, 0] > 0.85 and 0.75 < covered[2, 0] < 0.93, covered


def test_means_cross_seeds_with_problems_and_take_one_seed_as_it_is():
    values = np.random.default_rng(4).random((3, 7, 2))
    drawn, seeds = weights(7, 50, 5), seed_weights(3, 50, 5)
    expected = sum(seeds[:, s, None] * (drawn @ values[s]) for s in range(3))
    assert means(values, 50, 5) == pytest.approx(expected)
    assert np.array_equal(means(values[:1], 50, 5), drawn @ values[0])
    assert means(values, 50, 5)[0] == pytest.approx(values.mean((0, 1)))


def test_half_of_the_problems_count_alone():
    values, half = np.random.default_rng(6).random((1, 6, 1)), np.arange(6) % 2 == 0
    drawn = means(values, 2000, 0, half)[:, 0]
    assert drawn[0] == pytest.approx(values[0, ::2].mean())
    assert np.nanmin(drawn) >= values[0, ::2].min() and np.nanmax(drawn) <= values[0, ::2].max()
    without = (weights(6, 2000, 0)[:, half] == 0).all(1)
    assert without.any() and np.array_equal(np.isnan(drawn), without)


@pytest.mark.parametrize(("accuracy", "size"), [(0.6, 3), (0.99, 10)])
def test_beta_binomial_covers_the_truth_of_thirty_problems(accuracy, size):
    rng = np.random.default_rng(7)
    covered = np.zeros(2)
    for _ in range(150):
        correct = rng.binomial(8, rng.beta(accuracy * size, (1 - accuracy) * size, 30))
        bayes = beta_binomial(correct, np.full(30, 8))
        percentile = 100 * np.array(interval(means(correct[None, :, None] / 8, 300, 0)[1:, 0]))
        covered += [low <= 100 * accuracy <= high for low, high in (bayes, percentile)]
    assert covered[0] / 150 >= 0.9, covered
    assert accuracy < 0.9 or covered[0] > covered[1] + 8, covered


def test_beta_binomial_is_symmetric_and_narrows_with_problems_and_where_chains_are_independent():
    low, high = beta_binomial([1, 3, 8, 0] * 5, [8] * 20)
    assert beta_binomial([7, 5, 0, 8] * 5, [8] * 20) == pytest.approx((100 - high, 100 - low))

    def width(correct, copies=5):
        low, high = beta_binomial(correct * copies, [8] * len(correct * copies))
        return high - low

    assert width([4, 5, 3, 4]) < width([0, 8, 0, 8]) and width([0, 8, 4, 4], 20) < width([0, 8, 4, 4], 5)


@pytest.mark.parametrize(("correct", "total"), [([9], [8]), ([-1], [8]), ([0], [0]), ([], []), ([1, 1], [8])])
def test_beta_binomial_names_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="must be 0 <= correct <= total, total >= 1"):
        beta_binomial(correct, total)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_detectable_difference_is_found_with_the_stated_power(seeds):
    design = {"problems": 200, "chains": 8, "accuracy": 0.6, "seeds": seeds, "between": 0.1, "seed_sd": 0.01}
    rng, runs = np.random.default_rng(8), 4000
    true = detectable(**design) / 100
    error = true / (1.959964 + 0.841621)
    spread = rng.normal(true, 0.1, (runs, 1, 200)) + rng.normal(0, 0.01, (runs, seeds, 1))
    ours = shares((0.6 + spread).clip(0, 1), 8, rng).mean(1)
    found = (ours - shares(np.full((runs, 200), 0.6), 8, rng)).mean(1) > 1.959964 * error
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert detectable(**design | {"power": 0.9}) > 100 * true > detectable(**design | {"problems": 400})
