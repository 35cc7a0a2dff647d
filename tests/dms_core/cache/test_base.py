"""What RowCache keeps for all its layers: rows that move with their states, counters on the host, room for steps."""

from functools import partial

import pytest
import shadow
import torch
from transformers.cache_utils import LinearAttentionLayer

from dms_core.cache.base import prepared, take, tokens_first
from dms_core.cache.dms import DMSCache
from dms_core.cache.hybrid import StatefulLayer
from dms_core.cache.pages import AHEAD
from dms_core.config import DMSConfig

WIDTH = 4


def feed(cache: DMSCache, tokens: int, heads: tuple[int, ...], batch: int = 3) -> None:
    for layer, count in zip(cache.held, heads, strict=True):
        new = torch.randn(batch, count, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        layer.update(new, new)
        layer.attend(new, new, new, torch.zeros(batch, count, tokens, dtype=torch.bool), None, 0.5)


def mixed() -> DMSCache:
    """Three rows: a layer with keys and values, and one whose state at row b is b + 1."""
    cache = DMSCache(DMSConfig(window=2), 2, page=4, others={1: LinearAttentionLayer})
    feed(cache, 5, (2,))
    states = cache.layers[1]
    states.conv_states[0] = torch.arange(1.0, 4)[:, None].repeat(1, 2)
    states.recurrent_states[0] = states.conv_states[0].clone()
    return cache


def state(cache: DMSCache) -> list[float]:
    assert torch.equal(cache.layers[1].conv_states[0], cache.layers[1].recurrent_states[0])
    return cache.layers[1].conv_states[0][:, 0].tolist()


def sits_out(cache: DMSCache, *rows: bool) -> bool:
    """A step without these rows: did one of the others go on wrongly?"""
    return bool(cache.resumed_after_idle(~torch.tensor(rows)[:, None]))


def test_states_and_idle_rows_move_with_the_rows():
    cache = mixed()
    assert cache.held == cache.layers[:1] and cache.states == cache.layers[1:]
    assert cache.bytes_of_states() == 2 * 3 * 2 * 4
    assert not sits_out(cache, False, True, False)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert state(cache) == [2, 1, 3] and cache.idle.tolist() == [True, False, False]
    cache.fork(2)
    assert state(cache) == [2, 2, 1, 1, 3, 3] and cache.idle.tolist() == [True, True, False, False, False, False]
    assert sits_out(cache, True, False, False, False, False, True)
    assert cache.idle.tolist() == [True, True, False, False, False, True]
    cache.reset_rows(torch.tensor([0]))
    assert state(cache) == [0, 2, 1, 1, 3, 3] and cache.tokens_seen().tolist() == [0, 5, 5, 5, 5, 5]
    other = mixed()
    cache.put_rows(torch.tensor([1, 3]), other, torch.tensor([2, 0]))
    assert state(cache) == [0, 3, 1, 1, 3, 3] and cache.idle.tolist() == [False] * 5 + [True]
    assert cache.tokens_seen().tolist() == [0, 5, 5, 5, 5, 5]
    assert cache.live_tokens()[0, :, 0].tolist() == [0, 5, 5, 5, 5, 5]
    assert not sits_out(cache, False, False, False, False, False, True)
    assert sits_out(cache, *[False] * 6)
    cache.reset()
    assert cache.idle is None and cache.bytes_of_states() == cache.bytes_held() == 0


def test_numbers_of_rows_may_lie_on_another_device_than_the_cache():
    cache, numbers = mixed(), partial(torch.tensor, device=shadow.DEVICE)
    assert not sits_out(cache, False, True, False)
    cache.put_rows(numbers([0]), mixed(), numbers([2]))
    cache.reset_rows(numbers([1]))
    cache.reorder_cache(numbers([2, 0, 1]))
    assert state(cache) == [3, 3, 0] and cache.tokens_seen().tolist() == [5, 5, 0]


def test_rows_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="both must be the same"):
        mixed().put_rows(torch.tensor([0]), DMSCache(DMSConfig(window=2), 1, page=4), torch.tensor([0]))


@pytest.mark.parametrize("others", [{}, {1: LinearAttentionLayer}], ids=["no states", "fewer keys"])
def test_rows_of_layers_of_other_kinds_are_refused(others):
    def of_kinds(others: dict) -> DMSCache:
        cache = DMSCache(DMSConfig(window=2), 2, page=4, others=others)
        feed(cache, 5, (2,) * len(cache.held))
        return cache

    cache = of_kinds({1: partial(StatefulLayer, DMSConfig(window=2), 4, 1)})
    with pytest.raises(ValueError, match="in layer 1: this one has StatefulLayer; both must be the same"):
        cache.put_rows(torch.tensor([0]), of_kinds(others), torch.tensor([1]))


def test_counters_repeat_the_heads_of_each_layer_to_a_common_number():
    cache = DMSCache(DMSConfig(window=2), 2)
    feed(cache, 5, (2, 3))
    cache.held[0].rows.reads.copy_(torch.arange(6))
    cache.held[1].rows.reads.copy_(torch.arange(9))
    reads = cache.kv_reads()
    assert reads.shape == (2, 3, 6)
    assert reads[:, 1].tolist() == [[2, 2, 2, 3, 3, 3], [3, 3, 4, 4, 5, 5]]


def test_room_is_made_for_steps_ahead_and_looked_for_when_it_is_used_up():
    cache = DMSCache(DMSConfig(window=2), 2)
    assert cache.make_room() is False and cache.moves == 0  # no rows yet
    feed(cache, 5, (2, 2))
    assert cache.make_room() is True and [layer.rows.credit for layer in cache.held] == [AHEAD] * 2
    moved = cache.moves
    assert moved == sum(layer.rows.moves for layer in cache.held) > 0
    assert cache.make_room() is False and cache.moves == moved
    feed(cache, 1, (2, 2))
    cache.held[0].unread = True
    cache.count_step(3)
    assert [layer.rows.credit for layer in cache.held] == [AHEAD - 4] * 2
    assert [(layer.columns, layer.unread) for layer in cache.held] == [(9, False)] * 2
    cache.held[1].rows.credit = 0  # one layer without room is enough
    assert cache.make_room() is True and [layer.rows.credit for layer in cache.held] == [AHEAD] * 2


def test_lengths_are_what_transformers_asks_for():
    cache = mixed()
    layer = cache.held[0]
    assert layer.get_seq_length() == cache.columns == 5 and layer.get_mask_sizes(3) == (8, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    cache.columns = 7
    assert cache.get_seq_length() == 7 and cache.get_mask_sizes(1, 0) == (8, 0)


def test_rows_of_one_layer_can_be_selected():
    layer = mixed().held[0]
    before = layer.rows.read()[0].unflatten(0, (3, 2))
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.rows.read()[0].unflatten(0, (2, 2)), before[[2, 0]]) and layer.batch == 2


def test_keys_that_no_attention_asked_for_and_another_batch_raise():
    layer = mixed().held[0]
    new = torch.zeros(3, 2, 1, WIDTH)
    assert layer.update(new, new + 1)[1] is not None
    with pytest.raises(ValueError, match=r"that dms_core\.attach has not prepared"):
        layer.update(new, new)
    layer.reset()
    assert (layer.columns, layer.unread, layer.is_initialized, layer.rows) == (0, False, False, None)
    layer.batch_select_indices(torch.tensor([0]))  # nothing to select
    layer.update(new[:2], new[:2])
    assert (layer.batch, layer.heads, layer.columns, layer.unread) == (2, 2, 1, True)


def test_gathered_tokens_keep_their_order():
    x = torch.arange(24.0).view(1, 2, 4, 3)
    index = torch.tensor([[[3, 0], [1, 1]]])
    assert take(x, index)[..., 0].tolist() == [[[9, 0], [15, 15]]] and take(x, index).shape == (1, 2, 2, 3)
    valid = torch.tensor([[False, True, False, True, True]])
    assert tokens_first(valid).tolist() == [[1, 3, 4, 0, 2]]


def test_model_without_gates_is_named():
    with pytest.raises(ValueError, match="Linear has no DMS gates"):
        prepared(torch.nn.Linear(1, 1))
