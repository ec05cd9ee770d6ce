"""Forms of conversations and pairs that people have, each read as its makers mean it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.conversations import parse_chat, read_chats
from nemo_minitron.data.chat.preferences import parse_preference, read_preferences
from nemo_minitron.errors import DataError


def say(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CALL = {"name": "f", "arguments": {"a": 1}}
HELPSTEER = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}

#: A record -> the messages that it says; answers of weight 0 are context.
CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": say("a", "b", system="s")}, say("a", "b", system="s")),
    "UltraChat": ({"prompt": "a", "prompt_id": "7", "messages": say("a", "b", "c", "d")}, say("a", "b", "c", "d")),
    "ShareGPT": (
        {"id": "x", "conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "a", "markdown": None, "text": None},
            {"from": "gpt", "value": "b", "weight": 0}, {"from": "human", "value": "c"},
            {"from": "chatgpt", "value": "d"}]},
        [*say("a", system="s"), {"role": "assistant", "content": "b", "weight": 0}, *say("c", "d")],
    ),
    "ShareGPT with tools": (
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"}],
         "tools": json.dumps([{"name": "f", "parameters": {}}])},
        [*say("a"),
         {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
         {"role": "tool", "content": "2"}, {"role": "assistant", "content": "b"}],
    ),
    "NeMo's chats": (
        {"mask": "User", "system": "s", "conversations": [
            {"from": "User", "value": "a", "label": None}, {"from": "Assistant", "value": "b", "label": None}]},
        say("a", "b", system="s"),
    ),
    "prompt, response": ({"prompt": "a", "response": "b", "system": "s"}, say("a", "b", system="s")),
    "TRL's prompt, completion": ({"prompt": "a", "completion": " b"}, say("a", " b")),
    "TRL's conversations": (
        {"prompt": say("a", "b", "c", system="s"), "completion": [{"role": "assistant", "content": "d"}]},
        [*say("a", system="s"), {"role": "assistant", "content": "b", "weight": 0}, *say("c", "d")],
    ),
    "Alpaca": (
        {"instruction": "a", "input": "x", "output": "b", "text": "Below is ...\na\nx\n### Response:\nb"},
        say("a\nx", "b"),
    ),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "b"}, say("a", "b")),
    "LLaMA-Factory's history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"},
        say("a", "b", "c", "d", system="s"),
    ),
    "Dolly": ({"instruction": "a", "context": "x", "response": "b", "category": "open_qa"}, say("a\nx", "b")),
    "NeMo": ({"input": "a", "output": "b"}, say("a", "b")),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, say("a", "b", system="s")),
    "question, answer": ({"question": "a", "answer": "b"}, say("a", "b")),
    "HelpSteer 2 of several turns": (
        {"prompt": "a\n\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d"},
        [*say("a"), {"role": "assistant", "content": "b", "weight": 0}, *say("c", "d")],
    ),
    "Aligner's prompts": (
        {"prompt": "<extra_id_0>System\ns\n<extra_id_1>User\na\n<extra_id_1>Assistant\n",
         "response": "b\n<extra_id_1>"},
        say("a", "b", system="s"),
    ),
    "Aligner's prompts without a system message": (
        {"prompt": "<extra_id_0>System\n<extra_id_1>User\na\n<extra_id_1>Assistant", "response": "b"}, say("a", "b"),
    ),
    "HH-RLHF's prompts": ({"prompt": "\n\nHuman: a\n\nAssistant:", "response": " b"}, say("a", " b")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_forms_of_conversations(name: str, tmp_path: Path) -> None:
    record, messages = CHATS[name]
    (tmp_path / "chats.jsonl").write_text(json.dumps(record) + "\n")
    (chat,) = read_chats(tmp_path / "chats.jsonl")
    assert chat.record()["messages"] == messages


def test_columns_of_helpsteer_are_attributes() -> None:
    chat = parse_chat({"prompt": "a", "response": "b", **HELPSTEER})
    assert chat.attributes == HELPSTEER
    assert parse_chat({"prompt": "a", "response": "b", **HELPSTEER, "verbosity": 1.0}).attributes == HELPSTEER
    for changed, fault in (({"verbosity": 1.5}, "verbosity=1.5"), ({"attributes": HELPSTEER}, "field helpfulness=3")):
        with pytest.raises(DataError, match=fault):
            parse_chat({"prompt": "a", "response": "b", **HELPSTEER, **changed})


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"prompt": "z", "messages": say("a", "b")}, "a prompt that is none of them"),
        ({"mask": "Assistant", "messages": say("a", "b")}, "mask='Assistant'"),
        ({"conversations": [{"from": "User", "value": "a", "label": "quality:4"}]}, "ends without an answer"),
        ({"conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b", "label": "x"}]},
         "message 2: label: attributes 'x': 'x' is no name=number"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f("}]}, "is no JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference pair"),
        ({"prompt": "a", "completion": "b", "label": True}, "is an answer with a label (KTO)"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "unknown field completion='c'"),
        ({"instruction": "a", "output": "b", "text": "c"}, "text='c' does not hold instruction and output"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "no list of [question, answer]"),
        ({"prompt": "<extra_id_0>System\ns\n<extra_id_1>User\na", "response": "b", "system": "t"}, "of its own"),
        ({"prompt": "a\n<extra_id_1>Assistant\n<extra_id_2>quality:4\nb\n<extra_id_1>User\nc", "response": "d"},
         "turn 2 of the text holds a mark"),
        ({"prompt": "\n\nHuman: \n\nAssistant: a\n\nHuman: b", "response": "d"}, "turn 1 of the text is empty"),
        ({"question": "a"}, "has no answer and no response; it has question"),
    ],
)  # fmt: skip
def test_conversations_that_are_refused(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_chat(record)
    assert fault in str(caught.value)


def test_prompts_of_pairs_are_prompts() -> None:
    chat = parse_chat({"prompt": "a", "chosen": "b", "rejected": "c"}, answered=False)
    assert chat.record()["messages"] == say("a")


AB, AC = say("a", "b"), say("a", "c")
LONG = say("a", "b", "c", system="s")
D, E = {"role": "assistant", "content": "d"}, {"role": "assistant", "content": "e"}

#: A record -> the prompt, both answers and rewards.
PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[Any, ...]]] = {
    "texts": ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}, say("a", system="s"), ("b", "c")),
    "TRL's messages": ({"prompt": LONG, "chosen": [D], "rejected": [E]}, LONG, ("d", "e")),
    "implicit prompts": ({"chosen": [*LONG, D], "rejected": [*LONG, E]}, LONG, ("d", "e")),
    "prompt and dialogues": ({"prompt": LONG, "chosen": [*LONG, D], "rejected": [*LONG, E]}, LONG, ("d", "e")),
    "system message of the prompt": (
        {"prompt": LONG, "chosen": [*LONG[1:], D], "rejected": [*LONG[1:], E]}, LONG, ("d", "e")),
    "first question": ({"prompt": "a", "chosen": [*LONG, D], "rejected": [*LONG, E]}, LONG, ("d", "e")),
    "last question": ({"prompt": "c", "chosen": [*LONG, D], "rejected": [*LONG, E]}, LONG, ("d", "e")),
    "dialogues that go on": (
        {"prompt": "a", "chosen": [*LONG[2:], D], "rejected": [*LONG[2:], E]}, LONG[1:], ("d", "e")),
    "UltraFeedback": (
        {"prompt": "a", "prompt_id": "1", "chosen": AB, "rejected": AC, "messages": AB, "score_chosen": 8.5,
         "score_rejected": 4},
        say("a"), ("b", "c", 8.5, 4.0)),
    "ratings": (
        {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c", "chosen-rating": 5, "rejected-rating": 1},
        say("a\nx"), ("b", "c", 5.0, 1.0)),
    "Orca's pairs": (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, say("a", system="s"), ("b", "c")),
    "Aligner": (
        {"prompt": "<extra_id_0>System\n\n<extra_id_1>User\na\n<extra_id_1>Assistant\n",
         "chosen_response": "b\n<extra_id_1>", "rejected_response": "c\n<extra_id_1>", "chosen_reward": 2,
         "rejected_reward": 1},
        say("a"), ("b", "c", 2.0, 1.0)),
    "HelpSteer 2's preferences": (
        {"prompt": "a", "response_1": "c", "response_2": "b", "preference_strength": 2, "preference_statement": "x"},
        say("a"), ("b", "c")),
    "the first of two": (
        {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": -1}, say("a"), ("b", "c")),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"},
        LONG[1:], ("d", "e")),
    "LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
         "rejected": {"from": "gpt", "value": "c"}},
        say("a"), ("b", "c")),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_forms_of_pairs(name: str, tmp_path: Path) -> None:
    record, prompt, (chosen, rejected, *rewards) = PAIRS[name]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    (pair,) = read_preferences(tmp_path / "pairs.jsonl")
    assert [message.record() for message in pair.prompt] == prompt
    assert (pair.chosen, pair.rejected) == (chosen, rejected)
    assert [pair.chosen_reward, pair.rejected_reward] == (rewards or [None, None])
    assert [chat.answer for chat in pair.chats()] == [chosen, rejected]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"chosen": [*LONG, D], "rejected": say("a", "x", "c", "e", system="s")}, "part at message 3, before"),
        ({"chosen": [*LONG, D], "rejected": AC}, "part at message 1, before"),
        ({"chosen": [*LONG[1:], D], "rejected": AC}, "part at message 2, before"),
        ({"prompt": "z", "chosen": [*LONG, D], "rejected": [*LONG, E]}, "does not begin with the prompt"),
        ({"prompt": say("z"), "chosen": AB, "rejected": AC}, "does not begin with the prompt"),
        ({"prompt": say("a", system="t"), "chosen": say("a", "b", system="s"), "rejected": AC}, "does not begin"),
        ({"prompt": "a", "chosen": AB, "rejected": AC, "messages": AC}, "messages that are not the prompt with"),
        ({"chosen": "b", "rejected": "c"}, "has no prompt, and chosen is no dialogue"),
        ({"prompt": "a", "chosen": say("a"), "rejected": "c"}, "chosen is a message of the user"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0}, "prefers neither"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": "x"}, "is no number"),
        ({"prompt": "a", "response_1": "b", "response_2": "c"}, "has no chosen and no rejected; it has prompt, resp"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, "unknown field margin=2"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: e"}, "chosen is empty"),
    ],
)
def test_pairs_that_are_refused(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_preference(record)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", " \n", None, []])
def test_empty_system_messages_are_left_out(empty: Any) -> None:
    plain = parse_chat({"messages": say("a", "b")})
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": empty}, *say("a", "b")]},
        {"conversations": [{"from": "system", "value": empty}, *({"from": m["role"], "value": m["content"]}
                                                                 for m in say("a", "b"))]},
        {"messages": say("a", "b"), "system": empty},
        {"prompt": "a", "response": "b", "system": empty},
        {"instruction": "a", "output": "b", "system": empty},
        {"prompt": [{"role": "system", "content": empty}, *say("a")], "completion": "b"},
    ]  # fmt: skip
    assert [parse_chat(record) for record in records] == [plain] * len(records)
    both = parse_chat({"messages": records[0]["messages"], "system": "s"})
    assert both == parse_chat({"messages": say("a", "b", system="s")})
    pair = parse_preference({"chosen": records[0]["messages"], "rejected": say("a", "c")})
    assert pair.prompt == plain.prompt
    with pytest.raises(DataError, match="holds no message of the user"):
        parse_chat({"messages": [{"role": "system", "content": empty}]})
    for turn in ({"role": "system", "content": empty, "zz": 1}, {"role": "system", "content": 3}):
        with pytest.raises(DataError, match="message 1: "):
            parse_chat({"messages": [turn, *say("a", "b")]})
