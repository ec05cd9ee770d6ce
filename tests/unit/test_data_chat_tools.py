"""Weights, tools, calls, thoughts and parts of a content: trained on as they say, or refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat import byte_tokenizer

from nemo_minitron.data.chat.conversations import Chat, parse_chat, read_chats, split_held_out
from nemo_minitron.data.chat.preferences import parse_preference
from nemo_minitron.data.chat.templates import OWN, choose_template, prompt_ids, render
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import DataError

#: Writes tools, calls, results and thoughts.
TOOL_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}"
    "{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "1 and 1?"}
CALLING: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "It says 2."},
]


def marked(record: dict[str, Any], tokenizer: Any, name: str = OWN, **more: Any) -> tuple[str, str]:
    """The text of a conversation and that of its answers."""
    ids, answers = render(parse_chat(record), tokenizer, choose_template(tokenizer, name), **more)
    return tokenizer.decode(ids), tokenizer.decode([one for one, mark in zip(ids, answers, strict=True) if mark])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("tools"), chat_template=TOOL_TEMPLATE))


def test_tools_and_calls_go_through_the_template(tokenizer: Any) -> None:
    record = {"messages": CALLING, "tools": TOOLS}
    text, answers = marked(record, tokenizer)
    assert text == tokenizer.apply_chat_template(
        [{**turn, "content": turn["content"] or ""} for turn in CALLING], tools=TOOLS, tokenize=False
    )
    assert answers == '<call>add {"a": 1}<|im_end|><think>It says 2.</think>Two.<|im_end|>'
    for tools in (json.dumps(TOOLS), [TOOLS[0]["function"]]):  # as JSON text; without its cover
        assert marked({**record, "tools": tools}, tokenizer) == (text, answers)
    for call in (
        {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
    ):
        spelt = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
        assert marked({"messages": spelt, "tools": TOOLS}, tokenizer) == (text, answers)

    chat = parse_chat(record)
    assert parse_chat(chat.record()) == chat
    assert chat.answered("Two.", {"verbosity": 1}).messages == chat.messages
    template = choose_template(tokenizer)
    ids = render(chat, tokenizer, template).ids
    start = prompt_ids(chat.prompt, tokenizer, template, tools=chat.tools)
    assert ids[: len(start)] == start
    assert tokenizer.decode(start).endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")

    pair = parse_preference({"prompt": [USER], "chosen": CALLING[1], "rejected": "Two?", "tools": TOOLS})
    chosen, rejected = pair.chats()
    assert chosen == Chat(parse_chat({"messages": CALLING[:2]}).messages, tools=chat.tools)
    assert rejected.tools == chat.tools


@pytest.mark.parametrize(
    ("record", "left_out"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "2"}], "tools": TOOLS}, "tools"),
        ({"messages": CALLING[:2]}, "message 2: tool_calls"),
        ({"messages": CALLING}, "message 2: tool_calls, message 4: reasoning_content"),
        ({"messages": [USER, {"role": "assistant", "content": "2", "thinking": "hm"}]}, "message 2: thinking"),
        ({"messages": [{**USER, "name": "Ann"}, {"role": "assistant", "content": "2"}]}, "message 1: name"),
    ],
)
def test_what_a_template_does_not_write_is_refused(
    tokenizer: Any, tmp_path: Path, record: dict[str, Any], left_out: str
) -> None:
    (tmp_path / "chats.jsonl").write_text("\n" + json.dumps(record) + "\n")
    (chat,) = read_chats(tmp_path / "chats.jsonl")
    with pytest.raises(DataError, match=f"line 2: {left_out}: the template chatml does not write it; choose"):
        render(chat, tokenizer, choose_template(tokenizer, "chatml"))


def test_a_result_that_the_template_leaves_out_is_refused(tokenizer: Any) -> None:
    deaf = TOOL_TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}")
    other = load_tokenizer(tokenizer.name_or_path)
    other.chat_template = deaf
    with pytest.raises(DataError, match="message 3: content: the template own does not write it"):
        marked({"messages": CALLING}, other)


def test_an_answer_of_weight_0_is_not_trained_on(tokenizer: Any) -> None:
    turns = [
        USER, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Two."},
    ]  # fmt: skip
    whole, answers = marked({"messages": turns}, tokenizer)
    assert answers == "Three.<|im_end|>Two.<|im_end|>"
    for key, no, yes in (("weight", 0, 1), ("loss", False, True), ("train", 0.0, 1.0)):
        weighed = [turns[0], {**turns[1], key: no}, {**turns[2], key: no}, {**turns[3], key: yes}]
        chat = parse_chat({"messages": weighed})
        assert marked({"messages": weighed}, tokenizer) == (whole, "Two.<|im_end|>")
        assert parse_chat(chat.record()) == chat
        assert marked({"messages": [*weighed[:1], {**turns[1], key: yes}, *turns[2:]]}, tokenizer) == (whole, answers)
    assert [m.trained for m in parse_chat({"messages": weighed[:3]}, answered=False).messages] == [True, False, False]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "2", "weight": 0.5}]}, "message 2: weight=0.5"),
        ({"messages": [USER, {"role": "assistant", "content": "2", "loss": "no"}]}, "message 2: loss='no'"),
        ({"messages": [{**USER, "weight": 1}, {"role": "assistant", "content": "2"}]}, "weight=1 of the user"),
        ({"messages": [USER, {"role": "assistant", "content": "2", "weight": 1, "train": False}]}, "contradict"),
        ({"messages": [USER, {"role": "assistant", "content": "2", "weight": 0}]}, "all answers have the weight 0"),
        ({"messages": [USER, {"role": "assistant", "content": "2", "name": 3}]}, "message 2: name is int"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2: its answer is empty"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": {}, "content": ""}]}, "its answer is empty"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "add"}]}, "tool_calls is str; write a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["add"]}]}, "call 1: is str"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": 1}]}]}, "call 1: function is int"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "call 1: has no name"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "type": "code"}]}]}, "type='code'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "zz": 1}]}]}, "call 1: unknown field zz=1"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "is no JSON"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "JSON object"),
        ({"messages": [*CALLING[:2], CALLING[3]]}, "message 3 is assistant's, tool's was due"),
        ({"messages": [*CALLING[:3], USER]}, "message 4 is user's, tool or assistant's was due"),
        ({"messages": CALLING[:3]}, "ends without an answer"),
        ({"messages": CALLING, "tools": "add"}, "tools='add' is no JSON"),
        ({"messages": CALLING, "tools": 3}, "tools is int"),
        ({"messages": CALLING, "tools": [{"type": "function"}]}, "tools, 1: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "is 'image_url'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "message 1, part 1: is int, not a text part"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "zz": 1}]},
                          {"role": "assistant", "content": "2"}]},
            "message 1, part 1: unknown field zz=1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_chat(record)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_refuse_an_answer_of_weight_0() -> None:
    with pytest.raises(DataError, match="chosen has the weight 0"):
        parse_preference({"prompt": "a", "chosen": {"role": "assistant", "content": "b", "weight": 0}, "rejected": "c"})


def test_parts_that_are_no_text_are_refused_once(tmp_path: Path) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    record = {"messages": [image, {"role": "assistant", "content": "2"}]}
    (tmp_path / "images.jsonl").write_text((json.dumps(record) + "\n") * 30)
    with pytest.raises(DataError, match="30 bad lines") as caught:
        read_chats(tmp_path / "images.jsonl")
    (fault,) = str(caught.value).splitlines()[1:]
    assert fault.endswith("'image_url'; only text can be trained on: remove the line (and 29 more like it)")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "1 and "}, "1?"]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "2"}]}]
    assert parse_chat({"messages": turns}) == parse_chat({"messages": [USER, {"role": "assistant", "content": "2"}]})


def test_the_split_of_plain_conversations_is_what_it_was() -> None:
    import hashlib

    chats = [parse_chat({"prompt": f"q{n}", "response": "a"}) for n in range(20)]
    digests = [hashlib.sha256(json.dumps([3, ["user", f"q{n}"]]).encode()).hexdigest() for n in range(20)]
    held = {chats[digests.index(digest)].prompt for digest in sorted(digests)[:5]}
    assert {chat.prompt for chat in split_held_out(chats, 0.25, 3)[1]} == held
    assert chats[0].record() == {"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a"}]}
