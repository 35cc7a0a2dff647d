"""Following the dense model with another cache, on the embedded model."""

import pytest
import torch

from dms_core import DMSCache, attach, load_model
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig
from dms_core.decode_speed import decode_speed
from dms_core.fidelity import decisions_cr, dense_reference, follow, needle_recall
from dms_core.tasks.programs import make_problem
from dms_core.tasks.reasoner import REASONER_DIR, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REASONER_DIR)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(make_problem("test", 0, i, (6, 9)).prompt)["input_ids"] for i in range(6)]


@pytest.fixture(scope="module")
def reference(tokenizer, prompts):
    return dense_reference(attach(load_base(REASONER_DIR), DMSConfig()), tokenizer, prompts, 40, batch=4)


def own_cache(model, lengths):
    return DMSCache.for_model(model)


def test_dense_cache_follows_the_dense_model_exactly(tokenizer, reference):
    model = attach(load_base(REASONER_DIR), DMSConfig())
    with model.dms.disabled():
        facts = follow(model, tokenizer, reference, own_cache, batch=3, resamples=20)
    assert facts["agreement"] == 1 and abs(facts["kl"]) < 1e-5 and facts["cr_live"] == pytest.approx(1)
    assert facts["tokens"] == int(reference.counted.sum())


def test_reference_says_what_generate_says(tokenizer, prompts, reference):
    model = load_base(REASONER_DIR)
    said = model.generate(torch.tensor([prompts[0]]), max_new_tokens=40, do_sample=False)[0, len(prompts[0]) :]
    assert reference.tokens[0, : len(said)].tolist() == said.tolist()


def test_nothing_counts_after_the_end(tokenizer, reference):
    for tokens, counted in zip(reference.tokens.tolist(), reference.counted.tolist(), strict=True):
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        assert counted == [not ends or i <= ends[0] for i in range(len(tokens))]


def test_compressed_cache_is_smaller_and_close(tokenizer, prompts, reference):
    model = load_model(REASONER_DIR / "dms-cr4")
    facts = follow(model, tokenizer, reference, own_cache, resamples=50)
    assert facts["cr_live"] > 2 and decisions_cr(model, prompts) > 1.5
    assert 0.9 < facts["agreement_low"] <= facts["agreement"] <= facts["agreement_high"] <= 1


def test_needles_are_found_in_what_is_said(tokenizer, prompts):
    model = load_model(REASONER_DIR / "dms-cr4")
    said = model.generate(
        torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, past_key_values=DMSCache.for_model(model)
    )
    text = tokenizer.decode(said[0, len(prompts[0]) :])
    needles = [(prompts[0], text[2:6]), (prompts[0], "never said")]
    assert needle_recall(model, tokenizer, needles, own_cache, tokens=12) == 0.5


def test_compressed_cache_holds_fewer_bytes(tokenizer, prompts):
    pad = tokenizer.pad_token_id
    dense = decode_speed(load_base(REASONER_DIR), prompts, pad, tokens=4)
    ours = decode_speed(load_model(REASONER_DIR / "dms-cr8"), prompts, pad, tokens=4, page=4)
    assert ours["kv_bytes"] < dense["kv_bytes"] and min(ours["tokens_per_s"], dense["tokens_per_s"]) > 0
