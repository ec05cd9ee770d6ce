"""Turns of a conversation: messages of a record, read and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.fields import MESSAGE_FIELDS, Unknown, UnknownKinds, blank, shown
from nemo_minitron.data.chat.labels import parse_attribute_string
from nemo_minitron.data.chat.tools import parse_calls
from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json

__all__ = ["ROLES", "Message", "by_message", "check_order", "parse_message", "parse_messages", "system_turn", "text_of"]

ROLES = ("system", "user", "assistant", "tool")
#: Names that other forms of the same data use.
_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}
#: Fields of every message.
_COLUMNS = ({"role", "content"}, {"from", "value"})
#: Fields that say whether a message is trained on: 1 or 0.
_WEIGHTS = ("weight", "loss", "train")
#: Fields that a template writes, by role; each is a text, but for the calls.
_MORE = {
    "system": ("name",),
    "user": ("name",),
    "assistant": ("name", "reasoning_content", "thinking", "tool_calls"),
    "tool": ("name", "tool_call_id"),
}


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: of :data:`ROLES`.
        content: the text; not empty, but where the assistant calls a tool.
        trained: whether an answer is trained on.
        more: other fields that the chat template gets (``tool_calls``, ``reasoning_content``, ...), a JSON object;
            empty for none.
        label: attribute values of the turn in text form (SteerLM); of the last answer, the conversation has them.
    """

    role: str
    content: str
    trained: bool = True
    more: str = ""
    label: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """``more`` as an object."""
        return parse_json(self.more) if self.more else {}

    def turn(self) -> dict[str, Any]:
        """What the chat template gets."""
        return {"role": self.role, "content": self.content, **self.fields}

    def record(self) -> dict[str, Any]:
        """The message of a line."""
        record = self.turn() | ({} if self.trained else {"weight": 0})
        return record | ({"label": self.label} if self.label else {})

    def identity(self) -> list[str]:
        """What two equal messages of a prompt share."""
        return [self.role, self.content, *([self.more] if self.more else [])]


def by_message(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose messages are a column for each field, as tables may keep lists of objects, with lists of them."""
    return {key: _by_message(value) for key, value in record.items()}


def _by_message(value: Any) -> Any:
    if not isinstance(value, dict) or not any(names <= value.keys() for names in _COLUMNS):
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


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

    System messages without a text are left out.

    Raises:
        DataError: for no list, an empty one, unknown roles and empty contents.
    """
    if not isinstance(value, list):
        raise DataError(f"messages must be a list, not {type(value).__name__}")
    if not value:
        raise DataError("messages is empty")
    messages = [parse_message(turn, f"message {number}", unknown) for number, turn in enumerate(value, 1)]
    said = (turn for turn in messages if turn.role != "system" or turn.content.strip() or turn.more)
    return (*system_turn(system), *said)


def system_turn(value: Any) -> tuple[Message, ...]:
    """The system message of a record's field; none for null, or for a text without a character that shows.

    Raises:
        DataError: for anything but text.
    """
    if blank(value) or (isinstance(value, str) and not value.strip()):
        return ()
    return (Message("system", text_of(value, "system")),)


def parse_message(turn: Any, name: str, unknown: Unknown) -> Message:
    """One ``{role, content}`` or ``{from, value}`` object; its unknown fields go to ``unknown``.

    The content is a text or a list of text parts. ``weight``, ``loss`` or ``train`` says whether it is trained on.

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
    if given[role].lower() == "function_call":  # ShareGPT's: the value is the call
        return _call(given, content, name, unknown)
    trained = _trained(given, known, name)
    label = _label(given, known, name)
    more = _more(given, known, name, unknown)
    text = _content(given.get(content), name, unknown)
    wordless = blank(text) or (isinstance(text, str) and not text.strip())
    if not (wordless and (known == "system" or "tool_calls" in more)):  # a call needs no words
        text = text_of(text, f"{name}: its {'answer' if known == 'assistant' else 'content'}")
    unknown.account(given, MESSAGE_FIELDS, kind="message", place=name)
    return Message(known, text or "", trained, json.dumps(more) if more else "", label)


def _call(given: Noted, content: str, name: str, unknown: Unknown) -> Message:
    try:
        calls = parse_json(text_of(given.get(content), f"{name}: its call"))
    except ValueError:
        raise DataError(f"{name}: its call {shown(given[content])} is no JSON; correct it") from None
    calls = parse_calls(calls if isinstance(calls, list) else [calls], name, unknown)
    trained = _trained(given, "assistant", name)
    unknown.account(given, MESSAGE_FIELDS, kind="message", place=name)
    return Message("assistant", "", trained, json.dumps({"tool_calls": calls}))


def _trained(given: Noted, role: str, name: str) -> bool:
    """Whether a message is trained on, as its weight says."""
    said = {key: given[key] for key in _WEIGHTS if given.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{name}: {key}={shown(value)}; a message is trained on (1) or not (0): write one of both")
        if value == 1 and role != "assistant":
            raise DataError(f"{name}: {key}={value} of the {role}; only answers are trained on: remove it, or write 0")
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(
            f"{name}: {' and '.join(f'{key}={value}' for key, value in said.items())} contradict each other"
        )
    return all(said.values())


def _label(given: Noted, role: str, name: str) -> str:
    """NeMo's attribute values of a turn."""
    value = given.get("label") if role in ("user", "assistant") else None
    if blank(value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name}: label={shown(value)} is no text of attribute values; write quality:4,verbosity:1")
    try:
        return ",".join(f"{key}:{number}" for key, number in parse_attribute_string(value).items())
    except DataError as error:
        raise DataError(f"{name}: label: {error}") from None


def _more(given: Noted, role: str, name: str, unknown: Unknown) -> dict[str, Any]:
    """Fields beyond the content that a template may write."""
    more: dict[str, Any] = {}
    for key in _MORE[role]:
        value = given.get(key)
        if blank(value):
            continue
        if key == "tool_calls":
            value = parse_calls(value, name, unknown)
        elif not isinstance(value, str):
            raise DataError(f"{name}: {key} is {type(value).__name__}, not text")
        more[key] = value
    return more


def _content(value: Any, name: str, unknown: Unknown) -> Any:
    """The content, its parts joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value, 1):
        place = f"{name}, part {number}"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise DataError(f"{place}: is {type(part).__name__}, not a text part; correct it")
        given = Noted(part)
        if given.get("type", "text") != "text" or not isinstance(given.get("text"), str):
            kind = shown(part.get("type", part))
            raise UnknownKinds({f"part {kind}": f"{place}: is {kind}; only text can be trained on: remove the line"})
        texts.append(given["text"])
        unknown.account(given, {}, kind="part", place=place)
    return "".join(texts)


def check_order(messages: Sequence[Message], *, answered: bool) -> None:
    """Raise a DataError unless user and assistant follow each other after at most one system message.

    Results of tools follow a call, and the assistant follows them.
    """
    body = messages[1:] if messages and messages[0].role == "system" else messages
    if not body:
        raise DataError("holds no message of the user")
    due: tuple[str, ...] = ("user",)
    for number, message in enumerate(body, 1 + len(messages) - len(body)):
        if message.role not in due:
            raise DataError(f"roles out of order: message {number} is {message.role}'s, {' or '.join(due)}'s was due")
        if message.role == "assistant":
            due = ("tool",) if "tool_calls" in message.fields else ("user",)
        else:
            due = ("tool", "assistant") if message.role == "tool" else ("assistant",)
    if answered and body[-1].role != "assistant":
        raise DataError("ends without an answer of the assistant")
