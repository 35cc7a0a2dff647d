"""Verdicts follow from signs and intervals; claims without data are not tested."""

import re
from importlib.resources import files
from types import SimpleNamespace

import pytest
import yaml

from companion.claims.cards import claim_card, rule_card, show_claims, tally, tone
from companion.claims.evidence import Evidence, gather, job
from companion.claims.ledger import COLUMNS, MEASURES, NOT_TESTED, make_ledger, markdown
from companion.claims.protocols import protocols
from companion.paths import CHECKOUT, RESULTS
from dms_core.storage import read_json, write_json

ALL = {"problems": 300}


def margin(axis, low, high, task="traces", b="vanilla", **more):
    return {"task": task, "a": "dms", "b": b, "axis": axis, "scale": "log2", **interval("value", low, high), **more}


def interval(name, low, high):
    return {name: (low + high) / 2, "low": low, "high": high, **ALL}


def paired(a, b, cr, low, high, task="traces"):
    return {"task": task, "a": a, "b": b, "cr": cr, **interval("difference", low, high)}


def evidence(
    reads=(1.0, 3.0), peak=(-1.0, 1.0), cr4=(-2.0, 1.0), delay=(-4.0, -1.0), delay_peak=(-9.0, -7.0), stored=None
):
    summary = {
        "margins": [margin("reads", *reads), margin("peak", *peak)],
        "margins_per_cr": [
            margin("reads", -1.0, 1.0, b="dms-immediate", cr=4.0),
            margin("peak", *delay_peak, b="dms-immediate", cr=4.0),
        ],
        "paired": [paired("dms", "vanilla", 4.0, *cr4), paired("dms", "dms-immediate", 4.0, *delay)],
        "held_out": {"dms-cr4": {"cr_decisions": 4.2}, "dms-cr8": {"cr_decisions": 8.4}},
        "retrofit": {"ratios": {"4": {"kl": 0.001}, "7": {"kl": 0.0025}, "8": {"kl": 0.001}}},
    }
    return Evidence(summary, 700, 8.0, None, stored or {})


def verdicts(found: Evidence) -> dict[str, str]:
    return {claim.claim: claim.verdict for claim in make_ledger(found)}


def test_interval_beside_zero_agrees_or_disagrees_and_around_zero_is_unresolved():
    found = verdicts(evidence())
    assert found["At equal KV reads DMS is more accurate than the original"] == "agrees"
    assert found["At equal peak memory too"] == "unresolved"
    assert found["Delayed eviction is far better than immediate"] == "disagrees"


def test_beside_a_margin_stands_the_gain_at_the_dense_models_budget_on_the_same_axis():
    found, gain = evidence(), {"task": "traces", "a": "dms", "b": "vanilla", "gain": 1.5, "low": -0.5, "high": 3.5}
    found.summary["headline"] = [gain | {"axis": "reads"}, gain | {"axis": "peak", "gain": 2.5}]
    reads, peak = (claim.measured for claim in make_ledger(found)[:2])
    assert (
        "+1.5 [\N{MINUS SIGN}0.5, +3.5]" in reads and "+2.5" not in reads and "+2.5 [\N{MINUS SIGN}0.5, +3.5]" in peak
    )


@pytest.mark.parametrize(
    "ratio, peak, word",
    [
        ((6.0, 9.0), (-1.0, 1.0), "agrees"),
        ((1.0, 3.0), (-1.0, 1.0), "better, not far"),
        ((6.0, 9.0), (-9.0, -7.0), "the axes disagree: better at equal ratio (traces); worse at equal peak (traces)"),
        ((-1.0, 1.0), (-1.0, 1.0), "no difference that this design can resolve"),
    ],
)
def test_delay_is_judged_on_every_axis(ratio, peak, word):
    found = verdicts(evidence(delay=ratio, delay_peak=peak))
    assert found["Delayed eviction is far better than immediate"] == word


def test_tasks_that_differ_are_named():
    found = evidence()
    found.summary["margins"] += [margin("reads", -3.0, -1.0, "choice"), margin("reads", -1.0, 1.0, "search")]
    words = verdicts(found)["At equal KV reads DMS is more accurate than the original"]
    assert words == "mixed: agrees on traces, disagrees on choice, unresolved on search"


def test_stored_runs_of_three_retrofits_judge_where_they_are():
    full = evidence(reads=(-3.0, -1.0)).summary
    assert verdicts(evidence(stored={"full": full}))["At equal KV reads DMS is more accurate than the original"] == (
        "disagrees"
    )


@pytest.mark.parametrize(
    "steps, reached, word", [(700, 8.4, "agrees"), (1115, 8.4, "disagrees (159 steps"), (700, 7, "dis")]
)
def test_rests_count_as_steps(steps, reached, word):
    held = {"dms-cr8": {"cr_decisions": reached}}
    found = evidence()
    found = Evidence(found.summary | {"held_out": held}, steps, 8.0, None, {})
    claim = "About a hundred steps per unit of CR suffice, and one run gives every ratio"
    assert verdicts(found)[claim].startswith(word)


def test_a_ratio_that_the_run_only_passes_through_counts_too():
    found = evidence()
    found.summary["retrofit"]["ratios"]["7"]["kl"] = 0.012
    words = verdicts(found)["About a hundred steps per unit of CR suffice, and one run gives every ratio"]
    assert words == "disagrees (the KL at CR 7 is 12.0 times the larger of those at 4 and 8)"


def test_a_mean_below_the_projects_bar_is_said_beside_the_verdict():
    words = verdicts(evidence(cr4=(-4.9, -2.1)))["One chain at the longest length loses little"]
    assert words.startswith("agrees") and "below the project's bar: traces at CR 4" in words


def test_training_free_methods_are_judged_one_by_one_over_axes_and_tasks():
    grid = {"margins": []}
    for task in ("traces", "search"):
        for name, reads, peak in (("tova", 1, 1), ("h2o-protected", 1, -3), ("quest", -3, -3)):
            grid["margins"].append(margin("reads", reads, reads + 1, task, b=name))
            grid["margins"].append(margin("peak", peak, peak + 1, task, b=name))
    words = verdicts(evidence(stored={"grid": grid}))["Learnt eviction beats training-free eviction"]
    assert words == "agrees: TOVA; the axes or tasks disagree: H2O, prompt kept; disagrees: Quest"


def pairs_of(**bounds):
    """Stored ablations: "a__b" with the interval of a minus b, in one study."""
    return [paired(*name.replace("_", "-").split("--"), 4.0, *ends) for name, ends in bounds.items()]


@pytest.mark.parametrize(
    "bounds, word", [((-1.5, 3.0), "agrees"), ((-9.0, -3.0), "disagrees"), ((-9.0, 3.0), "unresolved")]
)
def test_rests_are_judged_with_a_rate_that_falls_without_them(bounds, word):
    stored = {"ablations": {"steps": {"pairs": pairs_of(no_rest__dms=(-30.0, -20.0)), "rows": []}}}
    claim = "Steps at a fixed ratio after the ramp bring nothing"
    assert verdicts(evidence(stored=stored))[claim] == NOT_TESTED  # an ablation of before
    stored["ablations"]["steps"]["pairs"] += pairs_of(no_rest_decay__dms=bounds)
    assert verdicts(evidence(stored=stored))[claim].startswith(f"{word} (nothing")


@pytest.mark.parametrize(
    "bounds, reached, words",
    [
        ((-4.0, 2.0), 4.1, "agrees (as good: at most 5 points worse); needed: the start at zero"),
        ((-4.0, 2.0), 3.2, "disagrees"),
        ((-40.0, -20.0), 4.1, "disagrees"),
        ((-9.0, 2.0), 4.1, "unresolved"),
    ],
)
def test_neuron_gate_needs_accuracy_and_compression(bounds, reached, words):
    pairs = pairs_of(
        neuron_all__dms=bounds, neuron_no_zero__neuron_all=(-9.0, -2.0), neuron_no_rate__neuron_all=(-9.0, 1.0)
    )
    rows = [{"variant": "neuron-all", "cr": 4.0, "cr_decisions": reached}]
    found = verdicts(evidence(stored={"ablations": {"neuron": {"pairs": pairs, "rows": rows}}}))
    assert found["One neuron of a query is gate enough, after a warm-up that fades it out"].startswith(words)


@pytest.mark.parametrize(
    "frozen, whole, words",
    [
        ((-9.0, -3.0), (-2.0, -1.0), "agrees; against future attention: agrees"),
        ((1.0, 3.0), (1.0, 2.0), "disagrees; against"),
        ((-9.0, -3.0), (-2.0, 1.0), "mixed: agrees with frozen base, unresolved with all weights; against"),
    ],
)
def test_teachers_are_judged_with_a_frozen_base_and_with_all_weights(frozen, whole, words):
    pairs = pairs_of(gates_lm__gates_only=frozen, lm_loss__dms=whole, gates_future__gates_only=(-60.0, -40.0))
    claim = "The original model's distribution is the teacher to learn eviction from"
    stored = {"ablations": {"teachers": {"pairs": pairs, "rows": []}}}
    assert verdicts(evidence(stored=stored))[claim].startswith(words)
    assert verdicts(evidence(stored={"ablations": {"loss": {"pairs": pairs, "rows": []}}}))[claim] == NOT_TESTED


@pytest.mark.parametrize(
    "adapter, neuron, tokens, word",
    [
        ((2.0, 9.0), (1.0, 5.0), (-1.0, 5.0), "agrees"),
        ((2.0, 9.0), (-1.0, 5.0), (-1.0, 5.0), "agrees with the adapter gate, not with a neuron gate"),
        ((2.0, 9.0), (1.0, 5.0), (-5.0, -1.0), "unresolved"),
        ((-1.0, 9.0), (-5.0, -1.0), (-1.0, 5.0), "disagrees"),
    ],
)
def test_dmc_is_judged_at_equal_ratio_and_at_equal_tokens(adapter, neuron, tokens, word):
    arms = (("dms", adapter), ("neuron-all", neuron))
    pairs = [paired(arm, "dmc", 3.5, *ends) | {"at": "equal cr_decisions"} for arm, ends in arms]
    pairs += [paired(arm, "dmc", 4.0, *tokens) | {"at": "equal tokens"} for arm, _ in arms]
    for stored, verdict in (({"pairs": pairs}, word), ({"runs": []}, NOT_TESTED)):
        found = verdicts(evidence(stored={"dmc": stored}))
        assert found["DMS needs far fewer training tokens than DMC"] == verdict


@pytest.mark.parametrize(
    "dense, tova, word",
    [
        ((-0.03, 0.01), (0.2, 0.4), "agrees (within 5 points of the original; ahead of 2 of 2 controls)"),
        ((-0.03, 0.01), (-0.1, 0.1), "mixed (within 5 points of the original; ahead of 1 of 2 controls)"),
        ((-0.09, 0.01), (0.2, 0.4), "mixed (not within"),
        ((-0.09, -0.06), (0.2, 0.4), "disagrees (not within"),
        ((-0.03, 0.01), (-0.4, -0.2), "disagrees (within"),
    ],
)
def test_memory_is_judged_against_the_original_and_against_every_control(dense, tova, word):
    def of(b, cr, ends, a="dms", measure="needles"):
        return {"a": a, "b": b, "cr": cr, "measure": measure, **interval("value", *ends)}

    pairs = [of("vanilla", 1.0, dense), of("tova", 4.0, tova), of("h2o", 4.0, (0.1, 0.2)), of("dms", 8.0, (-0.5, -0.4))]
    pairs += [of("dms-gates", 4.0, (-0.5, -0.4)), of("tova", 4.0, (-0.5, -0.4), measure="hops")]
    claim = "It still finds a needle in a haystack as long as its training context"
    assert verdicts(evidence(stored={"recall": {"pairs": pairs}}))[claim].startswith(word)
    assert verdicts(evidence(stored={"recall": {"pairs": pairs[:1]}}))[claim] == NOT_TESTED  # no control was run
    short = {"pairs": pairs[:1], "common": {"documents": 32, "pairs": pairs}}
    assert "controls on the 32 texts" in verdicts(evidence(stored={"recall": short}))[claim]
    assert verdicts(evidence())[claim] == NOT_TESTED


def test_every_verdict_quotes_a_protocol():
    for claim in make_ledger(evidence()):
        assert (claim.verdict == NOT_TESTED) == (claim.rule == "—")
        assert claim.verdict == NOT_TESTED or ".yaml, written" in claim.rule


@pytest.mark.parametrize(
    "bounds, word", [((-2.0, 1.0), "agrees"), ((-9.0, -6.0), "loses more"), ((-6.0, -1.0), "unres")]
)
def test_little_loss_needs_the_whole_interval_above_minus_five(bounds, word):
    assert verdicts(evidence(cr4=bounds))["One chain at the longest length loses little"].startswith(word)


def test_missing_results_are_not_tested():
    untested = {claim for claim, verdict in verdicts(evidence()).items() if verdict == NOT_TESTED}
    assert "DMS needs far fewer training tokens than DMC" in untested
    assert "Learnt eviction beats training-free eviction" in untested
    assert "Steps at a fixed ratio after the ramp bring nothing" in untested
    assert "What is evicted leaves memory" in untested


def test_margin_without_common_budgets_is_na():
    found = evidence()
    found.summary["margins"][0] |= {"value": None, "low": None, "high": None}
    claim = make_ledger(found)[0]
    assert claim.measured.startswith("traces NA") and claim.verdict == "no budgets in common"
    found.summary["margins"].append(margin("reads", 1.0, 3.0, "choice"))
    assert make_ledger(found)[0].verdict == "mixed: agrees on choice, no budgets in common on traces"


def test_a_language_models_curves_are_judged_by_their_own_study():
    rows = [margin("reads", 1.0, 3.0, f"reasoning_gym:{name}:number") for name in ("lcm", "gcd")]
    claims = make_ledger(evidence(stored={"smollm2-curve": {"margins": rows}}))
    ours = {claim.claim: claim for claim in claims if claim.protocol == "smollm2-curve"}
    assert ours["At equal KV reads, a language model that others trained"].verdict == "agrees"
    assert ours["At equal KV reads, a language model that others trained"].measured.startswith("lcm +2.0")
    assert "At equal peak memory, the same model" not in ours


def test_stored_results_of_the_repository_give_a_whole_table():
    stored = {file.stem: read_json(file) for file in RESULTS.glob("*.json")}
    claims = make_ledger(evidence(stored=stored))
    lines = markdown(claims).splitlines()
    assert len(lines) == len(claims) + 2
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    tested = verdicts(evidence(stored=stored))
    assert tested["And in a haystack longer than that"] != NOT_TESTED


def test_every_entry_names_a_measure_and_every_measure_has_an_entry():
    entries = yaml.safe_load((files("companion.claims") / "claims.yaml").read_text(encoding="utf-8"))
    assert {entry["measure"][0] for entry in entries if "measure" in entry} == {f.__name__ for f in MEASURES}


def test_published_numbers_are_read_from_the_tables():
    told = {claim.claim: claim.published for claim in make_ledger(evidence())}
    assert told["At equal throughput too"] == (
        "mean of three sizes: AIME 24 +5.3, MATH-500 +3.5, GPQA Diamond +6.7, LiveCodeBench +9.5 (Table 7)"
    )
    general = told["A retrofitted model keeps its abilities on general benchmarks"]
    assert general == "Qwen3 8B at CR 8: −2.0 to +1.8 points to the original (Table 2)"
    dmc = told["DMS needs far fewer training tokens than DMC"]
    assert dmc == "GSM8K, Llama 3.2 1B, CR 4, equal training: DMS 42.3, DMC 3.6 (Table 1)"


def test_gather_prefers_the_grid_of_the_run_to_the_stored_one(tmp_path, monkeypatch):
    results, root = tmp_path / "results", tmp_path / "run"
    write_json(results / "dmc.json", {"runs": []})
    write_json(results / "tiny" / "grid.json", {"of": "store"})
    write_json(results / "full" / "curves.json", {"of": "three"})
    write_json(root / "grid.json", {"of": "run"})
    monkeypatch.setattr(job, "summary", lambda run: {"retrofit": {"cr_target": 3.0, "steps": 7}})
    found = gather(SimpleNamespace(root=root), results)
    assert found.stored == {"dmc": {"runs": []}, "grid": {"of": "run"}, "full": {"of": "three"}}
    assert (found.steps, found.target, found.main) == (7, 3.0, {"of": "three"})


# Cards.


@pytest.fixture(scope="module")
def stored_claims():
    stored = {file.stem: read_json(file) for file in RESULTS.glob("*.json")}
    stored |= {"full": read_json(RESULTS / "full" / "curves.json"), "grid": read_json(RESULTS / "tiny" / "grid.json")}
    return make_ledger(evidence(stored=stored))


def test_card_has_the_verdict_first_and_every_text_of_the_claim(stored_claims):
    for claim in stored_claims:
        card = claim_card(claim)
        kind, strip = re.match(r":::::\{div\} ledger-card (\S+)\n\n::::\{div\} ledger-strip\n(.*)\n", card).groups()
        assert kind == f"ledger-{tone(claim.verdict)}" and strip.lower() == claim.verdict.lower()
        assert claim.claim in card and claim.published in card and (claim.where == "—" or claim.where in card)
        assert all(number in card for number in re.findall(r"\[[^]]*\]", claim.measured))
        assert (":::{dropdown} Rule: " in card) == (claim.protocol != "")
        assert card.count("\n:::::") == 1 and card.count(":::{dropdown}") == len(re.findall(r"^:::$", card, re.M))


def test_long_lists_of_numbers_are_folded(stored_claims):
    lines = {claim.protocol: claim.measured.count("; ") + 1 for claim in stored_claims}
    assert lines["training-free"] > 6 >= lines["delay"]
    cards = {claim.protocol: claim_card(claim) for claim in stored_claims}
    assert "lines of numbers" in cards["training-free"] and "lines of numbers" not in cards["delay"]


def test_cards_of_one_protocol_are_its_own(stored_claims):
    shown = show_claims(stored_claims, "delay").data
    assert shown.count("ledger-card") == 1 and "Delayed eviction is far better than immediate" in shown
    assert (
        show_claims(stored_claims).data.count("ledger-card") == len(stored_claims) == sum(tally(stored_claims).values())
    )


@pytest.mark.parametrize(
    "verdict, kind",
    [
        ("agrees", "yes"),
        ("agrees (as good: at most 5 points worse); needed: the start at zero", "yes"),
        ("agrees: TOVA; the axes or tasks disagree: Quest", "part"),
        ("agrees with the adapter gate, not with a neuron gate", "part"),
        ("mixed: agrees on traces", "part"),
        ("better, not far", "part"),
        ("disagrees (159 steps a unit)", "no"),
        ("loses here; too few to tell how much", "no"),
        ("unresolved; against future attention: agrees", "open"),
        ("no difference that this design can resolve", "open"),
        ("not tested", "untested"),
    ],
)
def test_a_strip_has_the_colour_of_its_verdict(verdict, kind):
    assert tone(verdict) == kind
    css = (CHECKOUT / "book" / "_static" / "ledger.css").read_text()
    assert kind == "open" or f".ledger-{kind} .ledger-strip" in css


@pytest.mark.parametrize("name", protocols())
def test_card_of_a_rule_has_question_rule_and_what_counts_against(name):
    rule = protocols()[name]
    card = rule_card(rule)
    assert all(text in card for text in (rule.question, rule.rule, rule.against, rule.outcome, rule.analysis))
    assert f"written {rule.written} the records" in card


def test_each_claim_names_a_place_that_is_in_the_book():
    entries = yaml.safe_load((files("companion.claims") / "claims.yaml").read_text(encoding="utf-8"))
    texts = {path.stem: path.read_text() for path in (CHECKOUT / "notebooks").glob("*.ipynb")}
    labels = {label: stem for stem, text in texts.items() for label in re.findall(r'"\(([\w-]+)\)=', text)}
    for entry in entries:
        chapter, label = re.search(r"chapter (\d)(?: <([\w-]+)>|\])", entry["where"] + "chapter 0]").groups()
        assert chapter == "0" or label is None or labels[label].startswith(f"0{chapter}"), entry["where"]
