"""What a token is that is evicted everywhere; patches do what they say; look-ups are where the documents say."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from companion.claims.measures import absorbed
from companion.experiments.delay import RULE, conclusion, default_checkpoints, delay, findings
from companion.experiments.interventions import MEASURES, RUNS, gates_of, interchange, make_batch, run, span
from companion.experiments.lookups import KINDS, TASKS, Case, find_cases
from companion.paths import REASONER
from companion.tasks.programs import DIGITS
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_base, load_model
from dms_core.config import DMSConfig
from dms_core.model import attach, detach
from dms_core.visibility import visible

WINDOW, BOTH = 16, pytest.mark.parametrize("eviction", ["delayed", "immediate"])
SOURCE, TOKENS = 7, 40
BEHIND = torch.arange(TOKENS).expand(2, -1) - SOURCE


@pytest.fixture(scope="module")
def cases():
    return find_cases(load_tokenizer(), 2, 2 * WINDOW + 1)


@pytest.fixture(scope="module", params=["dms", "dense"])
def model(request):
    dms = load_model(REASONER / "dms-cr4")
    return dms if request.param == "dms" else attach(load_base(REASONER), dms.dms.config)


def one_layer(tiny_model, **settings):
    """With random gates."""
    model = tiny_model(gates=False)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    attach(model, DMSConfig(scale=10.0, offset=0.0, **settings))
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def random_pair():
    """Token ids (2, T) twice, the second time with other tokens at the source."""
    clean = torch.randint(1, 40, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    other = clean.clone()
    other[:, SOURCE] = clean[:, SOURCE] % 39 + 1
    return clean, other, torch.tensor([SOURCE, SOURCE])


@BOTH
@pytest.mark.parametrize("window", [0, 1, 5])
def test_forced_token_is_seen_by_its_window_and_by_no_query_behind(tiny_model, window, eviction):
    """One layer, in which a query depends on what it sees alone."""
    model, (clean, other, source) = one_layer(tiny_model, window=window, eviction=eviction), random_pair()
    free = run(model, clean)[0]
    decided = model.dms.step.evicted[0].clone()  # (B, H, T)
    assert 0 < decided.float().mean() < 1 and not torch.equal(free, run(model, clean, source)[0])
    forced = model.dms.step.evicted[0]
    decided[:, :, SOURCE] = True
    assert torch.equal(forced, decided)  # nothing else was decided otherwise
    written = {place: x for place, x in run(model, other)[1].items() if place[1] != "dms_gate"}
    changed = run(model, clean, source, BEHIND == 0, written)[0] != run(model, clean, source)[0]
    seen = visible(forced, window)[:, :, :, SOURCE].any(1)  # (B, T)
    assert torch.equal(changed.any(-1), seen) and seen[:, SOURCE : SOURCE + window + 1].all()


def forced_pair(model):
    """Logits and what was written, of two runs that differ in a token that is forced out, its own gates held."""
    clean, other, source = random_pair()
    logits, written = run(model, clean, source)
    return logits, run(model, other, source, BEHIND == 0, gates_of(written))


@BOTH
def test_without_a_window_nothing_of_a_forced_token_is_left(tiny_model, eviction):
    for window, nothing in ((0, True), (5, False)):  # with one, later tokens pass it on
        clean, (other, _) = forced_pair(tiny_model(window=window, eviction=eviction))
        assert torch.equal(*(logits[:, SOURCE + window + 1 :] for logits in (clean, other))) == nothing


@BOTH
def test_what_is_left_of_a_forced_token_is_what_its_window_wrote(tiny_model, eviction):
    model, (clean, _, source) = tiny_model(window=5, eviction=eviction), random_pair()
    _, (target, written) = forced_pair(model)
    free, forced = (run(model, clean, gone)[1] for gone in (None, source))
    wrote = {place: x[:, : SOURCE + 6] for place, x in forced.items() if place[1] != "dms_gate"}
    assert all(torch.equal(x, free[place][:, : SOURCE + 6]) for place, x in wrote.items())  # what it would have anyway
    for last, equal in ((5, True), (4, False)):
        found = run(model, clean, source, (BEHIND > 0) & (last >= BEHIND), written)[0]
        assert torch.allclose(found[:, SOURCE + 6 :], target[:, SOURCE + 6 :], atol=1e-6) == equal


def test_forced_token_equals_one_that_an_attention_mask_hides(cases):
    clean, _ = make_batch(cases)
    source = torch.tensor([case.source for case in cases])
    model = attach(load_base(REASONER), DMSConfig(window=WINDOW))
    found = run(model, clean, source)[0]
    gone = torch.zeros(len(cases), 1, clean.shape[1], dtype=torch.bool)
    gone[range(len(cases)), 0, source] = True
    with torch.inference_mode():
        expected = detach(model)(clean, attention_mask=visible(gone, WINDOW)).logits  # (B, 1, T, T)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_patching_all_gives_the_exchanged_run_and_none_the_clean_run(model, cases):
    clean, exchanged = make_batch(cases)
    (target, written), (before, _) = run(model, exchanged), run(model, clean)
    later = torch.arange(clean.shape[1]) > torch.tensor([[case.source] for case in cases])  # same token in both runs
    everything = torch.ones_like(clean, dtype=torch.bool)
    found = run(model, clean, None, everything, written)[0]
    torch.testing.assert_close(found[later], target[later], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(model, clean, None, ~everything, written)[0], before)
    assert (before - target)[later].abs().max() > 1  # the two runs differ


def test_a_model_without_adapter_gates_is_refused(tiny_model):
    for model in (tiny_model(gates=False), tiny_model(gate="neuron")):
        with pytest.raises(ValueError, match="a model without adapter gates"):
            run(model, torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("task", TASKS)
def test_every_lookup_repeats_its_source_digit(task):
    make, lookups = TASKS[task]
    counted = dict.fromkeys(KINDS, 0)
    for index in range(40):
        document = make("validation", 0, index)
        text = document.prompt + document.trace
        for source, query, kind in lookups(document, 17):
            assert text[source] == text[query + 1] and text[source] in DIGITS and query - source >= 17
            assert (source < len(document.prompt)) == (kind == "definition") and query >= len(document.prompt)
            counted[kind] += 1
    assert min(counted.values()) > 10


def test_lookups_of_a_puzzle_by_hand():
    text = ">n>I;n=4-U;I=n+g;g=U-5;U=n-4;!", ">n8;n8=4-U>4-8=6;U6=n8-4=4?6-4=2>n83;n3=4-U"
    document = SimpleNamespace(prompt=text[0], trace=text[1])
    found = TASKS["search"][1](document, 1)
    trace = len(text[0])
    assert [place for place in found if place[2] == "definition"] == [
        (text[0].index("4-U"), trace + 6, "definition"),
        (text[0].index("4;!"), trace + text[1].index("n8-4=") + 2, "definition"),
    ]  # not the 4 of the second trial
    again = trace + text[1].index("n8-4=")
    assert [place for place in found if place[2] == "result"] == [
        (trace + 5, again, "result")
    ]  # not the list of ">n83"


def test_cases_hold_digits_and_two_spans_before_the_query(cases):
    assert {case.task for case in cases} == set(TASKS)
    ids = dict(zip(load_tokenizer().convert_tokens_to_ids(list(DIGITS)), DIGITS, strict=True))
    for case in cases:
        digits = case.ids[case.source], case.ids[case.other], case.wrong
        assert case.ids[case.source] == case.right and set(digits) <= set(ids)
        assert case.right not in (case.wrong, case.ids[case.other])
        assert max(case.source, case.other) + 2 * WINDOW < case.query
    tokens = make_batch(cases)[0].shape[1]
    window, control = (span(cases, tokens, first, WINDOW) for first in (1, 1 + WINDOW))
    assert not (window & control).any() and (window.sum(1) == WINDOW).all()
    assert all(window[i, case.source + 1] and not window[i, case.source] for i, case in enumerate(cases))
    with pytest.raises(ValueError, match=r"tasks \['chess'\]: must be among traces"):
        find_cases(load_tokenizer(), 1, 33, tasks=["chess"])


def test_interchange_reads_every_run_at_the_query(model, cases):
    cases = cases[:4]
    (clean, exchanged), source = make_batch(cases), torch.tensor([case.source for case in cases])
    held = span(cases, clean.shape[1], 0, 1), gates_of(run(model, clean)[1])
    for case, row, found in zip(cases, range(4), interchange(model, cases, WINDOW), strict=True):
        for name, given in (("clean", [clean]), ("exchanged", [exchanged, None, *held]), ("forced", [clean, source])):
            p = run(model, *given)[0][row, case.query].softmax(-1)
            expected = (p.argmax() == case.right, p.argmax() == case.wrong, p[case.right], p[case.wrong])
            expected = [*map(float, expected), float((p[case.right] / p[case.wrong]).log())]
            assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found["forced, window"] == pytest.approx(found["forced, exchanged"], rel=1e-3, abs=1e-4)
        assert found["forced, other"] != found["forced"] != found["clean"]


@BOTH
def test_interchange_holds_the_gates_of_an_exchanged_source(tiny_model, eviction):
    """So that with the source forced out, the window's tokens alone tell of its digit."""
    clean, other, _ = random_pair()
    pairs = zip(clean.tolist(), other[:, SOURCE].tolist(), strict=True)
    cases = [Case(tuple(ids), SOURCE, ids[SOURCE], wrong, "result", SOURCE + 2) for ids, wrong in pairs]
    for found in interchange(tiny_model(window=5, eviction=eviction), cases, 5):
        assert found["forced, window"] == pytest.approx(found["forced, exchanged"], rel=1e-4, abs=1e-6)
        assert found["forced, window"] != found["forced, control"]


# Tables and the verdict.


def planted(right: float, moved: float, clean: float = 1.0, seeds: int = 3, cases: int = 40) -> tuple:
    """Readings of a model that has ``right`` of its forced look-ups and moves ``moved`` of the other digit's p."""
    values = np.zeros((seeds, cases, len(RUNS), len(MEASURES)))
    for name, share in (("clean", clean), ("forced", right), ("forced, other", clean)):
        values[:, : round(share * cases), RUNS.index(name), 0] = 1
    values[:, :, RUNS.index("forced, window"), MEASURES.index("p_other")] = moved
    return values, np.where(np.arange(cases) == 1, 0, 2)[None].repeat(seeds, 0)


@pytest.fixture(scope="module")
def twice():
    """Forty look-ups of one task, forty of another, as ``planted`` has them."""
    made = Case((1,) * 50, 3, 5, 6, "result")
    return [replace(made, task=task, kind=KINDS[i % 2]) for task in ("traces", "search") for i in range(40)]


def study(twice, **planted_by_model):
    found = {name.replace("_", "-"): planted(*how) for name, how in planted_by_model.items()}
    found["dense"] = tuple(part[:1] for part in found["dense"])
    return findings(twice, {name: tuple(np.concatenate([x, x], 1) for x in parts) for name, parts in found.items()})


def test_verdict_follows_planted_effects(twice):
    dense = (0.1, 0.0)
    result = study(twice, dms=(0.8, 0.5), dms_immediate=(0.3, 0.1), dense=dense)
    assert result["verdict"] == "agrees"
    row = next(r for r in result["outcomes"] if (r["outcome"], r["a"], r["b"]) == ("right", "dms", "dms-immediate"))
    assert row["value"] == pytest.approx(50) and row["value_low"] < 50 < row["value_high"] and row["lookups"] == 80
    one = next(r for r in result["unforced"] if r["model"] == "dms")
    assert (one["evicted"], one["of"], one["right"], one["kept"]) == (6, 240, 100, 1.95) and one["right_low"] < 100
    still = study(twice, dms=(0.8, 0.0), dms_immediate=(0.3, 0.0), dense=dense)["verdict"]
    assert still.startswith("disagrees") and "content in the window's tokens: no task" in still
    worse = study(twice, dms=(0.3, 0.5), dms_immediate=(0.8, 0.1), dense=dense)["verdict"]
    assert worse.startswith("disagrees") and worse.endswith("right less often: traces, search)")
    weak = study(twice, dms=(0.8, 0.5), dms_immediate=(0.3, 0.1, 0.4), dense=dense)["verdict"]  # was worse unforced
    assert weak.startswith("mixed") and "a smaller loss: no task" in weak
    assert study(twice, dms=(0.8, 0.5), dense=dense)["verdict"].startswith("not judged")
    only = [r for r in result["outcomes"] if r["task"] != "search" or r["outcome"] != "moved"]
    only += [r | {"value_low": -1.0} for r in result["outcomes"] if r not in only]
    assert conclusion(only).startswith("mixed") and "content in the window's tokens: traces;" in conclusion(only)


def test_ledger_quotes_the_rule_and_passes_over_what_was_stored_before(twice):
    result = study(twice, dms=(0.8, 0.5), dms_immediate=(0.3, 0.1), dense=(0.1, 0.0))

    def judged(stored: dict):
        return absorbed(SimpleNamespace(rows=lambda name, key: stored.get(key, [])), None)

    measured, verdict = judged(result)
    assert verdict == "agrees" and all(words in measured for words in RULE) and "traces +50.0 [" in measured
    assert judged({"rows": [], "window_minus_control": {}}) is None


def test_a_missing_checkpoint_is_named_and_the_rest_is_measured(tmp_path):
    places = default_checkpoints(tmp_path)
    assert places["dms"] == [REASONER / "dms-cr4"] and str(places["dms-immediate"][0]).endswith("/cr4")
    result = delay(places, documents=3, tasks=["search"])
    assert result["missing"] == [str(places["dms-immediate"][0])] and result["verdict"].startswith("not judged")
    assert {(row["model"], row["run"]) for row in result["rows"]} == {(m, r) for m in ("dms", "dense") for r in RUNS}
    clean = [r for r in result["rows"] if (r["model"], r["run"]) == ("dense", "clean")]
    assert all(row["right"] == 100 for row in clean)
    assert result["settings"]["used"] <= result["settings"]["lookups"]
    with pytest.raises(ValueError, match="is not a DMS checkpoint"):
        delay({"dms": [tmp_path]}, documents=1)
