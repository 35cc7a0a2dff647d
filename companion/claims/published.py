"""The paper's tables (``data/published``), and the numbers of a run beside them.

Published margins are those of Tables 7 (throughput), 8 (KV reads) and 9 (peak memory); published accuracies at a fixed
budget, one chain at the largest length, those of Tables 2 and 10-12.  A run is compared with the rows of its own model
and benchmark; one that has none, such as the embedded model's, stands beside all of them and is labelled as what it is.
"""

from functools import cache

import pandas as pd

from companion.claims.wording import signed
from companion.claims.wording import table as markdown_table
from companion.figures.style import style_of
from companion.paths import PUBLISHED

EMBEDDED = "embedded model, its own tasks (direction, not size, can be compared)"
STANDS_FOR = {"AIME 24": "traces", "MATH-500": "traces", "GPQA Diamond": "choice", "LiveCodeBench": "search"}
AXES = {"reads": "KV reads", "peak": "peak memory", "throughput": "throughput"}


@cache
def read(file: str) -> pd.DataFrame:
    """One file of ``data/published``, such as "table8.csv"; what its columns mean is told in the README there."""
    path = PUBLISHED / file
    if not path.exists():
        raise ValueError(f"{file}: must be one of {', '.join(sorted(p.name for p in PUBLISHED.glob('*.csv')))}")
    return pd.read_csv(path)


def table(number: int) -> pd.DataFrame:
    """A table of the paper by its number, one value a row; 10, 11 and 12 come together.  ValueError for another."""
    if number not in range(1, 13):
        raise ValueError(f"table {number}: must be one of {', '.join(map(str, range(1, 13)))}")
    return read(f"table{number}.csv" if number < 10 else "tables10-12.csv")


def measured_by_others() -> pd.DataFrame:
    """What others measured in 2026, by date; text that a source does not give is "", ``highest`` NaN but in ranges."""
    rows = read("measured_by_others.csv").fillna(dict.fromkeys(("setting", "hardware", "note"), ""))
    return rows.assign(date=pd.to_datetime(rows["date"], format="%Y-%m-%d")).sort_values("date", kind="stable")


def margins() -> pd.DataFrame:
    """Tables 7-9: table, axis, task, model, a, b, value (points, a minus b; NaN where the paper has NA)."""
    return pd.concat([table(number) for number in (7, 8, 9)], ignore_index=True).astype({"table": str})


def accuracies() -> pd.DataFrame:
    """Tables 2 and 10-12: table, task, model, method, cr, context, value (points), difference (to vanilla, points)."""
    rows = pd.concat([table(2), table(10)], ignore_index=True).astype({"table": str}).drop(columns=["window", "stderr"])
    cell = ["table", "task", "model"]
    vanilla = rows[rows["method"] == "vanilla"].set_index(cell)["value"].rename("vanilla")
    return rows.assign(difference=(rows["value"] - rows.join(vanilla, on=cell)["vanilla"]).round(1))


def compare(summary: dict, model: str | None = None, task: str | None = None) -> dict:
    """A run beside the published rows, where it has several tasks each beside those of the benchmark it stands for.

    summary: of ``curves.summarise``, with "model" and "task" where the run has told them (they may also be given here),
    under their names in ``data/published``.  Returns, ready for JSON,

    "run": {"label", "model", "task", "same": whether the paper has this model on this benchmark},
    "margins": published margin rows with "measured": {scale: {"value", "low", "high"}}, None for a pair or an axis that
    the run does not have, and "direction" on log2 axes: same, opposite, unresolved, NA or None,
    "accuracies": published rows with "measured": {"accuracy", "low", "high", "L", "difference": {...} or None} or None.
    """
    model, task = model or summary.get("model"), task or summary.get("task")
    rows = {"margins": margins(), "accuracies": accuracies()}
    own = {name: all_[(all_["model"] == model) & (all_["task"] == task)] for name, all_ in rows.items()}
    same = any(map(len, own.values()))
    label = f"{model}, {task}" if model or task else EMBEDDED
    if not same and label != EMBEDDED:
        label += " (not in the paper's tables: direction, not size, can be compared)"
    chosen = own if same else rows
    plain = {name: some.astype(object).where(some.notna(), None).to_dict("records") for name, some in chosen.items()}
    return {
        "run": {"label": label, "model": model, "task": task, "same": same},
        "margins": [row | _measured_margin(row, summary["margins"]) for row in plain["margins"]],
        "accuracies": [row | {"measured": _measured_accuracy(row, summary)} for row in plain["accuracies"]],
    }


def markdown(comparison: dict) -> str:
    """The comparison as two tables, the models of a benchmark in one row.

    Intervals are the run's, 95 % over problems; the paper gives none.
    """
    head = ["table", "budget", "margin", "benchmark", "models", "published"]
    head += ["this run, log2", "this run, linear", "direction"]
    margin_rows, accuracy_rows = [], []
    for rows in _grouped(comparison["margins"], ["table", "axis", "a", "b", "task"]):
        first, (a, b) = rows[0], (style_of(rows[0][key])[0] for key in ("a", "b"))
        cells = [first["table"], AXES[first["axis"]], f"{a} − {b}", first["task"], _sizes(rows)]
        cells.append(" / ".join(signed(row["value"]) for row in rows))
        cells += [_interval(first["measured"] and first["measured"][scale], "value") for scale in ("log2", "linear")]
        margin_rows.append([*cells, " / ".join(dict.fromkeys(row["direction"] or "—" for row in rows))])
    for rows in _grouped(comparison["accuracies"], ["table", "task", "method", "cr"]):
        first, own = rows[0], rows[0]["measured"]
        cells = [first["table"], first["task"], _sizes(rows), style_of(first["method"])[0], f"{first['cr']:g}"]
        gaps = "—" if first["method"] == "vanilla" else " / ".join(signed(row["difference"]) for row in rows)
        cells += [" / ".join(f"{row['value']:.1f}" for row in rows), gaps]
        cells.append("{accuracy:.1f} [{low:.1f}, {high:.1f}]".format(**own) if own else "—")
        accuracy_rows.append([*cells, _interval(own and own["difference"], "difference")])
    columns = ("table", "benchmark", "models", "method", "CR", "published", "difference", "this run", "difference")
    return f"""\
# Published and measured: {comparison["run"]["label"]}

## Pareto margins (points)

{markdown_table(head, margin_rows)}

## One chain at the largest length (accuracy in points, difference to vanilla)

{markdown_table(columns, accuracy_rows)}

A dash: this run has no such method, ratio or axis. NA: the budgets do not meet.
"""


def size_of(model: str) -> str:
    """A model's name without what the models of the scaling runs have in common."""
    return model.removeprefix("DeepSeek-R1-Distill-Qwen-")


def _grouped(rows: list[dict], keys: list[str]) -> list[list[dict]]:
    """Rows that agree in the keys, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def _sizes(rows: list[dict]) -> str:
    return " / ".join(size_of(row["model"]) for row in rows)


def _interval(measured: dict | None, key: str) -> str:
    if measured is None or measured[key] is None:
        return "—" if measured is None else "NA"
    return f"{signed(measured[key])} [{signed(measured['low'])}, {signed(measured['high'])}]"


def _measured_margin(row: dict, measured: list[dict]) -> dict:
    found = [m for m in _of_task(row, measured) if all(m[key] == row[key] for key in ("a", "b", "axis"))]
    values = {m["scale"]: {key: m[key] for key in ("value", "low", "high")} for m in found}
    return {"measured": values or None, "direction": _direction(row["value"], **values["log2"]) if values else None}


def _of_task(row: dict, found: list[dict]) -> list[dict]:
    """The rows of the task that stands for a published row's benchmark; all where there is one task."""
    wanted = STANDS_FOR.get(row["task"]) if len({one.get("task") for one in found}) > 1 else None
    return [one for one in found if wanted in (None, one.get("task"))]


def _direction(published: float | None, value: float | None, low: float | None, high: float | None) -> str:
    """Whether the run's interval lies on the published side of zero."""
    if published is None or value is None:
        return "NA"
    if low <= 0 <= high or published == 0:
        return "unresolved"
    return "same" if (low > 0) == (published > 0) else "opposite"


def _measured_accuracy(row: dict, summary: dict) -> dict | None:
    points, pairs = (_of_task(row, summary[name]) for name in ("points", "paired"))
    longest, kind = max((point["L"] for point in points), default=0), (row["method"], row["cr"])
    at = (p for p in points if (p["method"], p["cr"], p["L"], p["W"]) == (*kind, longest, 1))
    pairs = (p for p in pairs if (p["a"], p["cr"], p["b"]) == (*kind, "vanilla"))
    if (point := next(at, None)) is None:
        return None
    difference = next(({key: p[key] for key in ("difference", "low", "high")} for p in pairs), None)
    return {key: point[key] for key in ("accuracy", "low", "high", "L")} | {"difference": difference}
