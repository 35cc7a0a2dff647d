"""Interchange interventions: patches do what they say, and look-ups are where the trace says."""

import pytest
import torch

from companion.experiments.delay import (
    CONDITIONS,
    delay,
    find_cases,
    findings,
    interchange,
    lookups,
    make_batch,
    patched,
    recorded,
    tokens_of,
)
from companion.paths import REASONER
from companion.tasks.programs import DIGITS, make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_base, load_model

WINDOW = 16


@pytest.fixture(scope="module")
def cases():
    return find_cases(load_tokenizer(), 8, 2 * WINDOW + 1)


@pytest.fixture(scope="module", params=["dms", "dense"])
def model(request):
    return load_model(REASONER / "dms-cr4") if request.param == "dms" else load_base(REASONER)


def test_patching_all_gives_the_corrupted_run_and_none_the_clean_run(model, cases):
    clean, corrupted = make_batch(cases)
    target, written = recorded(model, corrupted)
    before, _ = recorded(model, clean)
    later = torch.arange(clean.shape[1]) > torch.tensor([[case.source] for case in cases])  # same token in both runs
    everything = torch.ones_like(clean, dtype=torch.bool)
    torch.testing.assert_close(patched(model, clean, everything, written)[later], target[later], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patched(model, clean, ~everything, written), before)
    assert (before - target)[later].abs().max() > 1  # the two runs differ


def test_patch_changes_no_earlier_token(model, cases):
    clean, corrupted = make_batch(cases)
    before, (_, written) = recorded(model, clean)[0], recorded(model, corrupted)
    tokens = torch.zeros_like(clean, dtype=torch.bool)
    for row, case in enumerate(cases):
        tokens[row, tokens_of(case, "window", WINDOW)] = True
    after = patched(model, clean, tokens, written)
    earlier = torch.arange(clean.shape[1]) <= torch.tensor([[case.source] for case in cases])
    torch.testing.assert_close(after[earlier], before[earlier])


def test_every_lookup_repeats_its_source_digit():
    counted = {"definition": 0, "result": 0}
    for index in range(50):
        problem = make_problem("validation", 0, index)
        text = problem.prompt + problem.trace
        for source, query, kind in lookups(problem, 17):
            assert text[source] == text[query + 1] and text[source] in DIGITS and query - source >= 17
            assert (source < len(problem.prompt)) == (kind == "definition") and query >= len(problem.prompt)
            counted[kind] += 1
    assert min(counted.values()) > 20


def test_conditions_are_disjoint_spans_before_the_query(cases):
    for case in cases:
        source, window, control = (set(tokens_of(case, name, WINDOW)) for name in ("source", "window", "control"))
        assert not (source & window or window & control) and len(window) == len(control) == WINDOW
        assert max(control) < case.query and source | window == set(tokens_of(case, "source and window", WINDOW))
    with pytest.raises(ValueError, match=r"condition 'before': must be one of none"):
        tokens_of(cases[0], "before", WINDOW)


def test_conclusion_follows_planted_effects(cases):
    def results(moved: float) -> list[dict]:
        odds = {name: -5.0 for name in CONDITIONS} | {"clean": -5.0, "corrupted": 5.0, "window": -5.0 + 10 * moved}
        found = [{name: (case.wrong if o > 0 else case.right, o) for name, o in odds.items()} for case in cases]
        return [result | {"kept": [[True]]} for result in found]

    found = findings(cases, {"dms": results(0.8), "dense": results(0.0)})
    row = next(r for r in found["rows"] if (r["model"], r["patched"], r["kind"]) == ("dms", "window", "all"))
    assert row["effect"] == pytest.approx(80) and row["follows"] == 100 and found["verdict"].startswith("content moves")
    assert findings(cases, {"dms": results(0.0), "dense": results(0.0)})["verdict"].startswith("no sign")
    assert "no more than" in findings(cases, {"dms": results(0.8), "dense": results(0.8)})["verdict"]


def test_interchange_follows_the_corrupted_digit_when_all_is_patched(model, cases):
    for result in interchange(model, cases, WINDOW):
        assert result["all"][0] == result["corrupted"][0] and result["none"] == result["clean"]


@pytest.mark.slow
def test_delay_reports_every_condition():
    result = delay(documents=24)
    found = {(row["model"], row["patched"]) for row in result["rows"]}
    assert found == {(model, condition) for model in ("dms", "dense") for condition in CONDITIONS}
    assert result["settings"]["used"] <= result["settings"]["lookups"]
