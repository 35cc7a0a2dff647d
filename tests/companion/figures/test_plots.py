"""Figures draw what they are given, and reject what they cannot draw."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion.claims.published_plot import draw_comparison
from companion.figures.ablations import plot_pairs
from companion.figures.curves import draw_curves, plot_curves, plot_margins, plot_scaling
from companion.figures.retention import plot_kept, plot_positions, plot_retention, plot_training
from companion.figures.style import STYLES, style_of
from companion.paths import RESULTS
from dms_core.storage import read_json

ROWS = [
    {"task": "A", "model": "m", "a": "dms", "value": 2.0, "low": 1.0, "high": 3.0},
    {"task": "B", "model": "m", "a": "dms", "value": None},
]


@pytest.fixture
def ax():
    yield plt.figure().subplots()
    plt.close("all")


@pytest.fixture(scope="module")
def summary():
    return read_json(RESULTS / "tiny" / "curves.json")


def test_curves_have_a_line_a_method_and_the_points_of_its_frontier(summary, ax):
    assert plot_curves(summary, "peak", ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["vanilla", "DMS", "DMS, immediate eviction"]
    with pytest.raises(ValueError, match="axis 'time': must be one of reads, peak"):
        plot_curves(summary, "time", ax)


def test_scaling_moves_along_the_given_axis(summary, ax):
    points = [p for p in summary["points"] if p["W"] == 1]
    kinds = dict.fromkeys((p["method"], p["cr"]) for p in points)
    assert len(plot_scaling(points, "L", ax).containers) == len(kinds)
    with pytest.raises(ValueError, match="along 'cr': must be one of L, W"):
        plot_scaling(points, "cr", ax)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_drawn_files_are_reproducible(suffix, summary, tmp_path):
    files = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
    for file in files:
        draw_curves(summary, file)
    first, second = ([line for line in file.read_bytes().splitlines() if b"dc:date" not in line] for file in files)
    assert first == second
    plt.close("all")


def test_comparison_is_drawn_to_a_file(summary, tmp_path):
    draw_comparison(summary, None, None, tmp_path / "published.svg")
    assert "<svg" in (tmp_path / "published.svg").read_text()
    plt.close("all")


def test_margin_without_value_is_labelled_na(ax):
    plot_margins(ROWS, ax)
    assert [text.get_text() for text in ax.texts] == ["NA", "A", "B"]
    assert ax.lines[0].get_ydata().tolist() == [2.0]


def test_method_without_a_style_is_rejected():
    assert style_of("dms") == STYLES["dms"]
    with pytest.raises(ValueError, match=r"method 'lru': must be one of vanilla, .*dms"):
        style_of("lru")


def test_retention_is_shown_in_tokens_or_in_percent(ax):
    plot_retention([[1.0, 3.0]], ax, tokens=4)
    assert ax.collections[0].get_array().ravel().tolist() == [25.0, 75.0]
    for live, tokens, message in (([1.0], None, "live"), ([[1.0]], 0, "tokens 0: must be >= 1")):
        with pytest.raises(ValueError, match=message):
            plot_retention(live, ax, tokens)


def test_kept_cells_are_a_cell_a_character(ax):
    plot_kept("abc", np.array([[[True, False, True]]]), ax, width=2)
    image = ax.images[0].get_array().filled(np.nan)  # (blocks of 3 lines, characters a line)
    assert image[1].tolist() == [1.0, 0.0] and image[4, 0] == 1.0 and np.isnan(image[4, 1])
    with pytest.raises(ValueError, match=r"kept \(1, 1, 2\): must be \(layers, KV heads, 3\)"):
        plot_kept("abc", np.ones((1, 1, 2)), ax)


def test_positions_have_a_column_a_bucket_and_a_row_a_head(ax):
    rows = [{"from": 0, "to": 8, "retention": [[1.0, 0.5]]}, {"from": 8, "to": 16, "retention": [[0.25, 0.0]]}]
    plot_positions(rows, ax)
    assert ax.collections[0].get_array().reshape(2, 2).tolist() == [[100.0, 25.0], [50.0, 0.0]]


def test_training_log_needs_three_axes(ax):
    axes = plot_training([{"step": 1, "kd": 0.5}, {"step": 2, "cr_target": 2.0}])
    assert [len(a.lines) for a in axes] == [1, 1, 0]
    with pytest.raises(ValueError, match="axes 1: must be 3"):
        plot_training([], [ax])


def test_pairs_are_labelled_with_both_variants(ax):
    plot_pairs([{"a": "immediate-w16", "b": "dms", "difference": 1.0, "low": -1.0, "high": 2.0}], ax)
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert labels == ["immediate, w = 16 − reference"]
    with pytest.raises(ValueError, match="pairs"):
        plot_pairs([])
