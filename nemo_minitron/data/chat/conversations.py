"""Conversations: records of the user or of a package as :class:`Chat`.

A record is one of (:mod:`nemo_minitron.data.chat.forms`)::

    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"prompt": "..." or messages, "response" or "completion": "..." or messages}
    {"instruction": "...", "input": "...", "output": "..."}
    {"input": "...", "output": "..."}
    {"question": "...", "answer": "..."}

with ``"attributes": {"verbosity": 3}`` of the last answer, if it has attribute values, and ``"tools"`` that may be
called.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.accounting import Noted
from nemo_minitron.data import packages
from nemo_minitron.data.chat.fields import ANSWER_FIELDS, RECORD_FIELDS, Unknown
from nemo_minitron.data.chat.forms import chat_turns, read_attributes
from nemo_minitron.data.chat.labels import parse_attribute_string
from nemo_minitron.data.chat.tools import parse_tools
from nemo_minitron.data.chat.turns import ROLES, Message, by_message, check_order
from nemo_minitron.data.json_records import items
from nemo_minitron.data.records import open_records, parse_all
from nemo_minitron.errors import DataError

__all__ = [
    "CHAT_PACKAGES",
    "ROLES",
    "Chat",
    "Message",
    "iter_chats",
    "iter_records",
    "parse_chat",
    "read_chats",
    "read_package_chats",
    "read_records",
    "split_held_out",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Chat:
    """One conversation: a system message or none, then user and assistant in turn, and results of tools after calls.

    Attributes:
        messages: the turns.
        attributes: values of the last answer by name ("verbosity" -> 3); empty where the data give none.
        where: file and place in it, for messages.
        tools: what the assistant may call, a JSON list; empty for none.
    """

    messages: tuple[Message, ...]
    attributes: Mapping[str, int] = ()  # type: ignore[assignment]
    where: str = ""
    tools: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", dict(self.attributes))

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer; all turns if the last is the user's."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last turn, if it is the assistant's."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    def answered(self, answer: str, attributes: Mapping[str, int] | None = None) -> Chat:
        """The same prompt with this answer; if it is the answer that stands there, its other fields stay."""
        last = self.messages[-1] if answer == self.answer else Message("assistant", answer)
        messages = (*self.prompt, last)
        return replace(self, messages=messages, attributes=dict(attributes or {}))

    def record(self) -> dict[str, Any]:
        """The ``messages`` form of a line."""
        content: dict[str, Any] = {"messages": [message.record() for message in self.messages]}
        if self.tools:
            content["tools"] = json.loads(self.tools)
        return content | ({"attributes": dict(self.attributes)} if self.attributes else {})


def read_chats(path: str | Path, *, answered: bool = True, skip: bool = False) -> list[Chat]:
    """All conversations of a file: :func:`iter_chats`."""
    return list(iter_chats(path, answered=answered, skip=skip))


def iter_chats(path: str | Path, *, answered: bool = True, skip: bool = False) -> Iterator[Chat]:
    """The conversations of a file, streamed; of any container (:mod:`nemo_minitron.data.containers`).

    Args:
        path: of a file, or of a directory with a dataset.
        answered: each must end with an answer; otherwise it may end with the user's turn (prompts).
        skip: leave bad records out (``on_bad_record: skip``).

    Raises:
        DataError: for a file that cannot be read or holds nothing, and for bad records, which are all named with their
            places and what is wrong with each, at the end of the file; after the first nothing is given out.
    """
    return iter_records(path, lambda record: parse_chat(record, answered=answered), skip=skip)


def read_package_chats(name: str, cache_dir: str | Path) -> list[Chat]:
    """The conversations that an installable package carries (:data:`CHAT_PACKAGES`), in the package's order.

    Raises:
        DataError: for an unknown name, or as :func:`~nemo_minitron.data.packages.fetch`.
    """
    return read_package_records(name, cache_dir, CHAT_PACKAGES, parse_chat)


#: Conversations that come through pip alone.
CHAT_PACKAGES = ("llamafactory-sft",)


def parse_chat(record: Any, *, answered: bool = True) -> Chat:
    """A line's object as a conversation.

    Raises:
        DataError: what is wrong with it, without where it stands.
    """
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    record = by_message(record)
    given, unknown = Noted(record), Unknown()
    attributes = parse_attributes(read_attributes(record, given))
    messages = chat_turns(record, given, unknown, answered=answered)
    attributes, messages = _labelled(attributes, messages)
    tools = parse_tools(given.get("tools"))
    check_order(messages, answered=answered)
    if answered and not any(message.trained for message in messages if message.role == "assistant"):
        raise DataError("all answers have the weight 0, so nothing is trained on; remove the line")
    unknown.account(given, RECORD_FIELDS if answered else RECORD_FIELDS | ANSWER_FIELDS, kind="record")
    unknown.refuse()
    return Chat(messages, attributes, tools=tools)


def _labelled(attributes: dict[str, int], messages: tuple[Message, ...]) -> tuple[dict[str, int], tuple[Message, ...]]:
    """The label of the last answer (NeMo's) as the values of the conversation."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or not last.label:
        return attributes, messages
    values = parse_attribute_string(last.label)
    if attributes and attributes != values:
        raise DataError("attributes and the label of the last message say different values; remove one of both")
    return values, (*messages[:-1], last._replace(label=""))


def parse_attributes(value: Any) -> dict[str, int]:
    """``{"verbosity": 3}``; nothing for null.

    Raises:
        DataError: unless it maps names to whole numbers.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"attributes must map names to whole numbers, not be {type(value).__name__}")
    if bad := [f"{name}={it!r}" for name, it in value.items() if isinstance(it, bool) or not isinstance(it, int)]:
        raise DataError(f"attributes must be whole numbers: {', '.join(bad)}")
    return dict(value)


# --------------------------------------------------------------------------------------------------------------- files


def read_records(path: str | Path, parse: Callable[[Any], T], *, skip: bool = False) -> list[T]:
    """Each record of a file through ``parse``: :func:`iter_records`."""
    return list(iter_records(path, parse, skip=skip))


def iter_records(path: str | Path, parse: Callable[[Any], T], *, skip: bool = False) -> Iterator[T]:
    """Each record of a file through ``parse``, streamed; of any container (:mod:`nemo_minitron.data.containers`).

    In a result with a field ``where``, that field is set to the file and the record's place in it.

    Args:
        path: of a file, or of a directory with a dataset.
        parse: raises a DataError with what is wrong with one object.
        skip: leave bad records out (``on_bad_record: skip``).

    Raises:
        DataError: as :func:`read_chats`, at the end of the file; after the first bad record nothing is given out.
    """
    records = open_records(path)
    return _placed(parse_all(records.read(), records.title, parse, skip=skip))


def read_package_records(name: str, cache_dir: str | Path, known: Sequence[str], parse: Callable[[Any], T]) -> list[T]:
    """The objects of the JSON arrays that a package carries.

    Raises:
        DataError: as :func:`read_package_chats`.
    """
    if name not in known:
        raise DataError(f"package {name!r} carries no such data; known: {', '.join(known)}")
    return [
        record
        for member, content in packages.archive_members(name, cache_dir)
        for record in _parse_array(content, f"{name}/{member}", parse)
    ]


def _parse_array(content: bytes, title: str, parse: Callable[[Any], T]) -> list[T]:
    return list(_placed(parse_all(items(io.BytesIO(content), title, array=True), title, parse)))


def _placed(parsed: Iterable[tuple[str, T]]) -> Iterator[T]:
    for where, item in parsed:
        yield replace(item, where=where) if hasattr(item, "where") else item  # type: ignore[type-var]


def split_held_out(
    items: Sequence[T], fraction: float, seed: int, *, key: Callable[[T], Sequence[Message]] | None = None
) -> tuple[list[T], list[T]]:
    """``(train, held out)``: items with the same prompt are on one side, whatever their order in the file.

    Args:
        items: chats, or anything with a ``prompt`` of messages.
        fraction: share that is held out, at least one item where it is above 0.
        seed: of the split.
        key: the messages that two items must not share across the split; their ``prompt`` by default.
    """
    prompt: Callable[[Any], Sequence[Message]] = key or (lambda item: item.prompt)
    digests = [
        hashlib.sha256(json.dumps([seed, *(message.identity() for message in prompt(item))]).encode()).hexdigest()
        for item in items
    ]
    order = sorted(set(digests))
    count = max(1, round(len(order) * fraction)) if fraction > 0 and len(order) > 1 else 0
    chosen = set(order[:count])
    train = [item for item, digest in zip(items, digests, strict=True) if digest not in chosen]
    return train, [item for item, digest in zip(items, digests, strict=True) if digest in chosen]
