"""Figures of the ablations: paired differences with their intervals, and compression along a sequence.

Everything that draws takes the axes to draw on and returns them, as in ``report``.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from companion.figures.style import STYLES

LABELS = {
    "dms": "reference",
    "gates-only": "adapter gates alone",
    "neuron": "neuron gate",
    "reverse-kl": "reverse KL",
    "lm-loss": "next-token loss, no teacher",
    "no-rest": "no rest, as many steps",
}


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
        raise ValueError("pairs is empty; allowed: one or more")
    ax = ax or plt.subplots(figsize=(7, 0.36 * len(pairs) + 1), layout="constrained")[1]
    for place, row in enumerate(pairs):
        ax.plot(row["difference"], place, "s", color=STYLES["dms"][1], markersize=6)
        ax.hlines(place, row["low"], row["high"], color=STYLES["dms"][1], linewidth=1.5)
    ax.axvline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_yticks(range(len(pairs)), [f"{label_of(row['a'])} − {label_of(row['b'])}" for row in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set_xlabel("accuracy, difference (points)")
    return ax


def plot_positions(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Heat map of retention (%): a row for each (layer, KV head), a column for each bucket of positions.

    rows: of ``measure.retention_by_position``.
    """
    shares = np.array([row["retention"] for row in rows])  # (buckets, layers, heads)
    buckets, layers, heads = shares.shape
    ax = ax or plt.subplots(figsize=(0.5 * buckets + 2.5, 0.3 * layers * heads + 1.4), layout="constrained")[1]
    sns.heatmap(
        100 * shares.reshape(buckets, -1).T, ax=ax, vmin=0, vmax=100, cmap="viridis", annot=True, fmt=".0f",
        annot_kws={"fontsize": 7}, cbar_kws={"label": "tokens kept (%)"}, xticklabels=[row["from"] for row in rows],
        yticklabels=[f"{layer}.{head}" for layer in range(layers) for head in range(heads)],
    )  # fmt: skip
    ax.set_xlabel(f"position in the document, from (buckets of {rows[0]['to'] - rows[0]['from']} tokens)")
    ax.set_ylabel("layer.KV head")
    ax.tick_params(axis="y", rotation=0)
    return ax


def plot_compression(rows: Sequence[dict], target: float, ax: Axes | None = None) -> Axes:
    """Measured compression up to a position: one line a layer, and all layers and heads together.

    rows: of ``measure.retention_by_position``.
    """
    rows = [row for row in rows if row["cr"] is not None]
    ax = ax or plt.subplots(figsize=(7, 3.8), layout="constrained")[1]
    at = [row["to"] for row in rows]
    held = 1 / np.array([row["cr_live"] for row in rows])  # (buckets, layers, heads), share of tokens held
    decided = 1 / np.array([row["cr"] for row in rows])
    colour, marker = STYLES["dms"][1:]
    for layer, shade in enumerate(sns.color_palette("viridis", held.shape[1])):
        ax.plot(at, 1 / held[:, layer].mean(-1), color=shade, linewidth=1, label=f"layer {layer}")
    ax.plot(at, 1 / held.mean((1, 2)), color=colour, marker=marker, label="all, window included")
    ax.plot(at, 1 / decided.mean((1, 2)), "--", color=colour, label="all, by decisions")
    ax.axhline(target, color=STYLES["vanilla"][1], linewidth=1, linestyle=":", label="target")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="tokens of the document", ylabel="compression ratio (×)")
    ax.legend(fontsize=8, ncols=2)
    return ax
