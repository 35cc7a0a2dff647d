"""Following the dense model with another cache, on the embedded model."""

import pytest
import torch

from companion.experiments.fidelity import Decoder, Prompt, answer, compare, make_prompts, report
from companion.families import tiny_model
from companion.paths import REASONER
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core import attach, load_model
from dms_core.baselines import get_baseline
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REASONER)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Problems cut in two; the "needle" is the same problem, its code what a model says first."""
    rows = [tokenizer(make_problem("test", 0, i, (6, 9)).prompt)["input_ids"] for i in range(5)]
    return [Prompt(ids[:-4], ids[-4:], ids[-4:], "=" if i else "never said") for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def base():
    return attach(load_base(REASONER), DMSConfig())


@pytest.fixture(scope="module")
def dense(base, tokenizer, prompts):
    with base.dms.disabled():
        return answer(base, tokenizer, prompts, DMSCache.for_model, 40, batch=4)


def test_dense_answers_match_generate(dense, prompts):
    model, ids = load_base(REASONER), [*prompts[0].context, *prompts[0].question]
    said = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    assert dense.tokens[0, : len(said)].tolist() == said.tolist()


def test_dense_cache_agrees_with_dense_model_exactly(base, tokenizer, prompts, dense):
    with base.dms.disabled():
        again = answer(base, tokenizer, prompts, DMSCache.for_model, 40, dense.tokens, batch=2)
    facts = compare(again, dense, (tokenizer.eos_token_id,), 20)
    assert facts["agreement"] == 1 and abs(facts["kl"]) < 1e-5
    assert facts["cr_live"] == facts["cr_decisions"] == pytest.approx(1)
    assert facts["needles"] == 0.8 and facts["prompts"] == 5


def test_tokens_after_eos_are_not_counted(tokenizer, dense):
    ended = compare(dense, dense, [int(dense.tokens[0, 10])], 20)
    assert ended["tokens"] < dense.tokens.numel() and compare(dense, dense, (), 20)["tokens"] == dense.tokens.numel()


def test_compressed_cache_is_smaller_and_close(tokenizer, prompts, dense):
    model = load_model(REASONER / "dms-cr4")
    mine = answer(model, tokenizer, prompts, DMSCache.for_model, 40, dense.tokens)
    facts = compare(mine, dense, (tokenizer.eos_token_id,), 50)
    assert facts["cr_decisions"] > facts["cr_live"] > 1.5
    assert 0.9 < facts["agreement_low"] <= facts["agreement"] <= facts["agreement_high"] <= 1
    assert facts["kv_bytes"] < dense.kv_bytes


def test_training_free_method_keeps_its_budget(base, tokenizer, prompts, dense):
    with base.dms.disabled():
        theirs = answer(base, tokenizer, prompts, lambda m: get_baseline("tova")(4.0)(m, 40), 40, dense.tokens)
    assert (theirs.live <= (theirs.seen + 40) / 4 + 1).all()
    assert compare(theirs, dense, (tokenizer.eos_token_id,), 20)["agreement"] < 1


TEMPLATE = "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}{{ '>' if add_generation_prompt else '' }}"
TALK = [{"role": role, "content": text} for role, text in (("user", "?a"), ("assistant", "a=1")) * 6]


def test_make_prompts_shortens_the_context_and_keeps_the_code(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    full, short = (make_prompts(tokenizer, [TALK], longest)[0] for longest in (10**6, 60))
    assert len(short.context) < len(full.context) and len(short.context) + len(short.question) <= 60 + 40
    assert full.code == short.code and full.question == short.question


def test_report_has_a_row_for_every_method(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    gates = REASONER / "dms-cr4"
    model = load_base(gates)
    result = report(model, tokenizer, [gates], [TALK] * 3, 6, 10**6, batch=2)
    assert [row["method"] for row in result["rows"]] == ["vanilla", "dms", "tova", "streaming-llm"]
    assert result["rows"][0]["agreement"] == 1 and result["plain"]["kv_bytes"] > 0
    assert getattr(model, "dms", None) is None


@pytest.mark.parametrize("method", ["dms", "tova"])
def test_questions_of_unequal_length_after_a_past_leave_no_padding_in_states(method):
    model = attach(tiny_model("qwen3_next"), DMSConfig(window=4))
    make = DMSCache.for_model if method == "dms" else lambda m: get_baseline("tova")(1.0)(m, 8)
    texts = torch.randint(3, 60, (4, 24)).tolist()
    contexts, questions = (texts[0][:9], texts[1][:12]), [texts[2][:3], texts[3][:5], texts[3][:3], texts[2][:7]]
    with torch.inference_mode(), model.dms.disabled():
        decoder = Decoder(model, make(model), contexts, 0)
        decoder.branch(questions[::2], questions[1::2])
        whole = [[*contexts[i // 2], *question] for i, question in enumerate(questions)]
        for word in (7, 8):  # after the questions, and after decode steps
            alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[:, -1] for ids in whole])
            torch.testing.assert_close(decoder.logits, alone, rtol=1e-3, atol=1e-4)
            decoder.feed(torch.full((4, 1), word), torch.ones(4, 1, dtype=torch.long))
            whole = [[*ids, word] for ids in whole]
        assert decoder.position.tolist() == decoder.cache.tokens_seen().tolist() == [len(ids) for ids in whole]
