"""Chat messages into the text of a prompt, by the model's own template. Decides which messages are refused; knows no
stubs, and of a tokenizer only that it renders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinja2 import TemplateError

from router.validation import ChatMessage, InvalidArgument

ROLES = ("system", "user", "assistant", "tool")
# What a template may raise besides errors of its own, over messages that it did not expect.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def check_messages(messages: Sequence[ChatMessage], has_template: bool) -> None:
    if not has_template:
        raise InvalidArgument("chat", len(messages), "the model has no chat template; send text or token ids")
    if not messages:
        raise InvalidArgument("chat.messages", 0, "must have at least one message")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgument(f"chat.messages[{index}].role", message.role, f"must be one of {', '.join(ROLES)}")
        if not message.content:
            raise InvalidArgument(f"chat.messages[{index}].content", message.content, "must not be empty")


def render(messages: Sequence[ChatMessage], template: Callable[[list[dict[str, str]]], str]) -> str:
    """`template` puts the messages into one text, the beginning of the answer included."""
    try:
        return template([{"role": message.role, "content": message.content} for message in messages])
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message.role for message in messages[:8])
        reason = f"the model's chat template refuses the messages: {type(error).__name__}: {error}"
        raise InvalidArgument("chat.messages", roles, reason) from error


def num_chars(messages: Sequence[ChatMessage]) -> int:
    return sum(len(message.role) + len(message.content) for message in messages)
