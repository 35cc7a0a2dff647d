"""From chain records to what each (method, CR) scores and costs, problem by problem (section 5.1, App. G).

A chain cut at L answers only if its answer was complete by then.  A chain whose record has "budget_length", the L for
which a method set its KV budget, stands for that L alone: at a smaller L the method would have evicted more.
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

AGGREGATES = ("vote", "any")
GOLD = 0  # the code of every correct answer
MAX_SUBSETS = 32  # choices of W chains averaged per problem; all of them where there are no more than this
CHAIN = ("method", "cr", "problem", "chain")  # what tells a record from the others
COSTS = ("tokens", "stride", "live", "reads", "prompt_tokens", "prompt_live")
RECORD_KEYS = (*CHAIN, "answer", "gold", "finished_at", *COSTS)


@dataclass(frozen=True)
class Scores:
    """What one (method, CR) scores and costs, problem by problem; with a budget for one L, at that L."""

    method: str
    cr: float  # an int where it is whole
    problems: tuple  # sorted identifiers
    lengths: tuple[int, ...]  # those of the requested lengths that the chains stand for, ascending, at least one
    widths: tuple[int, ...]  # the requested widths that every problem has chains for
    credit: np.ndarray  # (P, L, W) in [0, 1]
    reads: np.ndarray  # (P, L, W)
    peak: np.ndarray  # (P, L, W) tokens per KV head
    alone: np.ndarray  # (P, L) credit of one chain, mean over chains
    chains: np.ndarray  # (P,) how many there are

    def rows(self, name: str, problems: Sequence) -> np.ndarray:
        """The named array for these problems, (len(problems), L·W), `alone` without W."""
        where = {problem: row for row, problem in enumerate(self.problems)}
        return getattr(self, name)[[where[p] for p in problems]].reshape(len(problems), -1)


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
    if record.get("correct", False) is None:
        raise ValueError(f"correct None ({where}): must be true or false; grade the records first: dms grade")
    if not np.isfinite([*record["live"], *record["reads"], record["prompt_live"]]).all():
        raise ValueError(f"live, reads or prompt_live ({where}): must be finite")


def make_scores(records: Iterable[dict], lengths: tuple, widths: tuple, aggregate: str, seed: int) -> list[Scores]:
    """One Scores a (method, CR), or one a "budget_length" where records have it, if it is among ``lengths``.

    Sorted by these.  ValueError names the offending record.
    """
    chains: dict = defaultdict(lambda: defaultdict(dict))  # (method, cr, budget length or 0) → problem → chain → record
    gold: dict = {}
    tasks: set = set()
    for record in records:
        _check_record(record)
        of_length = chains[record["method"], float(record["cr"]), record.get("budget_length", 0)]
        of_problem = of_length[record["problem"]]
        if record["chain"] in of_problem:
            key = [record[k] for k in CHAIN]
            raise ValueError(f"(method, cr, problem, chain) {key}: must occur once")
        tasks.add(record.get("task"))
        if gold.setdefault(record["problem"], record["gold"]) != record["gold"]:
            both = f"{gold[record['problem']]!r} and {record['gold']!r}"
            raise ValueError(f"problem {record['problem']} with gold answers {both}: must have one")
        of_problem[record["chain"]] = record
    if not chains:
        raise ValueError("no chain records: must be at least one")
    if len(tasks) > 1:
        raise ValueError(f"records of the tasks {sorted(map(str, tasks))}: must be of one task")
    served = [(key, tuple(n for n in lengths if key[2] in (0, n))) for key in sorted(chains)]
    scores = [_score(key, chains[key], own, widths, aggregate, seed) for key, own in served if own]
    if not scores:
        budgets = sorted({length for *_, length in chains})
        raise ValueError(f"lengths {list(lengths)}: must be among those of the KV budgets, {budgets}")
    return scores


def _score(key: tuple, by_problem: dict, lengths: tuple, widths: tuple, aggregate: str, seed: int) -> Scores:
    problems = tuple(sorted(by_problem))
    fewest = min(len(chains) for chains in by_problem.values())
    widths = tuple(w for w in widths if w <= fewest)
    credit, reads, peak = np.zeros((3, len(problems), len(lengths), len(widths)))
    alone, chains = np.zeros((len(problems), len(lengths))), np.zeros(len(problems))
    for row, problem in enumerate(problems):
        records = [by_problem[problem][chain] for chain in sorted(by_problem[problem])]
        answers = _answers(records, lengths)  # (L, chains)
        alone[row], chains[row] = (answers == GOLD).mean(-1), len(records)
        for column, w in enumerate(widths):
            credit[row, :, column] = _credit(answers, w, aggregate, seed)
        prompt = np.mean([r["prompt_live"] for r in records])
        read, own = np.mean([_costs(r, lengths) for r in records], axis=0)  # (L,) each, mean over chains
        reads[row] = np.outer(read, widths)
        peak[row] = np.outer(own, widths) + prompt
    cr = int(key[1]) if key[1].is_integer() else key[1]
    return Scores(key[0], cr, problems, lengths, widths, credit, reads, peak, alone, chains)


def _credit(answers: np.ndarray, width: int, aggregate: str, seed: int) -> np.ndarray:
    """Mean credit of ``width`` of the chains, answers (L, chains): (L,)."""
    if aggregate == "any":
        return any_correct((answers == GOLD).sum(-1), answers.shape[1], width)
    return vote(answers[:, _subsets(answers.shape[1], width, seed)], GOLD).mean(-1)


def any_correct(correct: np.ndarray, chains: int, width: int) -> np.ndarray:
    """Share of the choices of ``width`` of ``chains`` chains that hold one of the ``correct``; shape of ``correct``."""
    shares = [1 - comb(chains - int(c), width) / comb(chains, width) for c in correct.flat]
    return np.array(shares).reshape(correct.shape)


def _answers(records: list[dict], lengths: tuple) -> np.ndarray:
    """Answer codes (L, chains) of the chains cut at each length: GOLD where correct, −1 where there is none yet."""
    codes: dict = {}
    code = np.array([_code(record, codes) for record in records])
    finished = np.array([np.inf if r["finished_at"] is None else r["finished_at"] for r in records])
    return np.where(finished <= np.array(lengths)[:, None], code, -1)


def _code(record: dict, codes: dict) -> int:
    if record["answer"] is None:
        return -1
    correct = record.get("correct", record["answer"] == record["gold"])  # older records have no such key
    return GOLD if correct else codes.setdefault(record["answer"], len(codes) + 1)


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
