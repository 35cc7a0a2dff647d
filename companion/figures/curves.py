"""Accuracy against a budget, along length or width, and margins over vanilla."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from companion.figures.style import COLUMN, FONT, STYLES, legend_above, look, set_style, style_of
from companion.tasks.base import short_name
from dms_core.budgets.pareto import frontier

AXIS_LABELS = {
    "reads": "KV reads per problem (items per KV head)",
    "peak": "peak KV memory per problem (live tokens per KV head)",
    "bytes": "peak bytes of keys and values per KV head (of a problem)",
    "seconds": "seconds of generation per problem",
}
TASK_TITLES = {
    "traces": "traces (vote, as AIME)",
    "choice": "choice (vote, as GPQA)",
    "search": "search (any, as LiveCodeBench)",
}
SCALING_LABELS = {"L": "length limit L (generated tokens)", "W": "width W (voting chains)"}


def draw_curves(summary: dict, file: Path | str) -> None:
    """Accuracy against each budget, a row a task and a column an axis, as a PNG or SVG file."""
    plt.switch_backend("agg")
    set_style()
    plot_panels(summary)
    plt.savefig(file, dpi=120)


def plot_panels(
    summary: dict, axes: Sequence[str] = ("reads", "peak"), labelled: Sequence[str] = ("dms", "vanilla")
) -> plt.Figure:
    """``plot_curves`` for each of the tasks (rows) and axes (columns)."""
    tasks = list(dict.fromkeys(point.get("task") for point in summary["points"]))
    shape, size = (len(tasks), len(axes)), (COLUMN, 2.8 * len(tasks) + 0.8)
    fig, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharey="row")
    for row, task in zip(panels, tasks, strict=True):
        for ax, axis in zip(row, axes, strict=True):
            plot_curves({"points": [p for p in summary["points"] if p.get("task") == task]}, axis, ax, labelled)
            ax.set_xlabel(ax.get_xlabel().partition(" (")[0] if task == tasks[-1] else "")
            ax.get_legend().remove()
            ax.set_ylabel(ax.get_ylabel() if ax is row[0] else "")
        row[0].set_title(TASK_TITLES.get(task) or short_name(task or ""), loc="left")
    fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return fig


def show_panels(summary: dict, figure: str) -> None:
    """``plot_panels`` and its caption, where one cell shows both."""
    from IPython.display import Markdown, display

    plot_panels(summary)
    plt.show()
    points = summary["points"]
    widest, lengths = max(p["W"] for p in points), sorted({p["L"] for p in points})
    limits = f"{', '.join(map(str, lengths[:-1]))} or {lengths[-1]}"
    display(Markdown(CAPTION.format(figure=figure, problems=points[0]["problems"], widest=widest, limits=limits)))


CAPTION = (
    "**Figure {figure}.** Accuracy against both budgets, {problems} questions a kind, vote of 1 to {widest} chains of "
    "at most {limits} tokens; labels are W-L, or W-L-CR. Vertical bars: 95 % bootstrap intervals over questions. One "
    "training run."
)


def plot_curves(
    summary: dict, axis: str = "reads", ax: Axes | None = None, labelled: Sequence[str] = ("dms", "vanilla")
) -> Axes:
    """Accuracy against a budget: all points with their intervals, and each method's frontier over all its CRs.

    summary: of ``curves.summarise``, of one task.  axis: of AXIS_LABELS.  Frontier points of the labelled methods carry
    W-L, or W-L-CR if compressed, where there is room.  Raises ValueError for another axis or a method without a style.
    """
    if axis not in AXIS_LABELS:
        raise ValueError(f"axis {axis!r}: must be one of {', '.join(AXIS_LABELS)}")
    ax = ax or plt.gca()
    points = summary["points"]
    frontiers = {
        method: _plot_method(ax, [p for p in points if p["method"] == method], axis)
        for method in dict.fromkeys(p["method"] for p in points)
    }
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"$2^{{{np.log2(x):g}}}$" if x > 0 else "")
    ax.set(xlabel=AXIS_LABELS[axis], ylabel="accuracy (%)")
    ax.margins(x=0.14, y=0.08)
    _label_points(ax, [p for method in labelled for p in reversed(frontiers.get(method, []))], axis)
    legend_above(ax, 2)
    return ax


def plot_scaling(points: Sequence[dict], along: str, ax: Axes | None = None) -> Axes:
    """Accuracy along "L" (generated tokens) or "W" (voting chains): one line per (method, CR), with intervals.

    points: of ``curves.summarise``, those of one W or one L.  CRs of a method differ as ``style.look`` says.
    """
    if along not in SCALING_LABELS:
        raise ValueError(f"along {along!r}: must be one of {', '.join(SCALING_LABELS)}")
    ax = ax or plt.gca()
    for method, cr in dict.fromkeys((p["method"], p["cr"]) for p in points):
        rows = [p for p in points if (p["method"], p["cr"]) == (method, cr)]
        x, y, errors = _columns(sorted(rows, key=lambda p: p[along]), along)
        x = x * 1.012 ** (len(ax.containers) - 1)  # aside, so that intervals do not hide each other
        ax.errorbar(x, y, errors, **look(method, cr), capsize=2, elinewidth=1, markersize=6)
    ticks: list[int] = []
    for value in sorted({p[along] for p in points}, reverse=True):  # those that leave room for their names
        if not ticks or ticks[-1] >= 2**0.5 * value:
            ticks.append(value)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    ax.set(xlabel=SCALING_LABELS[along], ylabel="accuracy (%)")
    legend_above(ax, 2)
    return ax


def plot_margins(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Margins over vanilla, a column a task and within it one place a model, one colour a method.

    rows: dicts with task, model, a (the method) and value in points, None or NaN where the paper has NA; rows with low
    and high get error bars.  Tasks and models are shown in the order in which they come.
    """
    ax = ax or plt.gca()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    places = sorted(dict.fromkeys((row["task"], row["model"]) for row in rows), key=lambda place: tasks.index(place[0]))
    at = {place: i + 0.8 * tasks.index(place[0]) for i, place in enumerate(places)}
    for method in dict.fromkeys(row["a"] for row in rows):
        label, colour, marker = style_of(method)
        mine = [(at[row["task"], row["model"]], row) for row in rows if row["a"] == method]
        known = [(x, row["value"]) for x, row in mine if row["value"] is not None]
        ax.plot(*np.reshape(known, (-1, 2)).T, marker, color=colour, label=label, markersize=6)
        for x, row in mine:
            if row["value"] is None:
                ax.annotate("NA", (x, 0), color=colour, ha="center", va="bottom")
            elif row.get("low") is not None:
                ax.vlines(x, row["low"], row["high"], color=colour, linewidth=1.5)
    ax.axhline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_xticks(list(at.values()), [model for _, model in places], rotation=90)
    ax.set_xlim(-0.7, max(at.values()) + 0.7)
    for task in tasks:
        middle = np.mean([x for place, x in at.items() if place[0] == task])
        ax.annotate(task, (middle, 1.01), xycoords=ax.get_xaxis_transform(), ha="center", va="bottom")
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("margin over vanilla (points)")
    return ax


def _columns(points: Sequence[dict], x: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n points, by ``x``: its values (n,), the accuracies (n,), and the lengths of their error bars (2, n)."""
    at, y, low, high = pd.DataFrame(points)[[x, "accuracy", "low", "high"]].to_numpy(float).T
    return at, y, np.maximum([y - low, high - y], 0)


def _plot_method(ax: Axes, points: list[dict], axis: str) -> list[dict]:
    """Draw the points of one method and its frontier; returns the points on the frontier."""
    label, colour, marker = style_of(points[0]["method"])
    x, y, errors = _columns(points, axis)
    ax.errorbar(x, y, errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.3)
    ax.plot(x, y, marker, color=colour, alpha=0.25, markersize=4)
    vertices = frontier(np.stack([x, y], axis=1))
    ax.plot(*vertices.T, marker=marker, color=colour, markersize=6, linewidth=1.8, label=label)
    return [next(p for p in points if (p[axis], p["accuracy"]) == (budget, best)) for budget, best in vertices]


def _label_points(ax: Axes, points: list[dict], axis: str) -> None:
    """Name points in the given order, leaving out those whose name would cover an earlier one."""
    placed: list[np.ndarray] = []
    ax.autoscale_view()
    size = np.array([5, 2]) * FONT * ax.figure.dpi / 72 / ax.bbox.size  # room of a name, in fractions of the axes
    for point in points:
        where = (point[axis], point["accuracy"])
        vanilla = point["method"] == "vanilla"  # its frontier lies below the others: names to its lower right
        offset, side, shift = ((5, -15), "left", (0, 0)) if vanilla else ((-5, 5), "right", (-1, 1))
        corner = ax.transAxes.inverted().transform(ax.transData.transform(where)) + size * shift
        if all((np.abs(corner - other) > size).any() for other in placed):
            placed.append(corner)
            length = f"{point['L'] // 1024}K" if point["L"] % 1024 == 0 else point["L"]
            name = f"{point['W']}-{length}" + ("" if point["cr"] == 1 else f"-{point['cr']:g}")
            style = dict(textcoords="offset points", ha=side, color=style_of(point["method"])[1])
            ax.annotate(name, where, offset, **style)
