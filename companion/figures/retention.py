"""What a retrofitted model keeps, by token, head and position, and the log of its training."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from companion.figures.style import COLUMN, STYLES, legend_above

PANELS = {  # of plot_training: label of the axis → key of the log → label of the line
    "loss": {"kd": "distillation, $L_{KD}$ (nats per token)", "aux": "auxiliary, $L_{aux}$"},
    "compression ratio (×)": {"cr_target": "target", "cr_measured": "measured"},
    "learning rate": {"learning_rate": "learning rate"},
}


def plot_kept(text: str, kept: np.ndarray, ax: Axes | None = None, width: int = 56) -> Axes:
    """A document of one-character tokens; under each, a cell per (layer, KV head): kept, or evicted by decision.

    kept: boolean (layers, KV heads, tokens), tokens as many as ``text`` has characters, else a ValueError.
    """
    kept = np.asarray(kept, dtype=bool)
    if kept.ndim != 3 or kept.shape[2] != len(text):
        raise ValueError(f"kept {kept.shape}: must be (layers, KV heads, {len(text)}), one cell a character")
    rows = kept.reshape(-1, len(text))
    height, blocks = len(rows) + 2, -(-len(text) // width)  # a line of text, its cells, a gap
    image = np.full((blocks * height, width), np.nan)
    ax = ax or plt.subplots(figsize=(COLUMN, 0.16 * blocks * height + 0.5), layout="constrained")[1]
    for at, character in enumerate(text):
        block, column = divmod(at, width)
        image[block * height + 1 : block * height + 1 + len(rows), column] = rows[:, at]
        ax.text(column, block * height, character, ha="center", va="center", family="monospace")
    colours = ListedColormap(["#e6e6e6", STYLES["dms"][1]])
    ax.imshow(image, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none")
    for layer, block in np.ndindex(len(kept), blocks):
        middle = block * height + 1 + (layer + 0.5) * kept.shape[1] - 0.5
        ax.text(-1, middle, f"{layer}", ha="right", va="center", color="#555555")
    ax.set_axis_off()
    names = {1.0: "kept", 0.0: "evicted once it left the window"}
    patches = [Patch(color=colours(value), label=name) for value, name in names.items()]
    legend_above(ax, 2, handles=patches)
    return ax


def plot_retention(live: Sequence[Sequence[float]], ax: Axes | None = None, tokens: int | None = None) -> Axes:
    """Heat map of what each (layer, KV head) still holds: live tokens or, given the tokens seen, the share in %.

    live: (layers, KV heads).  Raises ValueError for another shape, and for ``tokens`` below 1.
    """
    live = np.asarray(live, dtype=float)
    if live.ndim != 2 or not live.size:
        raise ValueError(f"live {live.shape}: must be (layers, KV heads), neither empty")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens {tokens}: must be >= 1, or None")
    shown, label = (live, "live tokens") if tokens is None else (100 * live / tokens, "tokens kept (%)")
    top = None if tokens is None else 100
    return _heatmap(shown, ax or plt.gca(), label, "KV head", "layer", vmax=top, annot=live.size <= 64)


def plot_positions(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Heat map of retention (%): a row for each (layer, KV head), a column for each bucket of positions.

    rows: of ``heldout.retention_by_position``.
    """
    shares = np.array([row["retention"] for row in rows])  # (buckets, layers, heads)
    buckets, layers, heads = shares.shape
    ax = ax or plt.subplots(figsize=(COLUMN, 0.3 * layers * heads + 1.4), layout="constrained")[1]
    names = dict(
        xticklabels=[row["from"] for row in rows], yticklabels=[f"{i}.{j}" for i, j in np.ndindex(layers, heads)]
    )
    x = f"position in the document, from (buckets of {rows[0]['to'] - rows[0]['from']} tokens)"
    style = dict(vmax=100, annot=buckets <= 12)
    return _heatmap(100 * shares.reshape(buckets, -1).T, ax, "tokens kept (%)", x, "layer.KV head", **style, **names)


def plot_compression(rows: Sequence[dict], target: float, ax: Axes | None = None) -> Axes:
    """Measured compression up to a position: one line a layer, and all layers and heads together.

    rows: of ``heldout.retention_by_position``.
    """
    rows = [row for row in rows if row["cr"] is not None]
    ax = ax or plt.subplots(figsize=(COLUMN, 4.4), layout="constrained")[1]
    at = [row["to"] for row in rows]
    held, decided = (1 / np.array([row[key] for row in rows]) for key in ("cr_live", "cr"))  # (buckets, layers, heads)
    colour, marker = STYLES["dms"][1:]
    for layer, shade in enumerate(sns.color_palette("viridis", held.shape[1])):
        ax.plot(at, 1 / held[:, layer].mean(-1), color=shade, linewidth=1, label=f"layer {layer}")
    ax.plot(at, 1 / held.mean((1, 2)), color=colour, marker=marker, label="all, window included")
    ax.plot(at, 1 / decided.mean((1, 2)), "--", color=colour, label="all, by decisions")
    ax.axhline(target, color=STYLES["vanilla"][1], linewidth=1, linestyle=":", label="target")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="tokens of the document", ylabel="compression ratio (×)")
    legend_above(ax, 3)
    return ax


def plot_training(log_rows: Sequence[dict], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """A retrofit log on three axes: the losses, the compression ratio against its target, the learning rate.

    log_rows: dicts with step and any of kd, aux, cr_target, cr_measured, learning_rate (what ``retrofit`` logs).
    """
    axes = np.ravel(plt.subplots(3, 1, figsize=(COLUMN, 9), layout="constrained")[1] if axes is None else axes)
    if len(axes) != 3:
        raise ValueError(f"axes {len(axes)}: must be 3 (losses, compression ratio, learning rate)")
    for ax, (panel, labels) in zip(axes, PANELS.items(), strict=True):
        for key, label in labels.items():
            series = [(row["step"], row[key]) for row in log_rows if row.get(key) is not None]
            if series:
                style = dict(linestyle="--" if key == "cr_target" else "-", marker="." if len(series) < 30 else "")
                ax.plot(*np.array(series, dtype=float).T, label=label, **style)
        if len(labels) > 1 and ax.lines:
            legend_above(ax)
        ax.set(xlabel="optimiser step", ylabel=panel)
    axes[0].set_yscale("symlog", linthresh=1e-3)  # the auxiliary loss reaches 0 exactly
    axes[0].set_ylim(bottom=0)
    return axes


def _heatmap(values: np.ndarray, ax: Axes, label: str, x: str, y: str, **style) -> Axes:
    ax = sns.heatmap(values, ax=ax, vmin=0, cmap="viridis", fmt=".0f", cbar_kws={"label": label}, **style)
    ax.set(xlabel=x, ylabel=y)
    ax.tick_params(axis="y", rotation=0)
    return ax
