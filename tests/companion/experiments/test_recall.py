"""What a cache remembers of given texts, on the embedded model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from companion.experiments import recall, recall_study
from companion.experiments.recall import (
    CONTROLS,
    Document,
    Head,
    control,
    conversation,
    far_tokens,
    live_tokens,
    prose,
    record,
    scores,
    through,
    topics,
    whole,
)
from companion.paths import REASONER
from companion.tasks.memory import compose
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core import attach, load_model
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig


@pytest.fixture(scope="module")
def documents():
    """Traces; the "fact" is what stands at three places of each."""
    tokenizer, found = load_tokenizer(REASONER), []
    for i in range(5):
        problem = make_problem("test", 0, i, (6, 9))
        ids = tokenizer(problem.prompt + problem.trace)["input_ids"]
        counted = np.arange(len(ids)) >= 20
        asked = [{"kind": "code", "distance": 90, "tokens": np.arange(len(ids) - 9, len(ids) - 6)}]
        found.append(Document(ids, 20, counted, asked))
    return found


@pytest.fixture(scope="module")
def base():
    return attach(load_base(REASONER), DMSConfig())


@pytest.fixture(scope="module")
def truth(base, documents):
    with torch.inference_mode(), base.dms.disabled():
        return whole(base, [d.ids for d in documents])


@torch.inference_mode()
def test_one_pass_of_dms_is_what_its_cache_gives_token_by_token(documents):
    model, some = load_model(REASONER / "dms-cr4"), documents[:3]
    once = whole(model, [d.ids for d in some])
    live = live_tokens(model, [len(d.ids) for d in some])
    cache = DMSCache.for_model(model)
    stepped, reads = through(model, cache, some)
    for ours, theirs in zip(once, stepped, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert live == pytest.approx(reads.tolist())
    assert live == pytest.approx(cache.live_tokens().float().mean((0, 2)).tolist())
    assert max(live) < 0.6 * max(len(d.ids) for d in some)


@torch.inference_mode()
def test_dense_model_is_no_divergence_from_itself_also_through_a_control_without_a_ratio(base, documents, truth):
    head = Head(base)
    for name in ("tova", "quest-protected"):
        with base.dms.disabled():
            make = control(name, documents, max(len(d.ids) for d in documents) + 40)
            hidden, _ = through(base, make(base), documents)
        for ours, theirs, document in zip(hidden, truth, documents, strict=True):
            found = scores(ours, head, theirs, head, document)
            assert found["same"].all() and np.abs(found["kl"]).max() < 1e-4
            assert found["logp"].shape == (len(document.at),)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONTROLS)
def test_control_holds_or_reads_what_it_is_given_and_the_prompt_if_protected(base, documents, truth, name):
    live, head = 45.0, Head(base)
    with base.dms.disabled():
        cache = control(name, documents, live)(base)
        hidden, reads = through(base, cache, documents)
    mean = float((reads if name.startswith("quest") else cache.live_tokens()).float().mean())
    assert mean == pytest.approx(live, rel=0.7 if name.startswith(("quest", "rkv")) else 0.12)
    away = scores(hidden[0], head, truth[0], head, documents[0])
    assert 0 < away["kl"].mean() < 5 and away["same"].mean() < 1


@torch.inference_mode()
def test_far_dependent_tokens_need_what_is_cut_off(base, documents, truth, monkeypatch):
    head, document = Head(base), documents[0]
    with base.dms.disabled():
        monkeypatch.setattr(recall, "CUT", len(document.ids))
        assert not far_tokens(base, head, truth[0], document).any()
        monkeypatch.setattr(recall, "CUT", 16)
        monkeypatch.setattr(recall, "BLOCK", 8)
        far = far_tokens(base, head, truth[0], document)
        assert 0 < far.sum() < len(far) and not far[: 16 + 1].any()
        alone = replace(document, counted=np.arange(len(document.ids)) == document.at[-1])
        assert far_tokens(base, head, truth[0], alone).tolist() == far[-1:].tolist()
        monkeypatch.setattr(recall, "FAR", 0.0)
        t = int(document.at[-1])  # by hand, from a text cut just so
        start = 20 + 16 + 1 + (t - 37) // 8 * 8
        cut = whole(base, [document.ids[:20] + document.ids[start - 16 : t]])[0][-1]
    change = torch.nn.functional.kl_div(
        head(cut[None]).log_softmax(-1), head(truth[0][t - 1][None]).log_softmax(-1), log_target=True, reduction="sum"
    )
    assert far[-1] == bool(change >= 0.5)


@torch.inference_mode()
def test_a_fact_is_recalled_where_all_its_tokens_are_first_choices(documents):
    document = documents[0]
    found = {name: np.ones(len(document.at)) for name in ("kl", "same", "logp", "right")}
    none = np.zeros(len(document.at), bool)
    assert record(document, found, none)["asked"][0]["right"]
    found["right"][-8] = 0
    row = record(document, found, none | True, live=7.0)
    assert not row["asked"][0]["right"] and row["far_kl"] == row["counted"] and row["live"] == 7


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "Ġt"])}, merges=[("Ġ", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


def test_answers_lie_where_their_tokens_are_and_distances_reach_back_to_the_fact():
    tokenizer, exchanges = byte_tokenizer(), [(f"Say {i}.", f"{i}, as you like.") for i in range(90)]
    for index in range(6):
        row = compose(exchanges, "test", 5, index, 900, len, True)
        document = conversation(tokenizer, row)
        text = tokenizer.decode(document.ids)
        assert document.prompt < len(document.ids) and not document.counted[: document.prompt].any()
        for fact, found in zip(row["asked"], document.asked, strict=True):
            answer = row["messages"][fact["answer"]]["content"]
            said = "".join(answer[a:b] for a, b in fact["spans"])
            assert tokenizer.decode([document.ids[t] for t in found["tokens"]]) == said
            assert document.counted[found["tokens"]].all()
            told = row["messages"][fact["told"][0]]["content"]
            begins = len(tokenizer.decode(document.ids[: found["tokens"][0] - found["distance"]]))
            assert text[begins:].startswith(f"user: {told}")


def test_prose_is_there_and_counts_behind_its_prompt():
    texts = topics(3)
    document = prose(byte_tokenizer(), texts[0], 500, 64)
    assert len(texts) == 3 and min(map(len, texts)) > 6000 and len(document.ids) == 500
    assert document.at.tolist() == list(range(64, 500)) and not document.asked


@pytest.fixture(scope="module")
def study(base, documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    texts = [*documents, Document(documents[0].ids[:90], 10, np.arange(90) >= 10)]
    head, model = Head(base), load_model(REASONER / "dms-cr4")
    methods = [
        recall_study.Method("vanilla", 1.0, out / "vanilla.jsonl", base, head),
        recall_study.Method("dms", 4.0, out / "dms.jsonl", model, Head(model)),
        recall_study.Method("streaming-llm", 4.0, out / "streaming-llm.jsonl", base, head),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "CUT", 16)
        found = recall_study.measure(methods, texts, out, 3, {"model": "m"})
    return methods, texts, out, found


def test_study_holds_controls_to_what_dms_holds(study):
    methods, texts, _, found = study
    dms, other = (np.array([found[m][i]["live"] for i in range(len(texts))]) for m in methods[1:])
    assert abs(dms.mean() / other.mean() - 1) < 0.1
    assert all(found[methods[0]][i]["live"] == len(d.ids) for i, d in enumerate(texts))


def test_interrupted_study_goes_on_with_what_is_missing_and_ends_the_same(study, monkeypatch):
    methods, texts, out, found = study
    file = methods[2].file
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    runs = []
    monkeypatch.setattr(recall, "CUT", 16)
    monkeypatch.setattr(recall_study, "through", lambda *given: runs.append(given[2]) or through(*given))
    again = recall_study.measure(methods, texts, out, 3, {"model": "m"})
    assert len(runs) == 1 and again == found
    assert sorted(file.read_text().splitlines()) == sorted("".join(lines).splitlines())
    with pytest.raises(ValueError, match="other texts"):
        recall_study.measure(methods, texts[:2], out, 3, {"model": "m"})


def test_summary_has_the_dense_model_at_no_divergence_and_differences_from_dms(study):
    methods, _, _, found = study
    result = recall_study.summary(found, 200)
    dense, dms, other = result["rows"]
    assert dense["measures"]["agreement"]["value"] == 1 and dense["measures"]["kl"]["value"] < 1e-6
    assert dense["cr_live"] == 1 and dms["cr_live"] > 1.5 and result["questions"] == 5
    assert 0 < result["far"] < result["counted"] and dms["measures"]["far_kl"]["low"] is not None
    pair = next(p for p in result["pairs"] if p["b"] == "streaming-llm" and p["measure"] == "kl")
    assert pair["value"] == pytest.approx(dms["measures"]["kl"]["value"] - other["measures"]["kl"]["value"])
    assert pair["low"] <= pair["value"] <= pair["high"]
    assert sum(cell["of"] for cell in result["cells"]) == 5 * len(methods)


def test_controls_may_run_on_the_shorter_texts_alone(study, tmp_path, monkeypatch):
    methods, texts, _, found = study
    monkeypatch.setattr(recall, "CUT", 16)
    monkeypatch.setattr(recall_study, "STEP", 64)
    own = [recall_study.Method(m.name, m.cr, tmp_path / m.file.name, m.model, m.head) for m in methods]
    most = recall_study.size(90)
    short = recall_study.measure(own, texts, tmp_path, 1, {"model": "m"}, most)
    on = {i for i, d in enumerate(texts) if recall_study.size(len(d.ids)) <= most}
    assert 0 < len(on) < len(texts) and [set(short[m]) for m in own[:2]] == [set(range(len(texts)))] * 2
    assert set(short[own[2]]) == on
    result = recall_study.summaries(short, 50)
    assert [len(x["rows"]) for x in (result, result["common"])] == [2, 3]
    assert (result["documents"], result["common"]["documents"]) == (len(texts), len(on))
    assert recall_study.summaries(found, 50) == recall_study.summary(found, 50) | {"common": None}


def test_wilson_interval_of_half_and_of_all():
    assert recall_study.wilson(50, 100) == pytest.approx({"low": 0.4038, "high": 0.5962}, abs=1e-3)
    assert recall_study.wilson(20, 20)["high"] == pytest.approx(1)
