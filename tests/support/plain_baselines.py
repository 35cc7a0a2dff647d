"""The training-free baselines by their definitions, on lists of floats: what a row's next token sees and what stays.

``STEPS[name](method, row, t)`` returns what token t sees, by query head, and leaves ``row.held``, by KV head.  Where
two tokens are worth so nearly the same that rounding decides which goes, ``row.close`` says so.
"""

import math
from dataclasses import dataclass, field

SCALE = 0.7
MASK64 = (1 << 64) - 1
NEAR = 1e-5  # worths that differ by less, relatively, may be ordered either way

Held = list[list[int]]


@dataclass
class PlainRow:
    """What one row was given: q a token (Hq, D), k and v (H, D)."""

    heads: int
    group: int
    max_new: int
    layer: int = 0
    q: list = field(default_factory=list)
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)
    prompt: int = 0  # tokens of the first prefill
    stream: int = 0
    held: Held = field(default_factory=list)  # positions
    received: list[dict[int, float]] = field(default_factory=list)  # attention so far, for H2O
    close: bool = False

    def __post_init__(self) -> None:
        self.held = self.held or [[] for _ in range(self.heads)]
        self.received = self.received or [{} for _ in range(self.heads)]

    def query_heads(self, head: int) -> range:
        return range(head * self.group, (head + 1) * self.group)

    def per_query(self, held: Held) -> Held:
        return [held[h] for h in range(self.heads) for _ in range(self.group)]

    def scores(self, t: int, head: int, tokens: list[int]) -> list[float]:
        h = head // self.group
        return [SCALE * sum(a * b for a, b in zip(self.q[t][head], self.k[j][h], strict=True)) for j in tokens]

    def weights(self, t: int, head: int, tokens: list[int]) -> dict[int, float]:
        """Attention of token ``t`` in a query head over ``tokens``."""
        return dict(zip(tokens, softmax(self.scores(t, head, tokens)), strict=True))

    def answer(self, t: int, seen: Held) -> list[list[float]]:
        """(Hq, D): of token t, whose query heads see these."""
        out = []
        for head, tokens in enumerate(seen):
            weights, values = self.weights(t, head, tokens), [self.v[j][head // self.group] for j in tokens]
            out.append(
                [sum(w * v for w, v in zip(weights.values(), x, strict=True)) for x in zip(*values, strict=True)]
            )
        return out

    def best(self, worth: dict[int, float], keep: int) -> list[int]:
        """The ``keep`` tokens that are worth most, of equals the first."""
        order = sorted(worth, key=lambda j: -worth[j])
        if 0 < keep < len(order):
            last, next_ = worth[order[keep - 1]], worth[order[keep]]
            self.close |= 0 < last - next_ <= NEAR * max(abs(last), abs(next_), 1e-3) and last < math.inf
        return order[:keep]


def softmax(scores: list[float]) -> list[float]:
    parts = [math.exp(x - max(scores)) for x in scores]
    return [x / sum(parts) for x in parts]


def budget_of(method, row: PlainRow) -> int:
    budget = max(1, int((row.prompt + row.max_new) / method.cr + 1e-6))
    return max(budget, row.prompt + 1) if method.protect else budget


def pinned_of(method, row: PlainRow) -> int:
    """How many first tokens may never go."""
    return row.prompt if method.protect else 0


def h2o(method, row: PlainRow, t: int) -> Held:
    budget, pinned, seen = budget_of(method, row), pinned_of(method, row), [[*x, t] for x in row.held]
    for h, tokens in enumerate(seen):
        received = row.received[h]
        for head in row.query_heads(h):
            for j, weight in row.weights(t, head, tokens).items():
                received[j] = received.get(j, 0.0) + weight
        stay = {*tokens[-((budget - pinned + 1) // 2) :], *range(min(pinned, t + 1))}
        hitters = {j: received[j] for j in tokens if j not in stay}
        row.held[h] = sorted([*row.best(hitters, budget - len(stay)), *stay])
    return row.per_query(seen)


def tova(method, row: PlainRow, t: int) -> Held:
    tokens, pinned = [*row.held[0], t], pinned_of(method, row)
    total = dict.fromkeys(tokens, 0.0)
    for head in range(row.heads * row.group):
        for j, weight in row.weights(t, head, tokens).items():
            total[j] += weight
    left = tokens
    if len(tokens) > budget_of(method, row):
        free = {j: x for j, x in total.items() if j >= pinned}
        left = sorted([*(j for j in tokens if j < pinned), *row.best(free, len(free) - 1)])
    row.held = [list(left) for _ in range(row.heads)]
    return row.per_query([tokens] * row.heads)


def streaming_llm(method, row: PlainRow, t: int) -> Held:
    budget = budget_of(method, row)
    sinks = max(min(method.sinks, budget - 1), pinned_of(method, row))
    row.held = [[j for j in range(t + 1) if j < sinks or j > t - (budget - sinks)] for _ in range(row.heads)]
    return row.per_query(row.held)


def splitmix64(x: int) -> int:
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def random_eviction(method, row: PlainRow, t: int) -> Held:
    """``row.held`` is in the order of the slots."""
    budget, pinned = budget_of(method, row), pinned_of(method, row)
    for h, tokens in enumerate(row.held):
        if t < budget:
            tokens.append(t)
        else:
            counter = (t << 24) + (row.layer << 12) + h
            drawn = splitmix64(row.stream + method.seed + counter * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
            tokens[pinned + drawn % (budget - pinned)] = t
    return row.per_query([list(x) for x in row.held])


def quest(method, row: PlainRow, t: int, decoded: bool = True) -> Held:
    size, tokens = method.page, list(range(t + 1))
    row.held = [list(tokens) for _ in range(row.heads)]
    if not decoded:
        return row.per_query(row.held)
    pinned, budget = -(-pinned_of(method, row) // size), -(-budget_of(method, row) // size)  # pages
    budget = max(budget, pinned + 1) if method.protect else budget
    pages = [tokens[i : i + size] for i in range(0, t + 1, size)]
    seen = []
    for head, q in enumerate(row.q[t]):
        bounds = {}
        for i, page in enumerate(pages[:-1]):
            channels = zip(q, *(row.k[j][head // row.group] for j in page), strict=True)
            bounds[i] = math.inf if i < pinned else sum(max(x * y for y in ys) for x, *ys in channels)
        chosen = [*row.best(bounds, budget - 1), len(pages) - 1]
        seen.append([j for i in sorted(chosen) for j in pages[i]])
    return seen


def snapkv(method, row: PlainRow, t: int) -> Held:
    seen, n = [[*x, t] for x in row.held], row.prompt
    row.held = [list(x) for x in seen]
    if t != n - 1:
        return row.per_query(seen)
    keep = min(n, max(1, int(n / method.cr + 1e-6)))
    window = min(method.window, max(1, keep // 2))
    for h in range(row.heads):
        votes = dict.fromkeys(range(n - window), 0.0)
        for head in row.query_heads(h):
            asked = [row.weights(i, head, list(range(i + 1))) for i in range(n - window, n)]
            got = [sum(x[j] for x in asked) for j in votes]
            for j in votes:
                near = got[max(0, j - method.kernel // 2) : j + method.kernel // 2 + 1]
                votes[j] += max(near) if method.pool == "max" else sum(near) / method.kernel
        row.held[h] = sorted(row.best(votes, keep - window)) + list(range(n - window, n))
    return row.per_query(seen)


def rkv(method, row: PlainRow, t: int) -> Held:
    budget = budget_of(method, row)
    row.held = [[*(_compressed(method, row, h, t, x) if len(x) >= budget else x), t] for h, x in enumerate(row.held)]
    return row.per_query(row.held)


def _compressed(method, row: PlainRow, h: int, t: int, tokens: list[int]) -> list[int]:
    pinned = pinned_of(method, row)
    room = budget_of(method, row) - pinned
    keep = room - min(method.buffer, max(1, room // 2))
    window = min(method.window, keep)
    stay = tokens[:pinned] + tokens[len(tokens) - window :]
    may_go = [j for j in tokens if j not in stay]
    losses = _redundancy(method, row, h, tokens)
    gains = _importance(method, row, h, range(t - window, t), may_go)
    worth = {j: method.mix * gains[j] - (1 - method.mix) * losses[j] for j in may_go}
    return sorted([*stay, *row.best(worth, keep - window)])


def _importance(method, row: PlainRow, h: int, asking: range, may_go: list[int]) -> dict[int, float]:
    total = [0.0] * len(may_go)
    for t in asking:
        logits = zip(*(row.scores(t, head, may_go) for head in row.query_heads(h)), strict=True)
        total = [x + y / len(asking) for x, y in zip(total, softmax([max(x) for x in logits]), strict=True)]
    half = method.kernel // 2
    return {j: max(total[max(0, i - half) : i + half + 1]) for i, j in enumerate(may_go)}


def _redundancy(method, row: PlainRow, h: int, tokens: list[int]) -> dict[int, float]:
    norms = {j: math.hypot(*row.k[j][h]) for j in tokens}
    total = dict.fromkeys(tokens, 0.0)
    for i in tokens:
        alike = {
            j: sum(a * b for a, b in zip(row.k[i][h], row.k[j][h], strict=True)) / norms[i] / norms[j]
            for j in tokens
            if j != i
        }
        same = [j for j in alike if alike[j] > method.threshold]
        row.close |= any(abs(x - method.threshold) < NEAR for x in alike.values())
        for j, x in alike.items():
            total[j] += 0 if same and j == same[-1] else x / len(tokens)
    return dict(zip(tokens, softmax(list(total.values())), strict=True))


STEPS = {
    "rkv": rkv,
    "h2o": h2o,
    "tova": tova,
    "streaming-llm": streaming_llm,
    "random": random_eviction,
    "quest": quest,
    "snapkv": snapkv,
}
