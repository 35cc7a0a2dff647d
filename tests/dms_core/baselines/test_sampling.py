"""Baselines in generation: chains are their own, counted like DMS's, and only in the original model."""

from dataclasses import replace

import pytest
import torch

from companion.method import Method
from companion.paths import REASONER
from companion.records import records_file, sample_records
from companion.tasks.embedded import Traces
from companion.tasks.reasoner import make_tokenizer
from dms_core.baselines import BASELINES, H2O, TOVA, Quest, RandomEviction, StreamingLLM, get_baseline
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.storage import write_jsonl

TOKENIZER = make_tokenizer()
TASK = Traces(size=3, split="validation", variables=(1, 4))
PROMPTS = [TASK.prompt_ids(TOKENIZER, problem) for problem in TASK.problems]
JOBS = [(p, c) for p in range(3) for c in range(3)]
METHODS = {name: Quest(4.0, page=4) if name == "quest" else cls(4.0) for name, cls in BASELINES.items()}
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocabulary=len(TOKENIZER), window=4)


def sample(model, make_cache, jobs=JOBS, **settings):
    config = SamplingConfig(**{"max_new_tokens": 32, "temperature": 1.0, "top_p": 0.98, "stride": 8, **settings})
    with model.dms.disabled():
        return {(c.problem, c.chain): c for c in sample_chains(model, TOKENIZER, PROMPTS, jobs, config, make_cache)}


@pytest.mark.every(4)
@every_method
def test_chains_do_not_depend_on_batch_size_order_or_neighbours(model, name):
    alone = {job: sample(model, METHODS[name], [job], batch=1)[job] for job in JOBS}
    assert sample(model, METHODS[name], JOBS[::-1], batch=4) == alone
    assert sample(model, METHODS[name], JOBS, batch=9) == alone
    assert len({tuple(c.tokens) for c in alone.values()}) == 9


@pytest.mark.every(4)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"snapkv"}))
def test_protected_chains_are_their_own_and_no_longer_than_their_prompts_allow(model, name):
    method = replace(METHODS[name], protect=True)
    alone = {job: sample(model, method, [job], batch=1)[job] for job in JOBS}
    assert sample(model, method, JOBS[::-1], batch=4) == alone
    for chain in alone.values():
        most = max(int((chain.prompt_tokens + 32) / 4), chain.prompt_tokens + 1)
        assert name == "quest" or max(chain.live) <= most
        assert chain.live[0] == chain.prompt_tokens


@every_method
def test_compression_1_equals_the_original_model_in_chains_and_costs(model, name):
    chains, dense = (sample(model, method, batch=4) for method in (get_baseline(name)(1.0), None))
    assert {job: replace(chain, prompt_kept=chain.prompt_tokens) for job, chain in chains.items()} == dense


@every_method
def test_budgets_are_met_and_counted(model, name):
    dense = sample(model, None, batch=4)
    for job, chain in sample(model, METHODS[name], batch=4).items():
        made, budget = len(chain.tokens) + chain.finished, int((chain.prompt_tokens + 32) / 4)
        stored = chain.prompt_tokens + max(made - 1, 0)
        if name == "quest":
            assert chain.live[-1] == stored  # nothing is freed
            assert chain.reads[-1] < sum(chain.prompt_tokens + step for step in range(1, made))
        elif name == "snapkv":  # nothing of what is generated is
            assert chain.live[-1] == chain.prompt_tokens // 4 + made - 1
        else:
            after = name in ("h2o", "tova")  # these attend to budget + 1 items and then drop one
            most = sum(min(chain.prompt_tokens + t, budget + after) for t in range(1, made))
            assert chain.live[-1] == min(stored, budget)
            assert chain.reads[-1] < most if name == "rkv" and stored > budget else chain.reads[-1] == most
        assert chain.reads == sorted(chain.reads) and dense[job].prompt_tokens == chain.prompt_tokens


def test_random_eviction_differs_between_chains_of_a_problem(model):
    """Greedy chains of a problem differ only by what was evicted."""
    chains = sample(model, RandomEviction(4.0), temperature=0.0)
    assert len({tuple(c.tokens) for c in chains.values()}) > 3
    greedy = sample(model, TOVA(4.0), temperature=0.0)
    assert len({tuple(c.tokens) for c in greedy.values()}) == 3


@every_method
@torch.no_grad()
def test_generate_equals_greedy_sampling(name):
    model = attach(load_base(REASONER), DMSConfig(window=16))
    chain = sample(model, METHODS[name], [(1, 0)], temperature=0.0, max_new_tokens=40)[1, 0]
    with model.dms.disabled():
        ids = torch.tensor([PROMPTS[1]] * 2)
        cache = METHODS[name](model, 40)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40, do_sample=False
        )
    if name != "random":  # sampling gives its chains random streams of their own
        assert out[0].tolist()[len(PROMPTS[1]) :][: len(chain.tokens)] == chain.tokens
        assert cache.peak_tokens().float().mean().item() == pytest.approx(chain.live[-1])
    assert torch.equal(out[0], out[1])
    most = cache.live_tokens()
    if name == "rkv":  # less is left of it after each compression
        most = torch.full_like(most, (len(PROMPTS[1]) + 40) // 4)
        assert (cache.live_tokens() < most).any()
    assert torch.equal(cache.peak_tokens(), most) and cache.bytes_held() > 0


def test_every_setting_of_a_baseline_names_another_records_file(model, tmp_path):
    config, method = SamplingConfig(max_new_tokens=12, batch=4, stride=4), Method("streaming-llm", 4.0)
    makers = [None, StreamingLLM(4.0), StreamingLLM(4.0, sinks=2), StreamingLLM(3.0), H2O(4.0), TOVA(4.0)]
    makers += [TOVA(4.0, protect=True)]
    assert TOVA(4.0).settings() == {"method": "tova", "cr": 4.0}  # as when nothing could be protected
    assert len({records_file(model, "w", TOKENIZER, TASK, method, config, make) for make in makers}) == len(makers)
    records = sample_records(model, TOKENIZER, TASK, method, 2, config, tmp_path / "r.jsonl", StreamingLLM(4.0))
    assert [(r["problem"], r["chain"]) for r in records] == [(p, c) for p in range(3) for c in range(2)]
    assert all(r["live"][-1] <= (r["prompt_tokens"] + 12) // 4 for r in records)
    assert model.dms.enabled and len(list(tmp_path.iterdir())) == 1


def test_records_of_a_baseline_name_the_length_of_their_budget(model, tmp_path):
    config, method = SamplingConfig(max_new_tokens=12, batch=4, stride=4), Method("tova", 4.0)

    def sampled(baseline):
        return sample_records(model, TOKENIZER, TASK, method, 1, config, tmp_path / f"{bool(baseline)}", baseline)

    records = sampled(TOVA(4.0))
    assert [r["budget_length"] for r in records] == [12] * 3
    assert all("budget_length" not in r for r in sampled(None))
    old = [{k: v for k, v in r.items() if k != "budget_length"} for r in records]
    write_jsonl(tmp_path / "True", old)  # written before records had the key
    assert sampled(TOVA(4.0)) == records


def test_moved_rows_keep_their_budgets_and_unsuitable_uses_are_refused(model):
    cache = H2O(4.0)(model, 16)
    with model.dms.disabled():
        ids = torch.randint(2, 40, (2, 24))
        mask = torch.ones_like(ids)
        mask[1, :16] = 0
        model(ids, attention_mask=mask, past_key_values=cache)
    other = cache.empty_like(3)
    other.put_rows(torch.tensor([2, 0]), cache, torch.tensor([0, 1]))
    for layer in other.layers:
        assert layer.budget.tolist() == [6, 0, 10]
    assert other.live_tokens()[0, :, 0].tolist() == [6, 0, 10] and other.tokens_seen().tolist() == [8, 0, 24]
    with pytest.raises(ValueError, match="gates that are on"):
        model(ids, past_key_values=H2O(4.0)(model, 16))
    with pytest.raises(ValueError, match="both must be the same"):
        other.put_rows(torch.tensor([0]), H2O(2.0)(model, 16), torch.tensor([0]))
    with pytest.raises(ValueError, match="max_new_tokens -1: must be >= 0"):
        H2O(4.0)(model, -1)
