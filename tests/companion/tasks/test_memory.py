"""Conversations that ask for what was said before: what they hold, and that splits share nothing."""

import random

import pytest

from companion.tasks.memory import (
    HELD_OUT,
    KINDS,
    OVERHEAD,
    compose,
    draw_fact,
    draw_facts,
    exchanges_of,
    kinds_of,
    shared,
)

EXCHANGES = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.") for a in range(12) for b in range(12)]


def count(text):
    return len(text.split())


def composed(split, number, tokens=400, seed=1):
    late = split != "train"
    return [compose(EXCHANGES, split, seed, index, tokens, count, late) for index in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_to_be_remembered_was_told_and_stands_in_the_answer(kind):
    fact = draw_fact(random.Random(3), kind, "test")
    parts = [fact.plain[a:b] for a, b in fact.spans]
    assert parts and all(part.strip() in " ".join(fact.told) for part in parts)
    assert not set("{}[]") & set("".join([*fact.told, fact.asked, fact.plain]))


def test_conversations_are_the_same_for_a_seed_and_differ_by_index():
    first, again = composed("train", 3), composed("train", 3)
    assert first == again and first[0] != first[1] and first[0] != composed("train", 1, seed=2)[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_are_told_before_they_are_asked_for_and_answers_hold_them(split):
    for row in composed(split, 20):
        texts = [message["content"] for message in row["messages"]]
        assert len(texts) % 2 == 0 and 200 < sum(map(count, texts)) + OVERHEAD * len(texts) / 2 <= 400
        assert len(row["asked"]) >= 3
        for fact in row["asked"]:
            assert max(fact["told"]) < fact["answer"] - 1 and row["messages"][fact["answer"]]["role"] == "assistant"
            told = " ".join(texts[at] for at in fact["told"])
            assert all(texts[fact["answer"]][a:b].strip() in told for a, b in fact["spans"])
        if split == "test":  # nothing but questions about facts at the end
            last = sorted(fact["answer"] for fact in row["asked"])
            assert last == list(range(len(texts) - 2 * len(last) + 1, len(texts), 2))


def test_hops_are_told_in_order_and_one_chain_of_a_kind_is_in_a_conversation():
    for row in composed("test", 30):
        kinds = [fact["kind"] for fact in row["asked"]]
        assert all(fact["told"] == sorted(fact["told"]) for fact in row["asked"])
        assert all(kinds.count(kind) <= 1 for kind in kinds if KINDS[kind].get("once"))


def test_more_facts_than_there_are_is_refused():
    assert len(draw_facts(random.Random(0), 100, "train")) == 100
    with pytest.raises(ValueError, match=r"400 facts: only about [0-9]+ differ; a conversation must have fewer tokens"):
        draw_facts(random.Random(0), 400, "train")


def test_held_out_kinds_are_in_the_test_split_alone():
    kinds = {split: {f["kind"] for row in composed(split, 60) for f in row["asked"]} for split in ("train", "test")}
    assert not kinds["train"] & set(HELD_OUT) and set(HELD_OUT) <= kinds["test"]
    with pytest.raises(ValueError, match="split 'dev'"):
        kinds_of("dev")


def test_no_prompt_is_in_two_splits_and_a_planted_one_is_found():
    train, test = composed("train", 300), composed("test", 60)
    pool = exchanges_of(train)
    mine = [compose(exchanges_of([{"messages": []}]), "test", 1, i, 100, count, True) for i in range(60)]
    assert len(pool) > 100 and shared(mine, train) == []
    assert shared(test, train)  # their exchanges are the same
    planted = {**test[0], "asked": train[5]["asked"], "messages": train[5]["messages"]}
    assert any(train[5]["messages"][0]["content"] in text for text in shared([planted], train))


def test_exchanges_to_avoid_are_left_out():
    def row(pairs):
        return {"messages": [{"role": "user", "content": text} for pair in pairs for text in pair]}

    assert exchanges_of([row(EXCHANGES[:9]), row(EXCHANGES[:9])], [row(EXCHANGES[:4])]) == EXCHANGES[4:9]
