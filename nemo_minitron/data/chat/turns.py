"""Turns of a conversation: messages of a record, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.fields import MESSAGE_FIELDS, Unknown
from nemo_minitron.errors import DataError

__all__ = ["ROLES", "Message", "check_order", "parse_message", "parse_messages", "text_of"]

ROLES = ("system", "user", "assistant")
#: Names that other forms of the same data use.
_ROLE_NAMES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: of :data:`ROLES`.
        content: the text, not empty.
    """

    role: str
    content: str


def text_of(value: Any, name: str) -> str:
    """The text itself.

    Raises:
        DataError: if it is missing, no text, or empty.
    """
    if value is None:
        raise DataError(f"has no {name}")
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not text")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value


def parse_messages(value: Any, unknown: Unknown, *, system: Any = None) -> tuple[Message, ...]:
    """A list of ``{role, content}`` or ``{from, value}`` objects; their unknown fields go to ``unknown``.

    Raises:
        DataError: for no list, an empty one, unknown roles and empty contents.
    """
    if not isinstance(value, list):
        raise DataError(f"messages must be a list, not {type(value).__name__}")
    if not value:
        raise DataError("messages is empty")
    messages = [Message("system", text_of(system, "system"))] if system else []
    return (*messages, *(parse_message(turn, f"message {number}", unknown) for number, turn in enumerate(value, 1)))


def parse_message(turn: Any, name: str, unknown: Unknown) -> Message:
    """One ``{role, content}`` or ``{from, value}`` object; its unknown fields go to ``unknown``.

    Raises:
        DataError: for another object, an unknown role or an empty content.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{name} is {type(turn).__name__}, not an object with role and content")
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    given = Noted(turn)
    if not isinstance(given.get(role), str) or given[role].lower() not in _ROLE_NAMES:
        raise DataError(f"{name}: unknown role {given.get(role)!r}; known: {', '.join(ROLES)}")
    known = _ROLE_NAMES[given[role].lower()]
    what = "answer" if known == "assistant" else "content"
    message = Message(known, text_of(given.get(content), f"{name}: its {what}"))
    unknown.account(given, MESSAGE_FIELDS, kind="message", place=name)
    return message


def check_order(messages: Sequence[Message], *, answered: bool) -> None:
    """Raise a DataError unless user and assistant follow each other after at most one system message."""
    turns = [message.role for message in messages]
    body = turns[1:] if turns[:1] == ["system"] else turns
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(body))]
    if not body:
        raise DataError("holds no message of the user")
    if body != expected:
        at = next(number for number, (have, want) in enumerate(zip(body, expected, strict=True)) if have != want)
        raise DataError(
            f"roles out of order: message {at + 1 + len(turns) - len(body)} is {body[at]}'s, {expected[at]}'s was due"
        )
    if answered and body[-1] != "assistant":
        raise DataError("ends without an answer of the assistant")
