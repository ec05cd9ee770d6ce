"""Forms of conversations and pairs that people have, each read as its makers mean it, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
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
    "NeMo's labels": (
        {"mask": "User", "system": "", "type": "VALUE_TO_TEXT", "conversations": [
            {"from": "User", "value": "a", "label": None},
            {"from": "Assistant", "value": "b", "label": "quality:4, toxicity:0"},
            {"from": "User", "value": "c", "label": "quality:1"},
            {"from": "Assistant", "value": "d", "label": "quality:3"}]},
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "label": "quality:4,toxicity:0"},
         {"role": "user", "content": "c", "label": "quality:1"}, {"role": "assistant", "content": "d"}],
    ),
    "a column for each field of the messages": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, "Eve"]}},
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "Eve"}],
    ),
    "null in place of an answer's other name": ({"prompt": "a", "response": None, "completion": "b"}, say("a", "b")),
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
    "Nemotron's post-training data": (
        {"input": say("a", "b", "c"), "output": "<think>t</think>d", "reasoning": "on", "system_prompt": "s",
         "category": "math", "license": "cc", "generator": "m", "used_in_training": ["Ultra"], "version": "v1"},
        [*say("a", system="s"), {"role": "assistant", "content": "b", "weight": 0}, *say("c", "<think>t</think>d")],
    ),
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


def test_labels_of_the_last_answer_are_its_attributes() -> None:
    labelled, _ = CHATS["NeMo's labels"]
    chat = parse_chat(labelled)
    assert chat.attributes == {"quality": 3}
    again = parse_chat(chat.record())
    assert (again.messages, again.attributes) == (chat.messages, chat.attributes)
    assert parse_chat({**labelled, "attributes": {"quality": 3}}) == chat
    prompt = parse_chat({**labelled, "conversations": labelled["conversations"][:3]}, answered=False)
    assert (prompt.attributes, prompt.messages[-1].label) == ({}, "quality:1")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({**CHATS["NeMo's labels"][0], "attributes": {"quality": 1}}, "say different values; remove one of both"),
        ({**CHATS["NeMo's labels"][0], "type": "TEXT_TO_VALUE"}, "minitron reward trains one that predicts them"),
        ({**CHATS["NeMo's labels"][0], "type": "OTHER"}, "unknown field type='OTHER'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "label": [1, 2]}]},
         "message 2: label=[1, 2] is no text of attribute values"),
        ({"messages": {"role": ["user", "assistant"], "content": ["a"]}}, "messages must be a list, not dict"),
        ({"prompt": "z", "messages": say("a", "b")}, "a prompt that is none of them"),
        ({"mask": "Assistant", "messages": say("a", "b")}, "mask='Assistant'"),
        ({"conversations": [{"from": "User", "value": "a", "label": "quality:4"}]}, "ends without an answer"),
        ({"conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b", "label": "x"}]},
         "message 2: label: attributes 'x': 'x' is no name=number"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f("}]}, "is no JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference pair"),
        ({"prompt": "a", "completion": "b", "label": True}, "is an answer with a label (KTO)"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "unknown field completion='c'"),
        ({"prompt": "a", "response": "b", "reasoning": "because"}, "unknown field reasoning='because'"),
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
    for record in (
        rated(6, 7),
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1},
        {"context": say("a"), "response1": "b", "response2": "c", "overall_preference": 1, "individual_preference": []},
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen-rating": 5, "rejected-rating": 1, "chosen_model": "m"},
    ):
        assert parse_chat(record, answered=False).record()["messages"][:1] == say("a")


def rated(*scores: float | None, **more: Any) -> dict[str, Any]:
    """UltraFeedback's own form; the answers are called by their places."""
    completions = [
        {"model": "m", "principle": "honesty", "custom_system_prompt": "s", "critique": "x", "fine-grained_score": 4.0,
         "annotations": {"honesty": {"Rating": "5"}}, "response": f"answer {number}", "overall_score": score}
        for number, score in enumerate(scores)
    ]  # fmt: skip
    return {"source": "evol", "instruction": "a", "models": ["m"], "correct_answers": ["None"],
            "incorrect_answers": ["None"], "completions": completions, **more}  # fmt: skip


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
    "rated answers": (rated(5, 7.5, 7.5, 2, 2.0), say("a"), ("answer 1", "answer 3", 7.5, 2.0)),
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
    "HelpSteer 3's preferences": (
        {"domain": "code", "language": "python", "context": LONG, "response1": "d", "response2": "e",
         "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "x"}]},
        LONG, ("d", "e")),
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
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7.5, "score_rejected": 7.5},
         "score_chosen and score_rejected are both 7.5, so neither answer is preferred"),
        (rated(6, 6), "all 2 completions have the overall_score 6, so none is preferred"),
        (rated(6), "has 1 completions; a pair needs two"),
        (rated(6, None), "completion 2 has no overall_score"),
        (rated(6, "7"), "completion 2: overall_score='7' is no number"),
        ({**rated(6, 7), "completions": ["a", "b"]}, "completion 1 is str, not an object"),
        ({**rated(6, 7), "completions": [{"response": str(n), "overall_score": n, "z": 2} for n in range(2)]},
         "completion 1: unknown field z=2"),
        ({"prompt": "a", "completion": "b", "label": False}, "no stage trains on those; give minitron dpo pairs"),
        ({"prompt": "a", "chosen": {"role": "assistant", "content": "b", "label": "quality:1"}, "rejected": "c"},
         "chosen has attribute values (label), and answers of pairs have rewards"),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": "x"}, "is no number"),
        ({"context": say("a"), "response1": "b", "response2": "c", "overall_preference": 0}, "preference=0 prefers"),
        ({"prompt": "a", "response_1": "b", "response_2": "c"}, "has no chosen and no rejected; it has prompt, resp"),
        ({"prompt": "a"}, "rejected_response, response_1 with response_2, response1 with response2, completions with"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, "unknown field margin=2"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: e"}, "chosen is empty"),
    ],
)  # fmt: skip
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


FORMS = [(read_chats, record) for record, _ in CHATS.values()] + [
    (read_preferences, record) for record, *_ in PAIRS.values()
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms_of_tables(number: int, tmp_path: Path) -> None:
    """A table holds a record and, where its columns can, one of any other form: their missing fields are null there."""
    read, record = FORMS[number]
    together = 0
    for other in (other for reader, other in FORMS if reader is read):
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(other) + "\n")
        try:
            table = pyarrow.Table.from_pylist([{**dict.fromkeys(other), **record}, {**dict.fromkeys(record), **other}])
        except pyarrow.ArrowException:  # a field is text in one and a list in the other
            continue
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        wanted, found = (
            [dataclasses.replace(item, where="") for item in read(tmp_path / name)] for name in ("a.jsonl", "a.parquet")
        )
        assert found == wanted
        together += 1
    assert together  # with itself at least


def test_calls_of_tables(tmp_path: Path) -> None:
    """Arguments of a call are those that it has: the other functions' have a place in its row, too."""
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x", "c": [None, 2]}}]
    rows = [
        {"messages": [*say("a"), {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "content": "2"}, {"role": "assistant", "content": "b"}]}
        for call in calls
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    chats = read_chats(tmp_path / "a.parquet")
    assert [chat.messages[1].fields["tool_calls"][0]["function"] for chat in chats] == calls
    assert [chat.messages[0].fields for chat in chats] == [{}, {}]
