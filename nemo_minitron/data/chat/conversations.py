"""Conversations: JSONL of the user or of a package as :class:`Chat`, and their tokens through a chat template.

A line is one of (:mod:`nemo_minitron.data.chat.forms`)::

    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"prompt": "..." or messages, "response" or "completion": "..." or messages}
    {"instruction": "...", "input": "...", "output": "..."}
    {"input": "...", "output": "..."}
    {"question": "...", "answer": "..."}

with ``"attributes": {"verbosity": 3}`` of the last answer, if it has attribute values, and ``"tools"`` that may be
called. A ``.json`` file is an array of the same objects.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron.accounting import Noted
from nemo_minitron.data import packages
from nemo_minitron.data.chat.fields import ANSWER_FIELDS, RECORD_FIELDS, Unknown, UnknownKinds
from nemo_minitron.data.chat.forms import chat_turns, read_attributes
from nemo_minitron.data.chat.tools import parse_tools
from nemo_minitron.data.chat.turns import ROLES, Message, check_order
from nemo_minitron.errors import DataError

__all__ = [
    "CHAT_PACKAGES",
    "ROLES",
    "Chat",
    "Message",
    "parse_chat",
    "read_chats",
    "read_package_chats",
    "read_records",
    "split_held_out",
]

_REPORTED = 20  # bad lines named in one error

T = TypeVar("T")


@dataclass(frozen=True)
class Chat:
    """One conversation: a system message or none, then user and assistant in turn, and results of tools after calls.

    Attributes:
        messages: the turns.
        attributes: values of the last answer by name ("verbosity" -> 3); empty where the data give none.
        where: file and line, for messages.
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


def read_chats(path: str | Path, *, answered: bool = True) -> list[Chat]:
    """All conversations of a JSONL or JSON file.

    Args:
        path: the file.
        answered: each must end with an answer; otherwise it may end with the user's turn (prompts).

    Raises:
        DataError: for a file that cannot be read or holds nothing, and for bad lines, which are all named with their
            numbers and what is wrong with each.
    """
    return read_records(path, lambda record: parse_chat(record, answered=answered))


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
    given, unknown = Noted(record), Unknown()
    attributes = parse_attributes(read_attributes(record, given))
    messages = chat_turns(record, given, unknown, answered=answered)
    tools = parse_tools(given.get("tools"))
    check_order(messages, answered=answered)
    if answered and not any(message.trained for message in messages if message.role == "assistant"):
        raise DataError("all answers have the weight 0, so nothing is trained on; remove the line")
    unknown.account(given, RECORD_FIELDS if answered else RECORD_FIELDS | ANSWER_FIELDS, kind="record")
    unknown.refuse()
    return Chat(messages, attributes, tools=tools)


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


def read_records(path: str | Path, parse: Callable[[Any], T]) -> list[T]:
    """Each object of a JSONL file (or of the array in a ``.json`` file) through ``parse``.

    In a result with a field ``where``, that field is set to file and line.

    Raises:
        DataError: as :func:`read_chats`; ``parse`` raises it with what is wrong with one object.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    if path.suffix.lower() == ".json":
        return _parse_array(content, str(path), parse)
    lines = ((f"line {number}", line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
    return _parse_all(lines, str(path), parse)


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
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{title}: not JSON ({error}); correct it") from None
    if not isinstance(records, list):
        raise DataError(f"{title}: a JSON array of objects is needed, not {type(records).__name__}; or write JSONL")
    return _parse_all(((f"item {number}", record) for number, record in enumerate(records, 1)), title, parse)


def _parse_all(items: Iterable[tuple[str, Any]], title: str, parse: Callable[[Any], T]) -> list[T]:
    chats, faults, bad = [], [], 0
    kinds: dict[str, int] = {}
    again: Counter[int] = Counter()  # further lines of the fault with this number
    for where, item in items:
        bad += 1
        try:
            record = json.loads(item.decode("utf-8-sig")) if isinstance(item, bytes) else item
            chat = parse(record)
        except UnicodeDecodeError as error:
            faults.append(f"{where}: not UTF-8 ({error.reason})")
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except UnknownKinds as error:
            for kind, fault in error.kinds.items():
                if kind in kinds:
                    again[kinds[kind]] += 1
                else:
                    kinds[kind] = len(faults)
                    faults.append(f"{where}: {fault}")
        except DataError as error:
            faults.append(f"{where}: {error}")
        else:
            bad -= 1
            chats.append(replace(chat, where=f"{title}, {where}") if hasattr(chat, "where") else chat)  # type: ignore[type-var]
    if faults:
        for number, count in again.items():
            faults[number] += f" (and {count} more like it)"
        raise bad_lines(title, faults, lines=bad)
    if not chats:
        raise DataError(f"{title}: is empty; give a file with at least one line")
    return chats


def bad_lines(title: str, faults: Sequence[str], *, lines: int | None = None) -> DataError:
    """One error for all bad lines of a file.

    Args:
        title: the file.
        faults: what is wrong, each with its line.
        lines: how many lines are bad; by default as many as there are faults.
    """
    more = f"\n  and {len(faults) - _REPORTED} more" if len(faults) > _REPORTED else ""
    shown = "".join(f"\n  {fault}" for fault in faults[:_REPORTED])
    lines = len(faults) if lines is None else lines
    plural = "1 bad line; correct or remove it" if lines == 1 else f"{lines} bad lines; correct or remove them"
    return DataError(f"{title}: {plural}:{shown}{more}")


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
