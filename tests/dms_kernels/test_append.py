"""One decode step on the rows of a cache: torch and Triton against lists of live positions."""

import os
from dataclasses import fields

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dms_core.visibility import align_decisions, visible
from dms_kernels import rows as reference
from dms_kernels.rows import Rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave")


class NoWaiting(TorchDispatchMode):
    """Fails on operations that would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def backend(name: str):
    if name == "torch":
        return reference
    if name == "numba":
        pytest.importorskip("numba")
        from dms_kernels.cpu import step

        return step
    pytest.importorskip("triton")
    from dms_kernels.gpu import append

    return append


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


class NaiveAppend:
    """For each row, what its gates said, one entry a token; live positions follow from visibility.py."""

    def __init__(self, rows: int, window: int, lag: int) -> None:
        self.window, self.lag = window, lag
        self.said: list[list[bool]] = [[] for _ in range(rows)]

    def append(self, evict, active) -> None:
        for row, said in enumerate(self.said):
            if active[row]:
                said.append(bool(evict[row]))

    def live(self, row: int) -> set[int]:
        """Positions the row's last query sees."""
        said = torch.tensor(self.said[row], dtype=torch.bool)[None, None]
        if said.shape[-1] == 0:
            return set()
        undecided = self.lag >= said.shape[-1]
        evicted = torch.zeros_like(said) if undecided else align_decisions(said, self.lag, None, False)
        return set(visible(evicted, self.window)[0, 0, -1].nonzero()[:, 0].tolist())


def held(rows: Rows, row: int) -> list[int]:
    """Positions a row holds: every token's key is its position, its value the negative."""
    table, page = rows.table[row].tolist(), rows.page
    places = [table[s // page] * page + s % page for s in range(int(rows.length[row]))]
    keys, values = (pool.flatten(0, 1)[places] for pool in (rows.keys, rows.values))
    assert (keys == keys[:, :1]).all() and torch.equal(values, -keys)
    return keys[:, 0].int().tolist()


def check_pages(rows: Rows) -> None:
    """Every page is on the stack or belongs to one row, and no row has more than it needs."""
    used = [int(p) for r in range(len(rows.length)) for p in rows.table[r, : int(rows.owned[r])]]
    free = rows.free[: int(rows.free_count)].tolist()
    assert sorted(used + free) == list(range(len(rows.free)))
    assert torch.equal(rows.owned, (rows.length + rows.page - 1) // rows.page)


def tokens(rows: Rows, width: int):
    """k, v (R, D) that spell each row's next position."""
    k = rows.seen[:, None].float().expand(-1, width)
    return k, -k


def random_flags(count: int, share: float, g: torch.Generator, device="cpu"):
    return (torch.rand(count, generator=g) < share).to(device)


def walk(name, device, count, page, window, lag, share, steps, seed, width=3, spare=0):
    """Random steps; the live set must be the visible set after each."""
    ours, g = backend(name), torch.Generator().manual_seed(seed)
    columns = -(-(steps + 1) // page) + spare
    rows = Rows.empty(count, count * columns, columns, page, window, torch.empty(0, width, device=device))
    rows.keys.fill_(float("nan"))
    rows.values.fill_(float("nan"))
    oracle = NaiveAppend(count, window, lag)
    for step in range(steps):
        evict, active = random_flags(count, share, g), random_flags(count, 0.85, g)
        with NoWaiting():
            ours.append(rows, *tokens(rows, width), evict.to(device), active.to(device), lag)
        oracle.append(evict, active)
        for row in range(count):
            live = held(rows, row)
            assert len(live) == len(set(live)) and set(live) == oracle.live(row), (step, row)
        check_pages(rows)
    assert rows.seen.tolist() == [len(said) for said in oracle.said]
    assert not rows.overflow.item()


@pytest.mark.every(7)
@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["delayed", "immediate"])
@pytest.mark.parametrize("page", [1, 2, 3, 4, 5])
def test_cache_contents_equal_visible_set_over_hundreds_of_steps(name, window, kind, page):
    walk(name, "cpu", 5, page, window, 1 if kind == "delayed" else window, 0.6, 150, seed=window + page)


@pytest.mark.every(4)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window, lag", [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2), (5, 1), (5, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_cache_contents_equal_visible_set_in_triton(device, window, lag, share):
    needs(device)
    walk("triton", device, 4, 3, window, lag, share, 40, seed=window)


STATE = [field.name for field in fields(Rows) if field.name not in ("free", "largest")]


def assert_same(a: Rows, b: Rows) -> None:
    for name in STATE:
        assert torch.equal(getattr(a, name).nan_to_num(7.0), getattr(b, name).nan_to_num(7.0)), name
    assert torch.equal(a.free[: int(a.free_count)], b.free[: int(b.free_count)])


@pytest.mark.slow
@settings(max_examples=25)
@given(
    count=st.sampled_from([1, 2, 5, 33, 130]),
    page=st.integers(1, 5),
    window=st.sampled_from([0, 1, 2, 5]),
    immediate=st.booleans(),
    width=st.sampled_from([1, 5, 8]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    pages=st.integers(1, 40),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@example(2, 1, 1, False, 5, torch.float32, 1, 1, 0)
@example(1030, 1, 1, False, 5, torch.float32, 1500, 2, 0)  # more rows than one block of the walk
def test_triton_and_numba_equal_torch_bit_for_bit_even_without_room(
    count, page, window, immediate, width, dtype, pages, columns, seed
):
    g = torch.Generator().manual_seed(seed)
    backends = [backend(name) for name in ("torch", "triton", "numba")]
    same = [Rows.empty(count, pages, columns, page, window, torch.empty(0, width, dtype=dtype)) for _ in backends]
    share = 2 if count % 2 == 0 else 1  # rows of one active flag
    for _ in range(8):
        k, v = (torch.randn(count, 2 * width, generator=g)[:, ::2] for _ in range(2))
        evict, active = random_flags(count, 0.5, g), random_flags(count // share, 0.9, g)
        for rows, ours in zip(same, backends, strict=True):
            ours.append(rows, k, v, evict, active, window if immediate else 1)
        assert_same(*same[:2])
        assert_same(*same[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("count, pages", [(7, 60), (512, 5000), (3000, 9000)])
def test_on_the_device_triton_equals_torch_bit_for_bit(count, pages):
    needs("cuda")
    g = torch.Generator().manual_seed(count)
    like = torch.empty(0, 128, dtype=torch.bfloat16, device="cuda")
    both = [Rows.empty(count, pages, 8, 4, 5, like) for _ in range(2)]
    for _ in range(40):
        k, v = (torch.randn(count, 128, generator=g).bfloat16().cuda() for _ in range(2))
        evict, active = (random_flags(count, share, g, "cuda") for share in (0.6, 0.9))
        for rows, ours in zip(both, (backend("torch"), backend("triton")), strict=True):
            ours.append(rows, k, v, evict, active, 1)
        assert_same(*both)


@pytest.mark.parametrize("name", ["torch", "triton", "numba"])
def test_a_row_without_room_stays_as_it_was_and_sets_the_flag(name):
    ours = backend(name)
    rows = Rows.empty(3, 4, 2, 1, 3, torch.empty(0, 2))
    none, all_rows = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    ours.append(rows, *tokens(rows, 2), none, all_rows, 1)
    assert not rows.overflow.item() and rows.free_count.tolist() == [1]
    ours.append(rows, *tokens(rows, 2), none, all_rows, 1)  # one page left for three rows
    assert rows.overflow.item() and rows.length.tolist() == [2, 1, 1] and rows.seen.tolist() == [2, 1, 1]
    assert [held(rows, row) for row in range(3)] == [[0, 1], [0], [0]]
    rows.overflow.zero_()
    ours.append(rows, *tokens(rows, 2), none, torch.tensor([True, False, False]), 1)  # no column left
    assert rows.overflow.item() and rows.length.tolist() == [2, 1, 1]
    check_pages(rows)


@pytest.mark.parametrize("name", ["torch", "triton", "numba"])
def test_no_row_active_changes_nothing(name):
    rows, same = (Rows.empty(3, 4, 2, 2, 3, torch.empty(0, 2)) for _ in range(2))
    none = torch.zeros(3, dtype=torch.bool)
    backend(name).append(rows, torch.ones(3, 2), torch.ones(3, 2), ~none, none, 1)
    assert_same(rows, same)


def test_empty_rows_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"pages 0, .*must be >= 1"):
        Rows.empty(1, 0, 1, 1, 0, torch.empty(0, 2))
    with pytest.raises(ValueError, match=r"window -1: >= 0"):
        Rows.empty(1, 1, 1, 1, -1, torch.empty(0, 2))
