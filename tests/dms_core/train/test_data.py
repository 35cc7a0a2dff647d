import json
import threading

import numpy as np
import pytest
import torch

from companion.families import tiny_model as model_of
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import load_tokenizer
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.step import documents
from dms_core.train.data import OPEN, PackedRows, Store, completions, encode, pack, prepare
from dms_core.train.retrofit import pad_collate

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def math_row(number: int = 0, accepted=(True, False), complete=(True, True)) -> dict:
    """A row with the fields of OpenR1-Math-220k; the second generation is the first one cut."""
    problem = make_problem("retrofit", 0, number)
    return {
        "problem": problem.prompt.removesuffix(">"),
        "solution": problem.trace,
        "answer": problem.answer,
        "generations": [problem.trace, problem.trace[:5]],
        "correctness_math_verify": list(accepted),
        "is_reasoning_complete": list(complete),
        "uuid": str(number),
    }


def write(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    "accepted, complete, kept",
    [
        ((True, True), (True, True), [0, 1]),
        ((False, True), (True, True), [1]),
        ((True, True), (False, True), [1]),
        ((False, False), (True, True), []),
        ((True,), (True, True), [0]),
        (None, (True, True), []),
    ],
)
def test_only_complete_generations_that_math_verify_accepts_are_kept(accepted, complete, kept):
    row = {
        **math_row(),
        "correctness_math_verify": accepted and list(accepted),
        "is_reasoning_complete": list(complete),
    }
    assert completions(row) == [([{"role": "user", "content": row["problem"]}], row["generations"][i]) for i in kept]


def test_conversations_and_plain_text_become_completions():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert completions({"messages": talk}) == [(talk[:1], "b")]
    assert completions({"text": "abc"}) == [([], "abc")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problem": None}, "problem: is NoneType; must be text"),
        ({"generations": "x"}, "generations: is str; must be a list"),
        ({"generations": [1]}, "generations: must be a list of text"),
        ({"correctness_math_verify": True}, "correctness_math_verify: is bool"),
        ({"correctness_math_verify": ["yes", "no"]}, "correctness_math_verify: must be a list of true and false"),
        ({"is_reasoning_complete": 1}, "is_reasoning_complete: is int"),
    ],
)
def test_schema_errors_name_file_line_and_field(change, message, tokenizer, tmp_path):
    data = write(tmp_path / "rows.jsonl", [math_row(), {**math_row(1), **change}])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        prepare(data, tokenizer, 512, 10**6, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_malformed_rows_are_named_with_file_and_line(tokenizer, tmp_path):
    for row, message in (
        ([1], "the row is a list"),
        ({"prompt": "x"}, "generations: missing, and so are messages and text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: the last one must have role 'assistant'"),
        ({"messages": [{"role": "assistant"}]}, "messages: holds"),
    ):
        data = write(tmp_path / "rows.jsonl", [row])
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1: {message}"):
            prepare(data, tokenizer, 512, 10**6, tmp_path / "store")
    (tmp_path / "rows.jsonl").write_text('\n{"text": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not valid JSON"):
        prepare(data, tokenizer, 512, 10**6, tmp_path / "store")
    data = write(tmp_path / "rows.jsonl", [math_row(accepted=(False, False))])
    with pytest.raises(ValueError, match="no document of 1 rows is left"):
        prepare(data, tokenizer, 512, 10**6, tmp_path / "store")
    with pytest.raises(ValueError, match="data 'no/such': neither a JSONL file nor a hub data set in reach"):
        prepare("no/such", tokenizer, 512, 10**6, tmp_path / "store")


def test_labels_cover_the_completion_and_its_end(tokenizer, tmp_path):
    row = math_row()
    store = prepare(write(tmp_path / "rows.jsonl", [row]), tokenizer, 512, 10**6, tmp_path / "store")
    ids, labels = store.document(0)
    head = len(row["problem"]) + 1
    assert tokenizer.decode(ids[:head]) == row["problem"] + ">"
    assert tokenizer.decode(ids[head:-1]) == row["generations"][0] and ids[-1] == tokenizer.eos_token_id
    assert (labels[:head] == -100).all() and (labels[head:] == ids[head:]).all()


def test_encoding_keeps_one_think_tag_and_the_reasoning():
    """R1's template ends with an opened <think> and strips the reasoning of assistant turns."""

    class Words:
        chat_template, eos_token_id = "x", "<eos>"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            return f"<user>{messages[0]['content']}<assistant><think>\n"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": list(text)}

    ids, head = encode(Words(), [{"role": "user", "content": "q"}], "<think>\nso</think> 4")
    assert "".join(ids) == "<user>q<assistant><think>\nso</think> 4<eos>"
    assert "".join(ids[:head]) == "<user>q<assistant><think>\n"


def test_cuts_and_drops_are_counted(tokenizer, tmp_path):
    rows = [math_row(i) for i in range(4)] + [math_row(9, accepted=(False, False))]
    lengths = [len(encode(tokenizer, *completions(row)[0])[0]) for row in rows[:4]]
    heads = [encode(tokenizer, *completions(row)[0])[1] for row in rows[:4]]
    context = sorted(heads)[-1]  # too short for the longest prompt to leave anything to predict
    facts = prepare(write(tmp_path / "rows.jsonl", rows), tokenizer, context, 10**6, tmp_path / "store").facts
    kept = [min(length, context) for length, head in zip(lengths, heads, strict=True) if head < context]
    assert (facts["rows"], facts["rejected_rows"], facts["documents"]) == (5, 1, len(kept))
    assert facts["cut"] == sum(length > context for length in lengths) and facts["dropped"] == 4 - len(kept) >= 1
    assert facts["tokens_cut"] == sum(max(length - context, 0) for length in lengths)
    assert facts["tokens"] == sum(kept)


def test_prepare_stops_at_the_token_limit_and_reuses_its_store(tokenizer, tmp_path):
    data = write(tmp_path / "rows.jsonl", [math_row(i) for i in range(50)])
    store = prepare(data, tokenizer, 512, 1000, tmp_path / "store")
    assert 1000 <= store.facts["tokens"] < 1512 and store.facts["rows"] < 50
    before = (tmp_path / "store" / "tokens.bin").stat().st_mtime_ns
    again = prepare(data, tokenizer, 512, 1000, tmp_path / "store")
    assert (again.tokens == store.tokens).all() and (tmp_path / "store" / "tokens.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="store holds a run with other context"):
        prepare(data, tokenizer, 256, 1000, tmp_path / "store")
    write(tmp_path / "rows.jsonl", [math_row(3)])
    with pytest.raises(ValueError, match="store holds a run with other data"):
        prepare(data, tokenizer, 512, 1000, tmp_path / "store")


def test_prepare_on_other_ranks_waits_for_rank_0(tokenizer, tmp_path, monkeypatch):
    data, found = write(tmp_path / "rows.jsonl", [math_row()]), []
    monkeypatch.setenv("RANK", "1")
    waiter = threading.Thread(target=lambda: found.append(prepare(data, tokenizer, 512, 99, tmp_path / "store")))
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive()
    monkeypatch.setenv("RANK", "0")
    prepare(data, tokenizer, 512, 99, tmp_path / "store")
    waiter.join(5)
    assert len(found[0]) == 1


def store_of(lengths: list[int]) -> Store:
    """Documents whose tokens count on from 1, with a prompt of two tokens each."""
    offsets = np.cumsum([0, *lengths[:-1]])
    learnt = np.concatenate([np.arange(length) >= 2 for length in lengths])
    return Store(np.arange(1, sum(lengths) + 1, dtype=np.uint32), learnt, np.stack([offsets, lengths], 1), {})


def test_every_document_is_packed_once_and_whole():
    lengths = np.random.default_rng(0).integers(1, 101, 500)
    rows = pack(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= 100 and filled[:-OPEN].mean() > 96  # the last rows are what was open at the end


def test_packed_rows_are_a_function_of_seed_and_index():
    store = store_of([5, 9, 3, 7, 8, 4])
    rows = PackedRows(store, 12, 20, seed=3)
    forward = [rows[i] for i in range(20)]
    fresh = PackedRows(store, 12, 20, seed=3)
    for index in (19, 0, 7):  # out of order, as after a resumption
        assert all((fresh[index][key] == forward[index][key]).all() for key in forward[index])
    first_epoch = np.concatenate([row["input_ids"] for row in forward[: rows.starts[1]]])
    assert sorted(first_epoch) == list(range(1, 37))
    other = PackedRows(store, 12, 20, seed=4)
    assert any(
        len(other[i]["input_ids"]) != len(forward[i]["input_ids"])
        or (other[i]["input_ids"] != forward[i]["input_ids"]).any()
        for i in range(20)
    )
    with pytest.raises(IndexError):
        rows[20]
    with pytest.raises(ValueError, match="size 0: must be >= 1"):
        PackedRows(store, 12, 0)


def test_packed_rows_give_the_model_segments_without_labels_across_them():
    rows = PackedRows(store_of([5, 4, 3]), 12, 1)
    batch = pad_collate(0)([rows[0], {"input_ids": [7, 8], "labels": [-100, 8], "position_ids": [0, 1]}])
    segments = documents(batch["attention_mask"].bool(), batch["position_ids"], True)
    lengths = torch.unique_consecutive(segments[0], return_counts=True)[1].tolist()
    assert sorted(lengths) == [3, 4, 5] and segments[1].tolist() == [0, 0] + [-1] * 10
    starts = batch["position_ids"][0] == 0
    assert (batch["labels"][0][starts] == -100).all() and (batch["labels"][0] != -100).sum() == 12 - 2 * 3


def test_packed_documents_have_the_losses_of_single_documents(tiny_model):
    """Of teacher and student; the student's gates are random and evict."""
    from dms_core.train.losses import Distiller

    model, teacher = tiny_model(), tiny_model(seed=1, gates=False)
    distiller = Distiller(model, teacher)
    model.eval()
    store = store_of([9, 12, 7])
    packed = pad_collate(0)([PackedRows(store, 28, 1)[0]])
    alone = [pad_collate(0)([PackedRows(store_of_part(store, i), 28, 1)[0]]) for i in range(3)]
    with torch.no_grad():
        whole = distiller(**packed, alpha_target=0.5)
        parts = [distiller(**batch, alpha_target=0.5) for batch in alone]
    weights = [7, 10, 5]  # labelled tokens
    expected = sum(part["kd"] * weight for part, weight in zip(parts, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(whole["kd"], expected, rtol=1e-4, atol=1e-6)
    evicted = sum(part["evicted"] * tokens for part, tokens in zip(parts, (9, 12, 7), strict=True)) / 28
    torch.testing.assert_close(whole["evicted"], evicted)


def store_of_part(store: Store, index: int) -> Store:
    return Store(store.tokens, store.learnt, store.table[index : index + 1], {})


def test_rows_of_a_model_with_states_hold_one_document_each():
    rows = PackedRows(store_of([5, 4, 3]), 12, 6, alone=True)
    assert sorted(len(rows[i]["input_ids"]) for i in range(3)) == [3, 4, 5]
    assert all((rows[i]["position_ids"] == np.arange(len(rows[i]["input_ids"]))).all() for i in range(6))


def test_packed_documents_are_refused_by_a_model_with_states():
    model = attach(model_of("qwen3_next"), DMSConfig(window=2))
    batch = pad_collate(0)([PackedRows(store_of([5, 4, 3]), 12, 1)[0]])
    with pytest.raises(ValueError, match="documents packed in a row: must be one a row"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    model(input_ids=batch["input_ids"], use_cache=False)
