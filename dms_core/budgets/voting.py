"""From chain records to what each (method, CR) scores and costs, problem by problem (section 5.1, App. G).

A chain cut at L answers only if its answer was complete by then.  A chain whose record has "budget_length", the L for
which a method set its KV budget, stands for that L alone: at a smaller L the method would have evicted more.
"retrofit_seed" (0 where there is none) tells the retrofits of a method apart: the same problems, sampled from each.
"seconds", where records have them, are a cost as "reads" are.
At the peak the chains of a problem share "prompt_kept", what of the prompt is never evicted: every chain drops the rest
of it as its window moves on, and each holds its own copy of what has taken that room.  Older records have "prompt_live"
alone, what is live after the prefill, and count that as shared: too much where the prompt loses tokens afterwards.
W chains vote (math, multiple choice), or one correct chain among them is enough (pass@all, for programs):

    credit = 1/k where the gold answer is among the k most frequent ones, else 0      "vote"
    credit = 1 − C(n − c, W) / C(n, W)      "any": n chains, c of them correct at L; the mean over all choices of W
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from dms_core.budgets import bootstrap

AGGREGATES = ("vote", "any")
GOLD = 0  # the code of every correct answer
MAX_SUBSETS = 32  # choices of W chains averaged per problem; all of them where there are no more than this
CHAIN = ("method", "cr", "problem", "chain")  # what tells a record from the others, with its retrofit's seed
COSTS = ("tokens", "stride", "live", "reads", "prompt_tokens", "prompt_live")
RECORD_KEYS = (*CHAIN, "answer", "gold", "finished_at", *COSTS)


@dataclass(frozen=True)
class Scores:
    """What one (method, CR) scores and costs, problem by problem; with a budget for one L, at that L.

    Arrays begin with S retrofit seeds and P problems, which all seeds have.
    """

    method: str
    cr: float  # an int where it is whole
    task: str | None
    seeds: tuple[int, ...]  # ascending
    problems: tuple  # sorted identifiers
    lengths: tuple[int, ...]  # those of the requested lengths that the chains stand for, ascending, at least one
    widths: tuple[int, ...]  # the requested widths that every problem has chains for
    credit: np.ndarray  # (S, P, L, W) in [0, 1]
    costs: dict[str, np.ndarray]  # (S, P, L, W): KV "reads", "peak" tokens per KV head, and "seconds" where known
    alone: np.ndarray  # (S, P, L) credit of one chain, mean over chains
    ended: np.ndarray  # (S, P, L) share of the chains that were complete
    chains: np.ndarray  # (S, P) how many there are
    kept: np.ndarray  # (S, P) tokens of the prompt that are never evicted, counted once; NaN where records do not say

    def rows(self, name: str, problems: Sequence) -> np.ndarray:
        """The named array or cost for these problems, (S, len(problems), L·W), `alone` without W."""
        where = {problem: row for row, problem in enumerate(self.problems)}
        values = self.costs[name] if name in self.costs else getattr(self, name)
        return values[:, [where[p] for p in problems]].reshape(len(self.seeds), len(problems), -1)


def shared_problems(scores: Sequence[Scores]) -> list:
    """The problems that all have.  ValueError where several have several retrofit seeds, but not the same ones."""
    seeds = sorted({one.seeds for one in scores if len(one.seeds) > 1})
    if len(seeds) > 1:
        names = ", ".join(dict.fromkeys(one.method for one in scores if len(one.seeds) > 1))
        raise ValueError(f"retrofit seeds {seeds} of {names}: must be the same ones, or a single one of a method")
    return sorted(set.intersection(*(set(one.problems) for one in scores)))


def resampled(curve: Sequence[Scores], name: str, problems: Sequence, draws: tuple[int, int], half=None) -> np.ndarray:
    """Means (1 + resamples, configurations of the curve), row 0 as measured; see `bootstrap.means`.

    "credit" comes in points from 0 to 100, and rounded: equal accuracies must stay equal, since a frontier drops the
    costlier one.
    """
    means = np.concatenate([bootstrap.means(one.rows(name, problems), *draws, half) for one in curve], axis=1)
    return np.round(100 * means, 9).clip(0, 100) if name == "credit" else means


def vote(answers: np.ndarray, gold: int) -> np.ndarray:
    """Credit of majority votes, shape (...): 1/k where gold is among the k most frequent answers, else 0.

    answers: (..., W) integer codes, −1 for a chain without an answer, which has no vote. Nobody answered: 0.
    """
    counts = (answers[..., :, None] == answers[..., None, :]).sum(-1) * (answers >= 0)  # (..., W)
    top = (counts == counts.max(-1, keepdims=True)) & (counts > 0)
    ties = (top / np.maximum(counts, 1)).sum(-1)  # each of the k top answers adds count · 1/count
    return (top & (answers == gold)).any(-1) / np.maximum(ties, 1)


def _check_record(record: dict) -> None:
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
        raise ValueError(f"a chain record without {missing}: must have {list(RECORD_KEYS)}")
    tokens, stride, samples = record["tokens"], record["stride"], len(record["live"])
    where = f"method {record['method']}, problem {record['problem']}, chain {record['chain']}"
    if tokens < 1 or stride < 1 or record["cr"] < 1:
        raise ValueError(f"tokens, stride, cr {tokens}, {stride}, {record['cr']} ({where}): must be >= 1 each")
    fewest = -(-tokens // stride) + 1  # 0, stride, … and the end; one more if a multiple at the end is stored twice
    if not fewest <= samples <= fewest + 1 or len(record["reads"]) != samples:
        given = f"live, reads of {samples}, {len(record['reads'])} samples ({where})"
        raise ValueError(f"{given}: must be {fewest} each for {tokens} tokens at stride {stride}")
    if len(seconds := record.get("seconds", record["reads"])) != samples:
        raise ValueError(f"seconds of {len(seconds)} samples ({where}): must be {samples}, as reads are")
    if record.get("correct", False) is None:
        raise ValueError(f"correct None ({where}): must be true or false; grade the records first: dms grade")
    if not np.isfinite([*record["live"], *record["reads"], *seconds, record["prompt_live"], _shared(record)]).all():
        raise ValueError(f"live, reads, seconds, prompt_live or prompt_kept ({where}): must be finite")


def make_scores(records: Iterable[dict], lengths: tuple, widths: tuple, aggregate: str, seed: int) -> list[Scores]:
    """One Scores a (method, CR), or one a "budget_length" where records have it, if it is among ``lengths``.

    Sorted by these.  seed: of the choices of W chains.  ValueError names the offending record.
    """
    records = list(records)
    if not records:
        raise ValueError("no chain records: must be at least one")
    chains: dict = defaultdict(dict)  # (method, cr, budget length or 0) → (retrofit seed, problem, chain) → record
    posed: dict = {}  # (problem, field) → its gold answer; its identifier, where records have one
    for record in records:
        _check_record(record)
        if ("seconds" in record) != ("seconds" in records[0]):
            known = {key: record[key] for key in CHAIN}
            raise ValueError(f"record {known} {'with' if 'seconds' in record else 'without'} seconds: all or none must")
        for what, field in (("gold answers", "gold"), ("identifiers", "id")):
            first = posed.setdefault((record["problem"], field), record.get(field))
            if first != record.get(field):
                both = f"{first!r} and {record.get(field)!r}"
                raise ValueError(f"problem {record['problem']} with {what} {both}: must have one")
        of_length = chains[record["method"], float(record["cr"]), record.get("budget_length", 0)]
        key = (record.get("retrofit_seed", 0), record["problem"], record["chain"])
        if key in of_length:
            raise ValueError(f"(method, cr, problem, chain) {[record[k] for k in CHAIN]}: must occur once")
        of_length[key] = record
    if len(tasks := {record.get("task") for record in records}) > 1:
        raise ValueError(f"records of the tasks {sorted(map(str, tasks))}: must be of one task")
    served = [(key, tuple(n for n in lengths if key[2] in (0, n))) for key in sorted(chains)]
    scores = [_score(key, chains[key], own, widths, aggregate, seed) for key, own in served if own]
    if not scores:
        budgets = sorted({length for *_, length in chains})
        raise ValueError(f"lengths {list(lengths)}: must be among those of the KV budgets, {budgets}")
    return scores


def _score(key: tuple, chains: dict, lengths: tuple, widths: tuple, aggregate: str, seed: int) -> Scores:
    groups = defaultdict(list)  # (retrofit seed, problem) → records
    for *group, chain in sorted(chains):
        groups[tuple(group)].append(chains[*group, chain])
    seeds = sorted({one for one, _ in groups})
    problems = sorted(set.intersection(*({p for one, p in groups if one == s} for s in seeds)))
    if not problems:
        raise ValueError(f"retrofit seeds {seeds} of method {key[0]}, CR {key[1]:g}: must have a problem in common")
    widths = tuple(w for w in widths if w <= min(map(len, groups.values())))
    first = next(iter(chains.values()))
    names, shape = ["reads", "peak", *(["seconds"] if "seconds" in first else [])], (len(seeds), len(problems))
    credit, *costs = np.zeros((1 + len(names), *shape, len(lengths), len(widths)))
    (alone, ended), (counts, kept) = np.zeros((2, *shape, len(lengths))), np.zeros((2, *shape))
    for at in np.ndindex(shape):
        records = groups[seeds[at[0]], problems[at[1]]]
        answers, complete = _answers(records, lengths)  # (L, chains) each
        alone[at], ended[at], counts[at] = (answers == GOLD).mean(-1), complete.mean(-1), len(records)
        for column, w in enumerate(widths):
            credit[*at, :, column] = _credit(answers, w, aggregate, seed)
        kept[at] = np.mean([r.get("prompt_kept", np.nan) for r in records])
        prompts = {"peak": np.mean([_shared(r) for r in records])}  # counted once
        means = np.mean([_costs(r, lengths, names) for r in records], axis=0)  # (names, L), over chains
        for name, cost, mean in zip(names, costs, means, strict=True):
            cost[at] = np.outer(mean, widths) + prompts.get(name, 0)
    cr, named = int(key[1]) if key[1].is_integer() else key[1], dict(zip(names, costs, strict=True))
    about = (key[0], cr, first.get("task"), tuple(seeds), tuple(problems), lengths, widths)
    return Scores(*about, credit, named, alone, ended, counts, kept)


def _credit(answers: np.ndarray, width: int, aggregate: str, seed: int) -> np.ndarray:
    """Mean credit of ``width`` of the chains, answers (L, chains): (L,)."""
    if aggregate == "any":
        return any_correct((answers == GOLD).sum(-1), answers.shape[1], width)
    return vote(answers[:, _subsets(answers.shape[1], width, seed)], GOLD).mean(-1)


def any_correct(correct: np.ndarray, chains: int, width: int) -> np.ndarray:
    """Share of the choices of ``width`` of ``chains`` chains that hold one of the ``correct``; shape of ``correct``."""
    shares = [1 - comb(chains - int(c), width) / comb(chains, width) for c in correct.flat]
    return np.array(shares).reshape(correct.shape)


def _answers(records: list[dict], lengths: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Of the chains cut at each length, (L, chains) each: codes of answers, GOLD where correct, −1 where there is none
    yet; and whether the chain was complete."""
    codes: dict = {}
    code = np.array([_code(record, codes) for record in records])
    finished = np.array([np.inf if r["finished_at"] is None else r["finished_at"] for r in records])
    complete = finished <= np.array(lengths)[:, None]
    return np.where(complete, code, -1), complete


def _code(record: dict, codes: dict) -> int:
    if record["answer"] is None:
        return -1
    correct = record.get("correct", record["answer"] == record["gold"])  # older records have no such key
    return GOLD if correct else codes.setdefault(record["answer"], len(codes) + 1)


def _costs(record: dict, lengths: tuple, names: Sequence[str]) -> np.ndarray:
    """The named costs of the chain cut at each length, its peak without what it shares: (names, L)."""
    tokens = record["tokens"]
    at = np.minimum(np.arange(len(record["live"])) * record["stride"], tokens)
    cut = np.minimum(lengths, tokens)
    live = np.interp(cut, at, np.maximum.accumulate(record["live"]))
    own = {"peak": np.maximum(live - _shared(record), 0)}
    return np.stack([own[name] if name in own else np.interp(cut, at, record[name]) for name in names])


def _shared(record: dict) -> float:
    """Tokens of the prompt that all chains hold together."""
    return record.get("prompt_kept", record["prompt_live"])


@lru_cache(maxsize=256)
def _subsets(n: int, w: int, seed: int) -> np.ndarray:
    if w == 1 or comb(n, w) <= MAX_SUBSETS:
        return np.array(list(combinations(range(n), w)))
    return np.random.default_rng(seed).random((MAX_SUBSETS, n)).argsort(axis=1)[:, :w]
