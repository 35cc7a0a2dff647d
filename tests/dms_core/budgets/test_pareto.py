"""Frontiers and margins against values worked out by hand, and the invariants of their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dms_core.budgets.pareto import SCALES, frontier, margin, margins_of_frontiers

budgets = st.floats(1.0, 1e6)
accuracies = st.floats(0.0, 100.0)
curves = st.lists(st.tuples(budgets, accuracies), min_size=1, max_size=12)
scales = st.sampled_from(SCALES)


def test_frontier_keeps_exactly_the_points_that_nothing_cheaper_matches():
    points = [(4, 50), (1, 10), (2, 50), (2, 40), (3, 20), (8, 60), (16, 60)]
    assert frontier(points).tolist() == [[1, 10], [2, 50], [8, 60]]


@given(curves)
def test_frontier_rises_strictly_in_both_columns_and_dominates_every_point(points):
    vertices = frontier(points)
    assert (np.diff(vertices, axis=0) > 0).all()
    for budget, accuracy in points:
        assert ((vertices[:, 0] <= budget) & (vertices[:, 1] >= accuracy)).any()


@given(curves)
def test_frontier_of_a_frontier_is_itself(points):
    assert np.array_equal(frontier(frontier(points)), frontier(points))


@given(curves, st.randoms())
def test_frontier_does_not_depend_on_the_order_of_points(points, random):
    shuffled = random.sample(points, len(points))
    assert np.array_equal(frontier(shuffled), frontier(points))


@given(curves, scales)
def test_margin_of_a_curve_with_itself_is_zero(points, scale):
    assert margin(points, points, scale) == 0


@given(curves, st.floats(-50, 50), scales)
def test_raising_a_curve_by_c_gives_margin_c(points, c, scale):
    vertices = np.round(frontier(points), 3)  # coarse enough that adding c merges no two accuracies
    assert margin(vertices + np.array([0, c]), vertices, scale) == pytest.approx(c, abs=1e-6)


@given(curves, curves, scales)
def test_margin_is_antisymmetric(a, b, scale):
    forth, back = margin(a, b, scale), margin(b, a, scale)
    assert (forth is None and back is None) or forth == pytest.approx(-back, abs=1e-6)


@given(curves, curves, st.sampled_from([0.25, 2.0, 1024.0]), scales)
def test_margin_does_not_depend_on_the_unit_of_the_budget(a, b, unit, scale):
    before, after = (margin(frontier(a) * [u, 1], frontier(b) * [u, 1], scale) for u in (1.0, unit))
    assert (before is None and after is None) or after == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize(("scale", "expected"), [("linear", 5), ("log2", 2.5)])
def test_margin_of_a_chord_against_a_bent_curve_by_hand(scale, expected):
    # On [1, 4] B runs 0 → 30 straight. A has a vertex at 2: 0 → 20 → 30.
    # linear: A − B is 0 at 1, 10 at 2, 0 at 4: a triangle of area 15 over 3 → 5.
    # log2:   A is 0, 20, 30 and B 0, 15, 30 at u = 0, 1, 2: a triangle of area 5 over 2 → 2.5.
    a, b = [(1, 0), (2, 20), (4, 30)], [(1, 0), (4, 30)]
    assert margin(a, b, scale) == pytest.approx(expected)


@pytest.mark.parametrize(("scale", "expected"), [("linear", 95 / 9), ("log2", 11.25)])
def test_margin_covers_only_the_common_interval_by_hand(scale, expected):
    # A: (1, 10), (2, 30), (8, 50); B: (2, 20), (4, 30), (16, 40). The common interval is [2, 8].
    # linear: A is 30, 36⅔, 50 and B 20, 30, 33⅓ at 2, 4, 8; A − B is 10, 6⅔, 16⅔:
    #         (2·(10 + 6⅔)/2 + 4·(6⅔ + 16⅔)/2)/6 = (16⅔ + 46⅔)/6 = 95/9.
    # log2:   A is 30, 40, 50 and B 20, 30, 35 at u = 1, 2, 3; A − B is 10, 10, 15: (10 + 12.5)/2 = 11.25.
    a, b = [(1, 10), (2, 30), (8, 50)], [(2, 20), (4, 30), (16, 40)]
    assert margin(a, b, scale) == pytest.approx(expected)


@pytest.mark.parametrize(("scale", "expected"), [("linear", 170 / 7), ("log2", 20)])
def test_a_given_interval_extends_frontiers_flat(scale, expected):
    # A is 10 on [1, 2], rises to 30 at 4, and is 30 up to 8; B is 0 throughout.
    # linear: (1·10 + 2·20 + 4·30)/7.  log2: (1·10 + 1·20 + 1·30)/3.
    a, b = ((np.array([x], float), np.array([y], float)) for x, y in (([2, 4], [10, 30]), ([3, 3], [0, 0])))
    assert margins_of_frontiers(a, b, scale, (1, 8)) == pytest.approx(expected)
    assert margins_of_frontiers(b, a, scale, (8, 8)) == pytest.approx(-30)
    assert np.isnan(margins_of_frontiers(a, b, scale, (8, 1)))


@pytest.mark.parametrize("scale", SCALES)
def test_margin_is_not_available_where_budgets_do_not_meet(scale):
    low, high = [(1, 10), (2, 20)], [(4, 10), (8, 20)]
    assert margin(low, high, scale) is None
    assert margin([*low, (5, 15)], high, scale) is None, "a point that buys nothing does not extend a frontier"


@pytest.mark.parametrize("scale", SCALES)
def test_margin_at_a_single_common_budget_is_the_difference_there(scale):
    assert margin([(1, 10), (4, 30)], [(4, 25), (8, 40)], scale) == pytest.approx(5)
    inside = {"linear": 10 + 20 / 3, "log2": 20}[scale]  # at budget 2, within the first of two segments
    assert margin([(1, 10), (4, 30), (8, 50)], [(2, 5)], scale) == pytest.approx(inside - 5)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "shape"),
        ([1, 2, 3], "shape"),
        ([(1, 2, 3)], "shape"),
        ([(0, 50)], r"budget 0\.0: must be finite and > 0"),
        ([(1, 50), (-2, 50)], r"budget -2\.0: must be"),
        ([(np.inf, 50)], "budget inf: must be"),
        ([(1, np.nan)], "accuracy nan: must be finite"),
    ],
)
def test_bad_points_are_named(points, message):
    for call in (frontier, lambda p: margin(p, [(1, 1)]), lambda p: margin([(1, 1)], p)):
        with pytest.raises(ValueError, match=message):
            call(points)


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match=r"scale 'log': must be one of \('linear', 'log2'\)"):
        margin([(1, 1)], [(1, 1)], "log")
