"""What hyper-scaling means: the best accuracy at the dense model's budget, and the budget for its accuracy.

Both look at measured configurations (CR, L, W) alone; nothing is interpolated.  The best of many configurations
is biased upward, and more so for a, which has more of them: "gain_crossed" chooses on one half of the problems and
measures on the other.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from dms_core.budgets import bootstrap
from dms_core.budgets.voting import Scores, resampled, shared_problems


def headline(a: Sequence[Scores], b: Sequence[Scores], draws: tuple[int, int]) -> list[dict]:
    """A row an axis, of a over b; none where b has no W 1 at its largest L, or they share no problems.

    The reference is b at W 1 and its largest L, and of several CRs the lowest.  draws: resamples and seed.

    "budget": the reference's; "best_a", "best_b": the best accuracies that cost no more, "chosen_a" and "chosen_b"
    where; "gain" = best_a − best_b.  Each resample chooses anew among the configurations that the full sample's budgets
    allow.  "gain_crossed": chosen on problems of even position and measured on the others, the reverse, and the mean.
    All three are None where nothing of a is so cheap.
    "target": the "accuracy" of the reference, the least budgets that reach it, "saving" = budget_b / budget_a, and the
    share of resamples in which a has "reached" it; where it does not, the saving is 0, and without a's budget in the
    full sample it is None.  "of_best": the same for b's best accuracy of all.
    """
    if not (problems := shared_problems([*a, *b]) if a and b else []) or not any(one.widths for one in a):
        return []
    where = [_configurations(curve) for curve in (a, b)]
    longest = max(one.lengths[-1] for one in b)
    at = [i for i, (_, length, width) in enumerate(where[1]) if (length, width) == (longest, 1)]
    if not at:
        return []
    reference = min(at, key=lambda i: where[1][i][0])
    accuracy = [resampled(curve, "credit", problems, draws) for curve in (a, b)]
    halves = [
        [resampled(curve, "credit", problems, draws, half) for curve in (a, b)]
        for half in (np.arange(len(problems)) % 2 == odd for odd in (0, 1))
    ]
    about: dict = {"a": a[0].method, "b": b[0].method}
    about |= {"problems": len(problems), "seeds": max(len(one.seeds) for one in [*a, *b])}
    rows = []
    for axis in a[0].costs:
        budgets = [_mean_budgets(curve, axis, problems) for curve in (a, b)]
        row = about | {"axis": axis} | _gain(budgets, accuracy, halves, where, float(budgets[1][reference]))
        row["target"] = _saving(budgets, accuracy, accuracy[1][:, reference])
        rows.append(row | {"of_best": _saving(budgets, accuracy, accuracy[1].max(1))})
    return rows


def _configurations(curve: Sequence[Scores]) -> list[tuple]:
    """(CR, L, W) in the order of `resampled`."""
    return [(one.cr, *at) for one in curve for at in product(one.lengths, one.widths)]


def _mean_budgets(curve: Sequence[Scores], axis: str, problems: list) -> np.ndarray:
    return np.concatenate([one.rows(axis, problems).mean((0, 1)) for one in curve])


def _gain(budgets: list, accuracy: list, halves: list, where: list, budget: float) -> dict:
    allowed = [np.flatnonzero(costs <= budget) for costs in budgets]
    allowed = [at[np.argsort(costs[at], kind="stable")] for at, costs in zip(allowed, budgets, strict=True)]
    row: dict = {"budget": budget}
    for name, at, drawn, costs, places in zip("ab", allowed, accuracy, budgets, where, strict=True):
        best = at[drawn[0, at].argmax()] if at.size else None  # the cheapest of equals
        row[f"best_{name}"] = None if best is None else float(drawn[0, best])
        chosen = None if best is None else dict(zip(("cr", "L", "W"), places[best], strict=True))
        row[f"chosen_{name}"] = chosen and chosen | {"budget": float(costs[best])}
    if not allowed[0].size:
        return row | dict.fromkeys(("gain", "low", "high", "gain_crossed"))
    gains = np.subtract(*(drawn[:, at].max(1) for drawn, at in zip(accuracy, allowed, strict=True)))
    crossed = [
        np.subtract(*(_chosen(one[:, at], other[:, at]) for one, other, at in zip(*order, allowed, strict=True)))
        for order in (halves, halves[::-1])
    ]
    return row | _with_bounds("gain", gains) | {"gain_crossed": _with_bounds("value", np.mean(crossed, axis=0))}


def _chosen(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In each resample (R, K) what the best configuration of the one half has on the other half: (R,)."""
    return np.take_along_axis(other, one.argmax(1)[:, None], axis=1)[:, 0]


def _saving(budgets: list, accuracy: list, target: np.ndarray) -> dict:
    """The least budgets at which a and b have the target's accuracy, resample by resample."""
    least_a, least_b = (
        np.where(drawn >= target[:, None], costs, np.inf).min(1) for costs, drawn in zip(budgets, accuracy, strict=True)
    )
    row: dict = {"accuracy": float(target[0]), "budget_b": float(least_b[0])}
    row["budget_a"] = float(least_a[0]) if np.isfinite(least_a[0]) else None
    row |= _with_bounds("saving", least_b / least_a) | {"reached": float(np.isfinite(least_a[1:]).mean())}
    return row | ({} if row["budget_a"] else {"saving": None})


def _with_bounds(name: str, drawn: np.ndarray) -> dict:
    """The value of row 0, None where undefined, and the interval of the others."""
    low, high = bootstrap.interval(drawn[1:])
    return {name: None if np.isnan(drawn[0]) else float(drawn[0]), "low": low, "high": high}
