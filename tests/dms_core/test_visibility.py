import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dms_core.visibility import align_decisions, visible


def random_segments(batch: int, tokens: int, g: torch.Generator) -> list[list[int]]:
    """Packed documents, some with padding (-1) at an end."""
    segments = (torch.rand(batch, tokens, generator=g) < 0.25).long().cumsum(1)
    for row in segments:
        pad = int(torch.randint(0, tokens, (1,), generator=g))
        if torch.rand(1, generator=g) < 0.3:
            row[:pad] = -1
        elif torch.rand(1, generator=g) < 0.3:
            row[pad + 1 :] = -1
    return segments


@given(
    tokens=st.integers(1, 12),
    lag=st.integers(0, 14),
    packed=st.booleans(),
    fill=st.sampled_from([False, True, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_decision_about_a_token_comes_from_the_token_lag_places_later(tokens, lag, packed, fill, seed):
    g = torch.Generator().manual_seed(seed)
    said = torch.rand(2, 3, tokens, generator=g)
    said = said > 0.5 if isinstance(fill, bool) else said
    segments = random_segments(2, tokens, g) if packed else None
    about = align_decisions(said, lag, segments, fill)
    for b in range(2):
        for h in range(3):
            for j in range(tokens):
                inside = j + lag < tokens and (segments is None or segments[b, j] == segments[b, j + lag])
                assert about[b, h, j] == (said[b, h, j + lag] if inside else fill)


@given(tokens=st.integers(1, 12), window=st.integers(0, 14), packed=st.booleans(), seed=st.integers(0, 2**31))
def test_visible_equals_definition_of_section_3_2(tokens, window, packed, seed):
    g = torch.Generator().manual_seed(seed)
    evicted = torch.rand(2, 2, tokens, generator=g) > 0.5
    segments = random_segments(2, tokens, g) if packed else None
    seen = visible(evicted, window, segments)
    for b in range(2):
        for h in range(2):
            for i in range(tokens):
                for j in range(tokens):
                    if j > i or (segments is not None and segments[b, i] != segments[b, j]):
                        expected = False
                    elif i - j <= window:
                        expected = True
                    else:
                        expected = not evicted[b, h, j]
                    assert seen[b, h, i, j] == expected


@pytest.mark.parametrize("window", [0, 1, 5])
def test_window_previous_tokens_and_the_query_itself_are_always_visible(window):
    seen = visible(torch.ones(1, 1, 20, dtype=torch.bool), window)[0, 0]
    assert seen.sum(1).tolist() == [min(i, window) + 1 for i in range(20)]


@given(window=st.integers(0, 6), delayed=st.booleans(), seed=st.integers(0, 2**31))
def test_no_query_needs_a_decision_of_a_later_token(window, delayed, seed):
    lag = 1 if delayed else window
    said = torch.rand(1, 1, 16, generator=torch.Generator().manual_seed(seed)) > 0.5
    seen = visible(align_decisions(said, lag, None, False), window)
    for now in range(16):
        known = said.clone()
        known[..., now + 1 :] = ~known[..., now + 1 :]  # the future says the opposite
        changed = visible(align_decisions(known, lag, None, False), window)
        assert torch.equal(seen[0, 0, now], changed[0, 0, now])
