"""From chains to curves: accuracy against budget for every (method, CR, L, W), with intervals (section 5.1, App. G).

One generated chain gives every shorter length budget L for nothing: cut at L it answers only if its answer was
complete by then, and its cost is its cost at that token. W chains vote; the paper calls such a configuration W-L-CR.

    reads(L, W) = Σ_chains reads at the cut            items attended to, per KV head, mean over layers and heads
    peak(L, W)  = prompt + Σ_chains max(live at the cut − prompt, 0)

The peak counts the shared prompt once and holds all W chains until the last one ends. Both costs are averaged over all
choices of W among the available chains (exactly, since they are linear in the chains), then over problems.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product

import numpy as np

from dms_core.budgets.pareto import SCALES, margins_of_frontiers, padded_frontiers
from dms_core.budgets.voting import AGGREGATES, Grid, make_grids

AXES = ("reads", "peak")


def summarise(
    records: Iterable[dict], lengths: Sequence[int], widths: Sequence[int], resamples: int = 1000, seed: int = 0,
    aggregate: str = "vote",
) -> dict:  # fmt: skip
    """Points, Pareto margins and paired differences, ready for `json.dumps`: what `dms curves --json` prints.

    records: one dict a chain with RECORD_KEYS; `live` and `reads` hold the live items and the cumulative KV reads after
    0, stride, 2·stride, … generated tokens and at the end. lengths: budgets L in generated tokens, at most the limit of
    the run; records with "budget_length" count at that L alone (see `credit`). widths: numbers W of voting chains; a
    (method, CR) has no point at a W that one of its problems lacks chains for. Intervals are 95 % percentile bootstraps
    over problems; whatever compares two methods uses the problems that both have, and the same resamples of them.
    aggregate: how W chains count, "vote" or "any" (see `credit`).

    Returns {"points", "pass_at_1", "margins", "margins_per_cr", "paired"}. Accuracies, margins and differences are in
    points (0–100). "margins" compare frontiers over all CRs of a method, "margins_per_cr" one CR of `dms` with vanilla;
    a value is None (NA) where the budgets do not meet, and `na_share` is the share of resamples in which they do not
    (left out of the interval). Record order does not matter. ValueError names the offending value.
    """
    lengths, widths = _checked("lengths", lengths), _checked("widths", widths)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; allowed: >= 1")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}; allowed: one of {AGGREGATES}")
    grids = make_grids(records, lengths, widths, aggregate, seed)
    return {
        "points": [p for grid in grids for p in _points(grid, resamples, seed)],
        "pass_at_1": [row for grid in grids for row in _pass_at_1(grid)],
        "margins": _margins(grids, resamples, seed),
        "margins_per_cr": _margins_per_cr(grids, resamples, seed),
        "paired": _paired(grids, lengths[-1], resamples, seed),
    }


def _checked(name: str, values: Sequence[int]) -> tuple[int, ...]:
    wrong = [v for v in values if v != int(v) or v < 1]
    if wrong or not len(values):
        raise ValueError(f"{name} is {list(values)}; allowed: one or more integers >= 1")
    return tuple(sorted({int(v) for v in values}))


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over problems of values (P, K): row 0 as measured, then `resamples` rows with the problems drawn again.

    The draws depend on P and the seed only, so methods measured on the same problems share them: paired comparisons.
    """
    return _draws(len(values), resamples, seed) @ values


def _accuracies(credit: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Resampled means in points. Rounded, since equal accuracies must stay equal: a frontier drops the costlier one."""
    return np.round(100 * _resampled_means(credit, resamples, seed), 9)


@lru_cache(maxsize=8)
def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), draws]) / n  # (1 + resamples, n)


def _interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    defined = samples[~np.isnan(samples)]
    if not defined.size:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _plain(cr: float) -> float | int:
    return int(cr) if cr == int(cr) else cr


def _points(grid: Grid, resamples: int, seed: int) -> list[dict]:
    if not grid.widths:
        return []
    accuracy = _accuracies(grid.rows("credit", grid.problems), resamples, seed)
    low, high = np.percentile(accuracy[1:], [2.5, 97.5], axis=0)
    reads, peak = grid.reads.mean(0).ravel(), grid.peak.mean(0).ravel()
    rows = []
    for i, (length, width) in enumerate(product(grid.lengths, grid.widths)):
        row = {"method": grid.method, "cr": _plain(grid.cr), "L": length, "W": width, "problems": len(grid.problems)}
        row |= {"accuracy": float(accuracy[0, i]), "low": float(low[i]), "high": float(high[i])}
        rows.append(row | {"reads": float(reads[i]), "peak": float(peak[i])})
    return rows


def _pass_at_1(grid: Grid) -> list[dict]:
    """Accuracy of one chain (avg@n) at each L with two standard errors, all in points.

    se_questions: of the mean over questions, these drawn from many; None for one question.  se_samples: what other
    chains on these same questions would change, √(Σ p(1 − p)/(n − 1))/P; None where a question has one chain.
    """
    questions = len(grid.problems)
    rows = []
    for length, p in zip(grid.lengths, grid.alone.T, strict=True):  # p (P,)
        row = {"method": grid.method, "cr": _plain(grid.cr), "L": length, "problems": questions}
        row |= {"chains": float(grid.chains.mean()), "accuracy": float(100 * p.mean())}
        row["se_questions"] = float(100 * p.std(ddof=1) / np.sqrt(questions)) if questions > 1 else None
        repeated = (grid.chains > 1).all()
        variance = p * (1 - p) / (grid.chains - 1) if repeated else p
        row["se_samples"] = float(100 * np.sqrt(variance.sum()) / questions) if repeated else None
        rows.append(row)
    return rows


def _common(grids: Sequence[Grid]) -> list:
    return sorted(set.intersection(*(set(grid.problems) for grid in grids)))


def _compare(a: str, b: str, curves: tuple[list[Grid], list[Grid]], resamples: int, seed: int) -> list[dict]:
    """Margins of curve a over curve b, both axes and scales; a curve is the frontier over all points of its grids."""
    problems = _common([*curves[0], *curves[1]])
    if not problems or not all(any(grid.widths for grid in curve) for curve in curves):
        return []

    def columns(curve: list[Grid], name: str) -> np.ndarray:
        return np.concatenate([grid.rows(name, problems) for grid in curve], axis=1)

    accuracy = [_accuracies(columns(curve, "credit"), resamples, seed) for curve in curves]
    rows = []
    for axis in AXES:
        budgets = [_resampled_means(columns(curve, axis), resamples, seed) for curve in curves]
        frontiers = [padded_frontiers(x, y) for x, y in zip(budgets, accuracy, strict=True)]
        for scale in SCALES:
            values = margins_of_frontiers(*frontiers, scale)
            row = {"a": a, "b": b, "axis": axis, "scale": scale, "value": None, "low": None, "high": None}
            if not np.isnan(values[0]):
                low, high = _interval(values[1:])
                row |= {"value": float(values[0]), "low": low, "high": high}
            rows.append(row | {"na_share": float(np.isnan(values[1:]).mean()), "problems": len(problems)})
    return rows


def _margins(grids: list[Grid], resamples: int, seed: int) -> list[dict]:
    """dms and every other method against vanilla, and dms against every other method, each over all its CRs."""
    by_method: dict[str, list[Grid]] = defaultdict(list)
    for grid in grids:
        by_method[grid.method].append(grid)
    others = [m for m in by_method if m not in ("vanilla", "dms")]
    pairs = [("dms", "vanilla"), *((m, "vanilla") for m in others), *(("dms", m) for m in others)]
    return [
        row
        for a, b in pairs
        if a in by_method and b in by_method
        for row in _compare(a, b, (by_method[a], by_method[b]), resamples, seed)
    ]


def _margins_per_cr(grids: list[Grid], resamples: int, seed: int) -> list[dict]:
    vanilla = [grid for grid in grids if grid.method == "vanilla"]
    return [
        row | {"cr": _plain(grid.cr)}
        for grid in grids
        if grid.method == "dms" and vanilla
        for row in _compare("dms", "vanilla", ([grid], vanilla), resamples, seed)
    ]


def _paired(grids: list[Grid], length: int, resamples: int, seed: int) -> list[dict]:
    """Differences of one-chain accuracy at the largest L: dms at each CR against vanilla and all methods at that CR."""
    rows, grids = [], [grid for grid in grids if length in grid.lengths]
    for dms in (grid for grid in grids if grid.method == "dms"):
        for other in grids:
            if other.method == "dms" or (other.method != "vanilla" and other.cr != dms.cr):
                continue
            problems = _common([dms, other])
            if not problems:
                continue
            difference = (dms.rows("alone", problems) - other.rows("alone", problems))[:, -1:]  # (P, 1)
            means = 100 * _resampled_means(difference, resamples, seed)[:, 0]
            low, high = _interval(means[1:])
            row = {"a": "dms", "b": other.method, "difference": float(means[0]), "low": low, "high": high}
            rows.append(row | {"cr": _plain(dms.cr), "L": length, "W": 1, "problems": len(problems)})
    return rows
