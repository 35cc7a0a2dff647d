"""The ledger's verdicts follow from signs and intervals, and what was not measured is said to be untested."""

import json
from pathlib import Path

import pytest

from companion.claims.ledger import HEAD, NOT_TESTED, Evidence, make_ledger, markdown

RESULTS = Path(__file__).parents[3] / "data" / "results"
ALL = {"problems": 300}


def margin(axis, low, high, **more):
    return {"a": "dms", "b": "vanilla", "axis": axis, "scale": "log2", "value": (low + high) / 2, "low": low,
            "high": high, **ALL, **more}  # fmt: skip


def paired(a, b, cr, low, high):
    return {"a": a, "b": b, "cr": cr, "difference": (low + high) / 2, "low": low, "high": high, **ALL}


def evidence(reads=(1.0, 3.0), peak=(-1.0, 1.0), cr4=(-2.0, 1.0), delay=(-4.0, -1.0), stored=None):
    summary = {
        "margins": [margin("reads", *reads), margin("peak", *peak)],
        "paired": [paired("dms", "vanilla", 4.0, *cr4), paired("dms", "dms-immediate", 4.0, *delay)],
    }
    return Evidence(summary, {"cr_decisions": 8.4, "cr_live": 5.8}, 900, 8.0, None, stored or {})


def verdicts(found: Evidence) -> dict[str, str]:
    return {claim.claim: claim.verdict for claim in make_ledger(found)}


def test_a_sign_agrees_disagrees_or_is_not_resolved():
    found = verdicts(evidence())
    assert found["At equal KV reads DMS is more accurate than the original"] == "agrees"
    assert found["At equal peak memory too"] == "no difference that 300 problems can resolve"
    assert found["Delayed eviction is far better than immediate"] == "disagrees"


@pytest.mark.parametrize(
    "interval, word", [((-2.0, 1.0), "agrees"), ((-9.0, -6.0), "loses more"), ((-6.0, -1.0), "unres")]
)
def test_little_is_less_than_five_points_with_its_whole_interval(interval, word):
    assert verdicts(evidence(cr4=interval))["One chain at the longest length loses little"].startswith(word)


def test_what_is_not_stored_is_not_tested():
    untested = {claim for claim, verdict in verdicts(evidence()).items() if verdict == NOT_TESTED}
    assert "DMS needs far fewer training tokens than DMC" in untested
    assert "Learnt eviction beats training-free eviction" in untested
    assert "Steps at a fixed ratio after the ramp bring nothing" in untested
    assert "What is evicted leaves memory" in untested


def test_a_margin_without_common_budgets_is_na():
    found = evidence()
    found.summary["margins"][0] |= {"value": None, "low": None, "high": None}
    claim = make_ledger(found)[0]
    assert claim.measured.startswith("NA") and claim.verdict == "unresolved"


def test_stored_results_of_the_repository_give_a_whole_table():
    stored = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    stored["grid"] = json.loads((RESULTS / "tiny" / "grid.json").read_text())
    claims = make_ledger(evidence(stored=stored))
    lines = markdown(claims).splitlines()
    assert len(lines) == len(claims) + 2
    assert {line.count("|") for line in lines} == {len(HEAD) + 1}
    tested = verdicts(evidence(stored=stored))
    assert tested["Learnt eviction beats training-free eviction"] != NOT_TESTED
    assert tested["It still finds a needle in a haystack as long as its training context"] != NOT_TESTED
