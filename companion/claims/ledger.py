"""The ledger: each claim of the paper, where the book tests it, what came out, what was published, and a verdict.

The claims stand in ``claims.yaml``; the functions here say what this book measured.  "Agrees" means that the measured
sign is the published one and the 95 % interval excludes zero; "disagrees" that the interval excludes zero on the other
side.  The embedded model's numbers come from a run of the main job, the others from what ``data/results`` stores.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from companion.claims import published, wording
from companion.claims.wording import points
from companion.cost.roofline import ARCHITECTURES, kv_share
from companion.experiments import main as job
from companion.figures.style import style_of
from dms_core.storage import read_json

NOT_TESTED = "not tested"
HEAD = ("claim of the paper", "where", "this book", "published", "verdict", "the rest needs")
Found = tuple[str, str] | None  # what was measured, and the verdict; None without data


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

    summary: dict  # of main.summary: margins, paired differences
    held: dict  # of main.held_out, at the last CR
    steps: int
    target: float
    cache: dict | None  # of heldout.cache_report
    stored: dict[str, dict]  # files of data/results by their names without .json

    def rows(self, name: str, key: str) -> list[dict]:
        """A list in a stored file; empty without the file."""
        return self.stored.get(name, {}).get(key, [])


def gather(run: job.Run, results: Path, cache: dict | None = None) -> Evidence:
    """Everything that a finished run and ``results`` hold.  The run's own grid goes before the stored one."""
    stored = {file.stem: read_json(file) for file in results.glob("*.json")}
    for directory in (results / "tiny", run.root):
        stored |= {name: read_json(file) for name in ("grid", "seeds") if (file := directory / f"{name}.json").exists()}
    summary = job.summary(run)
    top, steps = summary["retrofit"]["cr_target"], summary["retrofit"]["steps"]
    return Evidence(summary, job.held_out(run, "dms", top), steps, top, cache, stored)


def make_ledger(evidence: Evidence) -> list[Claim]:
    """Every claim, in the order of the paper."""
    entries = yaml.safe_load((files("companion.claims") / "claims.yaml").read_text(encoding="utf-8"))
    return [_judge(evidence, **entry) for entry in entries]


def markdown(claims: Sequence[Claim]) -> str:
    """The ledger as a Markdown table."""
    return wording.table(HEAD, [asdict(claim).values() for claim in claims])


def _judge(evidence: Evidence, measure: Sequence[str] = (), untested: dict | None = None, **entry) -> Claim:
    """The row of one entry of claims.yaml."""
    found = {f.__name__: f for f in MEASURES}[measure[0]](evidence, *measure[1:]) if measure else None
    texts = [entry["published"]] if isinstance(entry["published"], str) else map(_told, entry["published"])
    entry |= {"published": "; ".join(texts)}
    if found is None:
        return Claim(**{"measured": "—", "verdict": NOT_TESTED} | entry | (untested or {}))
    return Claim(measured=found[0], verdict=found[1], **entry)


def _told(part: dict) -> str:
    """A published text with its numbers filled in, as claims.yaml tells."""
    source = part["source"]
    if source == "accuracies":
        rows, value = published.accuracies(), "difference"
    else:
        rows, value = published.table(source) if isinstance(source, int) else published.read(source), "value"
    rows = rows.query(part["query"])
    means = rows.groupby(rows[part["by"]].astype(str).agg(" ".join, axis=1))[value].mean().to_dict()
    text = part["text"].format_map(means | {"min": rows[value].min(), "max": rows[value].max(), "table": source})
    return re.sub(r"(?<=\s)-(?=\d)", "−", text)


def _sign(row: dict) -> str:
    return wording.verdict(row["low"], row["high"], row["problems"], "agrees", "disagrees")


def _difference(row: dict) -> str:
    return points(row["difference"], row["low"], row["high"])


def margin(evidence: Evidence, axis: str) -> Found:
    row = wording.margin(evidence.summary["margins"], "dms", "vanilla", axis, "log2")
    if row["value"] is None:
        return "NA: the budgets do not meet", "unresolved"
    return f"{wording.margin_words(row)}, log2 axis", _sign(row)


def fixed_budget(evidence: Evidence) -> Found:
    """Little is less than 5 points, with the whole interval."""
    pairs = [p for p in evidence.summary["paired"] if (p["a"], p["b"]) == ("dms", "vanilla")]
    means = [m for m in evidence.rows("seeds", "means") if (m["a"], m["b"]) == ("dms", "vanilla")]
    measured = [f"CR {p['cr']:g}: {_difference(p)}" for p in pairs]
    measured += [f"CR {m['cr']:g}, mean of {m['seeds']} stored retrofits: {_difference(m)}" for m in means]
    little, more = all(p["low"] > -5 for p in pairs), any(p["high"] < -5 for p in pairs)
    verdict = "agrees" if little else "loses more here" if more else "unresolved"
    return "; ".join(measured), f"{verdict} (little: less than 5 points)"


def schedule(evidence: Evidence) -> Found:
    """A tenth less compression than its target is too little."""
    held, target = evidence.held, evidence.target
    rows = evidence.rows("seeds", "rows")
    others = [row["cr_decisions"] for row in rows if (row["method"], row["cr"]) == ("dms", target)]
    measured = f"{evidence.steps} steps, CR {held['cr_decisions']:.2f} by decisions for a target of {target:g} on "
    measured += f"held-out data; live {held['cr_live']:.2f}"
    measured += f"; stored retrofits: {', '.join(f'{cr:.2f}' for cr in others)}" if others else ""
    shares = [cr / target for cr in (held["cr_decisions"], *others)]
    if min(shares) < 0.9:
        return measured, f"disagrees ({1 - min(shares):.0%} short)"
    return measured, f"agrees (at most {max(*shares, 1) - 1:.0%} over)"


def against_dmc(evidence: Evidence) -> Found:
    """Ahead is more compressed and still more accurate, by intervals that do not overlap."""
    runs = {run["arm"]: run | run["sampled"] | run["held_out"] for run in evidence.rows("dmc", "runs")}
    if not {"dms", "dmc"} <= runs.keys():
        return None
    names = {"dms": "DMS", "dms-neuron": "DMS with a neuron gate", "dmc": "DMC"}
    form = "{name} CR {cr_decisions:.2f}, {accuracy:.1f} % [{low:.1f}, {high:.1f}]"
    measured = "; ".join(form.format(name=name, **runs[arm]) for arm, name in names.items() if arm in runs)
    dmc = runs["dmc"]
    ahead = {arm: r["cr_decisions"] > dmc["cr_decisions"] and r["low"] > dmc["high"] for arm, r in runs.items()}
    verdict = "agrees" if ahead["dms"] else "unresolved"
    if ahead["dms"] and not ahead.get("dms-neuron", True):
        verdict = "agrees with the adapter gate, not with a neuron gate"
    return f"after {runs['dms']['trained']['tokens']:,} tokens and the same target: {measured}", verdict


def memory(evidence: Evidence) -> Found:
    if not evidence.cache:
        return None
    form = "{ratio:.2f} times fewer bytes after {tokens} tokens, {ratio_excluding_window:.2f} without the window"
    return form.format(**evidence.cache), "agrees" if evidence.cache["ratio"] > 1 else "disagrees"


def delay(evidence: Evidence) -> Found:
    pair = next(p for p in evidence.summary["paired"] if (p["a"], p["b"]) == ("dms", "dms-immediate"))
    measured, verdict = [f"CR {pair['cr']:g}: {_difference(pair)}"], _sign(pair)
    for mean in evidence.rows("seeds", "means"):
        if mean["b"] == "dms-immediate":
            measured.append(f"mean of {mean['seeds']} stored retrofits: {_difference(mean)}")
            verdict += f"; over seeds {_sign(mean | {'problems': evidence.stored['seeds']['problems']})}"
    for study in evidence.stored.get("ablations", {}).values():
        for row in study["pairs"]:
            if (row["a"], row["b"]) == ("immediate-w16", "dms"):
                turned = points(-row["difference"], -row["high"], -row["low"])
                measured.append(f"after {study['recipe']['steps']} steps: {turned}")
    return "; ".join(measured), verdict


def absorbed(evidence: Evidence) -> Found:
    study = evidence.stored.get("delay")
    if not study:
        return None
    moved = study["window_minus_control"]
    value, low, high = (wording.signed(moved[f"difference{end}"], 2) for end in ("", "_low", "_high"))
    kept = f"some head keeps the digit in {study['kept_somewhere']:.0f} % of the look-ups"
    verdict = "agrees" if moved["difference_low"] > 0 else f"no sign of it; {kept}"
    return f"{value} % of the log-odds [{low}, {high}] sit in the window's tokens", verdict


def training_free(evidence: Evidence) -> Found:
    rows = evidence.rows("grid", "paired")
    pairs = [p for p in rows if p["a"] == "dms" and p["b"] not in ("vanilla", "dms-immediate")]
    measured = "; ".join(f"{style_of(p['b'])[0]} CR {p['cr']:g}: {_difference(p)}" for p in pairs)
    return (measured, " / ".join(sorted(set(map(_sign, pairs))))) if pairs else None


def rests(evidence: Evidence) -> Found:
    studies = evidence.stored.get("ablations", {}).values()
    pair = next((p for study in studies for p in study["pairs"] if p["a"] == "no-rest"), None)
    measured = "as many steps without a rest, hence at a constant rate, minus with one: "
    return (measured + _difference(pair), _sign(pair)) if pair else None


def latency(evidence: Evidence) -> Found:
    model, batch, context = ARCHITECTURES["llama-3.1-8b"], 256, 8192
    dense, ours = (kv_share(model, batch, context, cr) for cr in (1, 8))
    measured = f"roofline model, Llama 3.1 8B, batch {batch}, {context} tokens: {dense:.0%} of the bytes read, "
    return f"{measured}{ours:.0%} at CR 8", "agrees, by the same model" if dense > 0.5 else "disagrees"


def needle(evidence: Evidence) -> Found:
    rows = {(row["method"], row["cr"]): row for row in evidence.rows("smollm2", "rows")}
    if not rows:
        return None
    dense, ours = rows["vanilla", 1.0], rows["dms", max(cr for method, cr in rows if method == "dms")]
    found, kept = (f"{round(row['needles'] * row['prompts'])} of {row['prompts']}" for row in (dense, ours))
    verdict = "agrees" if ours["needles"] >= dense["needles"] else "loses here; too few to tell how much"
    return f"SmolLM2 135M, gates alone: {found} for the original, {kept} at CR {ours['cr']:g}", verdict


MEASURES = (margin, fixed_budget, schedule, against_dmc, memory, delay, absorbed, training_free, rests, latency, needle)
