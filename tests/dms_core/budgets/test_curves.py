"""From chain records to points, margins and paired differences: records with known results, and simulations."""

import json
import random
from itertools import combinations, product

import numpy as np
import pytest

from dms_core.budgets.curves import Pairs, default_pairs, summarise
from dms_core.budgets.pareto import margin
from dms_core.budgets.voting import any_correct, vote

PROMPT = 10


def chain(problem, index, *, method="vanilla", cr=1, answer="1", tokens=8, stride=4, finished_at=-1):
    """A chain with the costs of a dense cache, divided by cr but for the prompt. finished_at −1: at the end."""
    at = np.minimum(np.arange(-(-tokens // stride) + 1) * stride, tokens)
    return {
        "method": method,
        "cr": cr,
        "problem": problem,
        "chain": index,
        "answer": answer,
        "gold": "1",
        "finished_at": (tokens if finished_at == -1 else finished_at) if answer is not None else None,
        "tokens": tokens,
        "stride": stride,
        "live": (PROMPT + at / cr).tolist(),
        "reads": (PROMPT * at + at**2 / 2 / cr).tolist(),
        "prompt_tokens": PROMPT,
        "prompt_live": PROMPT,
    }


def run(method, cr, correct, rng, chains=1):
    """Simulated chains: problem p is answered correctly with probability correct[p], after 8 to 64 tokens."""
    return [
        chain(p, c, method=method, cr=cr, tokens=int(rng.integers(8, 65)), answer="1" if rng.random() < q else "2")
        for p, q in enumerate(correct)
        for c in range(chains)
    ]


def point(summary, **wanted):
    (found,) = (p for p in summary["points"] if all(p[key] == value for key, value in wanted.items()))
    return found


@pytest.mark.parametrize(
    ("answers", "credit"),
    [
        ([0, 0, 1], 1),
        ([0, 1, 1], 0),
        ([0, 1, -1], 1 / 2),
        ([0, 1, 2], 1 / 3),
        ([1, 2, 2], 0),
        ([0, -1, -1], 1),
        ([1, -1, -1], 0),
        ([-1, -1, -1], 0),
        ([0, 0, 1, 1, 2], 1 / 2),
    ],
)
def test_majority_vote_averages_ties_and_ignores_chains_without_an_answer(answers, credit):
    assert vote(np.array(answers), gold=0) == pytest.approx(credit)


def test_vote_equals_the_expected_score_of_a_random_tie_break():
    rng = np.random.default_rng(0)
    for answers in rng.integers(-1, 4, size=(300, 6)):
        given = answers[answers >= 0].tolist()
        top = [a for a in set(given) if given.count(a) == max(map(given.count, given))]
        assert vote(answers, gold=0) == pytest.approx((0 in top) / max(len(top), 1))


def test_any_correct_is_the_share_of_choices_that_hold_a_correct_chain():
    for chains, correct, width in product(range(1, 8), range(8), range(1, 8)):
        if correct <= chains >= width:
            choices = list(combinations(range(chains), width))
            share = sum(min(choice) < correct for choice in choices) / len(choices)
            assert any_correct(np.array([correct]), chains, width) == pytest.approx(share)


def test_pass_at_all_needs_one_correct_chain_and_a_vote_a_majority():
    graded = [chain(0, c, answer=a) | {"correct": a == "1"} for c, a in enumerate(["1", "2", "2", "2"])]
    accuracy = {
        how: [p["accuracy"] for p in summarise(graded, [8], [1, 2, 4], aggregate=how)["points"]]
        for how in ("any", "vote")
    }
    assert accuracy == {"any": [25, 50, 100], "vote": [25, pytest.approx(25), 0]}


def test_pass_at_all_counts_no_chain_that_was_cut_before_its_answer():
    records = [chain(0, 0, tokens=20), chain(0, 1, tokens=8, answer="2")]
    assert [p["accuracy"] for p in summarise(records, [8, 20], [2], aggregate="any")["points"]] == [0, 100]


def test_grade_overrides_comparison_of_answer_text():
    records = [chain(0, c, answer=a) | {"correct": a != "3"} for c, a in enumerate(["0.5", "1/2", "3"])]
    assert summarise(records, [8], [3])["points"][0]["accuracy"] == 100
    records = [chain(0, 0, answer="1") | {"correct": False}]  # the grader's word, not the spelling
    assert summarise(records, [8], [1])["points"][0]["accuracy"] == 0


def test_standard_errors_of_pass_at_1_are_those_of_simulated_reruns():
    rng = np.random.default_rng(6)
    difficulty, chains = rng.random(30), 4
    means, rows = [], []
    for _ in range(100):
        summary = summarise(run("vanilla", 1, difficulty, rng, chains), [64], [1], resamples=1)
        rows.append(summary["pass_at_1"][0])
        means.append(rows[-1]["accuracy"])
    assert np.mean([r["se_samples"] ** 2 for r in rows]) == pytest.approx(np.var(means), rel=0.4)
    p = np.array([0.2, 0.4, 0.6, 0.8])
    records = [chain(q, c, answer="1" if c < 10 * p[q] else "2") for q in range(4) for c in range(10)]
    (row,) = summarise(records, [8], [1])["pass_at_1"]
    assert (row["problems"], row["chains"], row["accuracy"]) == (4, 10, pytest.approx(50))
    assert row["se_questions"] == pytest.approx(100 * p.std(ddof=1) / 2)
    assert row["se_samples"] == pytest.approx(100 * np.sqrt((p * (1 - p) / 9).sum()) / 4)
    (row,) = summarise([chain(0, 0)], [8], [1])["pass_at_1"]
    assert row["se_questions"] is row["se_samples"] is None


def test_ungraded_records_and_mixed_tasks_are_refused():
    with pytest.raises(ValueError, match=r"correct None \(method vanilla, problem 0, chain 0\): must be true or false"):
        summarise([chain(0, 0) | {"correct": None}], [8], [1])
    with pytest.raises(ValueError, match=r"tasks \['aime24', 'math500'\]: must be of one task"):
        summarise([chain(p, 0) | {"task": t} for p, t in enumerate(("aime24", "math500"))], [8], [1])
    with pytest.raises(ValueError, match="aggregate 'all': must be one of"):
        summarise([chain(0, 0)], [8], [1], aggregate="all")


def test_a_chain_cut_before_it_finished_scores_wrong():
    summary = summarise([chain(0, 0, tokens=20, finished_at=9)], lengths=[8, 9, 20, 40], widths=[1])
    assert [p["accuracy"] for p in summary["points"]] == [0, 100, 100, 100]


def test_costs_are_those_at_the_cut_and_stop_growing_when_the_chain_ends():
    summary = summarise([chain(0, 0, tokens=10, stride=4)], lengths=[4, 6, 10, 99], widths=[1])
    assert [p["peak"] for p in summary["points"]] == [14, 16, 20, 20]
    assert [p["reads"] for p in summary["points"]] == [48, 80, 150, 150]  # 6 lies midway between reads of 48 and 112


def test_chains_add_their_costs_and_share_one_prompt():
    records = [chain(0, c, tokens=8 * (1 + c), stride=4) for c in range(2)]
    summary = summarise(records, lengths=[16], widths=[1, 2])
    one, two = summary["points"]
    assert one["peak"] == PROMPT + (8 + 16) / 2
    assert two["peak"] == PROMPT + 8 + 16
    assert two["reads"] == 2 * one["reads"] == (80 + 32) + (160 + 128)


def test_accuracy_averages_over_all_choices_of_chains():
    records = [chain(0, c, answer=a) for c, a in enumerate(["1", "1", "2", None])]
    summary = summarise(records, lengths=[8], widths=[1, 2, 3, 4, 5])
    # W = 2: 11, 12, 1−, 12, 1−, 2− score 1, ½, 1, ½, 1, 0. W = 3: 112, 11−, 12−, 12− score 1, 1, ½, ½.
    # W = 4: 1. There is no W = 5.
    assert [p["accuracy"] for p in summary["points"]] == pytest.approx([50, 400 / 6, 75, 100])


def test_accuracy_over_random_choices_of_chains_is_close_to_that_over_all():
    records = [chain(0, c, answer="1" if c < 8 else "2") for c in range(16)]
    assert summarise(records, [8], [4])["points"][0]["accuracy"] == pytest.approx(50, abs=20)
    assert summarise(records, [8], [16])["points"][0]["accuracy"] == 50


def test_order_of_records_does_not_matter():
    rng = np.random.default_rng(1)
    records = [r for m, cr in (("vanilla", 1), ("dms", 4), ("tova", 4)) for r in run(m, cr, [0.3, 0.6, 0.9], rng, 7)]
    shuffled = random.Random(0).sample(records, len(records))
    arguments = {"lengths": (64, 16, 32), "widths": (4, 1), "resamples": 50}
    assert summarise(shuffled, **arguments) == summarise(records, **arguments)


def test_summary_is_json_and_reproducible():
    rng = np.random.default_rng(2)
    records = run("vanilla", 1, [0.5] * 6, rng, 2) + run("dms", 8.0, [0.5] * 6, rng, 2)
    first, second = (json.dumps(summarise(records, [16, 64], [1, 2], 40, seed=3), allow_nan=False) for _ in range(2))
    assert first == second
    assert {p["cr"] for p in json.loads(first)["points"]} == {1, 8}


def test_margins_are_those_of_the_points():
    rng = np.random.default_rng(3)
    records = [r for m, cr in (("vanilla", 1), ("dms", 4), ("dms", 8)) for r in run(m, cr, [0.7] * 20, rng, 4)]
    summary = summarise(records, [16, 32, 64], [1, 2, 4], resamples=20)
    assert [(m["a"], m["b"], m["axis"], m["scale"]) for m in summary["margins"]] == [
        ("dms", "vanilla", axis, scale) for axis in ("reads", "peak") for scale in ("linear", "log2")
    ]
    for row in summary["margins"] + summary["margins_per_cr"]:
        a, b = (
            [(p[row["axis"]], p["accuracy"]) for p in summary["points"] if p["method"] == m and p["cr"] in crs]
            for m, crs in (("dms", [row["cr"]] if "cr" in row else [4, 8]), ("vanilla", [1]))
        )
        assert row["value"] == pytest.approx(margin(a, b, row["scale"]))
        assert row["low"] <= row["high"]


def test_smaller_cache_at_equal_accuracy_gives_positive_margin_and_zero_difference():
    rng = np.random.default_rng(4)
    dense = run("vanilla", 1, rng.random(40), rng, 4)
    records = dense + [
        r | {"method": "dms", "cr": 2, "live": (PROMPT + (np.array(r["live"]) - PROMPT) / 2).tolist()} for r in dense
    ]
    summary = summarise(records, [8, 16, 32, 64], [1, 2, 4], resamples=200)
    assert all(m["low"] > 0 for m in summary["margins"] if m["axis"] == "peak")
    assert all(m["value"] == m["low"] == m["high"] == 0 for m in summary["margins"] if m["axis"] == "reads")
    assert [(p["difference"], p["low"], p["high"]) for p in summary["paired"]] == [(0, 0, 0)]


def test_margin_is_none_where_the_budgets_do_not_meet():
    records = [chain(0, 0, tokens=8), chain(0, 0, method="dms", cr=8, tokens=800)]
    summary = summarise(records, [1000], [1], resamples=10)
    assert all(m["value"] is m["low"] is m["high"] is None and m["na_share"] == 1 for m in summary["margins"])


def test_paired_rows_compare_dms_with_vanilla_and_with_methods_at_the_same_cr():
    runs = [("vanilla", 1), ("dms", 4), ("dms", 8), ("dms-immediate", 4), ("tova", 8)]
    summary = summarise([chain(0, 0, method=m, cr=cr) for m, cr in runs], [4, 8], [1], resamples=5)
    assert [(p["a"], p["b"], p["cr"], p["L"], p["W"]) for p in summary["paired"]] == [
        ("dms", "vanilla", 4, 8, 1),
        ("dms", "dms-immediate", 4, 8, 1),
        ("dms", "vanilla", 8, 8, 1),
        ("dms", "tova", 8, 8, 1),
    ]


def test_dms_is_compared_with_every_method_at_its_cr_problem_by_problem():
    rng = np.random.default_rng(7)
    others = ("dms-immediate", "h2o", "quest", "streaming-llm", "tova")
    records = run("vanilla", 1, [0.5] * 12, rng, 2) + run("dms", 4, [0.9] * 12, rng, 2)
    for other in others:
        records += budgeted(run(other, 4, [0.5] * 12, rng, 2), 64)
    records += budgeted(run("tova", 2, [0.5] * 12, rng, 2), 64)  # no dms at this CR
    summary = summarise(records, [16, 64], [1, 2], resamples=50)
    assert [(p["a"], p["b"], p["cr"]) for p in summary["paired"]] == [("dms", b, 4) for b in ("vanilla", *others)]
    for row in summary["paired"]:
        others_cr = 1 if row["b"] == "vanilla" else 4
        dms, other = (point(summary, method=m, cr=cr, L=64, W=1) for m, cr in (("dms", 4), (row["b"], others_cr)))
        assert row["difference"] == pytest.approx(dms["accuracy"] - other["accuracy"])
        assert row["low"] <= row["difference"] <= row["high"] and (row["L"], row["W"]) == (64, 1)


def budgeted(records, length):
    return [record | {"budget_length": length} for record in records]


def test_chain_with_budget_length_counts_at_that_length_only():
    rng = np.random.default_rng(8)
    dense, free = run("vanilla", 1, [0.6] * 10, rng, 2), run("dms", 4, [0.6] * 10, rng, 2)
    tova = run("tova", 4, [0.6] * 10, rng, 2)
    lengths, widths = [16, 32, 64], [1, 2]
    cut = summarise([*dense, *free, *tova], lengths, widths, 20)  # records without the key: every L
    held = summarise([*dense, *free, *budgeted(tova, 64)], lengths, widths, 20)
    for name in ("points", "pass_at_1"):
        assert held[name] == [row for row in cut[name] if row["method"] != "tova" or row["L"] == 64]
    assert held["paired"] == cut["paired"] and held["margins_per_cr"] == cut["margins_per_cr"]
    for row in held["margins"]:
        a, b = (
            [(p[row["axis"]], p["accuracy"]) for p in held["points"] if p["method"] == row[side]] for side in ("a", "b")
        )
        assert row["value"] == (None if (value := margin(a, b, row["scale"])) is None else pytest.approx(value))
    assert {(m["a"], m["b"]) for m in held["margins"]} == {("dms", "vanilla"), ("tova", "vanilla"), ("dms", "tova")}


def test_runs_at_two_lengths_give_a_budgeted_method_both_points():
    short, long = (budgeted([chain(0, 0, method="tova", cr=4, tokens=n)], n) for n in (8, 64))
    summary = summarise([chain(0, 0, method="dms", cr=4), *short, *long], [8, 32, 64], [1], 5)
    assert [(p["method"], p["L"]) for p in summary["points"]] == [
        *(("dms", n) for n in (8, 32, 64)),
        ("tova", 8),
        ("tova", 64),
    ]
    assert [(p["b"], p["L"]) for p in summary["paired"]] == [("tova", 64)]
    assert summarise([chain(0, 0), *short], [32], [1], 5)["points"][0]["method"] == "vanilla"
    with pytest.raises(ValueError, match=r"lengths \[32\]: must be among those of the KV budgets, \[8\]"):
        summarise(short, [32], [1])
    with pytest.raises(ValueError, match="must occur once"):
        summarise(short * 2, [8], [1])


def test_given_pairs_replace_the_default_ones():
    rng = np.random.default_rng(9)
    names = [("vanilla", 1), ("dms", 4), ("tova", 4), ("tova", 8)]
    records = [r for m, cr in names for r in run(m, cr, [0.6] * 8, rng, 2)]
    pairs = Pairs([("tova", "dms")], [("tova", "vanilla")], [("tova", "dms"), ("tova", "vanilla")])
    summary, default = (summarise(records, [16, 64], [1, 2], 20, pairs=given) for given in (pairs, None))
    assert {(m["a"], m["b"]) for m in summary["margins"]} == {("tova", "dms")}
    assert [(m["a"], m["b"], m["cr"]) for m in summary["margins_per_cr"][::4]] == [
        ("tova", "vanilla", 4),
        ("tova", "vanilla", 8),
    ]
    assert [(p["b"], p["cr"]) for p in summary["paired"]] == [("vanilla", 4), ("dms", 4), ("vanilla", 8)]
    assert summary["points"] == default["points"]
    assert default == summarise(records, [16, 64], [1, 2], 20, pairs=default_pairs(["vanilla", "dms", "tova"]))
    assert default["paired"][-1]["difference"] == -summary["paired"][1]["difference"]


def test_comparisons_use_the_problems_that_both_methods_have():
    records = [chain(p, 0, answer="1" if p else "2") for p in range(4)] + [chain(p, 0, method="dms") for p in (0, 1)]
    summary = summarise(records, [8], [1], resamples=10)
    assert (summary["paired"][0]["difference"], summary["paired"][0]["problems"]) == (50, 2)
    assert point(summary, method="vanilla")["accuracy"] == 75


def test_bootstrap_intervals_cover_the_truth():
    rng = np.random.default_rng(5)
    covered = np.zeros(3)
    for _ in range(60):
        difficulty = rng.beta(2, 1, size=80)  # mean 2/3; DMS is 0.9 times as accurate on every problem
        records = run("vanilla", 1, difficulty, rng, 2) + run("dms", 4, 0.9 * difficulty, rng, 2)
        summary = summarise(records, [64], [1], resamples=200)
        rows = [point(summary, method="vanilla"), point(summary, method="dms"), summary["paired"][0]]
        truths = [200 / 3, 60, -20 / 3]
        covered += [row["low"] <= truth <= row["high"] for row, truth in zip(rows, truths, strict=True)]
    assert (covered / 60 >= 0.85).all(), covered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens, stride, cr 0, 4, 1 .*: must be >= 1"),
        ({"cr": 0.5}, r"tokens, stride, cr 8, 4, 0\.5"),
        ({"live": [1.0, 2.0]}, "live, reads of 2, 3 samples .*: must be 3 each"),
        ({"reads": [0.0, np.nan, 1.0]}, "prompt_live .*: must be finite"),
    ],
)
def test_bad_records_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        summarise([chain(0, 0) | change], [8], [1])


def test_bad_arguments_are_named():
    good = [chain(0, 0)]
    incomplete = {key: value for key, value in good[0].items() if key != "stride"}
    for records, lengths, widths, resamples, message in (
        (good, [0], [1], 10, r"lengths \[0\]: must be"),
        (good, [8], [], 10, r"widths \[\]: must be"),
        (good, [8], [1], 0, "resamples 0: must be"),
        ([], [8], [1], 10, "no chain records"),
        (good * 2, [8], [1], 10, "must occur once"),
        ([*good, chain(0, 1) | {"gold": "2"}], [8], [1], 10, "gold answers '1' and '2'"),
        ([*good, chain(0, 1) | {"id": "test/2/0"}], [8], [1], 10, "identifiers None and 'test/2/0'"),
        ([incomplete], [8], [1], 10, r"without \['stride'\]: must have"),
    ):
        with pytest.raises(ValueError, match=message):
            summarise(records, lengths, widths, resamples)
