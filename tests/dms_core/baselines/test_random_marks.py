"""Random marks: each head's share, a chain's own draws, and the cache's invariants."""

from dataclasses import replace

import pytest
import torch

from companion.tasks.embedded import Traces
from companion.tasks.reasoner import make_tokenizer
from dms_core.baselines.random_marks import MarkedCache, draw, random_marks
from dms_core.cache.dms import DMSCache
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.visibility import align_decisions, visible

TOKENIZER = make_tokenizer()
TASK = Traces(size=3, split="validation", variables=(1, 4))
PROMPTS = [TASK.prompt_ids(TOKENIZER, problem) for problem in TASK.problems]
JOBS = [(p, c) for p in range(3) for c in range(3)]
RETENTION = [[0.9, 0.1], [0.5, 0.0]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocabulary=len(TOKENIZER), window=4)


def sample(model, jobs=JOBS, seed=0, retention=RETENTION, **settings):
    config = SamplingConfig(**{"max_new_tokens": 40, "temperature": 1.0, "stride": 8, **settings})
    with random_marks(model, retention, seed):
        return {(c.problem, c.chain): c for c in sample_chains(model, TOKENIZER, PROMPTS, jobs, config)}


@torch.no_grad()
def test_each_head_keeps_its_share_and_other_seeds_layers_and_heads_differ(model):
    ids = torch.full((4, 3000), 5)
    with random_marks(model, RETENTION, 3):
        model(ids[:1], use_cache=False)
        kept = torch.stack([~e[0].bool() for e in model.dms.step.evicted.values()])[..., :-1]
    torch.testing.assert_close(kept.float().mean(-1), torch.tensor(RETENTION), rtol=0, atol=5 * 0.5 / 3000**0.5)
    streams, place = torch.arange(2), torch.arange(3000).expand(2, -1)
    draws = torch.cat([draw(streams, place, layer, 2, seed) for layer in (0, 1) for seed in (0, 7)]).flatten(0, 1)
    seen = torch.corrcoef(draws) - torch.eye(len(draws))
    assert seen.abs().max() < 5 / 3000**0.5 and (draws.mean(1) - 0.5).abs().max() < 5 * 0.29 / 3000**0.5


@torch.no_grad()
def test_the_cache_holds_what_a_full_pass_with_the_same_marks_shows(model):
    ids = torch.randint(2, 20, (2, 40), generator=torch.Generator().manual_seed(0))
    with random_marks(model, RETENTION):
        full = model(ids, use_cache=False).logits
        said = torch.stack(list(model.dms.step.logits.values())) > 0
        cache = DMSCache.for_model(model, page=4)
        parts = [model(ids[:, :15], past_key_values=cache).logits]
        for t in range(15, 40):
            parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    about = [align_decisions(layer, 1, None, False) for layer in said]
    assert torch.equal(cache.live_tokens(), torch.stack([visible(x, 4)[:, :, -1].sum(-1) for x in about]))
    assert torch.equal(said[:, 0], said[:, 1])  # rows of one stream


def test_chains_do_not_depend_on_their_batch_and_differ_by_stream_and_seed(model):
    alone = {job: sample(model, [job], batch=1)[job] for job in JOBS}
    assert sample(model, JOBS[::-1], batch=4) == alone
    assert sample(model, batch=9) == alone
    assert sample(model, batch=9, seed=1) != alone
    greedy = sample(model, batch=4, temperature=0.0)  # a problem's differ by what was evicted alone
    assert len({tuple(c.tokens) for c in greedy.values()}) > 3


def test_all_kept_is_dense_and_all_marked_is_a_window(model):
    with model.dms.disabled():
        config = SamplingConfig(max_new_tokens=40, temperature=1.0, stride=8, batch=4)
        dense = {(c.problem, c.chain): c for c in sample_chains(model, TOKENIZER, PROMPTS, JOBS, config)}
    kept = sample(model, retention=[[1.0, 1.0]] * 2, batch=4)
    assert {job: replace(chain, prompt_kept=chain.prompt_tokens) for job, chain in kept.items()} == dense
    assert all(chain.prompt_kept == chain.prompt_tokens - 1 for chain in kept.values())  # no word on the last
    for chain in sample(model, retention=[[0.0, 0.0]] * 2, batch=4).values():
        assert chain.live[-1] == min(5, chain.prompt_tokens + len(chain.tokens) + chain.finished - 1)


def streams_of(cache) -> list[int]:
    (found,) = {tuple(head) for layer in cache.layers for head in layer.stream.T.tolist()}
    return list(found)


def test_streams_follow_their_rows(model):
    with random_marks(model, RETENTION):
        cache = model.dms.new_cache(page=4)
        model(torch.full((3, 6), 5), past_key_values=cache)
        assert isinstance(cache, MarkedCache)
        cache.name_streams(torch.tensor([0, 2]), torch.tensor([7, 9]))
        cache.fork(2)
        assert streams_of(cache) == [7, 7, 0, 0, 9, 9]
        cache.reorder_cache(torch.tensor([5, 0, 2]))
        other = cache.empty_like(4)
        other.put_rows(torch.tensor([3, 1]), cache, torch.tensor([0, 1]))
        assert streams_of(other) == [0, 7, 0, 9]
        other.reset_rows(torch.tensor([1]))
        assert streams_of(other) == [0, 0, 0, 9]
    assert not isinstance(model.dms.new_cache(), MarkedCache)


def test_wrong_retentions_are_named(model):
    for wrong in ([[0.5, 0.5]], [[0.5, 1.5]] * 2):
        with pytest.raises(ValueError, match=r"must be \(2, 2\) numbers in 0..1"), random_marks(model, wrong):
            pass
