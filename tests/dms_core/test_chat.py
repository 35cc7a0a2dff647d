"""Chat templates that know a system role, refuse it, or leave it out; their arguments."""

import pytest

from companion.tasks.base import Task, TaskProblem
from companion.tasks.reasoner import make_tokenizer
from dms_core.chat import chat_ids, chat_text, check_arguments
from dms_core.train.data import encode

LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[say]{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
LEAVES_OUT = LOOP.replace(
    "[{{ m.role }}]{{ m.content }}", "{% if m.role != 'system' %}[user]{{ m.content }}{% endif %}"
)
ASKED = [{"role": "system", "content": " be brief"}, {"role": "user", "content": "why"}]


def with_template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    return tokenizer


@pytest.mark.parametrize(
    "template, text",
    [
        (LOOP, "[system] be brief[user]why[say]"),
        (REFUSES, "[user] be brief\n\nwhy[say]"),
        (LEAVES_OUT, "[user] be brief\n\nwhy[say]"),
    ],
)
def test_system_message_is_said_by_the_user_where_the_template_has_no_place_for_it(template, text):
    tokenizer = with_template(template)
    assert chat_text(tokenizer, ASKED) == text
    assert chat_ids(tokenizer, ASKED) == tokenizer(text)["input_ids"]
    assert ASKED == [{"role": "system", "content": " be brief"}, {"role": "user", "content": "why"}]
    head = tokenizer(text)["input_ids"]
    assert encode(tokenizer, ASKED, "a")[0][: len(head)] == head
    task = Task()
    task.messages = lambda problem: ASKED
    assert task.prompt_ids(tokenizer, TaskProblem("1", "", None)) == head


@pytest.mark.parametrize(
    "template, reason", [("{{ raise_exception('No users\nat all') }}", "No users"), ("{{ messages[0].a.b }}", "a")]
)
def test_template_that_refuses_all_the_same_gives_one_line_that_names_the_model(template, reason):
    for messages in (ASKED, ASKED[1:]):
        with pytest.raises(ValueError, match=rf"^some/model: its chat template refuses.*{reason}") as error:
            chat_text(with_template(template), messages)
        assert "\n" not in str(error.value)


def test_arguments_reach_the_template_and_unknown_ones_are_refused():
    tokenizer = with_template(LOOP + "{% if enable_thinking is defined and not enable_thinking %}<quiet>{% endif %}")
    assert chat_text(tokenizer, ASKED, enable_thinking=False).endswith("[say]<quiet>")
    assert chat_text(tokenizer, ASKED).endswith("[say]")
    check_arguments(tokenizer, {"enable_thinking": False})
    for name in ("enable_thinkin", "tokenize"):
        with pytest.raises(ValueError, match=f"'{name}': the chat template of some/model does not use it"):
            check_arguments(tokenizer, {name: False})
    with pytest.raises(ValueError, match="has no chat template"):
        check_arguments(make_tokenizer(), {"enable_thinking": False})
    check_arguments(make_tokenizer(), {})
