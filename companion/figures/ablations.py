"""Figures of the ablations: what each changes, and paired differences with their intervals."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from companion.figures.style import COLUMN, STYLES

LABELS = {
    "dms": "reference",
    "gates-only": "adapter gates alone",
    "neuron": "neuron, no aid",
    "reverse-kl": "reverse KL",
    "lm-loss": "next-token loss, no teacher",
    "no-rest": "no rest, as many steps",
    "no-rest-decay": "no rest, as many steps, the rate falls",
    "rest-constant": "rest at a constant rate",
    "vanilla": "dense",
    "gates-lm": "gates alone, next-token loss",
    "gates-future": "gates alone, future attention",
    "neuron-all": "neuron, all aids",
    "neuron-no-warmup": "neuron, no warm-up",
    "neuron-no-zero": "neuron, no start at zero",
    "neuron-no-rate": "neuron, no own rate",
    "dmc": "DMC",
    "dmc-pressed": "DMC, pressed",
}
PARTS = ("eviction", "window", "gate", "train", "loss", "steps")  # of a variant, as a row of a study has them
SERIES = ((STYLES["dms"][1], "s"), ("#de8f05", "o"), ("#029e73", "D"))  # colour and marker, in order
WRAP = 26  # characters of a label
WIDTHS = (1.3, 1, 1.05, 0.75, 1.05, 0.75)  # of the columns of PARTS


def label_of(variant: str) -> str:
    """A variant's name in figures and tables, such as "immediate, w = 4"."""
    eviction, _, window = variant.partition("-w")
    if eviction in ("delayed", "immediate") and window.isdigit():
        return f"{eviction}, w = {window}"
    if variant.startswith("steps-"):
        return f"{variant[6:]} steps a unit"
    return LABELS.get(variant, variant)


def plot_pairs(pairs: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Differences in accuracy with their 95 % intervals; pairs: of ``Ablations.result``.  ValueError without any."""
    if not pairs:
        raise ValueError("pairs []: must be one or more")
    labels = [fill(f"{label_of(row['a'])} − {label_of(row['b'])}", WRAP) for row in pairs]
    heights = np.array([label.count("\n") + 1.4 for label in labels])
    places = heights.cumsum() - heights / 2
    ax = ax or plt.subplots(figsize=(COLUMN, 0.22 * heights.sum() + 0.8), layout="constrained")[1]
    for place, row in zip(places, pairs, strict=True):
        ax.plot(row["difference"], place, "s", color=STYLES["dms"][1], markersize=6)
        ax.hlines(place, row["low"], row["high"], color=STYLES["dms"][1], linewidth=1.5)
    ax.axvline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_yticks(places, labels)
    ax.set_ylim(heights.sum(), 0)
    ax.set_xlabel("accuracy, difference (points)")
    return ax


def plot_changes(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """A matrix of variants and their PARTS; what differs from the first row, the reference, is coloured.

    rows: of studies, each with "variant" and PARTS.
    """
    rows = list({row["variant"]: row for row in rows}.values())
    ax = ax or plt.subplots(figsize=(COLUMN, 0.31 * len(rows) + 0.6), layout="constrained")[1]
    differs = np.array([[row[part] != rows[0][part] for part in PARTS] for row in rows])
    edges = np.cumsum([0, *WIDTHS])
    colours = ListedColormap(["#ffffff", "#9ecae1"])
    ax.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, differs, cmap=colours, vmin=0, vmax=1)
    middles = (edges[:-1] + edges[1:]) / 2
    for (i, j), changed in np.ndenumerate(differs):
        words = str(rows[i][PARTS[j]]).replace("future attention", "future")
        ax.text(middles[j], i, words, ha="center", va="center", color="#111111" if changed else "#6a6a6a")
    ax.set_yticks(range(len(rows)), [LABELS["dms"], *(row["variant"] for row in rows[1:])])
    ax.set_xticks(middles, PARTS)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.xaxis.tick_top()
    ax.grid(False)
    ax.tick_params(length=0)
    return ax


def plot_by_task(series: Mapping[str, Sequence[dict]], unit: str = "points") -> Figure:
    """Values with their 95 % intervals: a panel a task, a line a label, and in it each series with its own marker.

    series: by name rows with task, label, and value or difference, low and high; a row without a value is left out.
    """
    rows = [row for of in series.values() for row in of if _value(row) is not None]
    tasks, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "label"))
    size = (COLUMN, 0.34 * len(labels) + 1.3)
    fig, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", sharey=True, squeeze=False)
    shifts = np.linspace(-0.2, 0.2, len(series)) if len(series) > 1 else [0.0]
    for ax, task in zip(axes[0], tasks, strict=True):
        for (name, of), (colour, marker), shift in zip(series.items(), SERIES, shifts, strict=False):
            mine = [row for row in of if row["task"] == task and _value(row) is not None]
            at = [labels.index(row["label"]) + shift for row in mine]
            ax.plot([_value(row) for row in mine], at, marker, color=colour, markersize=5, label=name)
            ax.hlines(at, [row["low"] for row in mine], [row["high"] for row in mine], color=colour, linewidth=1.4)
        ax.axvline(0, color=STYLES["vanilla"][1], linewidth=1)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if len(tasks) > 1:
            ax.set_title(task)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    fig.supxlabel(unit)
    if len(series) > 1:
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=len(series))
    return fig


def _value(row: dict) -> float | None:
    return row["difference"] if "difference" in row else row["value"]
