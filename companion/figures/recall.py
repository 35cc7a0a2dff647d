"""The study of ``dms recall`` on a page: what each method remembers, and how far it is from the dense model."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from companion.figures.style import COLUMN, STYLES, style_of
from dms_core.storage import read_json

PANELS = {"needles": ("needles\nrecalled (%)", 100), "far_kl": ("KL, far-dependent\ntokens (nats)", 1)}
TABLE = {  # a column: measure and factor
    "needles": ("needles", 100),
    "new kinds": ("needles_held_out", 100),
    "hops": ("hops", 100),
    "copies": ("copies", 100),
    "agreement": ("agreement", 100),
    "KL": ("kl", 1),
    "KL far": ("far_kl", 1),
}
MISSING = (
    "*`data/results/recall.json`, the study of gates with adapters, is not in this copy; the commands above "
    "compute it.*"
)


def show_recall(file: Path | str, figure: str):
    """Figure, caption and table of a stored study, or one sentence where there is none.  For the end of a cell."""
    from IPython.display import Markdown, display

    if not Path(file).exists():
        return Markdown(MISSING)
    result = read_json(file)
    shown = result.get("common") or result
    plot_recall(shown)
    plt.show()
    facts = {"figure": figure, **{name: shown[name] for name in ("documents", "questions", "far")}}
    display(Markdown(CAPTION.format(**facts)))
    if shown is not result:
        display(recall_table(shown))
        display(Markdown(LONGER.format(questions=result["questions"], far=result["far"])))
    return recall_table(result)


LONGER = (
    "Controls take each token as a step, and ran on the shorter texts alone. The others on the longer ones, too, in "
    "all {questions} questions and {far} far-dependent tokens:"
)
CAPTION = (
    "**Figure {figure}.** What each method remembers of {documents} texts with {questions} questions, and how far it "
    "is from the dense model at the {far} tokens that need the far past. 95 % bootstrap intervals over texts. Every "
    "control holds as many tokens as the last retrofit, but Quest, which holds all and chooses what it reads. In the "
    "table shares are in %, KL in nats a token; new kinds are needles of kinds that the training never had."
)


def plot_recall(result: dict) -> Figure:
    """A panel a measure, a line a method; the dense model as a dashed line.  result: of ``recall_study.summary``."""
    rows = [row for row in result["rows"] if row["method"] != "vanilla"]
    dense = next(row for row in result["rows"] if row["method"] == "vanilla")
    size = (COLUMN, 0.28 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(PANELS), figsize=size, layout="constrained", sharey=True)
    for ax, (name, (label, factor)) in zip(axes, PANELS.items(), strict=True):
        for place, row in enumerate(rows):
            _, colour, marker = style_of(row["method"])
            value, low, high = (row["measures"][name][key] for key in ("value", "low", "high"))
            ax.plot(factor * value, place, marker, color=colour, markersize=5)
            ax.hlines(place, factor * low, factor * high, color=colour, linewidth=1.4)
        ax.axvline(factor * dense["measures"][name]["value"], color=STYLES["vanilla"][1], linestyle="--", linewidth=1)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return fig


def recall_table(result: dict):
    """A row a method: live ratio and the measures of TABLE, as text.  Returns a pandas DataFrame."""
    import pandas as pd

    rows = {}
    for row in result["rows"]:
        values = {label: (row["measures"].get(name, {}).get("value"), by) for label, (name, by) in TABLE.items()}
        found = {label: by * value for label, (value, by) in values.items() if value is not None}
        rows[_label(row)] = {"CR live": f"{row['cr_live']:.2f}"}
        rows[_label(row)] |= {x: f"{v:.3f}" if x.startswith("KL") else f"{v:.1f}" for x, v in found.items()}
    return pd.DataFrame(rows).T


def _label(row: dict) -> str:
    name = "dense" if row["method"] == "vanilla" else style_of(row["method"])[0]
    return name if not row["method"].startswith("dms") else f"{name}, CR {row['cr']:g}"
