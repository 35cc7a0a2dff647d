"""A needle that is told, buried and asked for."""

import pytest

from companion.experiments.own_needle import Needle, buried, places, told_and_asked
from companion.paths import REASONER
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_model

NEEDLE = Needle("T=4+1;", "T=4+1=5;<", "?T>", "5")
OTHERS = [("a=1+2;b=a+3;?b>", "a=1+2=3;b=a+3=6;<"), ("c=2+2;?c>", "c=2+2=4;<")]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the reasoner's tokens are characters


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_needle_stands_behind_as_many_exchanges_as_asked(depth):
    messages = buried(NEEDLE, OTHERS, depth)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[2 * depth]["content"] == NEEDLE.told and messages[-1]["content"] == NEEDLE.question
    assert sorted(m["content"] for m in messages[::2][:-1]) == sorted([NEEDLE.told, *(q for q, _ in OTHERS)])


def test_a_depth_beyond_the_exchanges_is_refused():
    with pytest.raises(ValueError, match="depth 3: must be 0 to 2"):
        buried(NEEDLE, OTHERS, 3)


def test_gates_off_and_on_answer_the_same_conversation_and_the_cache_is_counted():
    model, tokenizer = load_model(REASONER / "dms-cr4"), load_tokenizer(REASONER)
    tokenizer.chat_template = TEMPLATE
    found = told_and_asked(model, tokenizer, NEEDLE, OTHERS, [0, 2])
    assert [(row["depth"], row["method"]) for row in found["rows"]] == [
        (depth, method) for depth in (0, 2) for method in ("vanilla", "dms")
    ]
    for dense, ours in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert dense["live"] == dense["seen"] and ours["live"] < ours["seen"]
        assert all(row["right"] == ("5" in row["said"]) for row in (dense, ours))
    assert found["messages"][:-1] == buried(NEEDLE, OTHERS, 0)
    assert found["messages"][-1] == {"role": "assistant", "content": found["rows"][1]["said"]}
    assert model.dms.enabled


@pytest.mark.parametrize(
    "tokens, secret, found",
    [
        (["the ", "code ", "is 73", "91", "."], "7391", [2, 3]),
        (["73", "91", "73", "91"], "7391", [0, 1]),
        (["code ", "7391", " end"], "7391", [1]),
        (["no", "ne"], "7391", []),
        (["7391"], "7391", [0]),
    ],
)
def test_tokens_of_the_secret_are_those_that_overlap_with_it(tokens, secret, found):
    assert places(tokens, secret) == found
