"""Drawings of the chapters that explain the method: the gate in its block, who sees whom, the slots of a row."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyBboxPatch, Patch

from companion.figures.style import COLUMN, STYLES

BLUE, INK, MARK = STYLES["dms"][1], "#333333", "#d55e00"
SEEN = {"not there": "#ffffff", "in the window": "#9ecae1", "kept": "#08519c", "evicted": "#fdd0a2"}
SLOTS = {"empty": "#ffffff", "in the window": "#9ecae1", "kept": "#08519c", "in the window, marked": "#fdae6b"}


def plot_gate_block(ax: Axes | None = None) -> Axes:
    """An attention block with an adapter gate: what it reads, and what it acts on in training and at inference."""
    ax = ax or plt.subplots(figsize=(COLUMN, 4.2), layout="constrained")[1]
    for x, y, width, text, colour in (
        (0.5, 1.5, 1.6, "RMSNorm", INK),
        (2.6, 1.5, 2.4, "queries, keys,\nvalues, RoPE", INK),
        (5.6, 1.5, 1.7, "KV cache", INK),
        (7.9, 1.5, 1.8, "attention", INK),
        (0.5, 4.0, 2.8, "$x_t = w\\cdot$RMSNorm$(h_t)$", BLUE),
        (4.0, 4.0, 2.1, "$z_t = s\\,x_t - b_0$", BLUE),
    ):
        _box(ax, x, y, width, text, colour)
    for start, end, colour, bend in (
        ((0, 0.4), (10, 0.4), INK, 0),
        ((1.3, 0.4), (1.3, 1.4), INK, 0),
        ((2.2, 1.95), (2.5, 1.95), INK, 0),
        ((5.1, 1.95), (5.5, 1.95), INK, 0),
        ((7.4, 1.95), (7.8, 1.95), INK, 0),
        ((3.8, 1.4), (8.3, 1.4), INK, 0.12),
        ((9.1, 1.4), (9.1, 0.55), INK, 0),
        ((0.25, 0.4), (0.45, 4.4), BLUE, -0.25),
        ((3.4, 4.45), (3.9, 4.45), BLUE, 0),
        ((5.8, 3.9), (6.4, 2.5), BLUE, -0.2),
        ((6.2, 4.6), (8.9, 2.5), BLUE, -0.25),
    ):
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", end, start, arrowprops=style)
    ax.text(9.1, 0.4, "+", ha="center", va="center", bbox={"boxstyle": "circle,pad=0.1", "fc": "white"})
    ax.text(0.05, -0.1, "residual stream $h_t$", color=INK)
    ax.text(4.5, 2.85, "inference: $z_t > 0$\nmarks a token", ha="center", color=BLUE)
    ax.text(8.7, 4.45, "training: a bias\non its scores", ha="center", color=BLUE)
    ax.set(xlim=(-0.1, 10.1), ylim=(-0.3, 5.2))
    ax.set_axis_off()
    return ax


def plot_distillation(ax: Axes | None = None) -> Axes:
    """A step of the retrofit: teacher and student on the same tokens, and what the two losses compare."""
    ax = ax or plt.subplots(figsize=(7, 3.4), layout="constrained")[1]
    for x, y, width, text, colour in (
        (1.2, 0.2, 5.6, "tokens of a correct trace", INK),
        (0.2, 1.8, 2.9, "teacher, frozen:\nsees every token", INK),
        (4.1, 1.8, 3.0, "student: sees what\nits gates leave", BLUE),
        (8.0, 1.8, 1.8, "schedule\nCR$(t)$", BLUE),
        (0.9, 3.9, 3.9, "$\\mathcal{L}_{KD}$ = KL$(p_T \\| p_S)$", INK),
        (5.7, 3.9, 4.1, "$\\mathcal{L}_{aux}$ = max$(\\alpha^* - \\bar\\alpha,\\ 0)$", BLUE),
    ):
        _box(ax, x, y, width, text, colour)
    for start, end, colour in (
        ((1.7, 1.15), (1.7, 1.7), INK),
        ((5.6, 1.15), (5.6, 1.7), INK),
        ((1.7, 2.8), (1.7, 3.8), INK),
        ((4.4, 2.8), (4.0, 3.8), INK),
        ((6.6, 2.8), (6.9, 3.8), BLUE),
        ((8.9, 2.8), (8.9, 3.8), BLUE),
    ):
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.4})
    for x, text, colour in ((1.4, "$p_T$", INK), (3.8, "$p_S$", INK), (6.4, "$\\bar\\alpha$", BLUE)):
        ax.text(x, 3.3, text, ha="center", va="center", color=colour)
    ax.text(9.3, 3.3, "$\\alpha^*$", ha="center", va="center", color=BLUE)
    ax.set(xlim=(0, 10), ylim=(0, 5))
    ax.set_axis_off()
    return ax


def _box(ax: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    box = FancyBboxPatch((x, y), width, 0.9, "round,pad=0.04", facecolor="white", edgecolor=colour, linewidth=1.5)
    ax.add_patch(box)
    ax.text(x + width / 2, y + 0.45, text, ha="center", va="center", color=colour)


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
    ax = ax or plt.subplots(figsize=(COLUMN, 4.4), layout="constrained")[1]
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
        ax.set_xticks(np.arange(len(keys)) + 0.5, keys)
    ax.set_yticks(np.arange(0, len(state), step) + 0.5, np.arange(0, len(state), step))
    ax.tick_params(axis="x", rotation=0 if keys is None else 90)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="key $j$ (position)", ylabel="query $i$ (position)")
    return ax


def mask_legend(figure, dot: bool = False, names: dict = SEEN) -> None:
    """One legend of the colours below a figure; with ``dot`` also of the marker of a decision."""
    handles = [Patch(color=colour, label=name) for name, colour in list(names.items())[1:]]
    if dot:
        marker = {"marker": "o", "linestyle": "", "color": MARK, "markersize": 5}
        handles.append(plt.Line2D([], [], label="the decision", **marker))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def plot_slots(slots: np.ndarray, marked: np.ndarray, window: int, ax: Axes | None = None) -> Axes:
    """A row of a cache over time: slots (slots, times) hold positions, -1 if empty; marked: positions to go."""
    used = slots[(slots >= 0).any(1)]
    ax = ax or plt.subplots(figsize=(COLUMN, 0.34 * len(used) + 1.5), layout="constrained")[1]
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
    )
    ax.set(xlabel="time: position of the newest token", ylabel="slot of the row")
    ax.tick_params(rotation=0)
    mask_legend(ax.figure, names=SLOTS)
    return ax
