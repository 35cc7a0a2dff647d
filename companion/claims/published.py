"""The paper's tables (``data/published``), and the numbers of a run beside them.

Published margins are those of Tables 7 (throughput), 8 (KV reads) and 9 (peak memory); published accuracies at a fixed
budget, one chain at the largest length, those of Tables 2 and 10-12.  A run is compared with the rows of its own model
and benchmark; one that has none, such as the embedded model's, stands beside all of them and is labelled as what it is.
"""

from functools import cache

import pandas as pd

from companion.figures.style import style_of
from companion.paths import PUBLISHED

DIRECTORY = PUBLISHED
FILES = {number: f"table{number}.csv" for number in range(1, 10)} | dict.fromkeys((10, 11, 12), "tables10-12.csv")
EMBEDDED = "embedded model, program traces (another task: direction, not size, can be compared)"
AXES = {"reads": "KV reads", "peak": "peak memory", "throughput": "throughput"}


@cache
def read(file: str) -> pd.DataFrame:
    """One file of ``data/published``, such as "table8.csv"; what its columns mean is told in the README there."""
    path = DIRECTORY / file
    if not path.exists():
        raise ValueError(f"{file}: must be one of {', '.join(sorted(p.name for p in DIRECTORY.glob('*.csv')))}")
    return pd.read_csv(path)


def table(number: int) -> pd.DataFrame:
    """A table of the paper by its number, one value a row; 10, 11 and 12 come together.  ValueError for another."""
    if number not in FILES:
        raise ValueError(f"table {number}: must be one of {', '.join(map(str, FILES))}")
    return read(FILES[number])


def margins() -> pd.DataFrame:
    """Tables 7-9: table, axis, task, model, a, b, value (points, a minus b; NaN where the paper has NA)."""
    return pd.concat([table(number) for number in (7, 8, 9)], ignore_index=True).astype({"table": str})


def accuracies() -> pd.DataFrame:
    """Tables 2 and 10-12: table, task, model, method, cr, context, value (points), difference (to vanilla, points)."""
    rows = pd.concat([table(2), table(10)], ignore_index=True).astype({"table": str})
    vanilla = rows[rows["method"] == "vanilla"].set_index(["table", "task", "model"])["value"]
    base = vanilla.reindex(pd.MultiIndex.from_frame(rows[["table", "task", "model"]])).to_numpy()
    return rows.assign(difference=(rows["value"] - base).round(1))[
        ["table", "task", "model", "method", "cr", "context", "value", "difference"]
    ]


def compare(summary: dict, model: str | None = None, task: str | None = None) -> dict:
    """A run beside the published rows.

    summary: of ``curves.summarise``, with "model" and "task" where the run has told them (they may also be given here),
    under their names in ``data/published``.  Returns, ready for JSON,

    "run": {"label", "model", "task", "same": whether the paper has this model on this benchmark},
    "margins": published margin rows with "measured": {scale: {"value", "low", "high"}}, None for a pair or an axis that
    the run does not have, and "direction" on log2 axes: same, opposite, unresolved, NA or None,
    "accuracies": published rows with "measured": {"accuracy", "low", "high", "L", "difference": {...} or None} or None.
    """
    model, task = model or summary.get("model"), task or summary.get("task")
    published = {"margins": margins(), "accuracies": accuracies()}
    own = {name: _own(rows, model, task) for name, rows in published.items()}
    same = any(len(rows) for rows in own.values())
    label = f"{model}, {task}" if model or task else EMBEDDED
    if not same and label != EMBEDDED:
        label += " (not in the paper's tables: direction, not size, can be compared)"
    rows = {name: _plain(own[name] if same else published[name]) for name in published}
    return {
        "run": {"label": label, "model": model, "task": task, "same": same},
        "margins": [row | _measured_margin(row, summary["margins"]) for row in rows["margins"]],
        "accuracies": [row | {"measured": _measured_accuracy(row, summary)} for row in rows["accuracies"]],
    }


def markdown(comparison: dict) -> str:
    """The comparison as two tables, the models of a benchmark in one row.

    Intervals are the run's, 95 % over problems; the paper gives none.
    """
    run = comparison["run"]
    head = ("table", "budget", "margin", "benchmark", "models", "published", "this run, log2", "this run, linear",
            "direction")  # fmt: skip
    body = [
        (first["table"], AXES[first["axis"]], f"{style_of(first['a'])[0]} − {style_of(first['b'])[0]}", first["task"],
         _sizes(rows), _each(_signed(row["value"]) for row in rows),
         *(_interval(first["measured"], scale) for scale in ("log2", "linear")),
         _each(dict.fromkeys(row["direction"] or "—" for row in rows)))
        for first, rows in _grouped(comparison["margins"], ("table", "axis", "a", "b", "task"))
    ]  # fmt: skip
    lines = [f"# Published and measured: {run['label']}", "", "## Pareto margins (points)", "", *_table(head, body)]
    lines += ["", "## One chain at the largest length (accuracy in points, difference to vanilla)", ""]
    head = ("table", "benchmark", "models", "method", "CR", "published", "difference", "this run", "difference")
    body = [
        (first["table"], first["task"], _sizes(rows), style_of(first["method"])[0], f"{first['cr']:g}",
         _each(f"{row['value']:.1f}" for row in rows),
         "—" if first["method"] == "vanilla" else _each(_signed(row["difference"]) for row in rows),
         *_accuracy_cells(first["measured"]))
        for first, rows in _grouped(comparison["accuracies"], ("table", "task", "method", "cr"))
    ]  # fmt: skip
    note = "A dash: this run has no such method, ratio or axis. NA: the budgets do not meet."
    return "\n".join([*lines, *_table(head, body), "", note, ""])


def size_of(model: str) -> str:
    """A model's name without what the models of the scaling runs have in common."""
    return model.removeprefix("DeepSeek-R1-Distill-Qwen-")


def _grouped(rows: list[dict], keys: tuple) -> list[tuple[dict, list[dict]]]:
    """Rows that agree in the keys, in order of first appearance, each group with its first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [(group[0], group) for group in groups.values()]


def _sizes(rows: list[dict]) -> str:
    return _each(size_of(row["model"]) for row in rows)


def _each(values) -> str:
    return " / ".join(values)


def _own(rows: pd.DataFrame, model: str | None, task: str | None) -> pd.DataFrame:
    return rows[(rows["model"] == model) & (rows["task"] == task)]


def _plain(rows: pd.DataFrame) -> list[dict]:
    return [{key: None if value != value else value for key, value in row.items()} for row in rows.to_dict("records")]


def _measured_margin(row: dict, measured: list[dict]) -> dict:
    found = {m["scale"]: m for m in measured if all(m[key] == row[key] for key in ("a", "b", "axis"))}
    if not found:
        return {"measured": None, "direction": None}
    values = {scale: {key: m[key] for key in ("value", "low", "high")} for scale, m in found.items()}
    return {"measured": values, "direction": _direction(row["value"], **values["log2"])}


def _direction(published: float | None, value: float | None, low: float | None, high: float | None) -> str:
    """Whether the run's interval lies on the published side of zero."""
    if published is None or value is None:
        return "NA"
    if low <= 0 <= high or published == 0:
        return "unresolved"
    return "same" if (low > 0) == (published > 0) else "opposite"


def _measured_accuracy(row: dict, summary: dict) -> dict | None:
    longest = max(point["L"] for point in summary["points"])
    for point in summary["points"]:
        if (point["method"], point["cr"], point["L"], point["W"]) == (row["method"], row["cr"], longest, 1):
            break
    else:
        return None
    pairs = [p for p in summary["paired"] if (p["a"], p["b"], p["cr"]) == (row["method"], "vanilla", row["cr"])]
    difference = {key: pairs[0][key] for key in ("difference", "low", "high")} if pairs else None
    return {key: point[key] for key in ("accuracy", "low", "high", "L")} | {"difference": difference}


def _signed(value: float | None) -> str:
    return "NA" if value is None else f"{value:+.1f}".replace("-", "−")


def _interval(measured: dict | None, scale: str) -> str:
    if measured is None:
        return "—"
    row = measured[scale]
    if row["value"] is None:
        return "NA"
    return f"{_signed(row['value'])} [{_signed(row['low'])}, {_signed(row['high'])}]"


def _accuracy_cells(measured: dict | None) -> tuple[str, str]:
    if measured is None:
        return "—", "—"
    accuracy = "{accuracy:.1f} [{low:.1f}, {high:.1f}]".format(**measured)
    gap = measured["difference"]
    if gap is None:
        return accuracy, "—"
    return accuracy, f"{_signed(gap['difference'])} [{_signed(gap['low'])}, {_signed(gap['high'])}]"


def _table(head: tuple, body: list[tuple]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *body)]
