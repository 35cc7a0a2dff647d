"""Conversations by a model's chat template, also by one that knows no system role."""

import inspect
import re
from collections.abc import Mapping, Sequence


def chat_text(tokenizer, messages: Sequence[dict], waiting: bool = True, **arguments) -> str:
    """The conversation [{"role", "content"}, ...] as the template writes it.

    A system message that the template refuses or leaves out is put before the user's first one.  waiting: for the
    assistant's turn; arguments: the template's own, such as enable_thinking.  Raises ValueError that names the model
    if its template refuses the conversation all the same.
    """
    wordings, refused = [list(messages)], None
    written: list = []
    if [message["role"] for message in messages[:2]] == ["system", "user"]:
        system, user, *rest = messages
        wordings.append([{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])
    for wording in wordings:
        try:
            text = tokenizer.apply_chat_template(wording, add_generation_prompt=waiting, tokenize=False, **arguments)
        except Exception as error:  # jinja2's, and whatever a template runs into
            refused = refused or error
            continue
        if not written or messages[0]["content"].strip() in text:
            written.append(text)
        if messages[0]["content"].strip() in text:
            break
    if not written:
        reason = (str(refused).splitlines() or [type(refused).__name__])[0]
        raise ValueError(f"{_name(tokenizer)}: its chat template refuses the conversation ({reason})") from refused
    return written[-1]


def chat_ids(tokenizer, messages: Sequence[dict], waiting: bool = True, **arguments) -> list[int]:
    """``chat_text`` as token ids; special tokens are those that the template has written."""
    return tokenizer(chat_text(tokenizer, messages, waiting, **arguments), add_special_tokens=False)["input_ids"]


def check_arguments(tokenizer, arguments: Mapping) -> None:
    """Raises ValueError for arguments that are not the chat template's own: it would not look at them."""
    template = getattr(tokenizer, "chat_template", None)
    taken = inspect.signature(tokenizer.apply_chat_template).parameters if template else ()
    for name in arguments:
        if not template:
            raise ValueError(f"template argument {name!r}: {_name(tokenizer)} has no chat template")
        if name in taken or not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise ValueError(f"template argument {name!r}: the chat template of {_name(tokenizer)} does not use it")


def _name(tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
