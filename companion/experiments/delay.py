"""What does the delay buy?  A token that is gone from every head, with delayed and with immediate eviction.

Some KV head may keep a digit that is needed far behind, and then nothing has to move.  So the source of a look-up is
forced out of all heads of all layers, and one asks whether its digit is still predicted at the query:

    right          share of look-ups whose right digit is the most likely token, source forced out
    loss           that share without forcing minus with it; own loss: beyond what forcing out another digit costs
    beyond chance  right minus the same in the run whose source has another digit: chance, and what the rest of the
                   document says
    moved          change of P(other digit) when the window's tokens write as in the run with the other digit, minus
                   the same of the next w tokens (`interventions`; source forced out in all runs)

Compared are retrofits with delayed and with immediate eviction and the dense model, whose gates evict the forced token
alone.  The verdict's rule is data/protocols/absorbed.yaml.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from companion.devices import checked_device
from companion.experiments.interventions import MEASURES, RUNS, interchange
from companion.experiments.lookups import KINDS, TASKS, Case, find_cases
from companion.experiments.run import Run, checkpoint
from companion.paths import REASONER
from companion.paths import RUNS as DIRECTORY
from companion.provenance import describe
from companion.tasks.reasoner import load_tokenizer
from dms_core.budgets import bootstrap
from dms_core.checkpoint import is_checkpoint, load_base, load_model, read_settings
from dms_core.config import DMSConfig
from dms_core.model import attach

MODELS = ("dms", "dms-immediate", "dense")
PAIRS = (("dms", "dms-immediate"), ("dms", "dense"), ("dms-immediate", "dense"))
OUTCOMES = {  # a measure, and the runs whose weighted sum is taken
    "right": ("right", {"forced": 1}),
    "loss": ("right", {"clean": 1, "forced": -1}),
    "own loss": ("right", {"forced, other": 1, "forced": -1}),
    "beyond chance": ("right", {"forced": 1, "forced, exchanged": -1}),
    "moved": ("p_other", {"forced, window": 1, "forced, control": -1}),
    "moved, log-odds": ("odds", {"forced, window": -1, "forced, control": 1}),
    "passed on": ("p_other", {"forced, control": 1, "forced": -1}),
    "moved, unforced": ("p_other", {"window": 1, "control": -1}),
}
RULE = {  # what the verdict needs in every task: outcome, model, compared with, sign
    "right more often than with immediate eviction": ("right", "dms", "dms-immediate", 1),
    "a smaller loss": ("loss", "dms", "dms-immediate", -1),
    "content in the window's tokens": ("moved", "dms", None, 1),
    "more than in the dense model": ("moved", "dms", "dense", 1),
}
LEAST = 1.0  # points of "moved" from which on content counts as moved
DOCUMENTS_SEED = 2  # of the validation documents; those of seeds 0 and 1 were looked at in pilots
DRAWS = (1000, 0)  # resamples, and their seed


def default_checkpoints(runs: Path = DIRECTORY, seeds: int = 1, cr: float = 4.0) -> dict[str, list[Path]]:
    """Of both kinds of eviction by retrofit seed: profile "full" below ``runs``; the first delayed one is shipped."""
    job = Run.of("full", runs)
    found = {name: [checkpoint(job, name, cr, seed) for seed in range(seeds)] for name in MODELS[:2]}
    return found | {"dms": [REASONER / f"dms-cr{cr:g}", *found["dms"][1:]]}


def delay(
    checkpoints: dict[str, Sequence[Path]] | None = None,
    base: Path | str = REASONER,
    documents=200,
    seed=DOCUMENTS_SEED,
    batch=32,
    device: str | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    report: Callable[[str], None] = lambda line: None,
) -> dict:
    """The experiment on the look-ups that the dense model solves, with the clean and with an exchanged source.

    checkpoints: by "dms" and "dms-immediate", of each retrofit seed.  Immediate eviction is left out, and what lacks is
    named in "missing", unless all are there; ValueError where one with delayed eviction is not.  report: gets a
    line before each model.
    """
    checkpoints = dict(checkpoints or default_checkpoints())
    missing = [str(path) for path in checkpoints.get("dms-immediate", ()) if not is_checkpoint(path)]
    if missing or not checkpoints.get("dms-immediate"):
        checkpoints.pop("dms-immediate", None)
    configs = [DMSConfig.from_dict(read_settings(path)["dms"]) for paths in checkpoints.values() for path in paths]
    if len(windows := {config.window for config in configs}) > 1:
        raise ValueError(f"windows {sorted(windows)}: must be one, else the tokens that see the source differ")
    window, place = configs[0].window, checked_device(device)
    cases = find_cases(load_tokenizer(base), documents, 2 * window + 1, seed, tasks)
    cases.sort(key=lambda case: len(case.ids))
    asked = len(cases)
    report(f"{asked} look-ups: dense")
    dense, kept = measured(attach(load_base(base), configs[0]).to(place), cases, window, batch)  # zero gates: z = -b0
    solved = (dense[:, RUNS.index("clean"), 0] == 1) & (dense[:, RUNS.index("exchanged"), 1] == 1)  # right; follows
    cases, found = [case for case, good in zip(cases, solved, strict=True) if good], {}
    if not cases:
        raise ValueError(f"documents {documents}: must be more, the dense model solves no look-up of them")
    for name, paths in checkpoints.items():
        parts = []
        for path in paths:
            report(f"{len(cases)} look-ups: {name}, {_short(path)}")
            parts.append(measured(load_model(path).to(place), cases, window, batch))
        found[name] = tuple(np.stack(part) for part in zip(*parts, strict=True))
    found["dense"] = dense[None, solved], kept[None, solved]
    settings = {"checkpoints": {name: [_short(path) for path in paths] for name, paths in checkpoints.items()}}
    settings |= {"window": window, "documents": documents, "seed": seed, "least_distance": 2 * window + 1}
    settings |= {"lookups": asked, "used": len(cases)}
    settings["median_distance"] = float(np.median([case.query - case.source for case in cases]))
    return findings(cases, found) | {"missing": missing, "settings": settings, "environment": describe()}


def _short(path: Path) -> str:
    return "/".join(Path(path).parts[-2:])


def measured(model, cases: Sequence[Case], window: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each case its readings (P, RUNS, MEASURES), and how many KV heads keep the source unforced (P,)."""
    parts = [interchange(model, cases[start : start + batch], window) for start in range(0, len(cases), batch)]
    results = [result for part in parts for result in part]
    values = np.array([[r[name] for name in RUNS] for r in results]).reshape(-1, len(RUNS), len(MEASURES))
    return values, np.array([r["kept"] for r in results], int)


def findings(cases: Sequence[Case], found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    """Tables by task and kind, and the verdict.

    found: by model the readings (seeds, P, RUNS, MEASURES), and how many KV heads keep the source unforced (seeds, P).
    """
    tables = {"rows": [], "outcomes": [], "unforced": []}
    tasks = [task for task in TASKS if any(case.task == task for case in cases)]
    for task, kind in [("all", "all"), *((task, "all") for task in tasks), *(("all", kind) for kind in KINDS)]:
        chosen = [i for i, case in enumerate(cases) if task in ("all", case.task) and kind in ("all", case.kind)]
        if not chosen:
            continue
        group, drawn = {"task": task, "kind": kind, "lookups": len(chosen)}, {}
        for name, (values, kept) in found.items():
            values, kept = values[:, chosen], kept[:, chosen]
            means = bootstrap.means(values.reshape(*values.shape[:2], -1), *DRAWS).reshape(-1, len(RUNS), len(MEASURES))
            for number, run in enumerate(RUNS):
                parts = [_named(what, means[:, number, k], what) for k, what in enumerate(MEASURES)]
                row = {"model": name, "run": run, "seeds": len(values)}
                tables["rows"].append(group | row | {k: v for part in parts for k, v in part.items()})
            drawn[name] = {
                outcome: sum(w * means[:, RUNS.index(run), MEASURES.index(what)] for run, w in weights.items())
                for outcome, (what, weights) in OUTCOMES.items()
            }
            tables["unforced"].append(group | {"model": name} | _unforced(values, kept))
        for outcome, (what, _) in OUTCOMES.items():
            parts = [(name, None, drawn[name][outcome]) for name in found]
            parts += [(a, b, drawn[a][outcome] - drawn[b][outcome]) for a, b in PAIRS if {a, b} <= set(found)]
            facts = [group | {"outcome": outcome, "a": a, "b": b} | _named("value", x, what) for a, b, x in parts]
            tables["outcomes"] += facts
    question = "When a token is gone from every head, what does delayed eviction keep of it?"
    return {"question": question, **tables, "verdict": conclusion(tables["outcomes"])}


def _named(name: str, samples: np.ndarray, what: str) -> dict:
    """Mean and 95 % interval of resampled means (1 + R,), the first as measured: in points, log-odds as they are."""
    samples = samples if what == "odds" else 100 * samples
    low, high = bootstrap.interval(samples[1:])
    return {name: float(samples[0]), f"{name}_low": low, f"{name}_high": high}


def _unforced(values: np.ndarray, kept: np.ndarray) -> dict:
    """Heads that keep a source; look-ups, over all seeds, whose source none keeps, and how many of these are right."""
    right, gone = values[..., RUNS.index("clean"), MEASURES.index("right")], kept == 0
    facts = {"kept": float(kept.mean()), "evicted": int(gone.sum()), "of": gone.size}
    facts |= dict.fromkeys(("right", "right_low", "right_high"))
    if (places := gone.any(0)).any():
        low, high = bootstrap.beta_binomial((right * gone).sum(0)[places].astype(int), gone.sum(0)[places])
        facts |= {"right": float(100 * right[gone].mean()), "right_low": low, "right_high": high}
    return facts


def select(outcomes: Sequence[dict], outcome: str, a: str, b: str | None) -> list[dict]:
    """The rows of one outcome and model (b: minus another), one a task."""
    wanted = {"outcome": outcome, "a": a, "b": b, "kind": "all"}
    return [row for row in outcomes if wanted.items() <= row.items() and row["task"] != "all"]


def conclusion(outcomes: Sequence[dict]) -> str:
    """The verdict by the protocol's rule."""
    if not select(outcomes, *next(iter(RULE.values()))[:3]):
        return "not judged: no retrofit with immediate eviction"
    holds, below = {}, []
    for words, (*which, sign) in RULE.items():
        rows = select(outcomes, *which)
        least = LEAST if which == ["moved", "dms", None] else 0.0
        holds[words] = [r["task"] for r in rows if (r["value_low"] if sign > 0 else -r["value_high"]) > least]
        if which[0] == "right":
            below = [r["task"] for r in rows if r["value_high"] < 0]
        tasks = len(rows)
    if all(len(found) == tasks for found in holds.values()):
        return "agrees"
    listed = "; ".join(f"{words}: {', '.join(found) or 'no task'}" for words, found in holds.items())
    listed += f"; right less often: {', '.join(below)}" if below else ""
    moved = any(row["value_low"] > LEAST for row in select(outcomes, "moved", "dms", None))
    return f"{'mixed' if moved and not below else 'disagrees'} ({listed})"
