import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion.tasks.programs import make_problem
from companion.tasks.reasoner import make_tokenizer
from dms_core import sampling
from dms_core.sampling import SamplingConfig, chain_uniforms, pick_tokens, sample_chains

TOKENIZER = make_tokenizer()
PROBLEMS = [make_problem("validation", 0, i, (1, 4)) for i in range(5)]
PROMPTS = [TOKENIZER(p.prompt)["input_ids"] for p in PROBLEMS]
JOBS = [(p, c) for p in range(5) for c in range(3)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocabulary=len(TOKENIZER), window=4)


def sample(model, jobs=JOBS, **settings):
    config = SamplingConfig(**{"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.98, "stride": 8, **settings})
    return {(c.problem, c.chain): c for c in sample_chains(model, TOKENIZER, PROMPTS, jobs, config)}


@pytest.fixture(scope="module")
def alone(model):
    """Every chain sampled on its own."""
    return {job: sample(model, [job], batch=1)[job] for job in JOBS}


SHUFFLED = [JOBS[i] for i in np.random.default_rng(0).permutation(15)]
ORDERS = {"forward": JOBS, "backward": JOBS[::-1], "shuffled": SHUFFLED}


@pytest.mark.parametrize("batch", [2, 5, 12, 64])
@pytest.mark.parametrize("order", ORDERS)
def test_chains_do_not_depend_on_batch_size_order_or_neighbours(model, alone, batch, order):
    chains = sample(model, ORDERS[order], batch=batch, page=3)
    assert chains == alone
    assert len({tuple(c.tokens) for c in chains.values()}) == 15


def test_chains_end_at_eos_or_at_the_limit(alone):
    for chain in alone.values():
        assert TOKENIZER.eos_token_id not in chain.tokens
        assert chain.finished or len(chain.tokens) == 40
        assert len(chain.tokens) + chain.finished <= 40
    assert 0 < sum(c.finished for c in alone.values()) < 15


def test_longer_limit_continues_a_cut_chain(model, alone):
    longer = sample(model, max_new_tokens=48)
    for job, chain in alone.items():
        assert longer[job].tokens[: len(chain.tokens)] == chain.tokens


def test_seed_problem_and_chain_have_distinct_streams():
    streams = [chain_uniforms(*key, 8) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(s) for s in streams}) == 4
    assert np.array_equal(chain_uniforms(0, 3, 2, 8), chain_uniforms(0, 3, 2, 20)[:8])


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward(model):
    chains = sample(model, [(p, 0) for p in range(5)], temperature=0.0, max_new_tokens=12, batch=2)
    for (problem, _), chain in chains.items():
        ids = torch.tensor([PROMPTS[problem]])
        for token in chain.tokens + [TOKENIZER.eos_token_id] * chain.finished:
            assert model(ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_dense_chain_budgets_equal_closed_form(model):
    with model.dms.disabled():
        chains = sample(model, batch=4)
    for chain in chains.values():
        n = len(chain.tokens) + chain.finished
        at = [*range(0, n + 1, 8), n]
        assert chain.prompt_tokens == len(PROMPTS[chain.problem])
        assert chain.live == [chain.prompt_tokens + max(made - 1, 0) for made in at]
        assert chain.reads == [sum(chain.prompt_tokens + step for step in range(1, made)) for made in at]


def test_gated_chains_cost_less(model, alone):
    for chain in alone.values():
        n = len(chain.tokens) + chain.finished
        assert chain.live[-1] < chain.prompt_tokens + n - 1
        assert chain.live == sorted(chain.live) and chain.reads == sorted(chain.reads)


def test_gradient_mode_of_caller_is_unchanged_between_chains(model):
    for _ in sample_chains(model, TOKENIZER, PROMPTS, JOBS[:2], SamplingConfig(3)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@given(top_p=st.floats(0.05, 1.0), temperature=st.sampled_from([0.3, 1.0, 2.0]), seed=st.integers(0, 2**31))
def test_nucleus_is_the_smallest_set_that_reaches_top_p_and_is_drawn_in_proportion(top_p, temperature, seed):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 2
    p = (logits[0] / temperature).softmax(-1).tolist()
    nucleus, total = [], 0.0
    for token in sorted(range(12), key=lambda t: -p[t]):
        if total >= top_p - 1e-6:
            break
        nucleus.append(token)
        total += p[token]
    uniforms = (torch.arange(2000) + 0.5) / 2000
    drawn = pick_tokens(logits.expand(2000, -1), uniforms, temperature, top_p).bincount(minlength=12) / 2000
    for token in range(12):
        expected = p[token] / total if token in nucleus else 0.0
        assert abs(drawn[token] - expected) < 2e-3


def test_temperature_zero_and_tiny_top_p_are_greedy():
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(20)
    assert torch.equal(pick_tokens(logits, uniforms, 0.0, 1.0), logits.argmax(-1))
    assert torch.equal(pick_tokens(logits, uniforms, 1.0, 1e-6), logits.argmax(-1))


def test_uniform_at_the_edge_picks_a_nucleus_token():
    logits = torch.tensor([[5.0, 4.0, -50.0]]).expand(2, -1)
    assert pick_tokens(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0, 0.9).tolist() == [0, 1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be >= 1"),
        ({"batch": 0}, "batch 0: must be >= 1"),
        ({"stride": 0}, "stride 0: must be >= 1"),
        ({"page": -1}, "page -1: must be >= 1"),
        ({"temperature": -0.1}, "temperature -0.1: must be >= 0"),
        ({"temperature": float("nan")}, "temperature nan: must be a finite number >= 0"),
        ({"top_p": 0.0}, r"top_p 0.0: must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1.5: must lie in \(0, 1\]"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**{"max_new_tokens": 4, **wrong})


def test_empty_prompt_raises_and_no_job_gives_no_chain(model):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        list(sample_chains(model, TOKENIZER, [[]], [(0, 0)], SamplingConfig(4)))
    assert list(sample_chains(model, TOKENIZER, PROMPTS, [], SamplingConfig(4))) == []


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])  # the nucleus of the first has more tokens than are sorted
def test_a_large_vocabulary_gives_the_tokens_of_a_whole_sort(spread, monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(16, 20_000, generator=g)).bfloat16()  # with many equal ones
    uniforms = torch.rand(16, generator=g)
    found = pick_tokens(logits, uniforms, 0.6, 0.95)
    monkeypatch.setattr(sampling, "HEAD", 20_000)
    assert torch.equal(found, pick_tokens(logits, uniforms, 0.6, 0.95))
