"""The published tables: complete, in range, and consistent with each other where data/published/README.md says so."""

from pathlib import Path

import pandas as pd
import pytest

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
ACCURACY_TABLES = {"table1": 80, "table2": 14, "table4": 96, "table5": 35, "table6": 52, "tables10-12": 60}
MARGIN_TABLES = {"table7": 12, "table8": 36, "table9": 36}
MODEL_32B = "DeepSeek-R1-Distill-Qwen-32B"


def load(name):
    return pd.read_csv(PUBLISHED / f"{name}.csv")


@pytest.mark.parametrize(("name", "rows"), ACCURACY_TABLES.items())
def test_accuracy_tables_are_complete_and_in_range(name, rows):
    table = load(name)
    assert list(table) == ["table", "task", "model", "method", "cr", "window", "context", "value", "stderr"]
    assert len(table) == rows
    assert not table.duplicated(["task", "model", "method", "cr", "context"]).any()
    assert table["value"].between(0, 100).all()
    assert ((table["method"] == "vanilla") == (table["cr"] == 1)).all()


@pytest.mark.parametrize(("name", "rows"), MARGIN_TABLES.items())
def test_margin_tables_have_twelve_cells_a_row(name, rows):
    table = load(name)
    assert len(table) == rows
    assert (table.groupby(["a", "b"]).size() == 12).all()
    assert not table.duplicated(["task", "model", "a", "b"]).any()


def test_margins_are_missing_exactly_where_the_paper_says_na():
    table = load("table8")
    missing = table[table["value"].isna()].groupby(["a", "b"]).size().to_dict()
    assert missing == {("quest", "vanilla"): 3, ("dms", "quest"): 3}
    assert load("table7")["value"].notna().all() and load("table9")["value"].notna().all()


def test_means_over_model_sizes_reproduce_the_averages_of_the_text():
    table = load("table8")
    means = table[(table["a"] == "dms") & (table["b"] == "vanilla")].groupby("task")["value"].mean().round(1)
    assert means.to_dict() == {"AIME 24": 12.5, "MATH-500": 2.3, "GPQA Diamond": 5.8, "LiveCodeBench": 8.3}


def test_headline_gains_are_those_of_table_8_in_the_camera_ready_only():
    gains = load("headline_gains").pivot(index="task", columns="version", values="value")
    table = load("table8").query("a == 'dms' and b == 'vanilla' and model == @MODEL_32B").set_index("task")["value"]
    assert gains["camera-ready"].to_dict() == table.drop("MATH-500").to_dict()
    assert (gains["arxiv-v1"] < gains["camera-ready"]).all()


def test_tables_1_and_6_differ_only_in_gsm8k_of_vanilla_and_dms():
    keys = ["task", "method", "cr"]
    both = load("table1").merge(load("table6"), on=keys)
    differ = both[both["value_x"] != both["value_y"]]
    assert set(map(tuple, differ[keys].to_numpy())) == {
        ("GSM8K", "vanilla", 1), ("GSM8K", "dms", 2), ("GSM8K", "dms", 3), ("GSM8K", "dms", 4),
    }  # fmt: skip
    assert len(both) == 26  # GSM8K and HellaSwag, vanilla and four methods at three CRs


def test_long_context_rows_of_table_1_are_those_of_table_4_at_4k():
    keys = ["task", "method", "cr", "context"]
    both = load("table1").dropna(subset="context").merge(load("table4"), on=keys)
    assert len(both) == 32 and (both["value_x"] == both["value_y"]).all()


@pytest.mark.parametrize(
    ("task", "problems", "averaged"),
    [("AIME 24", 30, {55.5}), ("MATH-500", 500, {84.1, 84.3}), ("GPQA Diamond", 198, {36.5, 37.0, 50.2, 65.4})],
)
def test_scaling_accuracies_are_single_runs_except_where_the_readme_says(task, problems, averaged):
    values = set(load("tables10-12").query("task == @task")["value"])
    single = {round(100 * k / problems, 1) for k in range(problems + 1)}
    assert values - single == averaged


def test_every_file_is_described_in_the_readme():
    readme = (PUBLISHED / "README.md").read_text()
    assert all(path.name in readme for path in PUBLISHED.glob("*.csv"))
