"""Tables of a summary say what it holds, and what it does not have."""

import matplotlib.pyplot as plt
import pytest

from companion.claims import budgets
from companion.paths import RESULTS
from dms_core.storage import read_json


@pytest.fixture(scope="module")
def summary():
    return read_json(RESULTS / "full" / "curves.json")


def test_gains_and_savings_have_a_row_a_task_and_axis(summary):
    gained, saved = budgets.gains(summary["headline"]), budgets.savings(summary["headline"])
    row = next(
        r for r in summary["headline"] if (r["task"], r["axis"], r["a"], r["b"]) == ("search", "peak", "dms", "vanilla")
    )
    shown = gained.loc["search", "peak"]
    assert shown["DMS"] == f"{row['best_a']:.1f} ({budgets.configuration(row['chosen_a'])})"
    assert shown["gain"].startswith(f"{row['gain']:+.1f} [")
    assert saved.loc["search", "peak"]["times less"].startswith(f"{row['target']['saving']:.1f} [")
    assert shown["budget"] == budgets.spent(row["budget"]) and len(gained) == len(saved) == 6


def test_what_is_not_reached_is_said(summary):
    row = next(r for r in summary["headline"] if (r["a"], r["b"]) == ("dms", "vanilla"))
    nothing = dict.fromkeys(("best_a", "chosen_a", "gain", "low", "high", "gain_crossed"))
    row = row | nothing | {"target": row["target"] | {"saving": None, "budget_a": None}}
    assert budgets.gains([row]).iloc[0][["DMS", "gain"]].tolist() == ["—", "NA"]
    assert budgets.crossed([row]).iloc[0].tolist() == ["NA", "NA"]
    assert budgets.savings([row]).iloc[0][["DMS pays", "times less"]].tolist() == ["—", "not reached"]
    axes = budgets.plot_headline([row])
    assert [len(ax.lines) for ax in axes] == [1, 1]  # the lines of no difference alone
    plt.close("all")


def test_margins_and_differences_are_of_dms_over_the_dense_model(summary):
    all_, per_cr = budgets.margins(summary["margins"]), budgets.margins(summary["margins_per_cr"])
    none_in_common = [row | {"restricted": None} for row in summary["margins"]]
    assert all_.index.names == ["task", "axis"] and len(all_) == 6
    assert set(per_cr.index.get_level_values("CR")) == {4, 8} and len(per_cr) == 12
    assert set(budgets.margins(none_in_common)["restricted"]) == {"NA"} and not set(all_["restricted"]) & {"NA"}
    assert budgets.differences(summary["paired"]).columns.tolist()[1:] == ["retrofit 0", "retrofit 1", "retrofit 2"]


def test_empty_lists_make_empty_tables():
    for table in (
        budgets.gains([]),
        budgets.crossed([]),
        budgets.savings([]),
        budgets.margins([]),
        budgets.differences([]),
    ):
        assert table.empty


def test_peak_with_nothing_shared_is_that_of_one_chain_times_the_chains():
    """Two points a method: DMS at half the peak, ten points better."""
    base = {"task": "reasoning_gym:lcm:number", "L": 64}
    points = [
        base | {"method": method, "cr": cr, "W": W, "peak": peak, "accuracy": 50.0 + W + better}
        for method, cr, peaks, better in (("vanilla", 1, (100, 130), 0), ("dms", 8, (60, 65), 10))
        for W, peak in zip((1, 4), peaks, strict=True)
    ]
    assert [p["peak"] for p in budgets.unshared(points)] == [100, 400, 60, 240]
    (lead,) = budgets.unshared_margins(points).values()
    assert list(budgets.unshared_margins(points)) == ["lcm"] and 9 < lead < 11  # the dense model shares
    said = [point | {"kept": 50.0} for point in points]
    assert budgets.is_exact(said) and not budgets.caveat(said)
    for unsaid in (points, [said[0], points[1] | {"kept": None}]):
        assert not budgets.is_exact(unsaid) and budgets.caveat(unsaid)
