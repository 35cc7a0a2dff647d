"""Drawings of the chapters show what the library computes."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.figures.bench import methods_of, plot_end_to_end, plot_memory, plot_times, ratio_table
from companion.figures.lessons import SEEN, SLOTS, mask_legend, plot_gate_block, plot_mask, plot_slots, states
from companion.lesson import keep
from companion.paths import RESULTS
from companion.provenance import describe
from dms_core.storage import read_json
from dms_core.visibility import visible


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cases():
    return read_json(RESULTS / "kernels-cpu.json")["cases"]


def test_states_are_window_kept_and_evicted_and_the_future_is_blank():
    evicted = torch.tensor([[[False, True, False, True, False]]])
    state = states(visible(evicted, 1)[0, 0], 1)
    names = np.array(list(SEEN))[state]
    assert names[4].tolist() == ["kept", "evicted", "kept", "in the window", "in the window"]
    assert names[0].tolist() == ["in the window"] + ["not there"] * 4


def test_hidden_pairs_are_blank():
    hidden = np.zeros((3, 3), bool)
    hidden[2, 0] = True
    assert states(np.ones((3, 3), bool), 1, hidden)[2].tolist() == [0, 1, 1]


def test_mask_has_a_dot_for_each_decision_in_the_row_of_the_token_that_decides():
    ax = plot_mask(np.ones((6, 6)), decided=[1, 3], lag=2)
    (dots,) = ax.get_lines()
    assert dots.get_xydata().tolist() == [[1.5, 3.5], [3.5, 5.5]]
    mask_legend(ax.figure, dot=True)
    said = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert said == ["in the window", "kept", "evicted", "the decision"]


def test_slots_show_positions_and_leave_unused_rows_out():
    slots = np.array([[0, 0, 0], [-1, 1, 2], [-1, -1, -1]])  # token 2 takes the place of token 1
    ax = plot_slots(slots, np.array([False, True, False]), window=0)
    assert [text.get_text() for text in ax.texts] == ["0", "0", "0", "", "1", "2"]
    shown = ax.collections[0].get_array().reshape(2, 3)
    assert np.array(list(SLOTS))[shown.astype(int)][0].tolist() == ["in the window", "kept", "kept"]


def test_gate_block_names_its_parts():
    said = " ".join(text.get_text() for text in plot_gate_block().texts)
    assert all(
        word in said for word in ("RMSNorm", "KV cache", "attention", "residual stream", "training", "inference")
    )


@pytest.mark.parametrize("kind", ["prefill", "train", "decode", "cache"])
def test_benchmarks_are_drawn_with_every_method_and_ratios_are_those_measured(cases, kind):
    mine = [case for case in cases if case["kind"] == kind]
    methods = {name for case in mine for name in methods_of(case)}
    for draw in (plot_times, plot_memory):
        assert len(draw(mine).get_legend().get_texts()) == len(methods)
    table = ratio_table(mine)
    assert len(table) == len(mine)
    assert table.iloc[0, 0] == round(mine[0]["ratio"][methods_of(mine[0])[1]], 2)


def test_whole_models_are_drawn_as_measured_in_order_of_what_is_cached():
    mine = [case for case in read_json(RESULTS / "e2e-cpu.json")["cases"] if case["name"].startswith("e2e-reasoner-b")]
    ax = plot_end_to_end(mine)
    sizes = {text: at for at, text in zip(ax.get_xticks(), (t.get_text() for t in ax.get_xticklabels()), strict=True)}
    assert sizes["1 × 512"] == 0 and sizes["8 × 16K"] == len(sizes) - 1
    for cr, measured, expected in zip((1, 4, 8), ax.lines[:-1:2], ax.lines[1:-1:2], strict=True):
        (top,) = [case for case in mine if case["name"] == f"e2e-reasoner-b8-16384-cr{cr}"]
        at = measured.get_xdata().argmax()
        assert (measured.get_ydata()[at], expected.get_ydata()[at]) == (top["ratio"]["dynamic_cache"], top["expected"])


def test_numbers_are_kept_beside_what_they_were_measured_on(tmp_path):
    shown = keep(tmp_path, "99_made", seconds=[1.0])
    assert read_json(tmp_path / "chapters" / "99_made.json") == {"made_on": describe(), "seconds": [1.0]}
    assert shown.loc["torch"].item() == torch.__version__ and "threads" in shown.index
