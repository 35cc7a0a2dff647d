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
    curves = [padded_frontiers(*_validated(points).T[:, None]) for points in (a, b)]
    value = margins_of_frontiers(*curves, scale)[0]
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


def margins_of_frontiers(a: tuple, b: tuple, scale: str) -> np.ndarray:
    """`margin` of many pairs of padded frontiers, unchecked: (R,), NaN where a pair does not meet."""
    (ax, ay), (bx, by) = a, b
    if scale == "log2":
        ax, bx = np.log2(ax), np.log2(bx)
    low, high = np.maximum(ax[:, 0], bx[:, 0]), np.minimum(ax[:, -1], bx[:, -1])
    values = np.full(len(low), np.nan)
    for row in np.flatnonzero(low <= high):
        # A − B is linear between these, so the trapezoid rule is exact
        x = np.clip(np.sort(np.concatenate([ax[row], bx[row]])), low[row], high[row])
        lead = np.interp(x, ax[row], ay[row]) - np.interp(x, bx[row], by[row])
        area = np.dot(x[1:] - x[:-1], lead[1:] + lead[:-1]) / 2
        values[row] = area / (high[row] - low[row]) if high[row] > low[row] else lead[0]
    return values
