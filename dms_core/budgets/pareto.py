"""Pareto frontiers and the margin between two of them (paper section 5.1 and appendix G).

    margin(A, B) = 1/|I| ∫_I (A(x) − B(x)) dx,    I = the largest budget interval that both frontiers cover

x is a budget (KV reads or peak tokens), A(x) the accuracy of the frontier at that budget, linear between its measured
vertices. The paper does not say whether x is the budget or its log2 (its plots use log2): both scales exist here.

A frontier ends at its last vertex: a larger budget that buys no accuracy is not on it. The paper has NA margins between
methods measured at the same lengths and widths, which suggests the same reading.
"""

import numpy as np
from numpy.typing import ArrayLike

SCALES = ("linear", "log2")


def frontier(points: ArrayLike) -> np.ndarray:
    """Vertices of the best accuracy reachable at each budget.

    points: (n, 2) pairs (budget > 0, accuracy), any order. Returns (m, 2), 1 ≤ m ≤ n, both columns strictly increasing:
    the points that no point of equal or smaller budget matches. ValueError for another shape, for budgets that are not
    positive and finite, or for accuracies that are not finite.
    """
    x, y = padded_frontiers(*_validated(points).T[:, None])
    keep = np.append(True, np.diff(x[0]) > 0)
    return np.stack([x[0, keep], y[0, keep]], axis=1)


def margin(a: ArrayLike, b: ArrayLike, scale: str = "log2") -> float | None:
    """Mean accuracy lead of a over b, in the unit of the accuracies, over the budgets that both frontiers cover.

    a, b: (n, 2) measured points as for `frontier`, or frontiers (taking the frontier twice changes nothing). scale:
    "linear" interpolates and integrates over x, "log2" over log2 x. None (the paper's NA) if the two intervals do not
    meet; if they share a single budget, the difference there. ValueError as for `frontier`, or for another scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: must be one of {SCALES}")
    first, second = (padded_frontiers(*_validated(points).T[:, None]) for points in (a, b))
    value = margins_of_frontiers(first, second, scale)[0]
    return None if np.isnan(value) else float(value)


def _validated(points: ArrayLike) -> np.ndarray:
    array = np.asarray(points, dtype=float)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array):
        raise ValueError(f"points of shape {array.shape}: must be (n, 2) pairs (budget, accuracy) with n >= 1")
    budgets, accuracies = array.T
    wrong = budgets[~(np.isfinite(budgets) & (budgets > 0))]
    if wrong.size:
        raise ValueError(f"budget {wrong[0]}: must be finite and > 0")
    wrong = accuracies[~np.isfinite(accuracies)]
    if wrong.size:
        raise ValueError(f"accuracy {wrong[0]}: must be finite")
    return array


def padded_frontiers(budgets: np.ndarray, accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frontiers of many resamples, unchecked: budgets, accuracies (R, K) in and out, a vertex repeated to the next."""
    order = np.lexsort((-accuracies, budgets), axis=1)  # at equal budgets the best comes first
    budgets, accuracies = (np.take_along_axis(v, order, axis=1) for v in (budgets, accuracies))
    best = np.maximum.accumulate(accuracies, axis=1)
    vertex = np.zeros(order.shape, dtype=int)
    vertex[:, 1:] = np.where(accuracies[:, 1:] > best[:, :-1], np.arange(1, order.shape[1]), 0)
    vertex = np.maximum.accumulate(vertex, axis=1)
    return np.take_along_axis(budgets, vertex, axis=1), best


def common_interval(a: tuple, b: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The budgets that both of two padded frontiers cover, (R,) from and (R,) to; from > to where they do not meet."""
    return np.maximum(a[0][:, 0], b[0][:, 0]), np.minimum(a[0][:, -1], b[0][:, -1])


def margins_of_frontiers(a: tuple, b: tuple, scale: str, within: tuple | None = None) -> np.ndarray:
    """`margin` of many pairs of padded frontiers, unchecked: (R,), NaN where a pair does not meet.

    within: budgets (from, to) for all pairs, to which each frontier is extended flat; else those that a pair covers.
    """
    low, high = common_interval(a, b) if within is None else within
    (ax, ay), (bx, by) = a, b
    if scale == "log2":
        ax, bx, low, high = (np.log2(x) for x in (ax, bx, low, high))
    lead = _mean_height(ax, ay, low, high) - _mean_height(bx, by, low, high)
    return np.where(low <= high, lead, np.nan)


def _mean_height(x: np.ndarray, y: np.ndarray, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Mean of padded frontiers (R, K), flat beyond their ends, over [low, high]; the height where these are equal."""
    low, high = (np.broadcast_to(bound, len(x))[:, None] for bound in (low, high))
    run = np.diff(x)
    slope = np.divide(np.diff(y), run, out=np.zeros_like(run), where=run > 0)
    cut = np.clip(x, low, high)
    left, right = (y[:, :-1] + slope * (ends - x[:, :-1]) for ends in (cut[:, :-1], cut[:, 1:]))
    area = (np.diff(cut) * (left + right) / 2).sum(1)
    area += (cut[:, 0] - low[:, 0]) * y[:, 0] + (high[:, 0] - cut[:, -1]) * y[:, -1]
    at_low = y[:, 0] + (slope * (np.clip(low, x[:, :-1], x[:, 1:]) - x[:, :-1])).sum(1)
    width = (high - low)[:, 0]
    return np.divide(area, width, out=at_low, where=width > 0)
