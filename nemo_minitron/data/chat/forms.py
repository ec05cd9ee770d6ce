"""Forms of a record: the fields in which data of this field keep the turns of a conversation.

A form is known by its fields alone. What a record holds besides is left for the caller to account for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.fields import Unknown, UnknownKinds, shown
from nemo_minitron.data.chat.turns import Message, parse_message, parse_messages, system_turn, text_of
from nemo_minitron.errors import DataError

__all__ = [
    "HELPSTEER",
    "LISTS",
    "chat_turns",
    "check_paired",
    "marked_turns",
    "question_turns",
    "read_attributes",
    "without_end",
]

#: HelpSteer's attributes (arXiv 2311.09528, section 3), which its rows have as columns.
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
#: Fields that hold a list of messages.
LISTS = ("messages", "conversations", "conversation")
#: Question -> the fields that may hold its answer.
_PAIRS = {
    "prompt": ("response", "completion"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "input": ("output",),
}
#: Fields that hold what an instruction is about.
_ABOUT = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_KNOWN = ", ".join([*LISTS, *(f"{asked} with {' or '.join(answers)}" for asked, answers in _PAIRS.items())])

#: Turns within one text: NeMo's (with HelpSteer 2's, which begins without a mark), and HH-RLHF's.
_NEMO_MARK = re.compile(r"^<extra_id_[01]>(System|User|Assistant)(?:\n|$)", re.MULTILINE)
_HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_NEMO_END = "\n<extra_id_1>"
_ROLES = {"System": "system", "User": "user", "Human": "user", "Assistant": "assistant"}


def chat_turns(record: Mapping[str, Any], given: Noted, unknown: Unknown, *, answered: bool) -> tuple[Message, ...]:
    """The turns of a record of any known form.

    Args:
        record: a line's object.
        given: the same; the fields that are read are noted.
        unknown: where unknown fields of messages go.
        answered: the answer must be there.

    Raises:
        DataError: for a form that is not known (once a file), or fields that do not hold what they should.
    """
    listed = next((key for key in LISTS if record.get(key) is not None), None)
    if listed is not None:
        messages = parse_messages(given[listed], unknown, system=_system(record, given))
        _check_repeated(record, given, messages)
        return messages
    asked = next((key for key in _PAIRS if record.get(key) is not None), None)
    have = ", ".join(sorted(record)) or "nothing"
    if asked is None and not answered and isinstance(record.get("context"), list):  # HelpSteer 3's pairs
        return question_turns(record, given, "context", unknown)
    if asked is None:
        raise UnknownKinds({"form": f"is of no form that is known; it has {have}; known: {_KNOWN}"})
    answers = _PAIRS[asked]
    if record.get("reasoning") in ("on", "off"):  # of Nemotron's data: whether the answer thinks, as its text shows
        given.get("reasoning")
    if answered:
        check_paired(record)
    if answered and record.get("chosen") is not None:
        raise UnknownKinds({"pair": f"is a preference pair, and conversations are wanted here; it has {have}"})
    answer = next((key for key in answers if record.get(key) is not None), None)
    if answer is None and answered and not any(key in record for key in answers):
        raise UnknownKinds({f"no answer to {asked}": f"has no {' and no '.join(answers)}; it has {have}"})
    prompt = question_turns(record, given, asked, unknown)
    if asked != "instruction":  # answers within a prompt are context; those of a history are trained on
        prompt = tuple(turn._replace(trained=turn.role != "assistant" and turn.trained) for turn in prompt)
    if answer is None:
        if answered:
            raise DataError(f"has no {' and no '.join(answers)}")
        for key in answers:
            given.get(key)
        return prompt
    if "text" in record:  # Alpaca's column of the whole, written out
        _check_written_out(given, asked, answer)
    return (*prompt, *_answers(given[answer], answer, unknown))


def question_turns(record: Mapping[str, Any], given: Noted, asked: str, unknown: Unknown) -> tuple[Message, ...]:
    """The turns before the answer.

    Args:
        record: a line's object.
        given: the same; the fields that are read are noted.
        asked: the field with the question: a text, a text with marks of turns, or messages.
        unknown: where unknown fields of messages go.

    Raises:
        DataError: for fields that do not hold what they should.
    """
    system = _system(record, given)
    if isinstance(given[asked], list):
        return parse_messages(given[asked], unknown, system=system)
    question = text_of(given[asked], asked)
    if (marked := marked_turns(question)) is not None:
        turns = marked[:-1] if marked[-1] == Message("assistant", "") else marked
        if system_turn(system) and turns[0].role == "system":
            raise DataError(f"{asked} has a system message of its own; remove one of both")
        return (*system_turn(system), *turns)
    about = next((key for key in _ABOUT if asked == "instruction" and record.get(key)), None)
    if about is not None:
        question += "\n" + text_of(given[about], about)
    history = _history(given.get("history")) if asked == "instruction" else ()
    return (*system_turn(system), *history, Message("user", question))


def marked_turns(text: str) -> tuple[Message, ...] | None:
    r"""Turns of a text that holds NeMo's or HH-RLHF's marks; None for a text without them.

    ``<extra_id_0>System\n...\n<extra_id_1>User\n...`` is what Aligner's scripts write, ``...\n<extra_id_1>Assistant\n``
    HelpSteer 2; ``\n\nHuman: ...\n\nAssistant: ...`` is HH-RLHF's. An empty system message is left out; the last turn
    may be an empty answer, whose place the text shows.

    Raises:
        DataError: for an empty turn, or other marks in one.
    """
    if re.match(r"\s*Human:", text) and "\n\nAssistant:" in text:
        mark, text = _HH_MARK, text.strip()
    elif _NEMO_MARK.search(text):
        mark = _NEMO_MARK
    else:
        return None
    first, *parts = mark.split(text)
    turns = [Message("user", first.strip("\n"))] if first.strip() else []
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        content = content.strip() if mark is _HH_MARK else without_end(content.removesuffix("\n"))
        if role == "System" and not content.strip():
            continue
        turns.append(Message(_ROLES[role], content))
    for number, turn in enumerate(turns, 1):
        if "<extra_id_" in turn.content:
            raise DataError(f"turn {number} of the text holds a mark of NeMo's, {shown(turn.content)}; write messages")
        if not turn.content.strip() and not (number == len(turns) and turn.role == "assistant"):
            raise DataError(f"turn {number} of the text is empty")
    if turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns[-1] = Message("assistant", "")
    return tuple(turns)


def without_end(text: str) -> str:
    """An answer without the mark of the next turn, with which Aligner's data end it."""
    stripped = text.rstrip("\n")
    return stripped.removesuffix(_NEMO_END) if stripped.endswith(_NEMO_END) else text


def check_paired(record: Mapping[str, Any]) -> None:
    """Raise an UnknownKinds error for a row of KTO: an answer, and whether it is good."""
    if isinstance(record.get("label"), bool) and record.get("completion") is not None:
        raise UnknownKinds(
            {"KTO": "is an answer with a label (KTO), and no stage trains on those; give minitron dpo pairs (chosen "
             "and rejected of one prompt), or minitron sft the answers whose label is true, without it"}
        )  # fmt: skip


def read_attributes(record: Mapping[str, Any], given: Noted) -> Any:
    """What a record says of its last answer: ``attributes``, or HelpSteer's columns; None for nothing."""
    if record.get("attributes") is not None:
        return given["attributes"]
    columns = {name: given[name] for name in HELPSTEER if record.get(name) is not None}
    if any(isinstance(record.get(key), str | list) for key in ("response", *LISTS)) and columns:
        return {name: _whole(value) for name, value in columns.items()}
    return given.get("attributes")


def _whole(value: Any) -> Any:
    """A column with gaps is one of floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _system(record: Mapping[str, Any], given: Noted) -> Any:
    name = next((name for name in _SYSTEM if record.get(name)), "system")
    return given.get(name)


def _answers(value: Any, name: str, unknown: Unknown) -> tuple[Message, ...]:
    if isinstance(value, list):
        return parse_messages(value, unknown)
    if isinstance(value, dict):
        return (parse_message(value, name, unknown),)
    return (Message("assistant", text_of(without_end(text_of(value, name)), name)),)


def _history(value: Any) -> tuple[Message, ...]:
    """LLaMA-Factory's earlier turns: ``[[question, answer], ...]``."""
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(both, list) and len(both) == 2 for both in value):
        raise DataError(f"history={shown(value)} is no list of [question, answer]; correct it")
    turns: list[Message] = []
    for number, (question, answer) in enumerate(value, 1):
        turns.append(Message("user", text_of(question, f"history, {number}: its question")))
        turns.append(Message("assistant", text_of(answer, f"history, {number}: its answer")))
    return tuple(turns)


def _check_repeated(record: Mapping[str, Any], given: Noted, messages: Sequence[Message]) -> None:
    """Fields that some data have beside the messages: right if they say the same, or what is done anyway."""
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        if prompt.strip() not in [turn.content.strip() for turn in messages if turn.role == "user"]:
            raise DataError("has messages and a prompt that is none of them; remove one of both")
        given.get("prompt")
    if record.get("type") == "TEXT_TO_VALUE":
        raise DataError(
            "type=TEXT_TO_VALUE trains a model to write attribute values; minitron reward trains one that predicts "
            "them, from the same conversations without the type"
        )
    if record.get("type") == "VALUE_TO_TEXT":  # what labelled=true does
        given.get("type")
    if (mask := record.get("mask")) is not None:  # of NeMo's chats: whose turns are not trained on
        if not isinstance(mask, str) or mask.lower() != "user":
            raise DataError(f"mask={shown(mask)}: only the user's turns can be left out; write User, or give weights")
        given.get("mask")


def _check_written_out(given: Noted, asked: str, answer: str) -> None:
    whole = given.get("text")
    if whole and not (isinstance(whole, str) and all(str(given[key]).strip() in whole for key in (asked, answer))):
        raise DataError(f"text={shown(whole)} does not hold {asked} and {answer}; remove it")
