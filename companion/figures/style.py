"""The one figure style: a method has the same colour and marker in every figure.

Curves, margins, retention maps, documents with what is kept of them, training logs.

Colours are seaborn's colour-blind palette. Everything that draws takes the axes to draw on and returns them.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from dms_core.budgets.pareto import frontier

_PALETTE = sns.color_palette("colorblind").as_hex()
STYLES = {  # method → (label, colour, marker)
    "vanilla": ("vanilla", "#222222", "o"),
    "dms": ("DMS", _PALETTE[0], "s"),
    "dms-immediate": ("DMS, immediate eviction", _PALETTE[3], "v"),
    "tova": ("TOVA", _PALETTE[1], "^"),
    "h2o": ("H2O", _PALETTE[2], "D"),
    "quest": ("Quest", _PALETTE[4], "P"),
    "streaming": ("sink and window", _PALETTE[5], "X"),
    "streaming-llm": ("StreamingLLM", _PALETTE[5], "X"),
    "snapkv": ("SnapKV", _PALETTE[8], ">"),
    "dmc": ("DMC", _PALETTE[9], "<"),
    "random": ("random eviction", _PALETTE[7], "*"),
}
AXIS_LABELS = {
    "reads": "KV reads per problem (items per KV head)",
    "peak": "peak KV memory per problem (live tokens per KV head)",
}


def set_style() -> None:
    """Make seaborn's theme, the palette and the font sizes of this book the default of matplotlib."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.figsize": (7, 4.5),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "svg.hashsalt": "dms",
            "axes.axisbelow": True,
        }
    )


def style_of(method: str) -> tuple[str, str, str]:
    """Label, colour and marker of a method. ValueError for one without a style."""
    if method not in STYLES:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(STYLES)} (add others to report.STYLES)")
    return STYLES[method]


def plot_curves(
    summary: dict, axis: str = "reads", ax: Axes | None = None, labelled: Sequence[str] = ("dms", "vanilla")
) -> Axes:
    """Accuracy against a budget: all points with their intervals, and each method's frontier over all its CRs.

    summary: from `curves.summarise`. axis: "reads" or "peak". Frontier points of the labelled methods carry W-L, or
    W-L-CR if compressed, where there is room. ValueError for another axis or a method without a style.
    """
    if axis not in AXIS_LABELS:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(map(repr, AXIS_LABELS))}")
    ax = ax or plt.gca()
    by_method = {p["method"]: [q for q in summary["points"] if q["method"] == p["method"]] for p in summary["points"]}
    frontiers = {method: _plot_method(ax, points, axis) for method, points in by_method.items()}
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{np.log2(x):g}}}$" if x > 0 else ""))
    ax.set_xlabel(AXIS_LABELS[axis])
    ax.set_ylabel("accuracy (%)")
    ax.margins(x=0.08, y=0.08)
    _label_points(ax, [p for method in labelled for p in reversed(frontiers.get(method, []))], axis)
    ax.legend(loc="best")
    return ax


def plot_scaling(points: Sequence[dict], along: str, ax: Axes | None = None) -> Axes:
    """Accuracy along "L" (generated tokens) or "W" (voting chains): one line per (method, CR), with intervals.

    points: of `curves.summarise`, those of one W or one L.  CRs of a method differ in line style, not in colour.
    """
    labels = {"L": "length limit L (generated tokens)", "W": "width W (voting chains)"}
    if along not in labels:
        raise ValueError(f"along is {along!r}; allowed: {', '.join(map(repr, labels))}")
    ax = ax or plt.gca()
    crs: dict[str, list] = {}
    for method, cr in dict.fromkeys((p["method"], p["cr"]) for p in points):
        label, colour, marker = style_of(method)
        crs.setdefault(method, []).append(cr)
        rows = sorted((p for p in points if (p["method"], p["cr"]) == (method, cr)), key=lambda p: p[along])
        x, y, low, high = (np.array([p[key] for p in rows]) for key in (along, "accuracy", "low", "high"))
        x = x * 1.012 ** (len(ax.containers) - 1)  # aside, so that intervals do not hide each other
        style = dict(color=colour, marker=marker, capsize=2, elinewidth=1, markersize=5)
        style["linestyle"] = ("-", "--", ":", "-.")[(len(crs[method]) - 1) % 4]
        name = label if cr == 1 else f"{label}, CR {cr:g}"
        ax.errorbar(x, y, np.maximum([y - low, high - y], 0), label=name, **style)
    ticks = sorted({p[along] for p in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    ax.set_xlabel(labels[along])
    ax.set_ylabel("accuracy (%)")
    ax.legend()
    return ax


def plot_margins(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Margins over vanilla, a column a task and within it one place a model, one colour a method.

    rows: dicts with task, model, a (the method) and value in points, None or NaN where the paper has NA; rows with low
    and high get error bars.  Tasks and models are shown in the order in which they come.
    """
    ax = ax or plt.gca()
    places = {place: i + 0.8 * _task_index(rows, place[0]) for i, place in enumerate(_places(rows))}
    for method in dict.fromkeys(row["a"] for row in rows):
        label, colour, marker = style_of(method)
        mine = [row for row in rows if row["a"] == method and row["value"] is not None]
        x = [places[row["task"], row["model"]] for row in mine]
        ax.plot(x, [row["value"] for row in mine], marker, color=colour, label=label, markersize=6)
        for at, row in zip(x, mine, strict=True):
            if row.get("low") is not None:
                ax.vlines(at, row["low"], row["high"], color=colour, linewidth=1.5)
        for row in rows:
            if row["a"] == method and row["value"] is None:
                place = places[row["task"], row["model"]]
                ax.annotate("NA", (place, 0), color=colour, ha="center", va="bottom", fontsize=7)
    ax.axhline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_xticks(list(places.values()), [model for _, model in places], fontsize=8)
    ax.set_xlim(-0.7, max(places.values()) + 0.7)
    for task in dict.fromkeys(task for task, _ in places):
        middle = np.mean([x for place, x in places.items() if place[0] == task])
        ax.annotate(task, (middle, 1.01), xycoords=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("margin over vanilla (points)")
    return ax


def plot_kept(text: str, kept: np.ndarray, ax: Axes | None = None, width: int = 64) -> Axes:
    """A document of one-character tokens; under each, a cell per (layer, KV head): kept, or evicted by decision.

    kept: boolean (layers, KV heads, tokens), tokens as many as ``text`` has characters.
    """
    kept = np.asarray(kept, dtype=bool)
    if kept.ndim != 3 or kept.shape[2] != len(text):
        raise ValueError(f"kept has shape {kept.shape}; allowed: (layers, KV heads, {len(text)}), one cell a character")
    rows = kept.reshape(-1, len(text))
    height, blocks = len(rows) + 2, -(-len(text) // width)  # a line of text, its cells, a gap
    image = np.full((blocks * height, width), np.nan)
    ax = ax or plt.subplots(figsize=(10, 0.13 * blocks * height + 0.4))[1]
    for at, character in enumerate(text):
        block, column = divmod(at, width)
        image[block * height + 1 : block * height + 1 + len(rows), column] = rows[:, at]
        ax.text(column, block * height, character, ha="center", va="center", fontsize=8, family="monospace")
    colours = ListedColormap(["#e6e6e6", STYLES["dms"][1]])
    ax.imshow(image, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none")
    for layer in range(kept.shape[0]):
        middle = 1 + (layer + 0.5) * kept.shape[1] - 0.5
        for block in range(blocks):
            ax.text(-1, block * height + middle, f"{layer}", ha="right", va="center", fontsize=6, color="#555555")
    ax.set_axis_off()
    patches = [
        Patch(color=colours(1.0), label="kept"),
        Patch(color=colours(0.0), label="evicted once it left the window"),
    ]
    ax.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    return ax


def plot_retention(
    live_per_layer_head: Sequence[Sequence[float]], ax: Axes | None = None, tokens: int | None = None
) -> Axes:
    """Heat map of what each (layer, KV head) still holds: live tokens or, given the tokens seen, the share in %."""
    live = np.asarray(live_per_layer_head, dtype=float)
    if live.ndim != 2 or not live.size:
        raise ValueError(f"live_per_layer_head has shape {live.shape}; allowed: (layers, KV heads), neither empty")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}; allowed: >= 1, or None")
    shown, label = (live, "live tokens") if tokens is None else (100 * live / tokens, "tokens kept (%)")
    ax = sns.heatmap(
        shown, ax=ax or plt.gca(), vmin=0, vmax=None if tokens is None else 100, cmap="viridis",
        annot=live.size <= 64, fmt=".0f", cbar_kws={"label": label},
    )  # fmt: skip
    ax.set_xlabel("KV head")
    ax.set_ylabel("layer")
    ax.tick_params(axis="y", rotation=0)
    return ax


def plot_training(log_rows: Sequence[dict], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """A retrofit log on three axes: the losses, the compression ratio against its target, the learning rate.

    log_rows: dicts with step and any of kd, aux, cr_target, cr_measured, learning_rate (what `retrofit` logs); rows may
    lack keys.
    """
    if axes is None:
        axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")[1]
    axes = np.ravel(axes)
    if len(axes) != 3:
        raise ValueError(f"axes are {len(axes)}; allowed: 3 (losses, compression ratio, learning rate)")
    _plot_keys(axes[0], log_rows, {"kd": "distillation, $L_{KD}$ (nats per token)", "aux": "auxiliary, $L_{aux}$"})
    _plot_keys(axes[1], log_rows, {"cr_target": "target", "cr_measured": "measured"})
    _plot_keys(axes[2], log_rows, {"learning_rate": "learning rate"})
    axes[0].set_yscale("symlog", linthresh=1e-3)  # the auxiliary loss reaches 0 exactly
    axes[0].set_ylim(bottom=0)
    for ax, label in zip(axes, ("loss", "compression ratio (×)", "learning rate"), strict=True):
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(label)
    return axes


def _places(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """(task, model), tasks together."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    places = dict.fromkeys((row["task"], row["model"]) for row in rows)
    return sorted(places, key=lambda place: tasks.index(place[0]))


def _task_index(rows: Sequence[dict], task: str) -> int:
    return list(dict.fromkeys(row["task"] for row in rows)).index(task)


def _plot_method(ax: Axes, points: list[dict], axis: str) -> list[dict]:
    """Draw the points of one method and its frontier; returns the points on the frontier."""
    label, colour, marker = style_of(points[0]["method"])
    x, y, low, high = (np.array([p[key] for p in points]) for key in (axis, "accuracy", "low", "high"))
    ax.errorbar(x, y, np.maximum([y - low, high - y], 0), fmt="none", ecolor=colour, elinewidth=1, alpha=0.3)
    ax.plot(x, y, marker, color=colour, alpha=0.25, markersize=4)
    vertices = frontier(np.stack([x, y], axis=1))
    ax.plot(*vertices.T, marker=marker, color=colour, markersize=6, linewidth=1.8, label=label)
    return [next(p for p in points if (p[axis], p["accuracy"]) == (budget, best)) for budget, best in vertices]


def _label_points(ax: Axes, points: list[dict], axis: str) -> None:
    """Name points in the given order, leaving out those whose name would cover an earlier one."""
    placed: list[np.ndarray] = []
    size = np.array([0.1, 0.045])  # of a name, in fractions of the axes
    for point in points:
        where = (point[axis], point["accuracy"])
        vanilla = point["method"] == "vanilla"  # its frontier lies below the others: names to its lower right
        offset, side, shift = ((5, -11), "left", (0, 0)) if vanilla else ((-5, 5), "right", (-1, 1))
        corner = ax.transAxes.inverted().transform(ax.transData.transform(where)) + size * shift
        if all((np.abs(corner - other) > size).any() for other in placed):
            placed.append(corner)
            colour = style_of(point["method"])[1]
            ax.annotate(_name(point), where, offset, textcoords="offset points", ha=side, fontsize=7, color=colour)


def _name(point: dict) -> str:
    length = point["L"]
    length = f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)
    return f"{point['W']}-{length}" + ("" if point["cr"] == 1 else f"-{point['cr']:g}")


def _plot_keys(ax: Axes, rows: Sequence[dict], labels: dict[str, str]) -> None:
    for key, label in labels.items():
        series = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if series:
            line, marker = "--" if key == "cr_target" else "-", "." if len(series) < 30 else ""
            ax.plot(*np.array(series, dtype=float).T, label=label, linestyle=line, marker=marker)
    if len(labels) > 1 and ax.lines:
        ax.legend()
