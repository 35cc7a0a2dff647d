"""Whole-model decoding against transformers' cache: what is compared, and that as much is held as the ratio says."""

import pytest
import torch
from transformers import DynamicCache

from companion.experiments import end_to_end
from companion.experiments.end_to_end import MODELS, Decoder, make_models, measure
from dms_core.cache.dms import DMSCache


def test_rows_have_the_form_of_other_benchmarks():
    rows = measure("cpu", quick=True)
    names = [f"e2e-reasoner-b2-96-cr{cr}" for cr in (1, 4, 8)]
    assert [row["name"] for row in rows] == [*names, "e2e-generate-reasoner-b2-cr1"]
    for row in rows:
        assert row["kind"] == "e2e" and row["rounds"] == 1
        assert row["ratio"]["dynamic_cache"] == pytest.approx(row["baseline_ms"]["dynamic_cache"] / row["ours_ms"])
        assert row["tokens_per_s"]["ours"] == pytest.approx(2e3 / row["ours_ms"])
    held = [row["held_bytes"] for row in rows[:3]]
    assert held[0]["ours"] >= held[0]["dynamic_cache"] > held[1]["ours"] > held[2]["ours"]
    assert rows[0]["expected"] <= 1 < rows[1]["expected"] < rows[2]["expected"]


def test_both_models_say_the_same_where_nothing_is_evicted():
    plain, gated = make_models(MODELS["reasoner"], 64, "cpu")
    ids = torch.randint(2, 73, (2, 40))
    pair = [
        Decoder(plain, DynamicCache(config=plain.config), ids, None),
        Decoder(gated, DMSCache.for_model(gated), ids, 1.0),
    ]
    for _ in range(8):
        assert torch.equal(pair[0].ids, pair[1].ids)
        for decoder in pair:
            decoder()


@pytest.mark.parametrize("cr", [4.0, 8.0])
def test_what_is_held_follows_the_ratio(cr):
    _, gated = make_models(MODELS["reasoner"], 1200, "cpu")
    decoder = Decoder(gated, DMSCache.for_model(gated, 8), torch.randint(2, 73, (2, 1024)), cr)
    cells = end_to_end.WINDOW + 1
    assert decoder.cache.live_tokens().float().mean() == pytest.approx((1024 - cells) / cr + cells, rel=0.1)


def test_bad_names_and_repeats_are_refused():
    with pytest.raises(ValueError, match="case 'e2e-none'"):
        measure("cpu", ["e2e-none"])
    with pytest.raises(ValueError, match="repeats 0"):
        measure("cpu", repeats=0)
