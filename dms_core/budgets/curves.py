"""From chains to curves: accuracy against budget for every (method, CR, L, W), with intervals (section 5.1, App. G).

One generated chain gives every shorter length budget L for nothing: cut at L it answers only if its answer was
complete by then, and its cost is its cost at that token. W chains vote; the paper calls such a configuration W-L-CR.

    reads(L, W)   = Σ_chains reads at the cut          items attended to, per KV head, mean over layers and heads
    peak(L, W)    = kept + Σ_chains max(live at the cut − kept, 0)
    seconds(L, W) = Σ_chains seconds at the cut        where they were measured

The peak counts what is kept of the prompt once and holds all W chains until the last one ends. Costs are averaged
over all choices of W among the available chains (exactly, since they are linear in the chains), then over problems.

Where a method was retrofitted with several seeds, its value is the mean over them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from dms_core.budgets import bootstrap
from dms_core.budgets.headline import headline
from dms_core.budgets.pareto import SCALES, common_interval, margins_of_frontiers, padded_frontiers
from dms_core.budgets.voting import AGGREGATES, Scores, make_scores, resampled, shared_problems

FEW = 60  # problems up to which an accuracy has a Bayesian interval too
FIRST = ("vanilla", "dms")  # in this order at the head of every list; the others follow by name


class Pairs(NamedTuple):
    """Which methods a summary compares: pairs (a, b), a minus b."""

    margins: list[tuple[str, str]]  # frontiers over all CRs of both
    margins_per_cr: list[tuple[str, str]]  # one CR of a, all CRs of b
    paired: list[tuple[str, str]]  # at each CR of a; b at the same CR, or any where margins_per_cr has the pair


def default_pairs(methods: Iterable[str]) -> Pairs:
    """Every method against vanilla, and dms against every other."""
    others = [m for m in methods if m not in FIRST]
    dms = [("dms", m) for m in others]
    first = ("dms", "vanilla")
    return Pairs([first, *((m, "vanilla") for m in others), *dms], [first], [first, *dms])


def summarise(
    records: Iterable[dict], lengths: Sequence, widths: Sequence, resamples=1000, seed=0, aggregate="vote", pairs=None
) -> dict:
    """Points, Pareto margins, paired differences and headline, for `json.dumps`: what `dms curves --json` prints.

    records: one dict a chain with RECORD_KEYS; `live` and `reads` hold the live items and the cumulative KV reads after
    0, stride, 2·stride, … generated tokens and at the end. lengths: budgets L in generated tokens, at most the limit of
    the run; records with "budget_length" count at that L alone (see `voting`). widths: numbers W of voting chains; a
    (method, CR) has no point at a W that one of its problems lacks chains for. Intervals are 95 % percentile bootstraps
    over problems and retrofit seeds (see `bootstrap`); whatever compares two methods uses the problems that both have,
    the same resamples of them, and the same seeds, or one of them has a single seed.
    aggregate: how W chains count, "vote" or "any" (see `voting`). pairs: a `Pairs` of what is compared, by default
    `default_pairs`.

    Returns {"points", "pass_at_1", "margins", "margins_per_cr", "paired", "headline"}, each a list of rows with "task".
    Accuracies, margins and differences are in points (0–100). A margin is taken over the budgets "from" … "to" that the
    frontiers of the full sample share, also in the resamples, and None (NA, `na_share` 1) where there are none;
    "restricted" begins where half of b's chains have ended (None: nowhere). "paired" has differences of one-chain
    accuracy at the largest L. A point's "kept": tokens of the prompt that its peak counts once (None: of older records,
    where that is all that is live after the prefill). "headline": see `headline`. Record order does not matter.
    ValueError names the offending value.

    >>> chain = dict(method="dms", cr=8.0, problem=0, chain=0, tokens=2, stride=16, prompt_tokens=3, prompt_live=3.0)
    >>> chain |= dict(live=[3.0, 4.0], reads=[0.0, 4.0], answer="7", gold="7", finished_at=2)
    >>> summarise([chain], lengths=[2], widths=[1])["points"][0]["accuracy"]
    100.0
    """
    lengths, widths = _checked("lengths", lengths), _checked("widths", widths)
    if resamples < 1:
        raise ValueError(f"resamples {resamples}: must be >= 1")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r}: must be one of {AGGREGATES}")
    scores = make_scores(records, lengths, widths, aggregate, seed)
    scores.sort(key=lambda one: FIRST.index(one.method) if one.method in FIRST else len(FIRST))
    by_method: dict[str, list[Scores]] = defaultdict(list)
    for one in scores:
        by_method[one.method].append(one)
    pairs = default_pairs(by_method) if pairs is None else pairs
    draws = (resamples, seed)
    summary = {
        "points": [row for one in scores if one.widths for row in _points(one, draws)],
        "pass_at_1": [row for one in scores for row in _pass_at_1(one)],
        "margins": [row for a, b in pairs.margins for row in _margins(by_method[a], by_method[b], draws)],
        "margins_per_cr": [
            row | {"cr": one.cr}
            for a, b in pairs.margins_per_cr
            for one in by_method[a]
            for row in _margins([one], by_method[b], draws)
        ],
        "paired": [
            _difference(one, other, lengths[-1], draws)
            for one, other in product([one for one in scores if lengths[-1] in one.lengths], repeat=2)
            if (pair := (one.method, other.method)) in pairs.paired
            and (one.cr == other.cr or pair in pairs.margins_per_cr)
            and set(one.problems) & set(other.problems)
        ],
        "headline": [row for a, b in pairs.margins for row in headline(by_method[a], by_method[b], draws)],
    }
    return {name: [{"task": scores[0].task} | row for row in rows] for name, rows in summary.items()}


def _checked(name: str, values: Sequence[int]) -> tuple[int, ...]:
    wrong = [v for v in values if v != int(v) or v < 1]
    if wrong or not len(values):
        raise ValueError(f"{name} {list(values)}: must be one or more integers >= 1")
    return tuple(sorted({int(v) for v in values}))


def _points(scores: Scores, draws: tuple[int, int]) -> list[dict]:
    accuracy = resampled([scores], "credit", scores.problems, draws)
    low, high = np.percentile(accuracy[1:], bootstrap.LEVELS, axis=0)
    columns = {"accuracy": accuracy[0], "low": low, "high": high}
    known = bool(np.isfinite(scores.kept).all())
    columns |= {axis: cost.mean((0, 1)).ravel() for axis, cost in scores.costs.items()}
    rows = []
    for i, (length, width) in enumerate(product(scores.lengths, scores.widths)):
        row = {"method": scores.method, "cr": scores.cr, "L": length, "W": width}
        row |= {"problems": len(scores.problems), "seeds": len(scores.seeds)}
        row["kept"] = float(scores.kept.mean()) if known else None
        rows.append(row | {name: float(values[i]) for name, values in columns.items()})
    return rows


def _pass_at_1(scores: Scores) -> list[dict]:
    """Accuracy of one chain (avg@n) at each L with two standard errors, all in points.

    se_questions: of the mean over questions, these drawn from many; None for one question.  se_samples: what other
    chains on these same questions would change, √(Σ p(1 − p)/(n − 1))/P; None where a question has one chain.  Neither
    has the spread of retrofit seeds, nor have bayes_low and bayes_high, `bootstrap.beta_binomial` for few problems.
    """
    questions, seeds, chains = len(scores.problems), len(scores.seeds), scores.chains
    rows = []
    for length, p in zip(scores.lengths, np.moveaxis(scores.alone, -1, 0), strict=True):  # p (S, P)
        row = {"method": scores.method, "cr": scores.cr, "L": length, "problems": questions, "seeds": seeds}
        row |= {"chains": float(chains.mean()), "accuracy": float(100 * p.mean())}
        row["se_questions"] = float(100 * p.mean(0).std(ddof=1) / np.sqrt(questions)) if questions > 1 else None
        repeated = (chains > 1).all()
        variance = p * (1 - p) / (chains - 1) if repeated else p
        row["se_samples"] = float(100 * np.sqrt(variance.sum()) / questions / seeds) if repeated else None
        if questions <= FEW:
            correct = (p * chains).sum(0).round().astype(int)
            bayes = bootstrap.beta_binomial(correct, chains.sum(0).astype(int))
            row |= dict(zip(("bayes_low", "bayes_high"), bayes, strict=True))
        rows.append(row)
    return rows


def _margins(a: list[Scores], b: list[Scores], draws: tuple[int, int]) -> list[dict]:
    """Margins of a over b, all axes and scales; a curve is the frontier over all points of its scores."""
    if not all(any(one.widths for one in curve) for curve in (a, b)) or not (problems := shared_problems([*a, *b])):
        return []
    accuracy = [resampled(curve, "credit", problems, draws) for curve in (a, b)]
    about = {"a": a[0].method, "b": b[0].method}
    sizes = {"problems": len(problems), "seeds": max(len(one.seeds) for one in [*a, *b])}
    rows = []
    for axis in a[0].costs:
        budgets = [resampled(curve, axis, problems, draws) for curve in (a, b)]
        frontiers = [padded_frontiers(x, y) for x, y in zip(budgets, accuracy, strict=True)]
        low, high = (float(ends[0]) for ends in common_interval(*frontiers))
        begin = max(low, _half_ended(b, axis, problems))
        for scale in SCALES:
            row = about | {"axis": axis, "scale": scale} | _margin(frontiers, scale, low, high)
            row |= {"na_share": float(row["value"] is None)} | sizes
            row["restricted"] = _margin(frontiers, scale, begin, high) if begin <= high else None
            rows.append(row)
    return rows


def _margin(frontiers: list, scale: str, low: float, high: float) -> dict:
    """Over the budgets from low to high; None where low is greater."""
    if low > high:
        return dict.fromkeys(("value", "low", "high", "from", "to"))
    a, b = frontiers
    value, *drawn = margins_of_frontiers(a, b, scale, (low, high))
    bounds = dict(zip(("low", "high"), bootstrap.interval(np.array(drawn)), strict=True))
    return {"value": float(value)} | bounds | {"from": low, "to": high}


def _half_ended(curve: list[Scores], axis: str, problems: list) -> float:
    """The least budget, at W 1, of an L by which half of a (method, CR)'s chains have ended; infinite if none has."""
    found = [np.inf]
    for one in curve:
        if 1 in one.widths:
            ended = np.average(one.ended, axis=(0, 1), weights=one.chains)
            budgets = one.rows(axis, problems).mean((0, 1)).reshape(len(one.lengths), -1)[:, one.widths.index(1)]
            found += budgets[ended >= 0.5][:1].tolist()
    return min(found)


def _difference(a: Scores, b: Scores, length: int, draws: tuple[int, int]) -> dict:
    """a minus b in one-chain accuracy at the largest L, over the problems that both have."""
    problems = shared_problems([a, b])
    difference = (a.rows("alone", problems) - b.rows("alone", problems))[..., -1:]  # (S, P, 1)
    means = 100 * bootstrap.means(difference, *draws)[:, 0]
    low, high = bootstrap.interval(means[1:])
    row = {"a": a.method, "b": b.method, "difference": float(means[0]), "low": low, "high": high}
    row |= {"cr": a.cr, "L": length, "W": 1, "problems": len(problems), "seeds": len(difference)}
    seeds = max(a.seeds, b.seeds, key=len)
    by_seed = {str(seed): 100 * float(of_seed.mean()) for seed, of_seed in zip(seeds, difference, strict=True)}
    return row | ({"by_seed": by_seed} if len(seeds) > 1 else {})
