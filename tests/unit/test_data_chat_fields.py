"""Readers of conversations and pairs account for every field: used, known to be harmless, or refused by line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.data.chat.conversations import parse_chat, read_chats
from nemo_minitron.data.chat.fields import MESSAGE_FIELDS, RECORD_FIELDS, UnknownKinds
from nemo_minitron.data.chat.preferences import parse_preference, read_preferences
from nemo_minitron.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHATS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": "Hi", "response": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"input": "Hi", "output": "Hello"},
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    {"prompt": [USER], "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "No"}]},
    {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No"}]},
    {"prompt": "Hi", "chosen_response": "Hello", "rejected_response": "No", "chosen_reward": 2, "rejected_reward": 1},
]
# A prefix that no form uses: what is invented is unknown.
NAMES = st.from_regex(r"zz[a-z_]{1,12}", fullmatch=True)
VALUES = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(min_size=1),
    st.lists(st.integers(), min_size=1),
    st.dictionaries(NAMES, st.integers(), min_size=1),
)
EMPTY = st.sampled_from([None, "", [], {}])
EACH = settings(max_examples=50, deadline=None)


def objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record and its messages."""
    held = [record]
    for value in record.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                held.append(one)
    return held


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = [(parse_chat, record) for record in CHATS] + [(parse_preference, record) for record in PAIRS]


@EACH
@given(case=st.sampled_from(CASES), name=NAMES, value=VALUES, at=st.integers(0, 3))
def test_an_invented_field_is_refused(case: Any, name: str, value: Any, at: int) -> None:
    parse, record = case
    parse(record)
    record = copy.deepcopy(record)
    held = objects(record)
    held[at % len(held)][name] = value
    with pytest.raises(UnknownKinds, match=f"unknown field {name}=") as caught:
        parse(record)
    assert "remove it" in str(caught.value)
    assert "\n" not in str(caught.value)


@EACH
@given(case=st.sampled_from(CASES), name=NAMES, value=EMPTY, at=st.integers(0, 3))
def test_a_field_without_a_value_says_nothing(case: Any, name: str, value: Any, at: int) -> None:
    parse, record = case
    changed = copy.deepcopy(record)
    held = objects(changed)
    held[at % len(held)][name] = value
    assert parse(changed) == parse(record)


@pytest.mark.parametrize("case", CASES)
def test_a_harmless_field_changes_nothing(case: Any) -> None:
    parse, record = case
    changed = copy.deepcopy(record)
    for number, held in enumerate(objects(changed)):
        held |= dict.fromkeys(MESSAGE_FIELDS if number else RECORD_FIELDS, 7)
    assert parse(changed) == parse(record)
    assert all(RECORD_FIELDS.values())
    assert all(MESSAGE_FIELDS.values())


def test_a_kind_is_refused_once(tmp_path: Path) -> None:
    marked = {"messages": [USER, {**ANSWER, "zz": 1}], "yy": 2}
    with pytest.raises(DataError) as caught:
        read_chats(write(tmp_path / "a.jsonl", CHATS[0], *[marked] * 50, {"prompt": "", "response": "a"}))
    title, *faults = str(caught.value).splitlines()
    assert title.endswith("a.jsonl: 51 bad lines; correct or remove them, or set on_bad_record=skip to leave them out:")
    assert len(faults) == 3
    assert faults[0].startswith("  line 2: message 2: unknown field zz=1")
    assert faults[1].startswith("  line 2: unknown field yy=2")
    assert all(fault.endswith("(and 49 more like it)") for fault in faults[:2])
    assert faults[2] == "  line 52: prompt is empty"

    for read, known in ((read_chats, "messages"), (read_preferences, "chosen")):
        with pytest.raises(DataError, match="it has ctx, reply") as caught:
            read(write(tmp_path / "b.jsonl", *[{"reply": "a", "ctx": "b"}] * 30))
        assert "30 bad lines" in str(caught.value)
        assert known in str(caught.value)
        assert len(str(caught.value).splitlines()) == 2
