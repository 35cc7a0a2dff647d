"""One style: a look for every method, one size of text, legends beside the data, colours that can be told apart."""

import ast
import itertools
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from companion.experiments import controls, recall
from companion.figures.ablations import plot_pairs
from companion.figures.bench import plot_end_to_end, plot_memory, plot_times
from companion.figures.curves import plot_curves, plot_margins, plot_panels, plot_scaling
from companion.figures.lessons import plot_gate_block, plot_mask, plot_slots
from companion.figures.retention import plot_compression, plot_kept, plot_positions, plot_retention, plot_training
from companion.figures.style import COLUMN, FONT, RATIOS, STYLES, look, set_style, shaded, style_of
from companion.paths import RESULTS
from dms_core.storage import read_json

ROOT = Path(__file__).parents[3]
PHONE = 358  # px that a figure has on a phone
# What a cone's absence leaves of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, ground: str) -> float:
    light, dark = sorted((TO_XYZ[1] @ linear(x) for x in (colour, ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(TO_XYZ @ rgb.clip(0, 1) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def turned(colour: str) -> str:
    """A colour as figures.css shows it in the dark theme: inverted, hues turned by half a circle."""
    grey = np.array([0.213, 0.715, 0.072])
    out = 2 * grey @ (1 - np.array(to_rgb(colour))) - (1 - np.array(to_rgb(colour)))
    return "#" + "".join(f"{round(255 * x):02x}" for x in out.clip(0, 1))


def test_every_method_that_is_measured_has_a_style():
    measured = {"vanilla", "vanilla-int8", "dms", "dms-int8", "dms-gates", "dms-immediate", "dmc"}
    for name in measured | {*recall.CONTROLS, *controls.CONTROLS, *controls.LIGHT}:
        assert style_of(name)


def test_no_two_methods_look_the_same():
    looks = [STYLES[name] for name in STYLES if name not in ("streaming", "random-protected")]  # other names of one
    assert len({(colour, marker) for _, colour, marker in looks}) == len(looks) == len({label for label, *_ in looks})


@pytest.mark.parametrize("colour", sorted({colour for _, colour, _ in STYLES.values()}))
def test_colour_stands_out_in_both_themes(colour):
    assert contrast(colour, "#ffffff") >= 3
    assert contrast(turned(colour), "#14181e") >= 3  # the page's ground in the dark theme


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_differ_for_colour_blind_readers(kind):
    colours = sorted({colour for _, colour, _ in STYLES.values()})
    seen = {colour: lab(BLINDNESS[kind] @ linear(colour)) for colour in colours}
    for a, b in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen[a] - seen[b]) >= 8, (a, b)


def test_ratios_of_a_method_differ_in_line_filling_and_shade():
    looks = [look("dms", cr) for cr in RATIOS]
    for key in ("linestyle", "fillstyle", "color", "label"):
        assert len({str(one[key]) for one in looks}) == len(RATIOS), key
    assert {one["marker"] for one in looks} == {STYLES["dms"][2]}
    assert look("dms")["label"] == "DMS" and look("dms", 5)["label"] == "DMS, CR 5"
    assert shaded("#000000", -1) == "#ffffff"


def test_text_has_nine_pixels_on_a_phone():
    set_style()
    assert {plt.rcParams[key] for key in plt.rcParams if re.search(r"(label|title|font)\.?size$", key)} <= {FONT}
    assert FONT * PHONE / COLUMN / 72 >= 9


def figures() -> dict:
    """A figure of every kind, of stored numbers."""
    summary, bench = read_json(RESULTS / "full" / "curves.json"), read_json(RESULTS / "kernels-cpu.json")
    whole = [case for case in read_json(RESULTS / "e2e-cpu.json")["cases"] if "expected" in case]
    traces = [p for p in summary["points"] if p["task"] == "traces"]
    in_bytes = [p | {"bytes": p["peak"]} for p in read_json(RESULTS / "int8.json")["points"]]
    kept = np.random.default_rng(0).random((4, 2, 300)) < 0.3
    share = [[0.5, 0.25]] * 4
    rows = [{"from": 64 * i, "to": 64 * i + 64, "retention": share, "cr": share, "cr_live": share} for i in range(6)]
    log = [{"step": i, "kd": 1 / (i + 1), "aux": 0.1, "cr_target": i / 9, "learning_rate": 1e-3} for i in range(9)]
    margins = [{"task": t, "model": m, "a": "dms", "value": 1.0} for t in "AB" for m in ("R1 1.5B", "R1 7B")]
    pair = {"a": "immediate-w16", "b": "dms", "difference": 1.0, "low": -1.0, "high": 2.0}
    slots = np.array([[0, 0, 2], [-1, 1, 1]])
    return {
        "curves": lambda: plot_curves({"points": traces}),
        "panels": lambda: plot_panels(summary),
        "bytes": lambda: plot_panels({"points": in_bytes}, ["bytes"], labelled=()),
        "scaling": lambda: plot_scaling([p for p in traces if p["W"] == 1], "L"),
        "margins": lambda: plot_margins(margins),
        "pairs": lambda: plot_pairs([pair]),
        "times": lambda: plot_times(cases(bench)),
        "memory": lambda: plot_memory(cases(bench)),
        "end to end": lambda: plot_end_to_end(whole),
        "gate": plot_gate_block,
        "mask": lambda: plot_mask(np.tril(np.ones((9, 9), int))),
        "slots": lambda: plot_slots(slots, np.array([True, False, False]), 1),
        "kept": lambda: plot_kept("abc" * 100, kept),
        "retention": lambda: plot_retention(share, tokens=1),
        "positions": lambda: plot_positions(rows),
        "compression": lambda: plot_compression(rows, 2.0),
        "training": lambda: plot_training(log),
    }


def cases(bench: dict) -> list[dict]:
    return [case for case in bench["cases"] if case["kind"] == "prefill"]


@pytest.mark.parametrize("name", figures())
def test_figure_is_a_column_wide_with_text_of_one_size_and_legends_beside_the_data(name):
    plt.close("all")  # what other tests have left open
    set_style()
    figures()[name]()
    fig = plt.gcf()
    fig.draw_without_rendering()
    assert fig.get_figwidth() == COLUMN
    sizes = {text.get_fontsize() for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible()}
    assert sizes == {FONT}
    for ax in fig.axes:
        if legend := ax.get_legend():
            assert not legend.get_window_extent().overlaps(ax.bbox)
    plt.close("all")


@pytest.mark.parametrize("chapter", sorted((ROOT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_chapter_draws_columns_and_sets_no_font_size(chapter):
    cells = [
        "".join(cell["source"]) for cell in json.loads(chapter.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    for call in (node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)):
        given = {word.arg: word.value for word in call.keywords}
        assert "fontsize" not in given
        if isinstance(size := given.get("figsize"), ast.Tuple):
            assert ast.literal_eval(size.elts[0]) == COLUMN
