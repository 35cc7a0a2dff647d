"""The headline, retrofit seeds, fixed intervals of margins, time: results worked out by hand, and invariants."""

import json

import numpy as np
import pytest

from dms_core.budgets.curves import summarise

PROMPT = 10


def chain(problem, index=0, *, right=True, tokens=8, method="vanilla", cr=1, seed=None, finished=True, **more):
    """A chain of a dense cache divided by cr, reads and live items one per token; right at its end if it finished."""
    at = np.minimum(np.arange(-(-tokens // 4) + 1) * 4, tokens)
    record = {"method": method, "cr": cr, "problem": problem, "chain": index, "tokens": tokens, "stride": 4}
    record |= {"answer": "1" if right else "2", "gold": "1", "finished_at": tokens if finished else None}
    record |= {"live": (PROMPT + at / cr).tolist(), "reads": (at / cr).tolist()}
    record |= {"prompt_tokens": PROMPT, "prompt_live": PROMPT}
    return record | more | ({} if seed is None else {"retrofit_seed": seed})


def row_of(rows, **wanted):
    (found,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return found


def joined(arms):
    return [record for arm in arms for record in arm]


def ladder(method="vanilla", cr=1, seed=None, problems=8, solved=4):
    """Of 8 problems the first are right after 8 tokens, others after 16, up to ``solved``, the rest never."""
    rest = {"method": method, "cr": cr, "seed": seed}
    return [chain(p, right=p < solved, tokens=8 if p < solved // 2 else 16, **rest) for p in range(problems)]


def test_headline_by_hand():
    # dense: 25 % for 8 reads at L 8, 50 % for (2·8 + 6·16)/8 = 14 at L 16; DMS, CR 4: 37.5 % for 2, 75 % for 3.25.
    records = ladder() + ladder("dms", 4, solved=6)
    (row,) = (r for r in summarise(records, [8, 16], [1], 200)["headline"] if r["axis"] == "reads")
    assert (row["a"], row["b"], row["budget"], row["problems"], row["seeds"]) == ("dms", "vanilla", 14, 8, 1)
    assert (row["best_a"], row["best_b"], row["gain"]) == (75, 50, 25)
    assert row["chosen_a"] == {"cr": 4, "L": 16, "W": 1, "budget": 3.25}
    assert row["chosen_b"] == {"cr": 1, "L": 16, "W": 1, "budget": 14}
    assert 0 <= row["low"] <= 25 <= row["high"] and row["gain_crossed"]["value"] == 25
    target = row["target"]
    assert (target["accuracy"], target["budget_b"], target["budget_a"]) == (50, 14, 3.25)
    assert target["saving"] == pytest.approx(14 / 3.25) and target["reached"] == 1
    assert target["low"] == 8 / 2 and target["high"] == 14 / 2  # no problem right at 16 only; DMS needs none of them
    assert row["of_best"] == target


def test_headline_where_a_is_dearer_or_worse():
    worse = summarise(ladder() + ladder("dms", 4, solved=2), [8, 16], [1], 200)["headline"][0]
    assert worse["target"]["budget_a"] is worse["target"]["saving"] is None
    assert worse["target"]["reached"] < 0.2 and worse["target"]["low"] == 0 and worse["gain"] == -25
    records = [chain(p) for p in range(4)] + [chain(p, method="dms", cr=1, tokens=64) for p in range(4)]
    dear = summarise(records, [64], [1], 20)["headline"][0]
    assert dear["gain"] is dear["gain_crossed"] is dear["best_a"] is dear["chosen_a"] is None
    assert dear["target"]["saving"] == 8 / 64
    assert summarise(records, [64], [2], 20)["headline"] == []


def test_choosing_the_best_of_many_equal_configurations_flatters_and_crossing_does_not():
    rng, gains, crossed = np.random.default_rng(0), [], []
    for _ in range(40):
        dense = [chain(p, right=rng.random() < 0.5) for p in range(40)]
        ours = [chain(p, right=rng.random() < 0.5, method="dms", cr=cr) for cr in (2, 3, 4, 5, 6, 7) for p in range(40)]
        row = summarise(dense + ours, [8], [1], 5)["headline"][0]
        gains.append(row["gain"])
        crossed.append(row["gain_crossed"]["value"])
    assert np.mean(gains) > 5 > 4 > abs(np.mean(crossed)), (np.mean(gains), np.mean(crossed))


def test_a_method_is_the_mean_of_its_seeds_and_one_seed_changes_nothing():
    arms = [ladder("dms", 4, seed, solved=solved) for seed, solved in enumerate((2, 4, 6))]
    dense = ladder()
    summary = summarise(dense + joined(arms), [8, 16], [1], 300)
    alone = [summarise(dense + arm, [8, 16], [1], 300) for arm in arms]
    for name, value in (
        ("points", "accuracy"),
        ("pass_at_1", "accuracy"),
        ("points", "reads"),
        ("paired", "difference"),
    ):
        for i, row in enumerate(summary[name]):
            assert row[value] == pytest.approx(np.mean([one[name][i][value] for one in alone]))
            assert row["seeds"] == (1 if row.get("method") == "vanilla" else 3)
    (pair,) = summary["paired"]
    assert pair["by_seed"] == {"0": -25, "1": 0, "2": 25} and "by_seed" not in alone[0]["paired"][0]
    assert {row["seeds"] for name in ("margins", "margins_per_cr", "headline") for row in summary[name]} == {3}
    unmarked = [{key: value for key, value in r.items() if key != "retrofit_seed"} for r in dense + arms[1]]
    assert summarise(unmarked, [8, 16], [1], 300) == alone[1]
    same = dense + [r | {"retrofit_seed": seed} for r in arms[1] for seed in range(3)]
    copies = summarise(same, [8, 16], [1], 300)
    for name in ("points", "margins", "paired"):
        for one, other in zip(copies[name], alone[1][name], strict=True):
            assert [one["low"], one["high"]] == pytest.approx([other["low"], other["high"]])
    width = pair["high"] - pair["low"]
    assert width > copies["paired"][0]["high"] - copies["paired"][0]["low"]


def test_seeds_are_paired_where_both_have_them_and_refused_where_they_differ():
    arms = [ladder("dms", 4, seed, solved=solved) for seed, solved in enumerate((2, 4, 6))]
    moved = [[r | {"method": "dms-immediate"} for r in arm] for arm in arms]
    summary = summarise(joined(arms + moved), [8, 16], [1], 100)
    assert (summary["paired"][0]["low"], summary["paired"][0]["high"]) == (0, 0), "the same seed of both in each draw"
    shifted = [r | {"retrofit_seed": r["retrofit_seed"] + 1} for arm in moved for r in arm]
    with pytest.raises(ValueError, match=r"retrofit seeds \[\(0, 1, 2\), \(1, 2, 3\)\] of dms, dms-immediate: must be"):
        summarise(joined(arms) + shifted, [8, 16], [1], 100)
    apart = [chain(p, method="dms", cr=4, seed=p) for p in range(2)]
    with pytest.raises(ValueError, match=r"retrofit seeds \[0, 1\] of method dms, CR 4: must have a problem in common"):
        summarise(apart, [8], [1])


def test_a_margin_keeps_the_full_samples_interval_of_budgets():
    rng = np.random.default_rng(1)
    records = [
        chain(p, c, right=rng.random() < 0.6, tokens=int(rng.integers(4, 64)), method=method, cr=cr)
        for method, cr in (("vanilla", 1), ("dms", 2))
        for p in range(12)
        for c in range(2)
    ]
    summary = summarise(records, [8, 16, 32, 64], [1, 2], 200)
    for row in summary["margins"]:
        curves = ([p for p in summary["points"] if p["method"] == row[side]] for side in ("a", "b"))
        ends = []
        for curve in curves:
            best = max(p["accuracy"] for p in curve)
            on = [p[row["axis"]] for p in curve if p["accuracy"] == best]
            ends.append((min(p[row["axis"]] for p in curve), min(on)))
        assert (row["from"], row["to"]) == pytest.approx((max(e[0] for e in ends), min(e[1] for e in ends)))
        assert row["na_share"] == 0 and row["low"] <= row["value"] <= row["high"]


def test_a_resample_without_what_is_solved_late_does_not_shorten_a_margin():
    # Problem 0: right at L 8 with DMS, at 64 without, for the same cost. Problem 1: at 64, both. Problem 2: never.
    # A draw of problem 0 alone: DMS has 100 % at every budget and the dense model 0 to 100 %, 50 points, not 100 at 8.
    done = {"vanilla": (64, 64), "dms": (8, 64)}
    records = [
        chain(p, tokens=64, method=method, right=p < 2, finished_at=(*at, 64)[p])
        for method, at in done.items()
        for p in range(3)
    ]
    row = row_of(summarise(records, [8, 64], [1], 400)["margins"], axis="reads", scale="linear")
    assert (row["from"], row["to"]) == (8, 64)
    assert row["value"] == pytest.approx(50 / 3) and row["high"] == pytest.approx(50)


def test_restricted_margin_begins_where_half_of_the_dense_chains_have_ended():
    # dense: nothing at L 8, half of it at L 16, all at L 32; DMS costs half of it and knows as much.
    tokens = [16, 16, 32, 32]
    records = [
        chain(p, c, tokens=tokens[p], method=method, cr=cr, right=c < 2)
        for method, cr in (("vanilla", 1), ("dms", 2))
        for p in range(4)
        for c in range(4)
    ]
    summary = summarise(records, [8, 16, 32], [1, 2, 4], 50, aggregate="any")
    dense = row_of(summary["points"], method="vanilla", L=16, W=1)
    for row in summary["margins"]:
        restricted = row["restricted"]
        assert restricted["from"] == dense[row["axis"]] > row["from"] and restricted["to"] == row["to"]
        assert restricted["low"] <= restricted["value"] <= restricted["high"]
    cut = [r | ({"finished_at": None, "answer": None} if r["method"] == "vanilla" else {}) for r in records]
    assert {row["restricted"] for row in summarise(cut, [8, 16, 32], [1], 5)["margins"]} == {None}


def test_seconds_are_a_third_axis_where_all_records_have_them():
    records = [r | {"seconds": [3 * x for x in r["reads"]], "task": "choice"} for r in ladder() + ladder("dms", 4)]
    summary = summarise(records, [8, 16], [1], 50)
    assert all(row["seconds"] == pytest.approx(3 * row["reads"]) for row in summary["points"])
    assert {row["task"] for rows in summary.values() for row in rows} == {"choice"}
    for name in ("margins", "headline"):
        reads, seconds = ([r for r in summary[name] if r["axis"] == axis] for axis in ("reads", "seconds"))
        assert len(reads) == len(seconds) > 0
        for one, other in zip(reads, seconds, strict=True):
            assert [one["low"], one["high"]] == pytest.approx([other["low"], other["high"]])
    json.dumps(summary, allow_nan=False)
    mixed = [*records[:-1], {key: value for key, value in records[-1].items() if key != "seconds"}]
    with pytest.raises(ValueError, match=r"record {'method': 'dms', 'cr': 4, 'problem': 7, .*} without seconds"):
        summarise(mixed, [8], [1])
    with pytest.raises(ValueError, match=r"seconds of 1 samples .*: must be 3"):
        summarise([chain(0, seconds=[0.0])], [8], [1])
    assert {row["task"] for rows in summarise(ladder(), [8], [1], 5).values() for row in rows} == {None}


def test_few_problems_have_a_bayesian_interval_beside():
    few, many = (
        summarise([chain(p, right=p % 2 == 0) for p in range(n)], [8], [1], 5)["pass_at_1"][0] for n in (30, 61)
    )
    assert few["bayes_low"] < few["accuracy"] < few["bayes_high"] and "bayes_low" not in many
