import json
import shutil

import pytest

from companion.claims.readme import TABLES, rewritten
from companion.paths import CHECKOUT, RESULTS


def test_tables_of_readme_are_those_of_the_stored_results():
    """If not: ``python -m companion.claims.readme``."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert {f"<!-- table {name} -->" for name in TABLES} <= set(text.splitlines())
    assert rewritten(text) == text


def test_a_changed_result_changes_its_cell_alone(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    file = results / "full" / "curves.json"
    stored = json.loads(file.read_text())
    pair = next(p for p in stored["paired"] if (p["a"], p["b"], p["cr"]) == ("dms", "vanilla", 8))
    pair |= {"difference": -1.25, "low": -2.0, "high": 0.5}
    file.write_text(json.dumps(stored))
    before, after = TABLES["one_chain"](RESULTS).split("|"), TABLES["one_chain"](results).split("|")
    changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["−1.2 [−2.0, +0.5]"]


def test_text_outside_of_tables_stays_and_an_unknown_table_is_refused():
    assert rewritten("a\n<!-- table -->\nb") == "a\n<!-- table -->\nb"
    with pytest.raises(ValueError, match="table 'mine': must be one of budgets, "):
        rewritten("<!-- table mine -->\n<!-- end -->")
