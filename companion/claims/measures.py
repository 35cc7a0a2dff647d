"""What this book measured of each claim, and the verdict that the claim's protocol gives it.

Each function takes the evidence and the protocol, and returns what was measured and the verdict, or None without data.
Main results are judged on the stored runs of three retrofits where they are there, else on the run at hand.
"""

from collections.abc import Iterable

from companion.claims import wording
from companion.claims.budgets import unshared_margins
from companion.claims.evidence import Evidence
from companion.claims.protocols import Protocol
from companion.claims.wording import points, signed
from companion.cost.roofline import ARCHITECTURES, kv_share
from companion.experiments.delay import RULE, conclusion, select
from companion.experiments.summaries import is_exact
from companion.figures.style import style_of
from companion.tasks.base import short_name

Found = tuple[str, str] | None  # what was measured, and the verdict; None without data
AXES = {"reads": "equal reads", "peak": "equal peak", "seconds": "equal time"}
DIFFERENCE = ("difference", "low", "high")


def margin(evidence: Evidence, rule: Protocol, axis: str, study: str = "") -> Found:
    """Of DMS over the dense model at each task; beside it, not judged, the gain at the dense model's budget.

    study: a stored one, with one retrofit, in place of the main results.
    """
    result = evidence.stored.get(study, {}) if study else evidence.runtime if axis == "seconds" else evidence.main
    rows = [
        row for row in result.get("margins", ()) if (row["a"], row["b"], row["scale"]) == ("dms", "vanilla", "log2")
    ]
    rows = [row for row in rows if row["axis"] == axis]
    if not rows:
        return None
    alone = ", one retrofit" if study else evidence.of_main
    where = f", on {result['machine']}" if axis == "seconds" else alone
    gains = [row for row in result.get("headline", ()) if (row["a"], row["b"], row["axis"]) == ("dms", "vanilla", axis)]
    told = f"; at the budget of one long dense chain: {_by_task(gains, 'gain')}" if gains else ""
    if axis == "peak" and not is_exact(result.get("points", ())):
        apart = ", ".join(f"{task} {signed(x)}" for task, x in unshared_margins(result["points"]).items())
        told += f"{_old_peaks(result)}, with a copy of it for each of its chains: {apart}"
    return f"{_by_task(rows, 'value')} (log2 axis{where}){told}", _all_tasks(rows)


def fixed_budget(evidence: Evidence, rule: Protocol) -> Found:
    """Little is less than the equivalence margin, with the whole interval, in every task."""
    pairs, most = evidence.pairs("dms", "vanilla"), -rule.thresholds["equivalence"]
    crs = dict.fromkeys(pair["cr"] for pair in pairs)
    measured = [f"CR {cr:g}: {_by_task([p for p in pairs if p['cr'] == cr], 'difference')}" for cr in crs]
    little, more = all(p["low"] > most for p in pairs), any(p["high"] < most for p in pairs)
    verdict = "agrees" if little else "loses more here" if more else "unresolved"
    bars = {4: rule.thresholds["bar_4"], 8: rule.thresholds["bar_8"]}
    missed = [f"{p['task']} at CR {p['cr']:g}" for p in pairs if p["difference"] < -bars.get(p["cr"], 100)]
    below = f"; a mean below the project's bar: {', '.join(missed)}" if missed else ""
    return f"{'; '.join(measured)}{evidence.of_main}", f"{verdict} (little: less than {-most:g} points{below})"


def schedule(evidence: Evidence, rule: Protocol) -> Found:
    """Steps a unit of CR, rests included, and compression at each checkpoint."""
    target, steps = evidence.target, evidence.steps
    unit = steps / (target - 1)
    held = {name: facts for name, facts in evidence.main["held_out"].items() if name.startswith("dms-cr")}
    reached = {name: facts["cr_decisions"] for name, facts in held.items()}
    shares = [cr / float(name.removeprefix("dms-cr").partition("-")[0]) for name, cr in reached.items()]
    words = ", ".join(f"{name.removeprefix('dms-')} {cr:.2f}" for name, cr in reached.items())
    measured = f"{steps} steps to CR {target:g}, {unit:.0f} a unit with rests; by decisions, held out: {words}"
    kl = {float(cr): ratio["kl"] for cr, ratio in evidence.main["retrofit"]["ratios"].items()}
    measured += "; KL at each ratio: " + ", ".join(f"CR {cr:g} {value:.4f}" for cr, value in kl.items())
    most = rule.thresholds["kl_factor"] * max(kl.get(cr, 0) for cr in (4, 8))
    why = [f"{unit:.0f} steps a unit"] * (unit > rule.thresholds["steps_a_unit"])
    why += [f"{1 - min(shares):.0%} short of its target"] * (min(shares) < rule.thresholds["compression"])
    why += [
        f"the KL at CR {cr:g} is {value / most * rule.thresholds['kl_factor']:.1f} times the larger of those at 4 and 8"
        for cr, value in kl.items()
        if value > most
    ]
    return measured, f"disagrees ({'; '.join(why)})" if why else "agrees"


def against_dmc(evidence: Evidence, rule: Protocol) -> Found:
    """Both gates of DMS minus DMC, at equal ratio and at equal tokens; a comparison of before had no pairs."""
    pairs = {(p["a"], p["at"]): p for p in evidence.rows("dmc", "pairs") if p["b"] == "dmc"}
    if not pairs:
        return None
    names = {"dms": "adapter gate", "neuron-all": "neuron gate"}
    signs = {arm: [_sign(pairs[arm, at]) for at in ("equal cr_decisions", "equal tokens")] for arm in names}
    better = {arm: ratio == 1 and tokens >= 0 for arm, (ratio, tokens) in signs.items()}
    told = [
        f"DMS, {name}, minus DMC {words}: {wording.interval(*(pairs[arm, at][key] for key in DIFFERENCE))}"
        for arm, name in names.items()
        for at, words in (
            ("equal cr_decisions", f"at CR {pairs[arm, 'equal cr_decisions']['cr']:.2f} by decisions"),
            ("equal tokens", "after equal tokens"),
        )
    ]
    if all(better.values()):
        verdict = "agrees"
    elif better["dms"]:
        verdict = "agrees with the adapter gate, not with a neuron gate"
    else:
        verdict = "disagrees" if signs["neuron-all"][0] == -1 else "unresolved"
    return "; ".join(told), verdict


def memory(evidence: Evidence, rule: Protocol) -> Found:
    """Bytes after one long generation."""
    if not (found := evidence.cache):
        return None
    form = "{ratio:.2f} times fewer bytes after {tokens} tokens, {ratio_excluding_window:.2f} without the window"
    enough = found["ratio_excluding_window"] >= rule.thresholds["share"] * found["cr"]
    return form.format(**found), "agrees" if enough else "disagrees"


def delay(evidence: Evidence, rule: Protocol) -> Found:
    """Delayed minus immediate at equal ratio, equal reads, equal peak, in every task."""
    pairs = evidence.pairs("dms", "dms-immediate")
    if not pairs:
        return None
    cr = pairs[0]["cr"]
    pairs = [pair for pair in pairs if pair["cr"] == cr]
    rows = [r for r in evidence.main["margins_per_cr"] if (r["a"], r["b"], r["cr"]) == ("dms", "dms-immediate", cr)]
    by_axis = {axis: [r for r in rows if (r["axis"], r["scale"]) == (axis, "log2")] for axis in ("reads", "peak")}
    measured = [f"CR {cr:g}, equal ratio: {_by_task(pairs, 'difference')}"]
    measured += [f"{AXES[axis]}: {_by_task(found, 'value')}" for axis, found in by_axis.items()]
    margins = [row for found in by_axis.values() for row in found if row["value"] is not None]
    above, below = (any(_sign(row) == sign for row in [*pairs, *margins]) for sign in (1, -1))
    better = all(_sign(pair) == 1 for pair in pairs) and not below
    if better and all(pair["difference"] >= rule.thresholds["far"] for pair in pairs):
        verdict = "agrees"
    elif better:
        verdict = "better, not far"
    elif above and below:
        verdict = f"the axes disagree: better at {_told(pairs, by_axis, 1)}; worse at {_told(pairs, by_axis, -1)}"
    else:
        verdict = "disagrees" if below else "no difference that this design can resolve"
    return f"{'; '.join(measured)}{evidence.of_main}{_old_peaks(evidence.main)}", verdict


def absorbed(evidence: Evidence, rule: Protocol) -> Found:
    """The stored intervention; one of before, without forced evictions, does not count."""
    outcomes = evidence.rows("delay", "outcomes")
    if not outcomes:
        return None
    measured = []
    for words, (*which, _) in RULE.items():
        rows = [{key.removeprefix("value_"): x for key, x in row.items()} for row in select(outcomes, *which)]
        measured += [f"{words}: {_by_task(rows, 'value')}"] * bool(rows)
    return f"evicted everywhere, in points; {'; '.join(measured)}", conclusion(outcomes)


def training_free(evidence: Evidence, rule: Protocol) -> Found:
    """The stored grid, method by method."""
    margins = [m for m in evidence.rows("grid", "margins") if m["a"] == "dms" and m["scale"] == "log2"]
    margins = [m for m in margins if m["b"] != "vanilla" and m["value"] is not None]
    if not margins:
        return None
    measured, verdicts = [], {}
    for name in dict.fromkeys(m["b"] for m in margins):
        axes = {what: [m for m in margins if (m["b"], m["axis"]) == (name, axis)] for axis, what in AXES.items()}
        label = style_of(name)[0]
        measured += [f"{label}, {what}: {_by_task(rows, 'value')}" for what, rows in axes.items() if rows]
        signs = {_sign(row) for rows in axes.values() for row in rows}
        words = {frozenset({1}): "agrees", frozenset({-1}): "disagrees", frozenset({0}): "unresolved"}
        verdicts.setdefault(words.get(frozenset(signs), "the axes or tasks disagree"), []).append(style_of(name)[0])
    told = "; ".join(measured) + _old_peaks(evidence.stored["grid"])
    return told, "; ".join(f"{word}: {', '.join(names)}" for word, names in verdicts.items())


def rests(evidence: Evidence, rule: Protocol) -> Found:
    """An equivalence claim: without a rest, but with a rate that falls, at most some points worse."""
    if (judged := _compared(evidence, "no-rest-decay", "dms")) is None:
        return None
    most = -rule.thresholds["equivalence"]
    verdict = "agrees" if judged["low"] > most else "disagrees" if judged["high"] < 0 else "unresolved"
    measured = [f"as many steps without a rest, the rate falling as long, minus with one: {_difference(judged)}"]
    for variant, words in (
        ("no-rest", "without a rest at a constant rate"),
        ("rest-constant", "a constant rate in it"),
    ):
        if other := _compared(evidence, variant, "dms"):
            measured.append(f"{words}: {_difference(other)}")
    return "; ".join(measured), f"{verdict} (nothing: at most {-most:g} points)"


def neuron_gate(evidence: Evidence, rule: Protocol) -> Found:
    """An equivalence claim: with a warm-up, a start at zero and a rate of its own about as good as an adapter."""
    if (judged := _compared(evidence, "neuron-all", "dms")) is None:
        return None
    (row,) = (r for r in evidence.stored["ablations"]["neuron"]["rows"] if r["variant"] == "neuron-all")
    short, most = row["cr_decisions"] < rule.thresholds["compression"] * row["cr"], -rule.thresholds["equivalence"]
    fails = short or judged["high"] < 0
    verdict = "agrees" if judged["low"] > most and not short else "disagrees" if fails else "unresolved"
    parts = {"no-warmup": "the warm-up", "no-zero": "the start at zero", "no-rate": "a rate of its own"}
    without = {words: _compared(evidence, f"neuron-{name}", "neuron-all") for name, words in parts.items()}
    measured = f"minus the adapter gate: {_difference(judged)}, CR {row['cr_decisions']:.2f} by decisions"
    if dense := _compared(evidence, "neuron-all", "vanilla"):
        measured += f"; minus dense: {_difference(dense)}"
    measured += "".join(f"; without {words}: {_difference(pair)}" for words, pair in without.items() if pair)
    of_long = [pair for pair in evidence.rows("gates", "pairs") if (pair["a"], pair["b"]) == ("neuron", "vanilla")]
    if of_long:
        least = min(of_long, key=lambda pair: pair["difference"])
        where = f"the least of {len(of_long)} (three tasks, CR 4 and 8; one retrofit, not judged)"
        measured += f"; after the main recipe, minus dense, {where}: {_difference(least)}"
    needs = " and ".join(words for words, pair in without.items() if pair and _sign(pair) == -1)
    return measured, f"{verdict} (as good: at most {-most:g} points worse); needed: {needs or 'none by itself'}"


def teachers(evidence: Evidence, rule: Protocol) -> Found:
    """Next-token loss minus distillation, with a frozen base and with all weights; beside it future attention."""
    bases = {"frozen base": ("gates-lm", "gates-only"), "all weights": ("lm-loss", "dms")}
    pairs = {where: _compared(evidence, *which, "teachers") for where, which in bases.items()}
    if None in pairs.values():
        return None
    signs, words = (
        {where: _sign(pair) for where, pair in pairs.items()},
        {-1: "agrees", 0: "unresolved", 1: "disagrees"},
    )
    measured = "next token minus distillation, " + ", ".join(f"{w}: {_difference(p)}" for w, p in pairs.items())
    verdict = ", ".join(f"{words[sign]} with {where}" for where, sign in signs.items())
    verdict = words[signs["frozen base"]] if len(set(signs.values())) == 1 else f"mixed: {verdict}"
    if future := _compared(evidence, "gates-future", "gates-only"):
        measured += f"; future attention minus distillation, frozen base: {_difference(future)}"
        verdict += f"; against future attention: {words[_sign(future)]}"
    return measured, verdict


def latency(evidence: Evidence, rule: Protocol) -> Found:
    """By the roofline model."""
    model, batch, context = ARCHITECTURES["llama-3.1-8b"], 256, 8192
    dense, ours = (kv_share(model, batch, context, cr) for cr in (1, 8))
    measured = f"roofline model, Llama 3.1 8B, batch {batch}, {context} tokens: {100 * dense:.0f} % of the bytes read, "
    verdict = "agrees, by the same model" if dense > rule.thresholds["share"] else "disagrees"
    return f"{measured}{100 * ours:.0f} % at CR 8", verdict


def needle(evidence: Evidence, rule: Protocol) -> Found:
    """The stored measurement on SmolLM2."""
    rows = {(row["method"], row["cr"]): row for row in evidence.rows("smollm2", "rows")}
    if not rows:
        return None
    dense, ours = rows["vanilla", 1.0], rows["dms", max(cr for method, cr in rows if method == "dms")]
    found, kept = (f"{round(row['needles'] * row['prompts'])} of {row['prompts']}" for row in (dense, ours))
    verdict = "agrees" if ours["needles"] >= dense["needles"] else "loses here; too few to tell how much"
    return f"SmolLM2 135M, gates alone: {found} for the original, {kept} at CR {ours['cr']:g}", verdict


def recall(evidence: Evidence, rule: Protocol) -> Found:
    """SmolLM2 with gates and adapters, stored: needles, minus the dense model's and minus each control's."""
    study, loss = evidence.stored.get("recall", {}), rule.thresholds["loss"]
    short = study.get("common")  # controls may have run on the shorter texts alone
    pairs, others = _needles(study), _needles(short or study)
    dense = next((pair for pair in pairs if pair["b"] == "vanilla"), None)
    others = [p for p in others if p["b"] not in ("vanilla", "dms", "dms-gates")]
    if dense is None or not others:
        return None
    kept, ahead = dense["low"] > -loss, [style_of(p["b"])[0] for p in others if _sign(p) == 1]
    worse = dense["high"] < -loss or any(_sign(p) == -1 for p in others)
    verdict = "agrees" if kept and len(ahead) == len(others) else "disagrees" if worse else "mixed"
    of_dense = f"within {loss:g} points of the original" if kept else f"not within {loss:g} points of the original"
    measured = [
        f"minus {label}: {wording.interval(p['value'], p['low'], p['high'])}"
        for label, p in (("the original", dense), *((style_of(p["b"])[0], p) for p in others))
    ]
    where = f" on the {short['documents']} texts that these have run on" if short else ""
    return "; ".join(measured), f"{verdict} ({of_dense}; ahead of {len(ahead)} of {len(others)} controls{where})"


def _needles(study: dict) -> list[dict]:
    """DMS minus each method, in points."""
    pairs = (p for p in study.get("pairs", ()) if (p["a"], p["measure"]) == ("dms", "needles"))
    return [{**p, **{key: 100 * p[key] for key in ("value", "low", "high")}} for p in pairs]


def _compared(evidence: Evidence, a: str, b: str, study: str | None = None) -> dict | None:
    """A pair of the stored ablations, of all of them or of one."""
    found = evidence.stored.get("ablations", {})
    pairs = (pair for name, of in found.items() if study in (None, name) for pair in of["pairs"])
    return next((pair for pair in pairs if (pair["a"], pair["b"]) == (a, b)), None)


def _sign(row: dict) -> int:
    """1 or −1 where the interval excludes zero, else 0."""
    return 0 if row["low"] is None else int(row["low"] > 0) - int(row["high"] < 0)


def _old_peaks(result: dict) -> str:
    """What must be said beside peaks that count too much of the prompt as shared."""
    exact = is_exact(result.get("points", ()))
    return "" if exact else "; at the peak what is evicted of the prompt after the prefill is not counted"


def _all_tasks(rows: list[dict]) -> str:
    """All tasks agree, all disagree, or which do what."""
    signs = {short_name(row["task"]): None if row["low"] is None else _sign(row) for row in rows}
    if len(set(signs.values())) == 1:
        return {1: "agrees", -1: "disagrees", 0: "unresolved", None: "no budgets in common"}[next(iter(signs.values()))]
    words = {1: "agrees on", -1: "disagrees on", 0: "unresolved on", None: "no budgets in common on"}
    parts = {words[s]: [task for task, sign in signs.items() if sign == s] for s in words}
    return "mixed: " + ", ".join(f"{word} {' and '.join(tasks)}" for word, tasks in parts.items() if tasks)


def _told(pairs: list[dict], by_axis: dict[str, list[dict]], sign: int) -> str:
    """Where intervals exclude zero on one side: axis, and tasks."""
    found = {"equal ratio": pairs, **{AXES[axis]: rows for axis, rows in by_axis.items()}}
    tasks = {axis: [row["task"] for row in rows if _sign(row) == sign] for axis, rows in found.items()}
    return ", ".join(f"{axis} ({', '.join(names)})" for axis, names in tasks.items() if names)


def _by_task(rows: Iterable[dict], key: str) -> str:
    """ "traces +1.2 [0.3, 2.0], choice …", in points with 95 % intervals."""
    return ", ".join(f"{short_name(row['task'])} {wording.interval(row[key], row['low'], row['high'])}" for row in rows)


def _difference(row: dict) -> str:
    return points(row["difference"], row["low"], row["high"])


MEASURES = (margin, fixed_budget, schedule, against_dmc, memory, delay, absorbed, training_free, rests, neuron_gate)
MEASURES += (teachers, latency, recall, needle)
