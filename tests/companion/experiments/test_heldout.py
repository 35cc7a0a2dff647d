"""Decisions on single documents: what the book's pictures and the window's price are computed from."""

import pytest
import torch

from companion.experiments.heldout import held_out, kept_tokens, live_cr, random_eviction, retention_by_position
from companion.tasks.reasoner import make_model
from dms_core.config import DMSConfig
from dms_core.model import attach

WINDOW = 4


@pytest.fixture(scope="module")
def model():
    return attach(make_model(64), DMSConfig(window=WINDOW)).eval()


def document(length):
    ids = [2 + i % 60 for i in range(length)]
    return {"input_ids": ids, "labels": ids}


def test_random_eviction_meets_its_ratio_and_ends_with_the_context(model):
    ids = document(400)["input_ids"]
    with random_eviction(model, 4.0):
        kept = kept_tokens(model, ids)
    assert kept.shape == (4, 2, 400) and kept.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert kept_tokens(model, ids).all()  # untrained gates are off


def test_live_cr_counts_the_window_and_agrees_with_held_out(model):
    documents = [document(length) for length in (3, 40, 63)]
    with random_eviction(model, 1e9):
        kept = [kept_tokens(model, d["input_ids"]) for d in documents]
        measured = held_out(model, make_model(64).eval(), documents, pad=0)["cr_live"]
    assert live_cr(kept, WINDOW) == pytest.approx((3 + 40 + 63) / (3 + 5 + 5)) == pytest.approx(measured)


def test_live_cr_at_window_zero_keeps_the_last_token():
    assert live_cr([torch.zeros(2, 2, 10, dtype=torch.bool)], 0) == pytest.approx(10)


def test_retention_by_position_matches_planted_decisions():
    """Head 0 keeps the first ten tokens, head 1 every second one; the last token has no decision."""
    kept = []
    for length in (41, 31):
        k = torch.zeros(1, 2, length, dtype=torch.bool)
        k[:, 0, :10] = True
        k[:, 1, ::2] = True
        kept.append(k)
    rows = retention_by_position(kept, (0, 10, 20, 30, 40, 50), lag=1, window=4)
    expected = [(0, 20, 2), (10, 20, 2), (20, 20, 2), (30, 10, 1)]
    assert [(row["from"], row["tokens"], row["documents"]) for row in rows] == expected
    assert [row["retention"] for row in rows] == [[[1.0, 0.5]]] + [[[0.0, 0.5]]] * 3
    assert rows[3]["cr"] == [[4.0, 2.0]]
    assert rows[3]["cr_live"][0] == pytest.approx([40 / 15, 40 / 23])  # 35 tokens outside the window of 4 + 1


@pytest.mark.parametrize("edges", [(0,), (0, 0), (-1, 4), (5, 3)])
def test_retention_by_position_rejects_edges_that_do_not_ascend(edges):
    with pytest.raises(ValueError, match="must be two or more ascending integers"):
        retention_by_position([torch.ones(1, 1, 8, dtype=torch.bool)], edges, 1, 4)
