import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from companion import families
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import make_tokenizer
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig, chain_uniforms, sample_chains

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
        assert chain.prompt_kept == chain.prompt_tokens == len(PROMPTS[chain.problem])
        assert chain.live == [chain.prompt_tokens + max(made - 1, 0) for made in at]
        assert chain.reads == [sum(chain.prompt_tokens + step for step in range(1, made)) for made in at]


def test_gated_chains_cost_less(model, alone):
    for chain in alone.values():
        n = len(chain.tokens) + chain.finished
        assert chain.live[-1] < chain.prompt_tokens + n - 1
        assert chain.prompt_kept < chain.live[0] and chain.prompt_kept == alone[chain.problem, 0].prompt_kept
        assert chain.live == sorted(chain.live) and chain.reads == sorted(chain.reads)


def test_gradient_mode_of_caller_is_unchanged_between_chains(model):
    for _ in sample_chains(model, TOKENIZER, PROMPTS, JOBS[:2], SamplingConfig(3)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


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
        ({"top_k": 0}, "top_k 0: must be >= 1"),
        ({"min_p": 1.0}, r"min_p 1.0: must lie in \[0, 1\)"),
        ({"min_p": -0.1}, "min_p -0.1: must be >= 0"),
    ],
)
def test_invalid_settings_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**{"max_new_tokens": 4, **wrong})


def test_empty_prompt_raises_and_no_job_gives_no_chain(model):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        list(sample_chains(model, TOKENIZER, [[]], [(0, 0)], SamplingConfig(4)))
    assert list(sample_chains(model, TOKENIZER, PROMPTS, [], SamplingConfig(4))) == []


@pytest.fixture
def stopping(model):
    """A function that says where ``model.generate`` stops, for this test."""
    before = model.generation_config.eos_token_id

    def stop(tokens):
        model.generation_config.eos_token_id = tokens

    yield stop
    stop(before)


@pytest.mark.parametrize("first", [True, False])
def test_chains_end_at_the_tokens_of_the_generation_config_too(model, alone, stopping, first):
    """As the chain without them, cut; ``first``: the stop token is the first one said."""
    job = next(j for j in JOBS if len(alone[j].tokens) > 20 and len(set(alone[j].tokens)) > 8)
    tokens = alone[job].tokens
    at = 0 if first else next(i for i in range(8, 40) if tokens.index(tokens[i]) == i)
    for stops in (tokens[at], [tokens[at], 39]):
        stopping(stops)
        cut, *_ = sample(model, [job], batch=1).values()
        assert cut.finished and cut.tokens == tokens[:at]
        assert cut.reads[:-1] == alone[job].reads[: len(cut.reads) - 1] and cut.reads[-1] < alone[job].reads[-1]
    assert all(39 not in chain.tokens for chain in sample(model, batch=5).values())


@torch.no_grad()
def test_greedy_chain_ends_where_generate_ends(model, stopping):
    job = (1, 0)
    said = sample(model, [job], temperature=0.0)[job].tokens
    stop = next(token for i, token in enumerate(said) if i > 2 and said.index(token) == i)
    stopping([stop, TOKENIZER.eos_token_id])
    chain = sample(model, [job], temperature=0.0)[job]
    ids = torch.tensor([PROMPTS[1]])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert theirs[0, len(PROMPTS[1]) :].tolist() == [*chain.tokens, stop] and chain.finished


def test_stop_tokens_that_are_given_are_the_only_ones(model):
    config = SamplingConfig(40, temperature=1.0, top_p=0.98)
    chains = list(sample_chains(model, TOKENIZER, PROMPTS, JOBS, config, stop=()))
    assert {len(chain.tokens) for chain in chains} == {40} and not any(chain.finished for chain in chains)
    assert any(TOKENIZER.eos_token_id in chain.tokens for chain in chains)


@pytest.mark.parametrize("pad, eos", [(None, 1), (None, None), (10**6, 1)])
def test_a_tokenizer_without_padding_changes_nothing(model, pad, eos):
    """Prompts of several lengths; the last one's padding token is none of the model's."""
    words, config = SimpleNamespace(pad_token_id=pad, eos_token_id=eos), SamplingConfig(12, temperature=1.0, batch=5)
    found, right = (list(sample_chains(model, x, PROMPTS, JOBS, config, stop=[1])) for x in (words, TOKENIZER))
    assert len({len(PROMPTS[problem]) for problem, _ in JOBS}) > 1 and found == right


def test_top_k_of_one_is_greedy_and_chains_stay_independent(model):
    greedy = sample(model, temperature=0.0, batch=4)
    assert {job: c.tokens for job, c in sample(model, top_k=1, batch=4).items()} == {
        job: c.tokens for job, c in greedy.items()
    }
    narrow = sample(model, top_k=6, min_p=0.05, batch=4)
    assert narrow == sample(model, SHUFFLED, top_k=6, min_p=0.05, batch=3) != sample(model, batch=4)


PHI = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
ROPES = {
    "longrope": ("phi3", PHI, {"original_max_position_embeddings": 48}),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, {"max_position_embeddings": 48}),
    "of layers": (
        "gemma3_text",
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
        {"max_position_embeddings": 48, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    ),
}


def roped(kind, rope, more):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "num_key_value_heads": 2}
    more = {"max_position_embeddings": 192, "head_dim": 8, "initializer_range": 0.4, **more}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(TOKENIZER), **shape, **ends, **more, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.filterwarnings("ignore:.*keep their sliding window")
@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_rope_that_depends_on_the_batch_is_independent_of_neighbours_or_refused(name):
    model = attach(roped(*ROPES[name]), DMSConfig(window=4, scale=10.0, offset=0.0))
    prompts, jobs = [[5, 9, 4, 7], list(range(2, 26))], [(0, 0), (1, 0)]  # 4 and 24 tokens

    def said(jobs, length) -> dict:
        config = SamplingConfig(length, temperature=0.0)
        return {c.problem: c for c in sample_chains(model, TOKENIZER, prompts, jobs, config, stop=())}

    model(torch.ones(1, 90, dtype=torch.long))  # what a longer text before leaves behind
    with model.dms.disabled():
        together = said(jobs, 24)
        for problem, chain in together.items():
            assert said([(problem, 0)], 24) == {problem: chain}
            logits = model(torch.tensor([prompts[problem] + chain.tokens])).logits[0]
            assert logits[len(prompts[problem]) - 1 : -1].argmax(-1).tolist() == chain.tokens
    assert said(jobs[:1], 44)
    kind = "longrope" if name == "longrope" else "dynamic"
    with pytest.raises(ValueError, match=f"49 tokens.*must be <= 48, since rope_type '{kind}' of this"):
        said(jobs, 25)


def test_position_temperature_of_llama_4_is_refused_where_it_would_go_by_the_batch():
    """Below its first step it is 1 for every row, however long the batch has run."""
    model = families.tiny_model("llama4_text", floor_scale=24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers in chunks get no gate
        attach(model, DMSConfig(window=3))
    prompts, jobs = [[5, 6, 7], [9, 8, 7, 6, 5]], [(p, c) for c in range(6) for p in range(2)]
    with pytest.raises(ValueError, match=r"25 tokens, .*: must be < 24, since attn_temperature_tuning"):
        next(sample_chains(model, TOKENIZER, prompts, [(1, 0)], SamplingConfig(20)))
    texts = []
    for batch in (2, 12):
        chains = sample_chains(model, TOKENIZER, prompts, jobs, SamplingConfig(12, 1.0, batch=batch), stop=())
        texts.append(sorted((chain.problem, chain.chain, chain.tokens) for chain in chains))
    assert texts[0] == texts[1]
