"""Attribute values of answers, as SteerLM uses them: schemas, the text form, and labels derived from plain data.

The text form is NeMo-Aligner's: ``helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:1``.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_minitron.data.bad_records import each
from nemo_minitron.data.chat.conversations import Chat
from nemo_minitron.data.chat.forms import HELPSTEER
from nemo_minitron.data.chat.labels import parse_attribute_string
from nemo_minitron.errors import DataError

__all__ = [
    "SCHEMAS",
    "AttributeSchema",
    "attribute_string",
    "check_attributes",
    "choose_schema",
    "derive_attributes",
    "parse_attribute_string",
    "reading_grade",
]


@dataclass(frozen=True)
class AttributeSchema:
    """The attributes that a data set labels, in the order of the text form and of the reward model's outputs.

    Attributes:
        name: its name in configurations.
        names: names of the attributes.
        highest: largest value; each value is a whole number from 0 to this.
    """

    name: str
    names: tuple[str, ...]
    highest: int

    def restricted(self, names: Collection[str]) -> AttributeSchema:
        """The schema with only the attributes in ``names``."""
        return replace(self, names=tuple(name for name in self.names if name in names))

    def faults(self, attributes: Mapping[str, int]) -> list[str]:
        """Unknown names and values out of range."""
        unknown = [name for name in attributes if name not in self.names]
        faults = [f"unknown attribute {name!r}; {self.name} has {', '.join(self.names)}" for name in unknown]
        return faults + [
            f"{name}={value}: must lie from 0 to {self.highest}"
            for name, value in attributes.items()
            if name in self.names and not 0 <= value <= self.highest
        ]


SCHEMAS: dict[str, AttributeSchema] = {
    schema.name: schema
    for schema in (
        # HelpSteer (arXiv 2311.09528, section 3) and HelpSteer 2: Likert scores 0 to 4.
        AttributeSchema("helpsteer", HELPSTEER, 4),
        # OpenAssistant as SteerLM uses it (arXiv 2310.05344, section 3.1): its scores in [0, 1] on a scale of 0 to 9.
        AttributeSchema(
            "oasst",
            ("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"),
            9,
        ),
    )
}


def choose_schema(name: str, names: Sequence[str] = (), highest: int | None = None) -> AttributeSchema:
    """A schema by its name, or the user's own schema.

    Raises:
        DataError: for an unknown name.
    """
    if names:
        return AttributeSchema(name, tuple(names), 4 if highest is None else highest)
    if name not in SCHEMAS:
        raise DataError(f"schema={name!r}: is not known; known: {', '.join(SCHEMAS)}; or name the attributes")
    return SCHEMAS[name]


def attribute_string(attributes: Mapping[str, int], schema: AttributeSchema | None = None) -> str:
    """The text form, in the order of the schema; None takes the first known schema with all the names."""
    if schema is None:
        schema = next((candidate for candidate in SCHEMAS.values() if set(attributes) <= set(candidate.names)), None)
    order = [name for name in (schema.names if schema else attributes) if name in attributes]
    return ",".join(f"{name}:{attributes[name]}" for name in order)


def check_attributes(
    chats: Sequence[Chat], schema: AttributeSchema, title: str, *, needed: bool = False, skip: bool = False
) -> list[int]:
    """Check every chat's values.

    Args:
        chats: as read.
        schema: what they may be.
        title: the file, for the message.
        needed: report chats without attribute values.
        skip: leave chats with such faults out.

    Returns:
        The numbers of the chats without a fault.

    Raises:
        DataError: all faults with their places, unless they are left out; in any case if all chats have some.
    """

    def check(row: tuple[int, Chat]) -> int:
        number, chat = row
        faults = schema.faults(chat.attributes)
        if needed and not chat.attributes:
            faults.append("has no attributes")
        if faults:
            raise DataError("; ".join(faults))
        return number

    checked = each(
        enumerate(chats),
        check,
        where=lambda row: row[1].where,
        record=lambda row: row[1].record(),
        title=title,
        skip=skip,
    )
    return [number for _, number in checked]


# -------------------------------------------------------------------------------------------------------------- derived


def derive_attributes(
    chats: Sequence[Chat], schema: AttributeSchema, preferred: Sequence[bool | None] | None = None
) -> list[Chat]:
    """Labels for data that have none. They are derived, not judged by people, and reports say so.

    ``verbosity`` is the rank of the answer's number of words among all answers, in as many equal parts as the scale
    has steps; ``complexity`` likewise of its reading grade (:func:`reading_grade`). Where ``preferred`` tells which
    answer of a pair was chosen, ``helpfulness``, ``correctness`` and ``quality`` are the highest value for it and the
    lowest for the other. Attributes that cannot be derived are left out.

    Args:
        chats: with answers.
        schema: only its attributes are derived.
        preferred: of each chat, whether its answer was chosen, rejected or is of no pair.

    Returns:
        The same chats with these attributes, in the same order; values that a chat already has stay.
    """
    answers = [chat.answer or "" for chat in chats]
    parts = {
        "verbosity": _parts([float(len(answer.split())) for answer in answers], schema.highest + 1),
        "complexity": _parts([reading_grade(answer) for answer in answers], schema.highest + 1),
    }
    derived = []
    for number, chat in enumerate(chats):
        values = {name: of[number] for name, of in parts.items()}
        if preferred is not None and (chosen := preferred[number]) is not None:
            values |= dict.fromkeys(("helpfulness", "correctness", "quality"), schema.highest if chosen else 0)
        values |= dict(chat.attributes)
        assert chat.answer is not None
        derived.append(chat.answered(chat.answer, {name: values[name] for name in schema.names if name in values}))
    return derived


def _parts(values: Sequence[float], count: int) -> list[int]:
    """Which of ``count`` equal parts of the sorted values each lies in; equal values lie in one."""
    order = sorted(values)
    return [min(count - 1, bisect.bisect_left(order, value) * count // len(order)) for value in values]


def reading_grade(text: str) -> float:
    """Flesch-Kincaid grade level (Kincaid et al. 1975), syllables counted as runs of vowels."""
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower()))) for word in words)
    return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59
