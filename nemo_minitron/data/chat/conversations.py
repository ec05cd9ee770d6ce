"""Conversations: JSONL of the user or of a package as :class:`Chat`, and their tokens through a chat template.

A line is one of::

    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"prompt": "...", "response": "..."}
    {"instruction": "...", "input": "...", "output": "..."}

with ``"attributes": {"verbosity": 3}`` of the last answer, if it has attribute values. A ``.json`` file is an array of
the same objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nemo_minitron.data import packages
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

ROLES = ("system", "user", "assistant")
#: Names that other forms of the same data use.
_ROLE_NAMES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
_REPORTED = 20  # bad lines named in one error

T = TypeVar("T")


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: of :data:`ROLES`.
        content: the text, not empty.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """One conversation: a system message or none, then user and assistant in turn.

    Attributes:
        messages: the turns.
        attributes: values of the last answer by name ("verbosity" -> 3); empty where the data give none.
        where: file and line, for messages.
    """

    messages: tuple[Message, ...]
    attributes: Mapping[str, int] = ()  # type: ignore[assignment]
    where: str = ""

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
        """The same prompt with this answer."""
        messages = (*self.prompt, Message("assistant", answer))
        return replace(self, messages=messages, attributes=dict(attributes or {}))

    def record(self) -> dict[str, Any]:
        """The ``messages`` form of a line."""
        content: dict[str, Any] = {"messages": [message._asdict() for message in self.messages]}
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
    attributes = parse_attributes(record.get("attributes"))
    for key in ("messages", "conversations"):
        if key in record:
            messages = parse_messages(record[key], system=record.get("system"))
            break
    else:
        pair = next((keys for keys in (("prompt", "response"), ("instruction", "output")) if keys[0] in record), None)
        if pair is None:
            have = ", ".join(sorted(record)) or "nothing"
            raise DataError(f"has none of messages, conversations, prompt and instruction; it has {have}")
        messages = _pair(record, *pair, answered=answered)
    check_order(messages, answered=answered)
    return Chat(messages, attributes)


def _pair(record: dict[str, Any], asked: str, given: str, *, answered: bool) -> tuple[Message, ...]:
    """The forms of one question and one answer."""
    question = text_of(record[asked], asked)
    if asked == "instruction" and record.get("input"):
        question += "\n" + text_of(record["input"], "input")
    system = record.get("system")
    messages = [Message("system", text_of(system, "system"))] if system else []
    messages.append(Message("user", question))
    if given in record or answered:
        messages.append(Message("assistant", text_of(record.get(given), given)))
    return tuple(messages)


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


def parse_messages(value: Any, *, system: Any = None) -> tuple[Message, ...]:
    """A list of ``{role, content}`` or ``{from, value}`` objects.

    Raises:
        DataError: for no list, an empty one, unknown roles and empty contents.
    """
    if not isinstance(value, list):
        raise DataError(f"messages must be a list, not {type(value).__name__}")
    if not value:
        raise DataError("messages is empty")
    messages = [Message("system", text_of(system, "system"))] if system else []
    return (*messages, *(parse_message(turn, f"message {number}") for number, turn in enumerate(value, 1)))


def parse_message(turn: Any, name: str) -> Message:
    """One ``{role, content}`` or ``{from, value}`` object.

    Raises:
        DataError: for another object, an unknown role or an empty content.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{name} is {type(turn).__name__}, not an object with role and content")
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    if not isinstance(turn.get(role), str) or turn[role].lower() not in _ROLE_NAMES:
        raise DataError(f"{name}: unknown role {turn.get(role)!r}; known: {', '.join(ROLES)}")
    known = _ROLE_NAMES[turn[role].lower()]
    what = "answer" if known == "assistant" else "content"
    return Message(known, text_of(turn.get(content), f"{name}: its {what}"))


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
    chats, faults = [], []
    for where, item in items:
        try:
            record = json.loads(item.decode("utf-8-sig")) if isinstance(item, bytes) else item
            chat = parse(record)
        except UnicodeDecodeError as error:
            faults.append(f"{where}: not UTF-8 ({error.reason})")
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except DataError as error:
            faults.append(f"{where}: {error}")
        else:
            chats.append(replace(chat, where=f"{title}, {where}") if hasattr(chat, "where") else chat)  # type: ignore[type-var]
    if faults:
        raise bad_lines(title, faults)
    if not chats:
        raise DataError(f"{title}: is empty; give a file with at least one line")
    return chats


def bad_lines(title: str, faults: Sequence[str]) -> DataError:
    """One error for all bad lines of a file."""
    more = f"\n  and {len(faults) - _REPORTED} more" if len(faults) > _REPORTED else ""
    shown = "".join(f"\n  {fault}" for fault in faults[:_REPORTED])
    plural = "1 bad line; correct or remove it" if len(faults) == 1 else (
        f"{len(faults)} bad lines; correct or remove them"
    )  # fmt: skip
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
    digests = [hashlib.sha256(json.dumps([seed, *prompt(item)]).encode()).hexdigest() for item in items]
    order = sorted(set(digests))
    count = max(1, round(len(order) * fraction)) if fraction > 0 and len(order) > 1 else 0
    chosen = set(order[:count])
    train = [item for item, digest in zip(items, digests, strict=True) if digest not in chosen]
    return train, [item for item, digest in zip(items, digests, strict=True) if digest in chosen]
