"""The tables of README.md, from what is stored: ``python -m companion.claims.readme`` writes them anew.

A table stands in README.md between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from companion.claims import wording
from companion.claims.budgets import configuration, spent
from companion.claims.wording import interval, signed
from companion.paths import RESULTS, checkout
from companion.tasks.base import short_name
from dms_core.storage import read_json, write_text

AXES = {"reads": "{} KV reads", "peak": "{} peak tokens", "seconds": "{} seconds"}
EQUAL = {"reads": "equal KV reads", "peak": "equal peak memory", "seconds": "equal seconds"}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def budgets(results: Path) -> str:
    """What the budget of one long dense chain buys, and what that chain's accuracy costs with DMS."""
    full, runtime = (read_json(results / "full" / name) for name in ("curves.json", "runtime.json"))
    rows = [*_ours(full["headline"]), *(row for row in _ours(runtime["headline"]) if row["axis"] == "seconds")]
    head = "task", "budget of one long dense chain", "dense, best (W-L)", "DMS, best (W-L-CR)", "gain (points)"
    body = [
        (
            short_name(row["task"]) if row["axis"] == "reads" else "",
            AXES[row["axis"]].format(spent(row["budget"])),
            f"{row['best_b']:.1f} % ({configuration(row['chosen_b'])})",
            "—" if row["best_a"] is None else f"{row['best_a']:.1f} % ({configuration(row['chosen_a'])})",
            _bold(row["gain"], row["low"], row["high"]),
            _times(row["target"]),
        )
        for task in _tasks(rows)
        for row in rows
        if row["task"] == task
    ]
    return wording.table((*head, "times less for its accuracy"), body)


def margins(results: Path) -> str:
    """Margins on log2 axes; beside them those at budgets at which half of the dense chains can end."""
    full, runtime = (read_json(results / "full" / name) for name in ("curves.json", "runtime.json"))
    rows = [*_ours(full["margins"]), *(row for row in _ours(runtime["margins"]) if row["axis"] == "seconds")]
    rows = [row for row in rows if row["scale"] == "log2"]
    body = []
    for axis, words in EQUAL.items():
        here = [row for row in rows if row["axis"] == axis]
        body.append((words, *(_bold(*_bounds(row)) for row in here)))
        body.append(("— where half of the dense chains have ended", *map(_restricted, here)))
    return wording.table(("margin (points)", *map(short_name, _tasks(rows))), body)


def smollm2(results: Path) -> str:
    """SmolLM2's own curve: margins at equal budgets, and one chain at the largest length."""
    return _study(read_json(results / "smollm2-curve.json"))


def larger(results: Path) -> str:
    """The same of the larger reasoner, with the margins where half of the dense chains have ended and the gains."""
    return _study(read_json(results / "large.json"), both=True)


def one_chain(results: Path) -> str:
    """One chain at the largest length: DMS minus dense, retrofit by retrofit, too, and minus immediate eviction.

    Beside those of the stored run the retrofits of an earlier one, of the same seeds on another machine.
    """
    full, earlier = (read_json(results / "full" / name) for name in ("curves.json", "earlier.json"))
    made = {(point["method"], point["cr"]) for point in full["points"]} | {("vanilla", cr) for cr in (4, 8)}
    pairs = [pair for pair in full["paired"] if pair["a"] == "dms" and (pair["b"], pair["cr"]) in made]
    kinds = dict.fromkeys((pair["a"], pair["b"], pair["cr"]) for pair in pairs)
    words = {"vanilla": "DMS minus dense, CR {:g}", "dms-immediate": "delayed minus immediate eviction, CR {:g}"}
    found = {
        kind: [pair for pair in pairs if (pair["a"], pair["b"], pair["cr"]) == kind]
        for kind in sorted(kinds, key=lambda kind: (list(words).index(kind[1]), kind[2]))
    }
    body = []
    for (_, b, cr), rows in found.items():
        body.append((words[b].format(cr), *(_bold(*_bounds(pair, "difference")) for pair in rows)))
        if b == "vanilla":
            body.append(("— its three retrofits", *map(_seeds, rows)))
            before = [pair for pair in earlier["paired"] if (pair["b"], pair["cr"]) == (b, cr)]
            body.append(("— three of an earlier run", *map(_seeds, before)))
    return wording.table(("", *map(short_name, _tasks(pairs))), body)


TABLES: dict[str, Callable[[Path], str]] = {
    "budgets": budgets,
    "larger": larger,
    "margins": margins,
    "one_chain": one_chain,
    "smollm2": smollm2,
}


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The text with its tables as they should be.  Raises ValueError for a table that does not exist."""

    def block(found: re.Match) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"table {found[2]!r}: must be one of {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]](results)}\n{found[3]}"

    return BLOCK.sub(block, text)


def _study(found: dict, both: bool = False) -> str:
    """Margins and one chain of a summary with one retrofit; both: also restricted margins, and gains."""
    rows = [row for row in _ours(found["margins"]) if row["scale"] == "log2"]
    body = []
    for axis in ("reads", "peak"):
        here = [row for row in rows if row["axis"] == axis]
        body.append((f"margin, {EQUAL[axis]}", *(_bold(*_bounds(row)) for row in here)))
        if both:
            body.append(("— where half of the dense chains have ended", *map(_restricted, here)))
            gained = [row for row in _ours(found["headline"]) if row["axis"] == axis]
            body.append(("— gain at the budget of one long dense chain", *(_bold(*_bounds(r, "gain")) for r in gained)))
    pairs = _ours(found["paired"])
    for cr in sorted({pair["cr"] for pair in pairs}):
        here = (_bold(*_bounds(pair, "difference")) for pair in pairs if pair["cr"] == cr)
        body.append((f"one chain, DMS minus dense, CR {cr:g}", *here))
    return wording.table(("points", *map(short_name, _tasks(rows))), body)


def _ours(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if (row["a"], row["b"]) == ("dms", "vanilla")]


def _tasks(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _bounds(row: dict, value: str = "value") -> tuple:
    return row[value], row["low"], row["high"]


def _restricted(row: dict) -> str:
    return _bold(*_bounds(row["restricted"] or dict.fromkeys(("value", "low", "high"))))


def _seeds(pair: dict) -> str:
    return ", ".join(signed(value) for value in pair["by_seed"].values())


def _bold(value: float | None, low: float | None, high: float | None) -> str:
    """An interval that excludes zero stands out."""
    words = interval(value, low, high)
    return f"**{words}**" if value is not None and (low > 0 or high < 0) else words


def _times(found: dict) -> str:
    if found["saving"] is None:
        return "not reached"
    return f"{found['saving']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


if __name__ == "__main__":
    readme = checkout("README.md") / "README.md"
    write_text(readme, rewritten(readme.read_text(encoding="utf-8")))
