"""Every baseline against its definition, transcribed for one row as a loop over its tokens."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_core.baselines import BASELINES, H2O, RKV, TOVA, Quest, RandomEviction, SnapKV, StreamingLLM, get_baseline
from dms_core.baselines.rkv import redundancy

WIDTH, HEADS, GROUP = 4, 2, 2
SCALE = 0.7
MAX_NEW = 14
MASK64 = (1 << 64) - 1


@dataclass
class Row:
    """What one row was given, token by token, and the layer's answers."""

    q: list = field(default_factory=list)  # (Hq, D) each
    k: list = field(default_factory=list)  # (H, D)
    v: list = field(default_factory=list)
    decoded: list = field(default_factory=list)  # was the token a decode step?
    out: list = field(default_factory=list)  # (Hq, D)
    prompt: int = 0
    stream: int = 0
    sinks: torch.Tensor | None = None  # (Hq,): one more logit a head

    def copy(self) -> "Row":
        lists = (list(x) for x in (self.q, self.k, self.v, self.decoded, self.out))
        return Row(*lists, self.prompt, self.stream, self.sinks)


def weights_of(row: Row, t: int, head: int, kept: list[int]) -> torch.Tensor:
    """Attention of token ``t`` in query head ``head`` over the tokens ``kept``."""
    keys = torch.stack([row.k[j][head // GROUP] for j in kept])
    scores = keys @ row.q[t][head] * SCALE
    if row.sinks is None:
        return scores.softmax(0)
    return torch.cat([scores, row.sinks[head, None]]).softmax(0)[:-1]


def answer(row: Row, t: int, kept: list[list[int]]) -> torch.Tensor:
    """(Hq, D): the token's dense attention over the tokens that each query head sees."""
    out = []
    for head, seen in enumerate(kept):
        values = torch.stack([row.v[j][head // GROUP] for j in seen])
        out.append(weights_of(row, t, head, seen) @ values)
    return torch.stack(out)


Held = list[list[int]]  # per KV head


def per_query(held: Held) -> Held:
    return [held[h // GROUP] for h in range(HEADS * GROUP)]


def budget_of(method, row: Row) -> int:
    budget = max(1, int((row.prompt + MAX_NEW) / method.cr + 1e-6))
    return max(budget, row.prompt + 1) if method.protect else budget


def pinned_of(method, row: Row) -> int:
    """How many first tokens may never go."""
    return row.prompt if method.protect else 0


def walk(row: Row, step: Callable) -> tuple[list, Held, list[int]]:
    """Outputs, tokens held at the end, and reads, of step(t, held) -> (seen per query head, held afterwards)."""
    held: Held = [[] for _ in range(HEADS)]
    outs, reads = [], [0] * HEADS
    for t in range(len(row.q)):
        seen, held = step(t, held)
        outs.append(answer(row, t, seen))
        if row.decoded[t]:
            for h in range(HEADS):
                reads[h] += len(set().union(*seen[h * GROUP : (h + 1) * GROUP]))
    return outs, held, reads


def h2o(method, row: Row):
    budget, pinned = budget_of(method, row), pinned_of(method, row)
    room = budget - pinned
    received = [[0.0] * len(row.q) for _ in range(HEADS)]

    def step(t, held):
        seen = [[*x, t] for x in held]
        left = []
        for h, tokens in enumerate(seen):
            for head in range(h * GROUP, (h + 1) * GROUP):
                for j, weight in zip(tokens, weights_of(row, t, head, tokens).tolist(), strict=True):
                    received[h][j] += weight
            stay = {*tokens[-((room + 1) // 2) :], *range(min(pinned, t + 1))}
            hitters = sorted((j for j in tokens if j not in stay), key=lambda j, h=h: -received[h][j])
            left.append(sorted([*hitters[: budget - len(stay)], *stay]))
        return per_query(seen), left

    return walk(row, step)


def tova(method, row: Row):
    budget = budget_of(method, row)

    def step(t, held):
        tokens = [*held[0], t]
        total = sum(weights_of(row, t, head, tokens) for head in range(HEADS * GROUP))
        worth = {j: float(x) for j, x in zip(tokens, total, strict=True) if j >= pinned_of(method, row)}
        left = [j for j in tokens if len(tokens) <= budget or j != min(worth, key=worth.get)]
        return per_query([tokens] * HEADS), [left] * HEADS

    return walk(row, step)


def streaming_llm(method, row: Row):
    budget = budget_of(method, row)
    sinks = max(min(method.sinks, budget - 1), pinned_of(method, row))

    def step(t, held):
        tokens = [j for j in range(t + 1) if j < sinks or j > t - (budget - sinks)]
        return per_query([tokens] * HEADS), [tokens] * HEADS

    return walk(row, step)


def splitmix64(x: int) -> int:
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def random_eviction(method, row: Row, layer: int = 3):
    budget, pinned = budget_of(method, row), pinned_of(method, row)

    def step(t, held):
        held = [list(x) for x in held]
        for h in range(HEADS):
            if t < budget:
                held[h].append(t)
            else:
                counter = (t << 24) + (layer << 12) + h
                drawn = splitmix64(row.stream + method.seed + counter * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
                held[h][pinned + drawn % (budget - pinned)] = t
        return per_query(held), held

    return walk(row, step)


def quest(method, row: Row):
    size, pinned = method.page, -(-pinned_of(method, row) // method.page)  # pages
    budget = (
        max(-(-budget_of(method, row) // size), pinned + 1) if method.protect else -(-budget_of(method, row) // size)
    )

    def step(t, held):
        tokens = list(range(t + 1))
        if not row.decoded[t]:
            return [tokens] * (HEADS * GROUP), [tokens] * HEADS
        pages = [tokens[i : i + size] for i in range(0, t + 1, size)]
        seen = []
        for head in range(HEADS * GROUP):
            bounds = []
            for page in pages[:-1]:
                keys, q = torch.stack([row.k[j][head // GROUP] for j in page]), row.q[t][head]
                bounds.append(float(torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()))
            order = sorted(range(len(bounds)), key=lambda i, bounds=bounds: (i >= pinned, -bounds[i]))
            chosen = [*order[: budget - 1], len(pages) - 1]
            seen.append([j for i in sorted(chosen) for j in pages[i]])
        return seen, [tokens] * HEADS

    return walk(row, step)


def snapkv(method, row: Row):
    n = row.prompt
    keep = min(n, max(1, int(n / method.cr + 1e-6)))
    window = min(method.window, max(1, keep // 2))

    def select() -> Held:
        left = []
        for h in range(HEADS):
            votes = [0.0] * (n - window)
            for head in range(h * GROUP, (h + 1) * GROUP):
                got = sum(
                    weights_of(row, t, head, [*range(t + 1), *range(t + 1, n)][: t + 1])[: n - window]
                    for t in range(n - window, n)
                )
                for j in range(n - window):
                    near = got[max(0, j - method.kernel // 2) : j + method.kernel // 2 + 1]
                    votes[j] += float(near.max() if method.pool == "max" else near.sum() / method.kernel)
            best = sorted(range(n - window), key=lambda j, votes=votes: -votes[j])[: keep - window]
            left.append(sorted(best) + list(range(n - window, n)))
        return left

    def step(t, held):
        seen = [[*x, t] for x in held]
        return per_query(seen), select() if t == n - 1 else seen

    return walk(row, step)


def rkv(method, row: Row):
    budget, pinned = budget_of(method, row), pinned_of(method, row)
    room = budget - pinned
    keep = room - min(method.buffer, max(1, room // 2))
    window = min(method.window, keep)

    def importance(h: int, t: int, may_go: list[int]) -> list[float]:
        keys, total = torch.stack([row.k[j][h] for j in may_go]), torch.zeros(len(may_go))
        for asks in range(t - window, t):
            logits = [keys @ row.q[asks][head] * SCALE for head in range(h * GROUP, (h + 1) * GROUP)]
            total += torch.stack(logits).max(0).values.softmax(0) / window
        half = method.kernel // 2
        return [float(total[max(0, i - half) : i + half + 1].max()) for i in range(len(may_go))]

    def redundancy(h: int, tokens: list[int]) -> dict[int, float]:
        total = dict.fromkeys(tokens, 0.0)
        for i in tokens:
            alike = {j: float(torch.cosine_similarity(row.k[i][h], row.k[j][h], 0)) for j in tokens if j != i}
            same = [j for j in alike if alike[j] > method.threshold]
            for j, x in alike.items():
                total[j] += 0 if same and j == same[-1] else x / len(tokens)
        shares = torch.tensor(list(total.values())).softmax(0).tolist()
        return dict(zip(tokens, shares, strict=True))

    def compress(h: int, t: int, tokens: list[int]) -> list[int]:
        stay = tokens[:pinned] + tokens[len(tokens) - window :]
        may_go = [j for j in tokens if j not in stay]
        gains, losses = importance(h, t, may_go), redundancy(h, tokens)
        worth = {j: method.mix * x - (1 - method.mix) * losses[j] for j, x in zip(may_go, gains, strict=True)}
        return sorted(stay + sorted(may_go, key=lambda j: -worth[j])[: keep - window])

    def step(t, held):
        seen = [[*(compress(h, t, x) if len(x) >= budget else x), t] for h, x in enumerate(held)]
        return per_query(seen), seen

    return walk(row, step)


ORACLES = {
    "rkv": rkv,
    "h2o": h2o,
    "tova": tova,
    "streaming-llm": streaming_llm,
    "random": random_eviction,
    "quest": quest,
    "snapkv": snapkv,
}


class Play:
    """A layer and its rows' histories: a left-padded prompt, decode steps with idle rows, forks, a second turn."""

    def __init__(self, method, lengths: list[int], seed: int, sinks: bool = False) -> None:
        self.method, self.g, self.rng = method, torch.Generator().manual_seed(seed), random.Random(seed)
        self.sinks = torch.randn(HEADS * GROUP, generator=self.g) if sinks else None
        self.rows = [Row(stream=self.rng.getrandbits(62), sinks=self.sinks) for _ in lengths]
        self.layer = method.layer(method, MAX_NEW, 3)
        self.layer.lazy_initialization(torch.empty(len(lengths), HEADS, 0, WIDTH))
        self.layer.stream[:] = torch.tensor([row.stream for row in self.rows])[:, None]
        width = max(lengths)
        self.feed(torch.arange(width) >= width - torch.tensor(lengths)[:, None], decoded=False)

    def feed(self, valid: torch.Tensor, decoded: bool) -> None:
        batch, tokens = valid.shape
        q = torch.randn(batch, HEADS * GROUP, tokens, WIDTH, generator=self.g) * 2
        k, v = (torch.randn(batch, HEADS, tokens, WIDTH, generator=self.g) for _ in range(2))
        self.layer.update(k, v)
        out = self.layer.attend(q, k, v, None, valid, SCALE, self.sinks)
        for b, row in enumerate(self.rows):
            row.prompt = row.prompt or int(valid[b].sum())
            for t in valid[b].nonzero()[:, 0].tolist():
                for x, new in ((row.q, q), (row.k, k), (row.v, v), (row.out, out)):
                    x.append(new[b, :, t])
                row.decoded.append(decoded)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.feed(torch.rand(len(self.rows), 1, generator=self.g) < 0.8, decoded=True)

    def rearrange(self) -> None:
        """Rows are chosen anew, some twice, by selection, or by putting them into another layer."""
        source = torch.tensor([self.rng.randrange(len(self.rows)) for _ in range(self.rng.randint(1, 4))])
        if self.rng.random() < 0.5:
            self.layer.batch_select_indices(source)
        else:
            other = self.method.layer(self.method, MAX_NEW, 3)
            other.lazy_initialization(torch.empty(len(source) + 1, HEADS, 0, WIDTH))
            other.put(torch.arange(len(source)) + 1, self.layer, source)
            other.batch_select_indices(torch.arange(len(source)) + 1)
            self.layer = other
        self.rows = [self.rows[i].copy() for i in source.tolist()]

    def check(self) -> None:
        for b, row in enumerate(self.rows):
            outs, held, reads = ORACLES[self.method.name](self.method, row)
            torch.testing.assert_close(torch.stack(row.out), torch.stack(outs), rtol=1e-4, atol=1e-5)
            assert self.layer.live[b].tolist() == [len(x) for x in held]
            assert self.layer.reads[b].tolist() == reads
            assert int(self.layer.seen[b]) == len(row.q)


SHARED = {"cr": st.floats(1, 9), "protect": st.booleans()}
METHODS = {
    "h2o": st.builds(H2O, **SHARED),
    "tova": st.builds(TOVA, **SHARED),
    "streaming-llm": st.builds(StreamingLLM, **SHARED, sinks=st.integers(0, 5)),
    "random": st.builds(RandomEviction, **SHARED, seed=st.integers(0, 9)),
    "quest": st.builds(Quest, **SHARED, page=st.integers(1, 5)),
    "rkv": st.builds(
        RKV,
        **SHARED,
        buffer=st.integers(1, 6),
        window=st.integers(1, 4),
        kernel=st.sampled_from([1, 3, 5]),
        mix=st.sampled_from([0.1, 0.5, 0.9]),
        threshold=st.sampled_from([0.0, 0.5]),
    ),
    "snapkv": st.builds(
        SnapKV,
        cr=st.floats(1, 4),
        window=st.integers(1, 5),
        kernel=st.sampled_from([1, 3, 5]),
        pool=st.sampled_from(["max", "avg"]),
    ),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=20)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 18), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    sinks=st.booleans(),
)
def test_layer_equals_its_definition(name, data, lengths, seed, sinks):
    play = Play(data.draw(METHODS[name]), lengths, seed, sinks)
    play.decode(6)
    play.rearrange()
    play.decode(5)
    play.feed(torch.rand(len(play.rows), 4, generator=play.g) < 0.7, decoded=False)  # another turn
    play.decode(4)
    play.check()


@pytest.mark.parametrize("name", BASELINES)
def test_compression_1_is_dense_attention(name):
    play = Play(get_baseline(name)(1.0), [12, 5, 9], 0)
    play.decode(MAX_NEW)
    for b, row in enumerate(play.rows):
        for t, out in enumerate(row.out):
            torch.testing.assert_close(out, answer(row, t, per_query([list(range(t + 1))] * HEADS)))
        assert play.layer.live[b].tolist() == [len(row.q)] * HEADS
        assert play.layer.reads[b].tolist() == [sum(t + 1 for t, d in enumerate(row.decoded) if d)] * HEADS


EVICTING = sorted(set(BASELINES) - {"quest", "snapkv"})


@pytest.mark.parametrize("name", sorted(set(EVICTING) - {"rkv"}))
@pytest.mark.parametrize("cr", [2.0, 7.9])
def test_live_tokens_never_exceed_the_budget(name, cr):
    play = Play(get_baseline(name)(cr), [18, 5, 9], 0)
    budgets = [int((row.prompt + MAX_NEW) / cr) for row in play.rows]
    for step in range(MAX_NEW):
        for b, row in enumerate(play.rows):
            assert play.layer.live[b].tolist() == [min(row.prompt + step, budgets[b])] * HEADS
        play.feed(torch.ones(3, 1, dtype=torch.bool), decoded=True)
    assert play.layer.capacity <= max(budgets) + 2


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("cr", [1.5, 2.0, 9.0])
def test_a_protected_prompt_stays_in_every_head_within_the_budget(name, cr):
    play = Play(get_baseline(f"{name}-protected")(cr), [18, 5, 9], 0)
    prompts = play.layer.keys.clone()
    play.decode(MAX_NEW)
    play.feed(torch.ones(3, 4, dtype=torch.bool), decoded=False)  # a later turn's prompt competes
    for b, row in enumerate(play.rows):
        budget = max(int((row.prompt + MAX_NEW) / cr + 1e-6), row.prompt + 1)
        assert torch.equal(play.layer.keys[b, :, : row.prompt], prompts[b, :, : row.prompt])
        assert int(play.layer.live[b].max()) <= budget == int(play.layer.budget[b])
        assert int(play.layer.pinned[b]) == row.prompt
    play.layer.clear(torch.tensor([0, 1, 2]))
    assert play.layer.pinned.tolist() == [0, 0, 0]


def test_rkv_lets_a_buffer_fill_and_compresses_it_at_once():
    play = Play(RKV(2.0, buffer=4, window=2), [10], 0)  # budget 12, of which 8 stay
    live = []
    for _ in range(MAX_NEW):
        play.feed(torch.ones(1, 1, dtype=torch.bool), decoded=True)
        live.append(play.layer.live[0].tolist())
    assert live == [[n] * HEADS for n in (11, 12, 9, 10, 11, 12, 9, 10, 11, 12, 9, 10, 11, 12)]
    play.decode(1)
    assert int(play.layer.held[0]) < 12 and play.layer.peak.tolist() == [[12] * HEADS]


def test_rkv_lets_off_the_latest_of_keys_that_say_the_same():
    keys = torch.eye(4)[[0, 1, 1, 1, 2, 3]][None, None]
    there = torch.arange(6)[None] < 5
    expected = torch.tensor([0, 2 / 5, 1 / 5, 0, 0]).softmax(0)  # the two earlier ones resemble two and one other
    torch.testing.assert_close(redundancy(keys, there, 0.5)[0, 0], torch.cat([expected, torch.zeros(1)]))


def test_random_eviction_draws_every_slot_equally_often_and_otherwise_in_each_stream_layer_and_head():
    method = RandomEviction(1.0)
    draws = []
    for index in range(2):
        layer = method.layer(method, 0, index)
        layer.lazy_initialization(torch.empty(400, HEADS, 0, WIDTH))
        layer.stream = torch.arange(400)[:, None]
        layer.budget[:] = 10
        for seen in range(10, 60):
            layer.seen[:] = seen
            draws.append(layer._place())
    draws = torch.stack(draws).view(2, 50, 400, HEADS)
    counts = draws.flatten().bincount(minlength=10)  # 80,000 draws: 8,000 a slot, standard deviation 85
    assert len(counts) == 10 and (counts - 8000).abs().max() < 5 * 85
    for other in (draws.flip(0), draws.roll(1, 1), draws.roll(1, 2), draws.flip(3)):
        assert abs((draws == other).float().mean() - 0.1) < 0.01


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: get_baseline("h20"), r"baseline 'h20': must be one of \['h2o', 'h2o-protected', 'quest'"),
        (lambda: get_baseline("snapkv-protected"), "baseline 'snapkv-protected': must be one of"),
        (lambda: TOVA(0.5), "compression ratio 0.5: must be >= 1"),
        (lambda: StreamingLLM(2, sinks=-1), "sinks -1: must be >= 0"),
        (lambda: Quest(2, page=0), "page 0: must be >= 1"),
        (lambda: SnapKV(2, protect=True), "protect True: must be False"),
        (lambda: RKV(2, buffer=0), "buffer 0: must be >= 1"),
        (lambda: RKV(2, kernel=2), "kernel 2: must be odd and >= 1"),
        (lambda: RKV(2, mix=1.5), "mix 1.5: must be in 0..1"),
        (lambda: SnapKV(2, window=0), "window 0: must be >= 1"),
        (lambda: SnapKV(2, kernel=4), "kernel 4: must be odd and >= 1"),
        (lambda: SnapKV(2, pool="sum"), "pool 'sum': must be 'max' or 'avg'"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
