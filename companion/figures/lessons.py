"""Drawings of the chapters that explain the method: the gate in its block, who sees whom, the slots of a row."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch, Patch

from companion.figures.style import STYLES

BLUE, INK, MARK = STYLES["dms"][1], "#333333", "#d55e00"
SEEN = {"not there": "#ffffff", "in the window": "#9ecae1", "kept": "#08519c", "evicted": "#fdd0a2"}
SLOTS = {"empty": "#ffffff", "in the window": "#9ecae1", "kept": "#08519c", "in the window, marked": "#fdae6b"}


def plot_gate_block(ax: Axes | None = None) -> Axes:
    """An attention block with an adapter gate: what it reads, and what it acts on in training and at inference."""
    ax = ax or plt.subplots(figsize=(7, 3.7), layout="constrained")[1]
    for x, y, width, text, colour in (
        (0.5, 1.5, 1.5, "RMSNorm", INK),
        (2.5, 1.5, 1.7, "queries, keys,\nvalues, RoPE", INK),
        (5.2, 1.5, 1.7, "KV cache", INK),
        (7.9, 1.5, 1.6, "attention", INK),
        (0.5, 4.0, 1.9, "$x_t = w\\cdot$RMSNorm$(h_t)$", BLUE),
        (3.2, 4.0, 1.6, "$z_t = s\\,x_t - b_0$", BLUE),
    ):
        box = FancyBboxPatch((x, y), width, 0.9, "round,pad=0.04", facecolor="white", edgecolor=colour, linewidth=1.5)
        ax.add_patch(box)
        ax.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9, color=colour)
    for start, end, colour, bend in (
        ((0, 0.4), (10, 0.4), INK, 0),
        ((1.2, 0.4), (1.2, 1.4), INK, 0),
        ((2.1, 1.95), (2.4, 1.95), INK, 0),
        ((4.3, 1.95), (5.1, 1.95), INK, 0),
        ((7.0, 1.95), (7.8, 1.95), INK, 0),
        ((3.4, 1.4), (8.4, 1.4), INK, 0.12),
        ((9.0, 1.4), (9.0, 0.55), INK, 0),
        ((0.25, 0.4), (0.45, 4.4), BLUE, -0.25),
        ((2.5, 4.45), (3.1, 4.45), BLUE, 0),
        ((4.9, 4.3), (6.05, 2.5), BLUE, -0.25),
        ((4.9, 4.6), (8.7, 2.5), BLUE, -0.25),
    ):
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", end, start, arrowprops=style)
    ax.text(9.0, 0.4, "+", ha="center", va="center", fontsize=13, bbox={"boxstyle": "circle,pad=0.1", "fc": "white"})
    ax.text(0.05, 0.0, "residual stream $h_t$", fontsize=9, color=INK)
    ax.text(4.0, 3.1, "inference: $z_t > 0$\nmarks a token", ha="center", fontsize=9, color=BLUE)
    ax.text(8.55, 4.35, "training: a bias\non its scores", ha="center", fontsize=9, color=BLUE)
    ax.set(xlim=(-0.1, 10.1), ylim=(-0.3, 5.2))
    ax.set_axis_off()
    return ax


def states(seen: np.ndarray, window: int, hidden: np.ndarray | None = None) -> np.ndarray:
    """Numbers of SEEN for a mask (T, T) of who sees whom; ``hidden``: pairs that are left blank as the future is."""
    behind = np.arange(len(seen))[:, None] - np.arange(len(seen))
    state = np.where(np.asarray(seen), np.where(behind <= window, 1, 2), 3)
    return np.where((behind < 0) | (False if hidden is None else np.asarray(hidden)), 0, state)


def plot_mask(
    state: np.ndarray, ax: Axes | None = None, decided: Sequence[int] = (), lag: int = 1, keys: Sequence | None = None
) -> Axes:
    """Numbers of SEEN, queries down and keys across.

    decided: keys with a decision, each drawn as a dot in the row of the token ``lag`` later, which decides; keys: the
    positions of the columns, where they are not all.
    """
    ax = ax or plt.subplots(figsize=(4, 4), layout="constrained")[1]
    colours = ListedColormap(list(SEEN.values()))
    sns.heatmap(
        state, ax=ax, cmap=colours, vmin=0, vmax=3, cbar=False, linewidths=0.5, linecolor="#dddddd", square=True
    )
    decided = np.asarray(decided, dtype=float)
    ax.plot(decided + 0.5, decided + lag + 0.5, "o", color=MARK, markersize=5)
    step = max(1, len(state) // 6)
    if keys is None:
        ax.set_xticks(np.arange(0, len(state[0]), step) + 0.5, np.arange(0, len(state[0]), step))
    else:
        ax.set_xticks(np.arange(len(keys)) + 0.5, keys, fontsize=8)
    ax.set_yticks(np.arange(0, len(state), step) + 0.5, np.arange(0, len(state), step))
    ax.tick_params(rotation=0)
    ax.set(xlabel="key $j$ (position)", ylabel="query $i$ (position)")
    return ax


def mask_legend(figure, dot: bool = False, names: dict = SEEN) -> None:
    """One legend of the colours below a figure; with ``dot`` also of the marker of a decision."""
    handles = [Patch(color=colour, label=name) for name, colour in list(names.items())[1:]]
    if dot:
        marker = {"marker": "o", "linestyle": "", "color": MARK, "markersize": 5}
        handles.append(plt.Line2D([], [], label="the decision", **marker))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)


def plot_slots(slots: np.ndarray, marked: np.ndarray, window: int, ax: Axes | None = None) -> Axes:
    """A row of a cache over time: slots (slots, times) hold positions, -1 if empty; marked: positions to go."""
    used = slots[(slots >= 0).any(1)]
    ax = ax or plt.subplots(figsize=(7, 0.32 * len(used) + 1.3), layout="constrained")[1]
    now = np.arange(used.shape[1])
    state = np.where(used < 0, 0, np.where(now - used <= window, 1, 2))
    state[(state == 1) & np.asarray(marked)[used] & (used < now)] = 3
    sns.heatmap(
        state,
        ax=ax,
        cmap=ListedColormap(list(SLOTS.values())),
        vmin=0,
        vmax=3,
        cbar=False,
        linewidths=0.6,
        linecolor="#dddddd",
        annot=np.where(used < 0, "", used.astype(str)),
        fmt="",
        annot_kws={"size": 9},
    )
    ax.set(xlabel="time: position of the newest token", ylabel="slot of the row")
    ax.tick_params(rotation=0)
    mask_legend(ax.figure, names=SLOTS)
    return ax
