"""The published tables: complete, in range, and consistent with each other where data/published/README.md says so."""

import json

import pandas as pd
import pytest

from companion.claims import published
from companion.cli.main import main
from companion.paths import PUBLISHED

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
        ("GSM8K", "vanilla", 1),
        ("GSM8K", "dms", 2),
        ("GSM8K", "dms", 3),
        ("GSM8K", "dms", 4),
    }
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


def test_tables_1_to_12_are_there_and_others_are_rejected():
    for number in range(1, 13):
        rows = published.table(number)
        assert len(rows) and rows["table"].astype(str).isin({str(number), "10-12"}).all()
    with pytest.raises(ValueError, match="table 13: must be one of 1, 2, "):
        published.table(13)
    with pytest.raises(ValueError, match=r"table8\.csv"):
        published.read("table99.csv")


def test_frontier_configurations_are_distinct_and_within_the_papers_lengths():
    rows = load("frontier_configurations")
    assert not rows.duplicated().any() and set(rows["length"]) == {8192, 16384, 32768}
    assert {(8192, 1), (16384, 1), (32768, 1)} <= set(map(tuple, rows[["length", "width"]].to_numpy()))


def test_rows_measured_by_others_have_source_date_unit_and_number():
    rows = published.measured_by_others()
    columns = ["method", "model", "task", "setting", "metric", "unit", "value", "highest"]
    assert list(rows) == [*columns, "hardware", "source", "url", "date", "note"]
    required = ["method", "model", "task", "metric", "unit", "source", "url"]
    assert rows[required].map(lambda text: bool(text.strip())).all(axis=None)
    assert (
        rows["url"]
        .str.fullmatch(r"https://(github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{7,40}/|arxiv\.org/abs/)\S+")
        .all()
    )
    assert rows["date"].dt.year.eq(2026).all() and rows["date"].is_monotonic_increasing
    assert rows["value"].notna().all() and (rows["highest"].isna() | (rows["highest"] > rows["value"])).all()
    assert rows["unit"].isin(["tokens/s", "GiB", "s", "points", "%", "ratio"]).all()
    assert not rows.duplicated(["source", "method", "model", "task", "setting", "metric"]).any()
    assert (rows.groupby("source")[["url", "date"]].nunique() == 1).all(axis=None)


def test_ratios_measured_by_others_equal_the_stated_ones():
    rows = published.measured_by_others()
    values = rows.set_index(["model", "setting", "method", "metric"])["value"].to_dict()
    for model, context, metric, ratio in (
        ("Qwen3-8B", "8192", "decode throughput", 2.06),
        ("Qwen3-8B", "40832", "decode throughput", 0.49),
        ("Llama-3.2-1B", "8192", "decode throughput", 1.53),
        ("Qwen3-8B", "8192", "KV cache", 1 / 6.35),
        ("Qwen3-8B", "40832", "KV cache", 1 / 49.2),
    ):
        ours, dense = (
            values[model, f"context {context} + 128, 8 streams", m, metric] for m in ("FastDMS", "vLLM BF16")
        )
        assert ours / dense == pytest.approx(ratio, rel=0.01)
    tri = rows[(rows["source"] == "TriAttention") & (rows["metric"] == "throughput")].set_index("method")["value"]
    assert tri["TriAttention"] / tri["dense"] == pytest.approx(2.5, abs=0.05)


def a_run(**facts):
    """A run with margins of two kinds and two points."""
    margin = {"a": "dms", "b": "vanilla", "na_share": 0.0, "problems": 30}
    rows = [
        margin | {"axis": axis, "scale": scale, "value": value, "low": value - 2, "high": value + 2}
        for axis, value in (("reads", 5.0), ("peak", 1.0))
        for scale in ("linear", "log2")
    ]
    rows += [
        margin | {"a": "tova", "axis": "peak", "scale": s, "value": None, "low": None, "high": None}
        for s in ("linear", "log2")
    ]
    point = {"L": 32, "W": 1, "low": 60.0, "high": 80.0, "reads": 2.0, "peak": 3.0, "problems": 30}
    compressed = point | {"method": "dms", "cr": 8, "accuracy": 72.0}
    points = [point | {"method": "vanilla", "cr": 1, "accuracy": 70.0}, compressed]
    points.append(compressed | {"accuracy": 1.0, "low": 0.0, "high": 3.0, "L": 16, "reads": 1.0, "peak": 2.0})
    paired = [{"a": "dms", "b": "vanilla", "cr": 8, "difference": 2.0, "low": -1.0, "high": 5.0, "L": 32, "W": 1}]
    return {"points": points, "margins": rows, "paired": paired, **facts}


def test_run_of_a_published_model_is_compared_with_its_own_rows_only():
    result = published.compare(a_run(model=MODEL_32B, task="AIME 24"))
    assert result["run"]["same"] and len(result["margins"]) == 1 + 3 + 3 and len(result["accuracies"]) == 5
    reads = next(row for row in result["margins"] if (row["axis"], row["a"], row["b"]) == ("reads", "dms", "vanilla"))
    assert (reads["value"], reads["measured"]["log2"]["value"], reads["direction"]) == (12.0, 5.0, "same")
    peak = {(row["a"], row["b"]): row["direction"] for row in result["margins"] if row["axis"] == "peak"}
    assert peak == {("dms", "vanilla"): "unresolved", ("tova", "vanilla"): "NA", ("dms", "tova"): None}
    measured = {(row["method"], row["cr"]): row["measured"] for row in result["accuracies"]}
    assert measured["dms", 8]["accuracy"] == 72.0 and measured["dms", 8]["difference"]["difference"] == 2.0
    assert measured["dms", 4] is None and measured["vanilla", 1]["difference"] is None


def test_negative_published_and_positive_measured_margins_are_opposite():
    result = published.compare(a_run(model="DeepSeek-R1-Distill-Qwen-1.5B", task="AIME 24"))
    assert published._direction(-1.5, 5.0, 3.0, 7.0) == "opposite"
    assert [row["direction"] for row in result["margins"] if row["axis"] == "throughput"] == [None]


def test_run_of_the_embedded_model_is_compared_with_all_rows():
    result = published.compare(a_run())
    assert not result["run"]["same"] and result["run"]["label"] == published.EMBEDDED
    assert len(result["margins"]) == 84 and len(result["accuracies"]) == 74
    text = published.markdown(result)
    assert published.EMBEDDED in text.splitlines()[0]
    assert "+10.6 / +15.0 / +12.0 | +5.0 [+3.0, +7.0]" in text and "70.0 / 73.3" not in text
    assert "30.0 / 53.3 / 73.3 | +0.0 / +0.0 / +3.3 | — | — |" in text  # DMS at CR 4, which this run lacks
    unknown = published.compare(a_run(), model="Another", task="AIME 24")["run"]["label"]
    assert unknown.startswith("Another, AIME 24 (not in the paper")


def test_published_command_writes_json_markdown_and_figure(tmp_path, capsys):
    (tmp_path / "curves.json").write_text(json.dumps(a_run(model=MODEL_32B, task="AIME 24")))
    written = tmp_path / "published.md"
    command = ["published", "--results", str(tmp_path), "--markdown", str(written)]
    assert main([*command, "--figure", str(tmp_path / "published.svg"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["run"]["label"] == f"{MODEL_32B}, AIME 24" and "+12.0 | +5.0 [+3.0, +7.0]" in written.read_text()
    assert "<svg" in (tmp_path / "published.svg").read_text()
    assert main(["published", "--results", str(tmp_path / "none")]) == 2
    assert "curves.json" in capsys.readouterr().err
