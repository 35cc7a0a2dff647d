import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dms_core import pick
from dms_core.pick import pick_tokens


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


@pytest.mark.every(7)
@pytest.mark.parametrize("size", [40, 3000])  # the larger vocabulary is not sorted whole
@pytest.mark.parametrize("top_k", [None, 1, 7, 40])
@pytest.mark.parametrize("top_p, min_p", [(1.0, 0.0), (0.8, 0.0), (1.0, 0.1), (0.95, 0.05), (0.3, 0.5)])
def test_tokens_have_the_probabilities_of_transformers_warpers(size, top_k, top_p, min_p):
    """By the share of evenly spaced numbers that draw a token."""
    logits, draws = 2 * torch.randn(1, size, generator=torch.Generator().manual_seed(size)), 20_000
    warpers = [TemperatureLogitsWarper(0.7)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    uniforms = (torch.arange(draws) + 0.5) / draws
    found = [
        pick_tokens(logits.expand(len(part), -1), part, 0.7, top_p, top_k, min_p).bincount(minlength=size)
        for part in uniforms.split(500)
    ]
    drawn = sum(found) / draws
    torch.testing.assert_close(drawn, scores.softmax(-1)[0], atol=1.1 / draws, rtol=1e-3)
    if top_k or top_p < 1 or min_p:
        assert ((drawn > 0) <= scores[0].isfinite()).all()


def test_equals_of_the_last_likeliest_token_stay_as_in_transformers():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).expand(1000, -1)
    drawn = pick_tokens(logits, (torch.arange(1000) + 0.5) / 1000, 1.0, 1.0, 2).bincount(minlength=5)
    assert (drawn[:4] > 0).all() and drawn[4] == 0


@pytest.mark.parametrize(
    "limits", [(0.95,), (0.95, 7, 0.1), (0.999, 2000), (1.0, 300), (1.0, None, 0.02), (0.9, 1024, 0.02)]
)
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])  # the nucleus of the first has more tokens than are sorted
def test_a_large_vocabulary_gives_the_tokens_of_a_whole_sort(spread, limits, monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(16, 20_000, generator=g)).bfloat16()  # with many equal ones
    uniforms = torch.rand(16, generator=g)
    found = pick_tokens(logits, uniforms, 0.6, *limits)
    monkeypatch.setattr(pick, "HEAD", 20_000)
    assert torch.equal(found, pick_tokens(logits, uniforms, 0.6, *limits))
