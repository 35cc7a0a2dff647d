"""Every baseline's cache: 3,500 steps in any order, against the methods' definitions on lists of floats."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from cache_machine import GROUP, WHICH, WIDTH, CacheMachine, Row, Twin, bytes_of, randoms
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test
from plain_baselines import SCALE, STEPS, PlainRow, budget_of, pinned_of

from dms_core.baselines import BASELINES, H2O, RKV, TOVA, Quest, RandomEviction, SnapKV, StreamingLLM
from dms_core.baselines import base as base_module
from dms_core.baselines.dmc_cache import DMCLayer

HEADS, MAX_NEW = 2, 14
EXAMPLES, STEPS_EACH = 10, 50
EVICTING = ("h2o", "tova", "streaming-llm", "random", "rkv")  # in decode steps
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


@dataclass
class Told(Row):
    plain: PlainRow = field(default_factory=lambda: PlainRow(HEADS, GROUP, MAX_NEW))

    def copy(self) -> "Told":
        plain = self.plain
        lists = {name: list(getattr(plain, name)) for name in ("q", "k", "v")}
        own = {"held": [list(x) for x in plain.held], "received": [dict(x) for x in plain.received]}
        return Told(**vars(super().copy()), plain=replace(plain, **lists, **own))


class BaselineMachine(CacheMachine):
    steps = close = 0
    model = None  # any that is prepared: its caches learn shapes from the keys
    name = ""

    @initialize(
        data=st.data(),
        batches=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        block=st.sampled_from([1, 3, 256]),
        seed=st.integers(0, 2**31),
    )
    def start(self, data, batches, block, seed):  # block: queries of a prefill that are taken together
        self.block, base_module.BLOCK = base_module.BLOCK, block
        self.method, self.too_close = data.draw(METHODS[self.name]), []
        self.begin(seed, batches)

    def teardown(self):
        if hasattr(self, "block"):
            base_module.BLOCK = self.block

    def new_cache(self):
        return self.method(self.model, MAX_NEW)

    def heads(self, index: int) -> int:
        return HEADS

    def new_row(self, index: int) -> Told:
        return Told(HEADS, plain=PlainRow(HEADS, GROUP, MAX_NEW, index))

    def feed(self, twin: Twin, valid: list[list[bool]], share: float) -> None:
        super().feed(twin, valid, share)
        if self.too_close:  # rounding may decide what such a row keeps
            type(self).close += len(self.too_close)
            self.empty(twin, sorted(set(self.too_close)))
            self.too_close = []

    def feed_layer(self, twin: Twin, index: int, valid: list[list[bool]], share: float) -> None:
        layer, rows, mask = twin.cache.layers[index], twin.layers[index], torch.tensor(valid)
        batch, tokens = mask.shape
        q = randoms(self.g, batch, HEADS * GROUP, tokens, WIDTH) * 2
        k, v = (randoms(self.g, batch, HEADS, tokens, WIDTH) for _ in "kv")
        twin.cache.update(k, v, index)
        given = None if mask.all() and self.rng.random() < 0.5 else mask
        out = layer.attend(q, k, v, None, given, SCALE)
        lists = [x.transpose(1, 2).tolist() for x in (q, k, v)]
        for b, row in enumerate(rows):
            if new := [t for t in range(tokens) if valid[b][t]]:
                expected = self.tell(row, [[x[b][t] for t in new] for x in lists], decoded=tokens == 1)
                if row.plain.close:
                    self.too_close.append(b)
                else:
                    torch.testing.assert_close(out[b, :, new].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)

    def tell(self, row: Told, given: list, decoded: bool) -> torch.Tensor:
        """Give a row its new tokens: what it should answer, (n, Hq, D)."""
        plain, answers = row.plain, []
        plain.prompt, plain.stream = plain.prompt or len(given[0]), row.stream
        for new in zip(*given, strict=True):
            for held, x in zip((plain.q, plain.k, plain.v), new, strict=True):
                held.append(x)
            t = len(plain.q) - 1
            seen = STEPS[self.name](self.method, plain, t, *([decoded] if self.name == "quest" else []))
            answers.append(plain.answer(t, seen))
            for h, heads in enumerate(plain.query_heads(h) for h in range(HEADS)):
                row.reads[h] += len({j for head in heads for j in seen[head]}) * (decoded and t > 0)
                if self.name != "snapkv" or t >= plain.prompt - 1:  # its prompt is chosen from at its end
                    row.peak[h] = max(row.peak[h], len(plain.held[h]))
        row.tokens = plain.q
        return torch.tensor(answers)

    @rule(which=WHICH)
    def crop(self, which):
        twin = self.twins[which]
        if twin.columns:
            with pytest.raises(ValueError, match="was made with slack 0"):
                twin.cache.crop(-1)
        self.did(twin)

    def lasting(self, row: Told, index: int) -> list[int]:
        """All where steps evict nothing, else the first ones; these are there at every look."""
        plain = row.plain
        if self.name in ("quest", "snapkv"):
            return [len(held) for held in plain.held]
        first = pinned_of(self.method, plain) if plain.q else 0
        if self.name == "streaming-llm" and plain.q:
            first = max(first, min(self.method.sinks, budget_of(self.method, plain) - 1))
        assert all({j for j in range(len(plain.q)) if j < first} <= set(held) for held in plain.held)
        return [min(first, len(held)) for held in plain.held]

    def check_layer(self, twin: Twin, index: int) -> None:
        layer, rows = twin.cache.layers[index], twin.layers[index]
        more = [getattr(layer, name) for name in ("bounds", "queries") if hasattr(layer, name)]
        assert layer.nbytes == bytes_of(layer.keys, layer.values, *more)
        numbers = torch.cat([layer.keys, layer.values], -1).tolist()
        free = layer.free.tolist() if hasattr(layer, "free") else None
        for b, row in enumerate(rows):
            plain = row.plain
            assert layer.live[b].tolist() == [len(x) for x in plain.held]
            assert not plain.q or int(layer.pinned[b]) == pinned_of(self.method, plain)
            if plain.q and self.name not in ("quest", "snapkv"):
                assert int(layer.budget[b]) == budget_of(self.method, plain) >= len(plain.held[0])
            assert layer.stream[b].tolist() == [row.stream] * row.heads
            for h, held in enumerate(plain.held):
                # Where eviction follows a step, the slot of the next token may lie between the others.
                slots = [s for s in range(len(held) + 1) if s != free[b][h]] if free else range(len(held))
                wanted = Counter((*plain.k[j][h], *plain.v[j][h]) for j in held)
                assert Counter(tuple(numbers[b][h][s]) for s in slots) == wanted


@pytest.mark.every(4)
@pytest.mark.parametrize("name", BASELINES)
def test_caches_hold_what_the_method_keeps(name, tiny_model):
    machine = type(f"{name} machine", (BaselineMachine,), {"name": name, "model": tiny_model(), "steps": 0})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS_EACH + 1))
    assert machine.steps >= EXAMPLES * STEPS_EACH
    assert machine.close <= machine.steps / 100


# Faults that the machine found, one by one.


def fed(layer, tokens: int, valid: list[list[bool]] | None = None, batch: int = 2, said=None, dtype=torch.float32):
    """Give a layer the same numbers each time; returns its answers (B, Hq, T, D)."""
    if not layer.is_initialized:
        layer.lazy_initialization(torch.empty(batch, HEADS, 0, WIDTH, dtype=dtype))
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (randoms(g, batch, n, tokens, WIDTH).to(dtype) for n in (HEADS * GROUP, HEADS, HEADS))
    layer.update(k, v)
    return layer.attend(
        q, k, v, said, torch.ones(batch, tokens).bool() if valid is None else torch.tensor(valid), SCALE
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_cache_that_was_reset_selects_rows_as_a_new_one(name):
    layers = []
    for times in (1, 2):
        layer = BASELINES[name].layer(BASELINES[name](2.0), MAX_NEW, 0)
        for _ in range(times):
            layer.reset()
            fed(layer, 9)
            fed(layer, 1)
        layer.batch_select_indices(torch.tensor([1, 0, 1]))
        layers.append(layer)
    for tokens in (1, 1, 5):
        assert torch.equal(*(fed(layer, tokens, batch=3) for layer in layers))


@pytest.mark.parametrize("method", [*(BASELINES[name](2.0) for name in EVICTING), Quest(2.0, page=4)], ids=str)
def test_a_row_may_begin_after_a_call_that_was_all_padding(method):
    one, other = (method.layer(method, MAX_NEW, 0) for _ in range(2))
    fed(one, 3, [[False] * 3] * 2)
    for _ in range(6):
        assert torch.equal(fed(one, 1), fed(other, 1))


@pytest.mark.parametrize("name", ["tova", "h2o", "rkv"])
def test_rows_go_into_a_cache_of_another_dtype(name):
    one, other = (BASELINES[name].layer(BASELINES[name](2.0), MAX_NEW, 0) for _ in range(2))
    fed(one, 9)
    fed(other, 4, dtype=torch.bfloat16)
    other.put(torch.tensor([0]), one, torch.tensor([1]))
    n = int(one.live[1, 0])
    assert torch.equal(other.keys[0, :, :n], one.keys[1, :, :n].bfloat16())


@pytest.mark.parametrize("name", BASELINES)
def test_rows_that_never_had_a_token_go_into_a_cache_in_use(name):
    one, other = (BASELINES[name].layer(BASELINES[name](2.0), MAX_NEW, 0) for _ in range(2))
    fed(one, 9)
    other.lazy_initialization(torch.empty(1, HEADS, 0, WIDTH))
    one.put(torch.tensor([1]), other, torch.tensor([0]))
    assert one.live[1].tolist() == one.reads[1].tolist() == [0] * HEADS and one.live[0].min() > 0


def test_padding_between_tokens_changes_nothing_in_dmc():
    said = torch.tensor([False, True, True, False, True]).expand(2, HEADS, -1)
    whole, holes = DMCLayer(), DMCLayer()
    fed(whole, 5, said=said)
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.zeros(2, n, 7, WIDTH) for n in (HEADS * GROUP, HEADS, HEADS))
    valid = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool().expand(2, -1)
    for x, n in ((q, HEADS * GROUP), (k, HEADS), (v, HEADS)):
        x[:, :, valid[0]] = randoms(g, 2, n, 5, WIDTH)
    spread = torch.ones(2, HEADS, 7).bool()  # padding goes on with the open entry
    spread[:, :, valid[0]] = said
    holes.lazy_initialization(k[:, :, :0])
    holes.update(k, v)
    holes.attend(q, k, v, spread, valid, SCALE)
    assert holes.live.tolist() == whole.live.tolist() == [[2, 2], [2, 2]]
    assert torch.equal(holes.keys[:, :, :2], whole.keys[:, :, :2])
