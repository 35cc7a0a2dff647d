"""One figure of a run beside the paper's tables: curves, margins, and accuracies at a fixed budget."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.claims.published import AXES, STANDS_FOR, compare, read, size_of
from companion.figures.curves import TASK_TITLES, plot_curves, plot_margins
from companion.figures.style import STYLES, set_style, style_of


def draw_comparison(summary: dict, model: str | None, task: str | None, file: Path | str) -> None:
    """``plot_comparison`` as a PNG or SVG file."""
    plt.switch_backend("agg")
    set_style()
    plot_comparison(summary, model, task).savefig(file)


def plot_comparison(summary: dict, model: str | None = None, task: str | None = None) -> Figure:
    """Top: the run's curves. Middle: margins over vanilla. Bottom: differences to vanilla with one chain.

    Arguments as of ``published.compare``.  Grey lines in the curves: pass@1 of the original model, by its makers.
    """
    comparison = compare(summary, model, task)
    tasks = list(dict.fromkeys(point.get("task") for point in summary["points"]))
    curves = [[f"{axis} {one}" for one in tasks for _ in range(6 // len(tasks))] for axis in ("reads", "peak")]
    layout = [*curves, ["margins reads"] * 3 + ["margins peak"] * 3, ["fixed"] * 6]
    fig, axes = plt.subplot_mosaic(layout, figsize=(14, 17), layout="constrained")
    for axis in ("reads", "peak"):
        for one in tasks:
            ax = axes[f"{axis} {one}"]
            plot_curves({"points": [p for p in summary["points"] if p.get("task") == one]}, axis, ax)
            ax.set_title(TASK_TITLES.get(one, ""), fontsize=10)
            _plot_pass1(ax, comparison["run"])
        rows = [row for row in comparison["margins"] if row["axis"] == axis and row["b"] == "vanilla"]
        plot_margins_beside(rows, axes[f"margins {axis}"])
        axes[f"margins {axis}"].set_title(f"at equal {AXES[axis]}", fontsize=10, pad=18)
    plot_differences_beside(comparison["accuracies"], axes["fixed"])
    fig.suptitle(f"Published, and measured by this run: {comparison['run']['label']}", fontsize=11)
    return fig


def plot_margins_beside(rows: list[dict], ax: Axes) -> Axes:
    """Published margins over vanilla, and at the right those of the run on log2 axes, with their intervals."""
    if not rows:
        ax.set_axis_off()
        return ax
    shown = [{**row, "model": size_of(row["model"])} for row in rows]
    own = {(STANDS_FOR.get(row["task"], ""), row["a"]): row["measured"]["log2"] for row in rows if row["measured"]}
    beside = ({"task": "this run", "model": task, "a": a, **found} for (task, a), found in own.items())
    plot_margins([*shown, *beside], ax)
    ax.legend(loc="best", fontsize=8)
    return ax


def plot_differences_beside(rows: list[dict], ax: Axes) -> Axes:
    """Accuracy minus vanilla with one chain at the largest length: published per benchmark and model, then the run."""
    places = list(dict.fromkeys((row["task"], size_of(row["model"])) for row in rows))
    compressed, own = [row for row in rows if row["method"] != "vanilla"], []
    kinds = sorted({(row["method"], row["cr"]) for row in compressed})
    for kind, shift in zip(kinds, np.linspace(-0.25, 0.25, len(kinds)), strict=True):
        label, colour, marker = style_of(kind[0])
        style = dict(color=colour, marker=marker, linestyle="", markerfacecolor=colour if kind[1] <= 4 else "none")
        mine = [row for row in compressed if (row["method"], row["cr"]) == kind]
        x = [places.index((row["task"], size_of(row["model"]))) + shift for row in mine]
        ax.plot(x, [row["difference"] for row in mine], **style, label=f"{label}, CR {kind[1]:g}")
        found = {STANDS_FOR.get(row["task"], ""): row["measured"] for row in mine if row["measured"]}
        for task in (name for name, measured in found.items() if measured["difference"]):
            own = own if task in own else [*own, task]
            gap, at = found[task]["difference"], len(places) + own.index(task) + shift
            ax.plot(at, gap["difference"], **style)
            ax.vlines(at, gap["low"], gap["high"], color=colour)
    ax.axhline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.axvline(len(places) - 0.5, color="#888888", linewidth=0.8)
    names = [*(f"{task}, {size}" for task, size in places), *(f"this run {task}".strip() for task in own or [""])]
    ax.set_xticks(range(len(names)), names, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("accuracy minus vanilla (points)")
    ax.legend(loc="best", fontsize=8)
    return ax


def _plot_pass1(ax: Axes, run: dict) -> None:
    rows = read("deepseek_r1_pass1.csv")
    for value in rows[(rows["model"] == run["model"]) & (rows["task"] == run["task"])]["value"]:
        ax.axhline(value, color="#888888", linestyle=":", linewidth=1)
