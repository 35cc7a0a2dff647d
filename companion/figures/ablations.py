"""Figure of the ablations: paired differences with their intervals."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from companion.figures.style import STYLES

LABELS = {
    "dms": "reference",
    "gates-only": "adapter gates alone",
    "neuron": "neuron gate",
    "reverse-kl": "reverse KL",
    "lm-loss": "next-token loss, no teacher",
    "no-rest": "no rest, as many steps",
    "no-rest-decay": "no rest, as many steps, the rate falls",
    "rest-constant": "rest at a constant rate",
    "vanilla": "dense",
    "gates-lm": "gates alone, next-token loss",
    "gates-future": "gates alone, future attention",
    "neuron-all": "neuron gate, all three",
    "neuron-no-warmup": "… without the warm-up",
    "neuron-no-zero": "… without the start at zero",
    "neuron-no-rate": "… without its own rate",
    "dmc": "DMC",
    "dmc-pressed": "DMC, ten times the compression loss",
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
        raise ValueError("pairs []: must be one or more")
    ax = ax or plt.subplots(figsize=(7, 0.36 * len(pairs) + 1), layout="constrained")[1]
    for place, row in enumerate(pairs):
        ax.plot(row["difference"], place, "s", color=STYLES["dms"][1], markersize=6)
        ax.hlines(place, row["low"], row["high"], color=STYLES["dms"][1], linewidth=1.5)
    ax.axvline(0, color=STYLES["vanilla"][1], linewidth=1)
    ax.set_yticks(range(len(pairs)), [f"{label_of(row['a'])} − {label_of(row['b'])}" for row in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set_xlabel("accuracy, difference (points)")
    return ax
