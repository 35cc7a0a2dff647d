"""Figures of chapters 7 and 8 show what they are given: changes of a variant, intervals by task, a study of recall."""

import matplotlib.pyplot as plt
import pytest

from companion.experiments.recall import CONTROLS
from companion.figures import recall
from companion.figures.ablations import PARTS, plot_by_task, plot_changes
from companion.figures.recall import plot_recall, recall_table, show_recall
from dms_core.storage import write_json

REFERENCE = {
    "variant": "dms",
    "eviction": "delayed",
    "window": 16,
    "gate": "adapter",
    "train": "all",
    "loss": "forward",
}
REFERENCE["steps"] = 120


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_what_differs_from_the_first_row_is_coloured():
    rows = [REFERENCE, REFERENCE | {"variant": "delayed-w4", "window": 4}, REFERENCE, REFERENCE | {"variant": "x"}]
    ax = plot_changes(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["reference", "delayed-w4", "x"]
    changed = ax.collections[0].get_array().reshape(3, len(PARTS))
    assert changed.sum() == 1 and changed[1, PARTS.index("window")]
    assert [text.get_text() for text in ax.texts[: len(PARTS)]] == [str(REFERENCE[part]) for part in PARTS]


def test_intervals_have_a_panel_a_task_and_rows_without_a_value_are_left_out():
    def row(task, label, value):
        return {"task": task, "label": label, "value": value, "low": 0, "high": 9}

    series = {
        "reads": [row("traces", "TOVA", 5.0), row("search", "TOVA", 6.0), row("search", "Quest", 7.0)],
        "peak": [row("traces", "TOVA", 4.0), row("traces", "H2O", None)],
    }
    fig = plot_by_task(series)
    assert [ax.get_title() for ax in fig.axes] == ["traces", "search"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["TOVA", "Quest"]
    traces, search = ([[float(x) for x in line.get_xdata()] for line in ax.lines[:2]] for ax in fig.axes)
    assert traces == [[5.0], [4.0]] and search == [[6.0, 7.0], []]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["reads", "peak"]


def study():
    """A result of ``recall_study.summary`` with every control."""

    def row(method, cr, share):
        spread = {"value": share, "low": share - 0.1, "high": share + 0.1}
        names = ("needles", "needles_held_out", "agreement", "far_kl", "kl")
        measures = dict.fromkeys(names, spread) | {
            "hops": {**spread, "value": share / 2},
            "copies": {"value": None, "low": None, "high": None},
        }
        return {"method": method, "cr": cr, "cr_live": cr, "measures": measures}

    rows = [row("vanilla", 1.0, 0.8), row("dms-gates", 4.0, 0.3), row("dms", 4.0, 0.7)]
    rows += [row(name, 4.0, 0.2) for name in CONTROLS]
    return {"documents": 96, "questions": 273, "far": 1234, "rows": rows}


def test_recall_is_drawn_a_line_a_method_and_the_dense_model_as_a_dashed_line():
    fig, table = plot_recall(study()), recall_table(study())
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert labels[:2] == ["DMS, gates alone, CR 4", "DMS, CR 4"] and len(labels) == 2 + len(CONTROLS)
    dashed = [line for line in fig.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[80.0, 80.0]]
    assert list(table.index) == ["dense", *labels] and list(table.loc["DMS, CR 4", ["needles", "hops"]]) == [
        "70.0",
        "35.0",
    ]
    assert "copies" not in table and table.loc["dense", "KL far"] == "0.800"


def test_a_missing_study_is_one_sentence_and_a_stored_one_a_figure_with_caption_and_table(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(thing.data))
    monkeypatch.setattr(recall.plt, "show", lambda: shown.append("figure"))
    said = show_recall(tmp_path / "recall.json", "8.5").data
    assert "is not in this copy" in said and said.count(".") == said.count(".json") + 1 and shown == []
    write_json(tmp_path / "recall.json", study())
    table = show_recall(tmp_path / "recall.json", "8.5")
    assert shown[0] == "figure" and shown[1].startswith("**Figure 8.5.**") and "273 questions" in shown[1]
    assert len(table) == 3 + len(CONTROLS)
    whole = study() | {"rows": study()["rows"][:3], "common": study() | {"documents": 32, "questions": 91}}
    write_json(tmp_path / "recall.json", whole)
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", thing)))
    table = show_recall(tmp_path / "recall.json", "8.5")
    assert "32 texts with 91 questions" in shown[3] and len(shown[4]) == 3 + len(CONTROLS)
    assert "273 questions" in shown[5] and len(table) == 3
