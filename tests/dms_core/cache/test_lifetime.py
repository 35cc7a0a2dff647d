"""A cache goes when its last user goes, and holds no memory before its first token."""

import gc
import weakref

import torch

from dms_core.cache.dms import DMSCache
from dms_core.cache.pages import PagedRows
from dms_core.sampling import SamplingConfig, sample_chains


class Tokenizer:
    eos_token_id, pad_token_id = 1, 0


def test_sampling_leaves_no_cache_behind_for_the_garbage_collector(tiny_model):
    """On a card it would hold its pages until then."""
    model, made = tiny_model(), []

    def make_cache(model, max_new_tokens):
        cache = DMSCache.for_model(model)
        empty_like = cache.empty_like

        def noted(batch: int):
            made.append(weakref.ref(other := empty_like(batch)))
            return other

        cache.empty_like = noted
        return cache

    gc.disable()
    try:
        chains = sample_chains(model, Tokenizer, [[3, 4, 5]], [(0, 0), (0, 1)], SamplingConfig(4), make_cache)
        assert len(list(chains)) == 2
        assert len(made) == 1 and made[0]() is None
        chains = sample_chains(model, Tokenizer, [[3, 4, 5]], [(0, 0), (0, 1)], SamplingConfig(4), make_cache)
        next(chains)
        chains.close()  # a caller that has seen enough
        assert len(made) == 2 and made[1]() is None
    finally:
        gc.enable()


def test_rows_without_a_token_hold_no_memory():
    rows = PagedRows.new(4, torch.empty(0, 64), page=64, window=3)
    assert sum(pool.untyped_storage().nbytes() for pool in rows.pools.values()) == rows.nbytes == 0
