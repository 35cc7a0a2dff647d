"""Benchmarks of the kernels (``dms bench``) as figures and tables: ours beside what one would use otherwise."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from companion.figures.style import COLUMN, STYLES, legend_above, look

LOOKS = {  # of a benchmark's method: label, colour
    "ours": ("compacted", STYLES["dms"][1]),
    "sdpa": ("dense SDPA", STYLES["vanilla"][1]),
    "sdpa_mask": ("SDPA, float mask", "#d55e00"),
    "flex": ("FlexAttention", "#029e73"),
    "sdpa_folded": ("dense SDPA, folded", "#949494"),
    "sdpa_gqa": ("dense SDPA, grouped", "#cc78bc"),
    "dynamic_cache": ("DynamicCache", STYLES["vanilla"][1]),
}


def label_of(case: dict) -> str:
    shape = case["shape"]
    return f"CR {shape['cr']}" if case["kind"] == "decode" else f"{shape['tokens']} tokens"


def methods_of(case: dict) -> list[str]:
    """Ours and the baselines; dense decode appears in its two layouts, not once more as the faster of them."""
    return ["ours", *(name for name in case["baseline_ms"] if name != "sdpa" or case["kind"] != "decode")]


def plot_times(cases: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Median milliseconds of each method in each case, with the interquartile range."""

    def time(case: dict, name: str) -> tuple[float, list[float]]:
        middle = case["ours_ms"] if name == "ours" else case["baseline_ms"][name]
        return middle, case["quartiles_ms"][name]

    return _plot(cases, time, "time (ms)", ax)


def plot_memory(cases: Sequence[dict], ax: Axes | None = None) -> Axes:
    """MiB that each method holds afterwards where something stays in memory, else its peak."""
    key, label = ("held_bytes", "held (MiB)") if "held_bytes" in cases[0] else ("peak_bytes", "peak memory (MiB)")

    def memory(case: dict, name: str) -> tuple[float, list[float]]:
        return (size := case[key][name] / 2**20), [size, size]

    return _plot(cases, memory, label, ax)


def _plot(cases: Sequence[dict], value: Callable, label: str, ax: Axes | None) -> Axes:
    """One column a case, in it one marker a method, with its value."""
    ax = ax or plt.subplots(figsize=(COLUMN, 3.8), layout="constrained")[1]
    names = list(dict.fromkeys(name for case in cases for name in methods_of(case)))
    for n, name in enumerate(names):
        here = [(x, case) for x, case in enumerate(cases) if name in methods_of(case)]
        at = np.array([x + 0.22 * (n - (len(names) - 1) / 2) for x, _ in here])
        found = [value(case, name) for _, case in here]
        height = np.array([middle for middle, _ in found])
        ends = np.array([spread for _, spread in found])
        text, colour = LOOKS.get(name, (name, "#703410"))
        style = {"fmt": "s" if name == "ours" else "o", "color": colour, "markersize": 6, "capsize": 2}
        ax.errorbar(at, height, np.maximum([height - ends[:, 0], ends[:, 1] - height], 0), label=text, **style)
        for x, y, top in zip(at, height, ends.max(1), strict=True):
            place = {"xytext": (1, 7), "textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90}
            ax.annotate(f"{y:.3g}" if y < 1000 else f"{y:.0f}", (x, top), color=colour, **place)
    ax.set_xticks(range(len(cases)), [label_of(case) for case in cases])
    ax.set(xlim=(-0.6, len(cases) - 0.4), yscale="log", ylabel=label)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.margins(y=0.45)
    ax.grid(axis="x", visible=False)
    legend_above(ax, 2)
    return ax


def plot_end_to_end(cases: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Whole models that decode: tokens a second over those of transformers' cache, a column a batch and context.

    Small bars across: what the bytes that a step must read let one expect.
    """
    ax = ax or plt.subplots(figsize=(COLUMN, 4.2), layout="constrained")[1]
    columns = list(dict.fromkeys((case["shape"]["batch"], case["shape"]["context"]) for case in cases))
    columns.sort(key=lambda column: column[0] * column[1])
    ratios = sorted({case["shape"]["cr"] for case in cases})
    for n, cr in enumerate(ratios):
        mine = [case for case in cases if case["shape"]["cr"] == cr]
        at = [columns.index((c["shape"]["batch"], c["shape"]["context"])) + 0.2 * (n - 1) for c in mine]
        style = look("dms", cr) | {"linestyle": "none", "label": f"DMS, CR {cr:g}"}
        ax.plot(at, [case["ratio"]["dynamic_cache"] for case in mine], markersize=8, **style)
        expected = {"color": style["color"], "linestyle": "none", "marker": "_", "markersize": 14}
        ax.plot(at, [case["expected"] for case in mine], **expected)
    ax.axhline(1, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_xticks(range(len(columns)), [f"{b} × {c}" if c < 1024 else f"{b} × {c // 1024}K" for b, c in columns])
    ax.set(yscale="log", xlabel="batch × context", ylabel="tokens/s, over dense")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", visible=False)
    legend_above(ax, 3)
    return ax


def ratio_table(cases: Sequence[dict]) -> pd.DataFrame:
    """How many times longer than ours each baseline takes, and what ours reaches: GFLOP/s, or GB/s beside a copy's."""
    rows = {}
    for case in cases:
        ratios = {LOOKS.get(n, (n,))[0] + " (×)": round(case["ratio"][n], 2) for n in methods_of(case)[1:]}
        if case["kind"] == "decode":
            ratios |= {"ours (GB/s)": round(case["gbps"], 1), "a copy (GB/s)": round(case["copy_gbps"], 1)}
        elif case["flops"]:
            ratios |= {"ours (GFLOP/s)": round(case["flops"] / case["ours_ms"] / 1e6, 1)}
        rows[label_of(case)] = ratios
    return pd.DataFrame(rows).T.astype(object).fillna("–")
