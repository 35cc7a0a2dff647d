"""From chains to curves: accuracy against budget for every (method, CR, L, W), with intervals (section 5.1, App. G).

One generated chain gives every shorter length budget L for nothing: cut at L it answers only if its answer was
complete by then, and its cost is its cost at that token. W chains vote; the paper calls such a configuration W-L-CR.

    reads(L, W) = Σ_chains reads at the cut            items attended to, per KV head, mean over layers and heads
    peak(L, W)  = prompt + Σ_chains max(live at the cut − prompt, 0)

The peak counts the shared prompt once and holds all W chains until the last one ends. Both costs are averaged over all
choices of W among the available chains (exactly, since they are linear in the chains), then over problems.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import comb

import numpy as np

from dms_core.pareto import SCALES, margins_of_frontiers, padded_frontiers

AXES = ("reads", "peak")
MAX_SUBSETS = 32  # choices of W chains averaged per problem; all of them where there are no more than this
RECORD_KEYS = (
    "method", "cr", "problem", "chain", "answer", "gold", "finished_at", "tokens",
    "stride", "live", "reads", "prompt_tokens", "prompt_live",
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What one (method, CR) scores and costs, problem by problem."""

    method: str
    cr: float
    problems: tuple  # sorted identifiers
    widths: tuple[int, ...]  # the requested widths that every problem has chains for
    credit: np.ndarray  # (P, L, W) in [0, 1]
    reads: np.ndarray  # (P, L, W)
    peak: np.ndarray  # (P, L, W) tokens per KV head
    solo: np.ndarray  # (P,) credit of one chain at the largest L, mean over chains

    def rows(self, name: str, problems: Sequence) -> np.ndarray:
        """The named array for these problems, (len(problems), L·W), or of `solo` one column."""
        where = {problem: row for row, problem in enumerate(self.problems)}
        return getattr(self, name)[[where[p] for p in problems]].reshape(len(problems), -1)


def summarise(
    records: Iterable[dict], lengths: Sequence[int], widths: Sequence[int], resamples: int = 1000, seed: int = 0
) -> dict:
    """Points, Pareto margins and paired differences, ready for `json.dumps`: what `dms curves --json` prints.

    records: one dict a chain with RECORD_KEYS; `live` and `reads` hold the live items and the cumulative KV reads after
    0, stride, 2·stride, … generated tokens and at the end. lengths: budgets L in generated tokens, at most the limit of
    the run. widths: numbers W of voting chains; a (method, CR) has no point at a W that one of its problems lacks
    chains for. Intervals are 95 % percentile bootstraps over problems; whatever compares two methods uses the problems
    that both have, and the same resamples of them.

    Returns {"points", "margins", "margins_per_cr", "paired"}. Accuracies, margins and differences are in points
    (0–100). "margins" compare frontiers over all CRs of a method, "margins_per_cr" one CR of `dms` with vanilla; a
    value is None (NA) where the budgets do not meet, and `na_share` is the share of resamples in which they do not
    (left out of the interval). Record order does not matter. ValueError names the offending value.
    """
    lengths, widths = _checked("lengths", lengths), _checked("widths", widths)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; allowed: >= 1")
    grids = _grids(records, lengths, widths, seed)
    return {
        "points": [p for grid in grids for p in _points(grid, lengths, resamples, seed)],
        "margins": _margins(grids, resamples, seed),
        "margins_per_cr": _margins_per_cr(grids, resamples, seed),
        "paired": _paired(grids, lengths[-1], resamples, seed),
    }


def vote(answers: np.ndarray, gold: int) -> np.ndarray:
    """Credit of majority votes, shape (...): 1/k where gold is among the k most frequent answers, else 0.

    answers: (..., W) integer codes, −1 for a chain without an answer, which has no vote. Nobody answered: 0.
    """
    counts = (answers[..., :, None] == answers[..., None, :]).sum(-1) * (answers >= 0)  # (..., W)
    top = (counts == counts.max(-1, keepdims=True)) & (counts > 0)
    ties = (top / np.maximum(counts, 1)).sum(-1)  # each of the k top answers adds count · 1/count
    return (top & (answers == gold)).any(-1) / np.maximum(ties, 1)


def _checked(name: str, values: Sequence[int]) -> tuple[int, ...]:
    wrong = [v for v in values if v != int(v) or v < 1]
    if wrong or not len(values):
        raise ValueError(f"{name} is {list(values)}; allowed: one or more integers >= 1")
    return tuple(sorted({int(v) for v in values}))


def _check_record(record: dict) -> None:
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
        raise ValueError(f"a chain record lacks {missing}; required: {list(RECORD_KEYS)}")
    tokens, stride, samples = record["tokens"], record["stride"], len(record["live"])
    where = f"method {record['method']}, problem {record['problem']}, chain {record['chain']}"
    if tokens < 1 or stride < 1 or record["cr"] < 1:
        raise ValueError(f"tokens, stride, cr are {tokens}, {stride}, {record['cr']} ({where}); allowed: >= 1 each")
    fewest = (
        -(-tokens // stride) + 1
    )  # 0, stride, … and the end; one more if the end is also a multiple and was stored twice
    if not fewest <= samples <= fewest + 1 or len(record["reads"]) != samples:
        raise ValueError(
            f"live and reads hold {samples} and {len(record['reads'])} samples ({where}); allowed: {fewest} each "
            f"for {tokens} tokens at stride {stride}"
        )
    if not np.isfinite([*record["live"], *record["reads"], record["prompt_live"]]).all():
        raise ValueError(f"live, reads or prompt_live hold a value that is not finite ({where}); allowed: finite")


def _grids(records: Iterable[dict], lengths: tuple, widths: tuple, seed: int) -> list[Grid]:
    chains: dict = defaultdict(lambda: defaultdict(dict))  # (method, cr) → problem → chain → record
    gold: dict = {}
    for record in records:
        _check_record(record)
        of_problem = chains[record["method"], float(record["cr"])][record["problem"]]
        if record["chain"] in of_problem:
            key = [record[k] for k in ("method", "cr", "problem", "chain")]
            raise ValueError(f"(method, cr, problem, chain) {key} occurs twice; allowed: once")
        if gold.setdefault(record["problem"], record["gold"]) != record["gold"]:
            both = f"{gold[record['problem']]!r} and {record['gold']!r}"
            raise ValueError(f"problem {record['problem']} has gold answers {both}; allowed: one")
        of_problem[record["chain"]] = record
    if not chains:
        raise ValueError("there are no chain records; allowed: at least one")
    order = sorted(chains, key=lambda key: (key[0] != "vanilla", key[0] != "dms", *key))
    return [_grid(method, cr, chains[method, cr], lengths, widths, seed) for method, cr in order]


def _grid(method: str, cr: float, by_problem: dict, lengths: tuple, widths: tuple, seed: int) -> Grid:
    problems = tuple(sorted(by_problem))
    fewest = min(len(chains) for chains in by_problem.values())
    widths = tuple(w for w in widths if w <= fewest)
    credit, reads, peak = np.zeros((3, len(problems), len(lengths), len(widths)))
    solo = np.zeros(len(problems))
    for row, problem in enumerate(problems):
        records = [by_problem[problem][chain] for chain in sorted(by_problem[problem])]
        answers, gold = _answers(records, lengths)  # (L, chains)
        solo[row] = (answers[-1] == gold).mean()
        for column, w in enumerate(widths):
            subsets = _subsets(len(records), w, seed)  # (S, W)
            credit[row, :, column] = vote(answers[:, subsets], gold).mean(-1)
        prompt = np.mean([r["prompt_live"] for r in records])
        read, own = np.mean([_costs(r, lengths) for r in records], axis=0)  # (L,) each, mean over chains
        reads[row] = np.outer(read, widths)
        peak[row] = np.outer(own, widths) + prompt
    return Grid(method, cr, problems, widths, credit, reads, peak, solo)


def _answers(records: list[dict], lengths: tuple) -> tuple[np.ndarray, int]:
    """Answer codes (L, chains) of the chains cut at each length, −1 where there is none yet, and the gold code."""
    codes = {records[0]["gold"]: 0}
    code = np.array([-1 if r["answer"] is None else codes.setdefault(r["answer"], len(codes)) for r in records])
    finished = np.array([np.inf if r["finished_at"] is None else r["finished_at"] for r in records])
    return np.where(finished <= np.array(lengths)[:, None], code, -1), 0


def _costs(record: dict, lengths: tuple) -> np.ndarray:
    """Reads of the chain cut at each length, and its live items beyond the shared prompt: (2, L)."""
    tokens = record["tokens"]
    at = np.minimum(np.arange(len(record["live"])) * record["stride"], tokens)
    cut = np.minimum(lengths, tokens)
    live = np.interp(cut, at, np.maximum.accumulate(record["live"]))
    return np.stack([np.interp(cut, at, record["reads"]), np.maximum(live - record["prompt_live"], 0)])


@lru_cache(maxsize=256)
def _subsets(n: int, w: int, seed: int) -> np.ndarray:
    if w == 1 or comb(n, w) <= MAX_SUBSETS:
        return np.array(list(combinations(range(n), w)))
    return np.random.default_rng(seed).random((MAX_SUBSETS, n)).argsort(axis=1)[:, :w]


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over problems of values (P, K): row 0 as measured, then `resamples` rows with the problems drawn again.

    The draws depend on P and the seed only, so methods measured on the same problems share them: paired comparisons.
    """
    return _draws(len(values), resamples, seed) @ values


def _accuracies(credit: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Resampled means in points. Rounded, since equal accuracies must stay equal: a frontier drops the costlier one."""
    return np.round(100 * _resampled_means(credit, resamples, seed), 9)


@lru_cache(maxsize=8)
def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), draws]) / n  # (1 + resamples, n)


def _interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    defined = samples[~np.isnan(samples)]
    if not defined.size:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _plain(cr: float) -> float | int:
    return int(cr) if cr == int(cr) else cr


def _points(grid: Grid, lengths: tuple, resamples: int, seed: int) -> list[dict]:
    if not grid.widths:
        return []
    accuracy = _accuracies(grid.rows("credit", grid.problems), resamples, seed)
    low, high = np.percentile(accuracy[1:], [2.5, 97.5], axis=0)
    reads, peak = grid.reads.mean(0).ravel(), grid.peak.mean(0).ravel()
    rows = []
    for i, (length, width) in enumerate(product(lengths, grid.widths)):
        row = {"method": grid.method, "cr": _plain(grid.cr), "L": length, "W": width, "problems": len(grid.problems)}
        row |= {"accuracy": float(accuracy[0, i]), "low": float(low[i]), "high": float(high[i])}
        rows.append(row | {"reads": float(reads[i]), "peak": float(peak[i])})
    return rows


def _common(grids: Sequence[Grid]) -> list:
    return sorted(set.intersection(*(set(grid.problems) for grid in grids)))


def _compare(a: str, b: str, curves: tuple[list[Grid], list[Grid]], resamples: int, seed: int) -> list[dict]:
    """Margins of curve a over curve b, both axes and scales; a curve is the frontier over all points of its grids."""
    problems = _common([*curves[0], *curves[1]])
    if not problems or not all(any(grid.widths for grid in curve) for curve in curves):
        return []

    def columns(curve: list[Grid], name: str) -> np.ndarray:
        return np.concatenate([grid.rows(name, problems) for grid in curve], axis=1)

    accuracy = [_accuracies(columns(curve, "credit"), resamples, seed) for curve in curves]
    rows = []
    for axis in AXES:
        budgets = [_resampled_means(columns(curve, axis), resamples, seed) for curve in curves]
        frontiers = [padded_frontiers(x, y) for x, y in zip(budgets, accuracy, strict=True)]
        for scale in SCALES:
            values = margins_of_frontiers(*frontiers, scale)
            row = {"a": a, "b": b, "axis": axis, "scale": scale, "value": None, "low": None, "high": None}
            if not np.isnan(values[0]):
                low, high = _interval(values[1:])
                row |= {"value": float(values[0]), "low": low, "high": high}
            rows.append(row | {"na_share": float(np.isnan(values[1:]).mean()), "problems": len(problems)})
    return rows


def _margins(grids: list[Grid], resamples: int, seed: int) -> list[dict]:
    """dms and every other method against vanilla, and dms against every other method, each over all its CRs."""
    by_method: dict[str, list[Grid]] = defaultdict(list)
    for grid in grids:
        by_method[grid.method].append(grid)
    others = [m for m in by_method if m not in ("vanilla", "dms")]
    pairs = [("dms", "vanilla"), *((m, "vanilla") for m in others), *(("dms", m) for m in others)]
    return [
        row
        for a, b in pairs
        if a in by_method and b in by_method
        for row in _compare(a, b, (by_method[a], by_method[b]), resamples, seed)
    ]


def _margins_per_cr(grids: list[Grid], resamples: int, seed: int) -> list[dict]:
    vanilla = [grid for grid in grids if grid.method == "vanilla"]
    return [
        row | {"cr": _plain(grid.cr)}
        for grid in grids
        if grid.method == "dms" and vanilla
        for row in _compare("dms", "vanilla", ([grid], vanilla), resamples, seed)
    ]


def _paired(grids: list[Grid], length: int, resamples: int, seed: int) -> list[dict]:
    """Differences of one-chain accuracy at the largest L: dms at each CR against vanilla and all methods at that CR."""
    rows = []
    for dms in (grid for grid in grids if grid.method == "dms"):
        for other in grids:
            if other.method == "dms" or (other.method != "vanilla" and other.cr != dms.cr):
                continue
            problems = _common([dms, other])
            if not problems:
                continue
            difference = dms.rows("solo", problems) - other.rows("solo", problems)  # (P, 1)
            means = 100 * _resampled_means(difference, resamples, seed)[:, 0]
            low, high = _interval(means[1:])
            row = {"a": "dms", "b": other.method, "difference": float(means[0]), "low": low, "high": high}
            rows.append(row | {"cr": _plain(dms.cr), "L": length, "W": 1, "problems": len(problems)})
    return rows
