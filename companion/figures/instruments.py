"""The book's instruments: small figures that a reader can operate, in plain JavaScript (book/instruments).

``instrument("mask")`` at the end of a notebook's cell shows one.  What it displays is complete in itself: style,
scripts and numbers are in the output, so that a page needs neither files beside it nor a network.
"""

import json
from dataclasses import asdict

from IPython.display import HTML

from companion.cost.planner import RESERVED
from companion.cost.roofline import ARCHITECTURES, DEVICES, Architecture
from companion.figures.style import style_of
from companion.paths import checkout

TITLES = {
    "mask": "Mask and slots: mark tokens, and see who sees them and who takes their place",
    "budget": "A budget line over the frontiers",
    "roofline": "What a decode step costs, by the roofline model",
    "gate": "The gate: logit, noise and temperature",
    "tokens": "A text whose tokens are coloured by the rows of the cache that keep them",
}
NEEDED = {"budget": "a summary", "tokens": "an example"}
AXES = ("reads", "peak", "seconds")


def instrument(name: str, data: dict | None = None) -> HTML:
    """An instrument of TITLES, for display.

    data: for "budget" a summary of `dms_core.budgets.curves.summarise`, of one task or several; for "roofline"
    architectures by name, beside those that it has; for "tokens" an `example` of companion.figures.tokens, which may
    have "marked", positions to point out; the others take none.  Raises ValueError for another name, for data
    that are missing or not wanted, and where there is no repository.
    """
    if name not in TITLES:
        raise ValueError(f"instrument {name!r}: must be one of {sorted(TITLES)}")
    if (data is None) if name in NEEDED else (data is not None and name != "roofline"):
        raise ValueError(f"data for instrument {name!r}: must be {NEEDED.get(name, 'left out')}")
    given = {"budget": budget_data, "roofline": roofline_data, "tokens": tokens_data}.get(name, lambda _: None)(data)
    folder = checkout("an instrument") / "book" / "instruments"
    style, common, own = ((folder / file).read_text() for file in ("instrument.css", "common.js", f"{name}.js"))
    stored = json.dumps(given, separators=(",", ":")).replace("</", "<\\/")
    return HTML(
        f"<style>{style}</style>"
        f'<div class="instrument" data-name="{name}" role="group" aria-label="{TITLES[name]}">'
        f"<noscript>{TITLES[name]}: this figure can be operated where JavaScript is on.</noscript>"
        f'<script type="application/json">{stored}</script></div>'
        f"<script>{common}</script><script>{own}</script>"
    )


def roofline_data(models: dict[str, Architecture] | None = None) -> dict:
    """Architectures and devices as roofline.js takes them, and what is shown first."""
    sizes = {
        name: {"hidden": arch.hidden, "vocabulary": arch.vocabulary, "parameters": arch.parameters}
        | {"kinds": [{"count": count} | asdict(kind) for count, kind in arch.kinds]}
        for name, arch in (ARCHITECTURES | (models or {})).items()
    }
    devices = {name: asdict(device) for name, device in DEVICES.items()}
    return {"models": sizes, "devices": devices, "reserved": RESERVED, "model": "llama-3.1-8b", "device": "h100"}


def tokens_data(shown: dict) -> dict:
    """What tokens.js takes of an example."""
    names = ("tokens", "special", "layers", "heads", "kept")
    return {name: shown[name] for name in names} | {"marked": list(shown.get("marked", ()))}


def budget_data(summary: dict) -> dict:
    """The points of a summary as rows; half_ended: the budgets from which on half of the dense chains have ended."""
    points = summary["points"]
    columns = ["task", "method", "cr", "L", "W", "accuracy", *(axis for axis in AXES if axis in points[0])]
    half_ended = {
        f"{row['task'] or ''} {row['axis']}": row["restricted"]["from"]
        for row in summary["margins"]
        if (row["a"], row["b"]) == ("dms", "vanilla") and row["restricted"]
    }
    return {
        "columns": columns,
        "points": [[point[column] for column in columns] for point in points],
        "labels": {method: style_of(method)[0] for method in dict.fromkeys(point["method"] for point in points)},
        "half_ended": half_ended,
    }
