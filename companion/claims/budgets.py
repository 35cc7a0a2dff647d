"""What a budget buys, margins and differences: tables of a summary of ``curves.summarise``, and a figure of the first.

Every table is of DMS over the dense model, with 95 % intervals; "—" and NA stand where there is no value.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from companion.claims.wording import interval, signed
from companion.experiments.summaries import is_exact
from companion.figures.style import COLUMN, STYLES, style_of
from companion.tasks.base import short_name
from dms_core.budgets.pareto import margin

BOUNDS = ("value", "low", "high")
INEXACT = (
    "These stored peaks count as shared all that is live of the prompt after the prefill, more than DMS keeps of it: "
    "each of its chains but the first holds up to $w + 1$ tokens more than they say. The margins of this build count "
    "what is kept."
)
FEWEST = 0.25  # times; where an interval of a saving that begins at 0 begins on the log axis


def configuration(chosen: dict | None) -> str:
    """A configuration as W-L-CR, or W-L where nothing is compressed.

    >>> configuration({"W": 4, "L": 544, "cr": 8})
    '4-544-8'
    """
    if chosen is None:
        return "—"
    return f"{chosen['W']}-{chosen['L']}" + (f"-{chosen['cr']:g}" if chosen["cr"] > 1 else "")


def gains(headline: Sequence[dict]) -> pd.DataFrame:
    """The best accuracy (%) of both at the budget of one long dense chain, and DMS's gain in points."""
    rows = [
        {
            "task": row["task"],
            "axis": row["axis"],
            "budget": spent(row["budget"]),
            "dense": f"{row['best_b']:.1f} ({configuration(row['chosen_b'])})",
            "DMS": "—" if row["best_a"] is None else f"{row['best_a']:.1f} ({configuration(row['chosen_a'])})",
            "gain": interval(row["gain"], row["low"], row["high"]),
        }
        for row in _ours(headline)
    ]
    return _indexed(rows, "task", "axis")


def crossed(headline: Sequence[dict]) -> pd.DataFrame:
    """The gains again, and with configurations chosen on one half of the problems and measured on the other."""
    rows = [
        {
            "task": row["task"],
            "axis": row["axis"],
            "gain": interval(row["gain"], row["low"], row["high"]),
            "chosen and measured apart": interval(*((row["gain_crossed"] or {}).get(key) for key in BOUNDS)),
        }
        for row in _ours(headline)
    ]
    return _indexed(rows, "task", "axis")


def savings(headline: Sequence[dict], target: str = "target") -> pd.DataFrame:
    """The least budgets at which both have an accuracy, and how many times less DMS pays.

    target: "target" for the accuracy of one long dense chain, "of_best" for the best that the dense model has at all.
    """
    rows = []
    for row in _ours(headline):
        found, times = row[target], "not reached"
        if found["saving"] is not None:
            times = f"{found['saving']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"
        pays = {name: found[key] for name, key in (("dense pays", "budget_b"), ("DMS pays", "budget_a"))}
        budgets = {name: "—" if paid is None else spent(paid) for name, paid in pays.items()}
        facts = {"task": row["task"], "axis": row["axis"], "accuracy": f"{found['accuracy']:.1f} %"}
        rows.append(facts | budgets | {"times less": times})
    return _indexed(rows, "task", "axis")


def margins(rows: Sequence[dict], scale: str = "log2") -> pd.DataFrame:
    """Margins in points on one scale, and those restricted to budgets at which half of the dense chains have ended.

    rows: "margins" of a summary, or "margins_per_cr".
    """
    found = [
        {
            "task": row["task"],
            "CR": row.get("cr"),
            "axis": row["axis"],
            "budgets": "—" if row["from"] is None else f"{spent(row['from'])}–{spent(row['to'])}",
            "margin": interval(*(row[key] for key in BOUNDS)),
            "restricted": interval(*((row["restricted"] or {}).get(key) for key in BOUNDS)),
        }
        for row in _ours(rows)
        if row["scale"] == scale
    ]
    table = _indexed(found, "task", "CR", "axis")
    return table if any("cr" in row for row in rows) else table.droplevel("CR")


def caveat(points: Sequence[dict]) -> str:
    """What must stand beside peaks that are not exact; nothing beside others."""
    return "" if is_exact(points) else INEXACT


def unshared(points: Sequence[dict]) -> list[dict]:
    """The points with a copy of the prompt for every chain: a peak of W chains is W times that of one."""
    one = {_chain(point): point["peak"] for point in points if point["W"] == 1}
    return [point | {"peak": point["W"] * one[_chain(point)]} for point in points if _chain(point) in one]


def _chain(point: dict) -> tuple:
    return tuple(point[key] for key in ("task", "method", "cr", "L"))


def unshared_margins(points: Sequence[dict]) -> dict[str, float | None]:
    """Margin at equal peak, log2, of each task, if chains of DMS shared nothing and dense ones the prompt; no interval.

    No chain of DMS holds more, and no dense one less.
    """
    found: dict[str, float | None] = {}
    for task in dict.fromkeys(p["task"] for p in points):
        mine, dense = (
            [(p["peak"], p["accuracy"]) for p in every if (p["task"], p["method"]) == (task, name)]
            for every, name in ((unshared(points), "dms"), (points, "vanilla"))
        )
        found[short_name(task)] = margin(mine, dense)
    return found


def differences(paired: Sequence[dict]) -> pd.DataFrame:
    """One chain at the largest L, DMS minus dense in points; with several retrofits also each by itself."""
    rows = []
    for pair in _ours(paired):
        row = {"task": pair["task"], "CR": pair["cr"]}
        row["minus dense"] = interval(*(pair[key] for key in ("difference", "low", "high")))
        rows.append(row | {f"retrofit {seed}": signed(value) for seed, value in pair.get("by_seed", {}).items()})
    return _indexed(rows, "task", "CR")


def plot_headline(headline: Sequence[dict], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Left the gain at the budget of one long dense chain, right how many times less its accuracy costs."""
    rows = _ours(headline)
    size = (COLUMN, 0.45 * len(rows) + 1.4)
    axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")[1] if axes is None else axes
    _, colour, marker = style_of("dms")
    for y, row in enumerate(rows):
        for ax, found, value in ((axes[0], row, "gain"), (axes[1], row["target"], "saving")):
            if found[value] is not None:
                least = FEWEST if value == "saving" else float("-inf")
                ax.hlines(y, max(found["low"], least), max(found["high"], least), color=colour)
                ax.plot(max(found[value], least), y, marker, color=colour)
    for ax, nothing in zip(axes, (0, 1), strict=True):
        ax.axvline(nothing, color=STYLES["vanilla"][1], linewidth=1)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [f"{row['task'] or ''}, {row['axis']}" for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_xlabel("gain (points)")
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].set_xlabel("times less")
    return axes


def spent(budget: float) -> str:
    """A budget in three digits.

    >>> spent(86430.4), spent(4026.9), spent(0.158)
    ('86.4K', '4.03K', '0.158')
    """
    return f"{budget / 1000:.3g}K" if budget >= 1000 else f"{budget:.3g}"


def _ours(rows: Sequence[dict]) -> list[dict]:
    ours = [row for row in rows if (row["a"], row["b"]) == ("dms", "vanilla")]
    return [row | {"task": short_name(row["task"])} for row in ours]


def _indexed(rows: list[dict], *index: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=None if rows else list(index)).set_index(list(index))
