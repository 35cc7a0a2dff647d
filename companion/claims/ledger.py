"""The ledger: each claim of the paper, where the book tests it, what came out, what was published, and a verdict.

"Agrees" means that the measured sign is the published one and the 95 % interval excludes zero; "disagrees" that the
interval excludes zero on the other side.  The embedded model's numbers come from a run of the main job, the others
from what is stored in ``data/results``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from companion.claims import published, wording
from companion.cost.latency import ARCHITECTURES, kv_share
from companion.experiments.main import Pipeline
from companion.figures.style import style_of

GPU = "the published models, on a GPU"
NOT_TESTED = "not tested"
HEAD = ("claim of the paper", "where", "this book", "published", "verdict", "the rest needs")


@dataclass(frozen=True)
class Claim:
    """A row of the ledger; every field is text, ``where`` a MyST reference into the book."""

    claim: str
    where: str
    measured: str
    published: str
    verdict: str
    needs: str


@dataclass(frozen=True)
class Evidence:
    """What the claims are judged by; what is missing is None or empty."""

    summary: dict  # of Pipeline.summary: margins, paired differences
    held: dict  # of Pipeline.held_out, at the last CR
    steps: int
    target: float
    cache: dict | None  # of measure.cache_report
    stored: dict[str, dict]  # files of data/results by their names without .json


def gather(pipeline: Pipeline, results: Path, cache: dict | None = None) -> Evidence:
    """Everything that a finished run and ``results`` hold.  The run's own grid goes before the stored one."""
    stored = {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}
    for name in ("grid", "seeds"):
        for file in (results / "tiny" / f"{name}.json", pipeline.root / f"{name}.json"):
            if file.exists():
                stored[name] = json.loads(file.read_text())
    top = pipeline.profile.recipe.final_cr
    steps = pipeline.retrofit("dms")["recipe"]["steps"]
    return Evidence(pipeline.summary(), pipeline.held_out("dms", top), steps, top, cache, stored)


def make_ledger(evidence: Evidence) -> list[Claim]:
    """Every claim, in the order of the paper."""
    return [
        *_margins(evidence), _fixed_budget(evidence), _schedule(evidence), _against_dmc(evidence), _memory(evidence),
        _delay(evidence), _absorbed(evidence), _training_free(evidence), _rests(evidence), _latency(),
        _general(), _needle(evidence),
    ]  # fmt: skip


def markdown(claims: Sequence[Claim]) -> str:
    """The ledger as a Markdown table."""
    rows = [HEAD, ("---",) * len(HEAD), *(tuple(asdict(claim).values()) for claim in claims)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _verdict(low: float, high: float, problems: int, sign: int = 1) -> str:
    """``sign``: of the published difference."""
    words = ("agrees", "disagrees") if sign > 0 else ("disagrees", "agrees")
    return wording.verdict(low, high, problems, *words)


def _interval(row: dict, value: str = "difference") -> str:
    return wording.points(row[value], row["low"], row["high"])


def _margins(evidence: Evidence) -> list[Claim]:
    gains = published.read("headline_gains.csv").groupby("version", sort=False)["value"].apply(list)
    listed = [f"{' / '.join(map(str, v))} ({name.replace('arxiv-v1', 'arXiv v1')})" for name, v in gains.items()]
    headline = f"32B on AIME 24 / GPQA Diamond / LiveCodeBench: {', '.join(listed)}"
    claims = []
    for axis, text, more in (
        ("reads", "At equal KV reads DMS is more accurate than the original", f"; {headline}"),
        ("peak", "At equal peak memory too", ""),
    ):
        row = wording.margin(evidence.summary["margins"], "dms", "vanilla", axis, "log2")
        known = row["value"] is not None
        measured = f"{_interval(row, 'value')}, log2 axis" if known else "NA: the budgets do not meet"
        verdict = _verdict(row["low"], row["high"], row["problems"]) if known else "unresolved"
        claims.append(Claim(text, "{ref}`06 <sec-margins>`", measured, _published_margins(axis) + more, verdict, GPU))
    throughput = _published_margins("throughput")
    return [*claims, Claim("At equal throughput too", "—", "—", throughput, NOT_TESTED, "a GPU and fused kernels")]


def _published_margins(axis: str) -> str:
    rows = published.margins().query(f"axis == '{axis}' and a == 'dms' and b == 'vanilla'")
    means = rows.groupby("task", sort=False)["value"].mean()
    listed = ", ".join(f"{task} {f'{value:+.1f}'.replace('-', '−')}" for task, value in means.items())
    return f"mean of three sizes: {listed} (Table {rows['table'].iloc[0]})"


def _fixed_budget(evidence: Evidence) -> Claim:
    pairs = [p for p in evidence.summary["paired"] if p["b"] == "vanilla" and p["a"] == "dms"]
    measured = "; ".join(f"CR {p['cr']:g}: {_interval(p)}" for p in pairs)
    measured += "".join(
        f"; CR {m['cr']:g}, mean of {m['seeds']} stored retrofits: {_interval(m)}"
        for m in evidence.stored.get("seeds", {"means": []})["means"]
        if (m["a"], m["b"]) == ("dms", "vanilla")
    )
    rows = published.accuracies().query("table != '2' and method == 'dms'")
    means = [f"CR {cr:g}: {rows.query(f'cr == {cr}')['difference'].mean():+.1f}".replace("-", "−") for cr in (4, 8)]
    worst = min((p["low"] for p in pairs), default=0.0)
    verdict = "agrees" if worst > -5 else "loses more here" if any(p["high"] < -5 for p in pairs) else "unresolved"
    return Claim(
        "One chain at the longest length loses little", "{ref}`06 <sec-fixed>`", measured,
        f"mean of twelve cells, {', '.join(means)} points (Tables 10–12)",
        f"{verdict} (little: less than 5 points)", GPU,
    )  # fmt: skip


def _schedule(evidence: Evidence) -> Claim:
    held, target = evidence.held, evidence.target
    rows = evidence.stored.get("seeds", {"rows": []})["rows"]
    others = [row["cr_decisions"] for row in rows if (row["method"], row["cr"]) == ("dms", target)]
    measured = (
        f"{evidence.steps} steps, CR {held['cr_decisions']:.2f} by decisions for a target of {target:g} on held-out "
        f"data; live {held['cr_live']:.2f}"
    )
    measured += f"; stored retrofits: {', '.join(f'{cr:.2f}' for cr in others)}" if others else ""
    least, most = min([held["cr_decisions"], *others]) / target, max([held["cr_decisions"], *others]) / target
    verdict = f"disagrees ({1 - least:.0%} short)" if least < 0.9 else f"agrees (at most {max(most - 1, 0):.0%} over)"
    return Claim(
        "About a hundred steps per unit of CR suffice, and one run gives every ratio", "{ref}`05 <sec-held-out>`",
        measured, "CR 8 at step 700", verdict, GPU,
    )  # fmt: skip


def _against_dmc(evidence: Evidence) -> Claim:
    text = "DMS needs far fewer training tokens than DMC"
    rows = published.table(1).query("task == 'GSM8K' and cr == 4").set_index("method")["value"]
    told = f"GSM8K, Llama 3.2 1B, CR 4, equal training: DMS {rows['dms']}, DMC {rows['dmc']} (Table 1)"
    runs = {run["arm"]: run for run in evidence.stored.get("dmc", {"runs": []})["runs"]}
    if not {"dms", "dmc"} <= runs.keys():
        return Claim(text, "—", "no stored comparison", told, NOT_TESTED, "CPU")
    names = {"dms": "DMS", "dms-neuron": "DMS with a neuron gate", "dmc": "DMC"}
    measured = "; ".join(
        f"{name} CR {runs[arm]['held_out']['cr_decisions']:.2f}, {runs[arm]['sampled']['accuracy']:.1f} % "
        f"[{runs[arm]['sampled']['low']:.1f}, {runs[arm]['sampled']['high']:.1f}]"
        for arm, name in names.items()
        if arm in runs
    )
    tokens = runs["dms"]["trained"]["tokens"]
    verdict = "agrees" if _ahead(runs["dms"], runs["dmc"]) else "unresolved"
    if verdict == "agrees" and "dms-neuron" in runs and not _ahead(runs["dms-neuron"], runs["dmc"]):
        verdict = "agrees with the adapter gate, not with a neuron gate"
    return Claim(
        text, "`companion.experiments.dmc`", f"after {tokens:,} tokens and the same target: {measured}", told,
        verdict, "longer runs, CPU; real models on a GPU",
    )  # fmt: skip


def _ahead(run: dict, other: dict) -> bool:
    """More compressed and still more accurate, by intervals that do not overlap."""
    denser = run["held_out"]["cr_decisions"] > other["held_out"]["cr_decisions"]
    return denser and run["sampled"]["low"] > other["sampled"]["high"]


def _memory(evidence: Evidence) -> Claim:
    cache = evidence.cache
    measured = "—"
    if cache:
        measured = (
            f"{cache['ratio']:.2f} times fewer bytes after {cache['tokens']} tokens, "
            f"{cache['ratio_excluding_window']:.2f} without the window"
        )
    verdict = NOT_TESTED if not cache else "agrees" if cache["ratio"] > 1 else "disagrees"
    return Claim(
        "What is evicted leaves memory", "{ref}`05 <sec-cache>`", measured, "counted in tokens (Table 9)", verdict, "—"
    )


def _delay(evidence: Evidence) -> Claim:
    pair = next(p for p in evidence.summary["paired"] if (p["a"], p["b"]) == ("dms", "dms-immediate"))
    measured = f"CR {pair['cr']:g}: {_interval(pair)}"
    verdict = _verdict(pair["low"], pair["high"], pair["problems"])
    for mean in evidence.stored.get("seeds", {"means": []})["means"]:
        if mean["b"] == "dms-immediate":
            measured += f"; mean of {mean['seeds']} stored retrofits: {_interval(mean)}"
            verdict = (
                f"{verdict}; over seeds {_verdict(mean['low'], mean['high'], evidence.stored['seeds']['problems'])}"
            )
    for study in evidence.stored.get("ablations", {}).values():
        for row in study["pairs"]:
            if (row["a"], row["b"]) == ("immediate-w16", "dms"):
                turned = wording.points(-row["difference"], -row["high"], -row["low"])
                measured += f"; after {study['recipe']['steps']} steps: {turned}"
    return Claim(
        "Delayed eviction is far better than immediate", "{ref}`07 <sec-immediate>`", measured,
        "“far worse”, a figure without numbers (section 5.3)", verdict, "longer windows; real models on a GPU",
    )  # fmt: skip


def _absorbed(evidence: Evidence) -> Claim:
    study = evidence.stored.get("delay")
    measured, verdict = "no stored intervention", NOT_TESTED
    if study:
        moved = study["window_minus_control"]
        numbers = (moved[key] for key in ("difference", "difference_low", "difference_high"))
        value, low, high = (f"{x:+.2f}".replace("-", "−") for x in numbers)
        measured = f"{value} % of the log-odds [{low}, {high}] sit in the window's tokens"
        kept = f"; some head keeps the digit in {study['kept_somewhere']:.0f} % of the look-ups"
        verdict = "agrees" if moved["difference_low"] > 0 else f"no sign of it{kept}"
    return Claim(
        "In the window, later tokens absorb what the leaving one holds", "{ref}`07 <sec-delay>`", measured,
        "asserted (section 3.2)", verdict, "a model whose heads drop what it needs",
    )  # fmt: skip


def _training_free(evidence: Evidence) -> Claim:
    grid = evidence.stored.get("grid", {"paired": []})
    pairs = [p for p in grid["paired"] if p["a"] == "dms" and p["b"] not in ("vanilla", "dms-immediate")]
    measured = "; ".join(f"{style_of(p['b'])[0]} CR {p['cr']:g}: {_interval(p)}" for p in pairs)
    verdicts = {_verdict(p["low"], p["high"], p["problems"]) for p in pairs}
    return Claim(
        "Learnt eviction beats training-free eviction", "{ref}`07 <sec-baselines>`", measured or "no stored grid",
        "Tables 1, 6, 8 and 9", " / ".join(sorted(verdicts)) or NOT_TESTED, GPU,
    )  # fmt: skip


def _rests(evidence: Evidence) -> Claim:
    studies = evidence.stored.get("ablations", {})
    pair = next((p for study in studies.values() for p in study["pairs"] if p["a"] == "no-rest"), None)
    measured, verdict = "not compared", NOT_TESTED
    if pair:
        measured = f"as many steps without a rest, hence at a constant rate, minus with one: {_interval(pair)}"
        verdict = wording.verdict(pair["low"], pair["high"], pair["problems"], "agrees", "disagrees")
    return Claim(
        "Steps at a fixed ratio after the ramp bring nothing", "{ref}`07 <sec-retrofits>`", measured,
        "no benefit found", verdict, "more seeds, CPU",
    )  # fmt: skip


def _latency() -> Claim:
    model, batch, context = ARCHITECTURES["llama-3.1-8b"], 256, 8192
    dense, ours = (kv_share(model, batch, context, cr) for cr in (1, 8))
    return Claim(
        "Reading the cache dominates the latency of long generations", "[01](01_bottleneck)",
        f"roofline model, Llama 3.1 8B, batch {batch}, {context} tokens: {dense:.0%} of the bytes read, "
        f"{ours:.0%} at CR 8",
        "Fig. 9", "agrees, by the same model" if dense > 0.5 else "disagrees", "timings on a GPU",
    )  # fmt: skip


def _general() -> Claim:
    gaps = published.accuracies().query("table == '2' and method == 'dms'")["difference"]
    told = f"Qwen3 8B at CR 8: {gaps.min():+.1f} to {gaps.max():+.1f} points to the original (Table 2)"
    return Claim(
        "A retrofitted model keeps its abilities on general benchmarks", "—", "—", told.replace("-", "−"), NOT_TESTED,
        GPU,
    )  # fmt: skip


def _needle(evidence: Evidence) -> Claim:
    rows = published.table(4).query("task == 'NIAH' and context == 4096").set_index(["method", "cr"])["value"]
    told = f"4K tokens, Llama 3.2 1B: {rows['vanilla', 1]} for the original, {rows['dms', 4]} at CR 4 (Table 4)"
    study = evidence.stored.get("smollm2")
    measured, verdict = "no stored measurement", NOT_TESTED
    if study:
        by = {(row["method"], row["cr"]): row for row in study["rows"]}
        dense, ours = by["vanilla", 1.0], by["dms", max(cr for method, cr in by if method == "dms")]
        found = [f"{round(row['needles'] * row['prompts'])} of {row['prompts']}" for row in (dense, ours)]
        measured = f"SmolLM2 135M, gates alone: {found[0]} for the original, {found[1]} at CR {ours['cr']:g}"
        verdict = "agrees" if ours["needles"] >= dense["needles"] else "loses here; too few to tell how much"
    return Claim(
        "It still finds a needle in a haystack as long as its training context", "[08](08_real_model)", measured, told,
        verdict, GPU,
    )  # fmt: skip
