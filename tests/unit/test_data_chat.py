"""Conversations, preference pairs and attributes: every form is read, every bad line is named, answers are marked."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.chat import CHATML, LLAMA3, NEMOTRON, byte_tokenizer

from nemo_minitron.data.chat.attributes import (
    SCHEMAS,
    attribute_string,
    check_attributes,
    derive_attributes,
    parse_attribute_string,
    reading_grade,
)
from nemo_minitron.data.chat.conversations import Chat, Message, read_chats, split_held_out
from nemo_minitron.data.chat.preferences import read_preferences
from nemo_minitron.errors import DataError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven. "},
]
GOOD = [
    {"messages": TURNS},
    {"messages": TURNS[1:3], "attributes": {"verbosity": 3}},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
    {"prompt": "Hi", "response": "Hello"},
    {"instruction": "Add.", "input": "1 1", "output": "2", "system": ""},
]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    chats = read_chats(lines(tmp_path / "chats.jsonl", *GOOD, ""))
    assert [[message.role[0] for message in chat.messages] for chat in chats] == [
        list("suaua"), list("ua"), list("sua"), list("ua"), list("ua"),
    ]  # fmt: skip
    assert chats[1].attributes == {"verbosity": 3}
    assert chats[4].prompt == (Message("user", "Add.\n1 1"),)
    assert chats[4].answer == "2"
    assert chats[2].where.endswith("line 3")
    (tmp_path / "array.json").write_text(json.dumps(GOOD))
    assert [chat.messages for chat in read_chats(tmp_path / "array.json")] == [chat.messages for chat in chats]
    written = lines(tmp_path / "again.jsonl", *(chat.record() for chat in chats))
    again = read_chats(written)
    assert [(c.messages, c.attributes) for c in again] == [(c.messages, c.attributes) for c in chats]

    (open_end,) = read_chats(lines(tmp_path / "p.jsonl", {"messages": TURNS[:2]}), answered=False)
    assert open_end.answer is None
    assert open_end.answered("4").answer == "4"


BAD = [
    ("{oops", "not JSON"),
    ([1], "a JSON object is needed, not list"),
    ({"text": "x"}, "is of no form that is known; it has text; known: messages, conversations"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "hi"}, "messages must be a list, not str"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "message 1: unknown role 'judge'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is tool's, user's was due"),
    ({"messages": [*TURNS[1:2], {"role": "assistant", "content": " "}]}, "message 2: its answer is empty"),
    ({"messages": [*TURNS[1:2], {"role": "assistant"}]}, "has no message 2: its answer"),
    ({"messages": TURNS[2:]}, "roles out of order: message 1 is assistant's, user's was due"),
    ({"messages": [TURNS[1], TURNS[1]]}, "message 2 is user's, assistant's was due"),
    ({"messages": TURNS[:1]}, "holds no message of the user"),
    ({"messages": TURNS[:2]}, "ends without an answer"),
    ({"prompt": "x"}, "has no response"),
    ({"prompt": 3, "response": "x"}, "prompt is int, not text"),
    ({"prompt": "x", "response": "y", "attributes": {"verbosity": 1.5}}, "verbosity=1.5"),
    ({"prompt": "x", "response": "y", "attributes": [1]}, "must map names"),
]


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", GOOD[0], *(record for record, _ in BAD))
    with pytest.raises(DataError, match=f"{len(BAD)} bad lines") as caught:
        read_chats(path)
    told = str(caught.value).splitlines()[1:]
    for number, ((_, fault), line) in enumerate(zip(BAD, told, strict=True), 2):
        assert line.startswith(f"  line {number}: "), line
        assert fault in line
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    for name, content, fault in (
        ("latin.jsonl", None, "line 1: not UTF-8"),
        ("empty.jsonl", "", "is empty"),
        ("object.json", "{}", "line 1: is of no form"),
        ("broken.json", "[", "not JSON"),
        ("absent.jsonl", None, "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=fault):
            read_chats(tmp_path / name)


def test_preferences(tmp_path: Path) -> None:
    pairs = read_preferences(
        lines(
            tmp_path / "pairs.jsonl",
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "chosen_reward": 2, "rejected_reward": 0.5},
            {"prompt": TURNS[:4], "chosen": TURNS[4], "rejected": {"role": "assistant", "content": "Eight."}},
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Go"},
            },
            {"prompt": "Two and two?", "chosen": TURNS[:3], "rejected": [*TURNS[:2], {**TURNS[2], "content": "Five."}]},
        )
    )
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("Hello", "No"), ("Seven. ", "Eight."), ("Hello", "Go"), ("Four.", "Five."),
    ]  # fmt: skip
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (2.0, 0.5)
    chosen, rejected = pairs[1].chats()
    assert chosen.prompt == rejected.prompt == pairs[1].prompt
    assert (chosen.answer, rejected.answer) == ("Seven. ", "Eight.")

    bad = [
        ({"prompt": "Hi", "chosen": "A", "rejected": "A "}, "chosen and rejected are the same"),
        ({"prompt": "Hi", "chosen": "", "rejected": "A"}, "chosen is empty"),
        ({"chosen": "B"}, "has no prompt and no rejected"),
        ({"prompt": "Hi", "chosen": "A", "rejected": TURNS[1]}, "rejected is a message of the user"),
        ({"prompt": TURNS[:3], "chosen": "A", "rejected": "B"}, "the prompt ends with an answer"),
        ({"prompt": "Hi", "chosen": "A", "rejected": "B", "chosen_reward": "x"}, "chosen_reward='x' is no number"),
        ({"prompt": "Hi", "chosen": 5, "rejected": "B"}, "chosen is int"),
        ({"prompt": "Hi", "chosen": TURNS[:3], "rejected": TURNS}, "chosen is a dialogue that does not begin with"),
    ]
    with pytest.raises(DataError) as caught:
        read_preferences(lines(tmp_path / "bad.jsonl", *(record for record, _ in bad)))
    for number, ((_, fault), line) in enumerate(zip(bad, str(caught.value).splitlines()[1:], strict=True), 1):
        assert line.startswith(f"  line {number}: {fault}"), line


def test_a_split_parts_prompts_and_ignores_the_order() -> None:
    chats = [Chat((Message("user", f"q{i % 20}"), Message("assistant", f"a{i}"))) for i in range(40)]
    train, held = split_held_out(chats, 0.25, 7)
    assert len(held) == 10
    assert {c.prompt for c in train}.isdisjoint({c.prompt for c in held})
    again = split_held_out(chats[::-1], 0.25, 7)
    assert {c.answer for c in again[1]} == {c.answer for c in held}
    assert split_held_out(chats, 0.0, 7)[1] == []


CHAT = Chat(tuple(Message(**turn) for turn in TURNS))


@pytest.mark.parametrize(
    ("name", "special", "text", "answers"),
    [
        (
            "chatml", CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
            "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n"
            "<|im_start|>assistant\nSeven. <|im_end|>\n",
            ["Four.<|im_end|>", "Seven. <|im_end|>"],
        ),
        (
            "llama3", LLAMA3,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nTwo and two?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd three?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nSeven.<|eot_id|>",
            ["Four.<|eot_id|>", "Seven.<|eot_id|>"],
        ),
        (
            "nemotron", NEMOTRON,
            "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nTwo and two?\n<extra_id_1>Assistant\nFour.\n"
            "<extra_id_1>User\nAnd three?\n<extra_id_1>Assistant\nSeven. \n<extra_id_1>",
            ["Four.\n<extra_id_1>", "Seven. \n<extra_id_1>"],
        ),
    ],
)  # fmt: skip
def test_templates(name: str, special: tuple[str, ...], text: str, answers: list[str], tmp_path: Path) -> None:
    from nemo_minitron.data.chat.templates import TEMPLATES, choose_template, end_ids, prompt_ids, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_tokenizer(tmp_path, special))
    template = choose_template(tokenizer, name)
    ids, marked = render(CHAT, tokenizer, template)
    assert tokenizer.decode(ids) == text
    tokenizer.chat_template = template.jinja  # as it stands in an exported tokenizer
    assert tokenizer.apply_chat_template(TURNS) == ids
    runs = "".join("1" if mark else "0" for mark in marked).split("0")
    assert [len(run) for run in runs if run] == [
        len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers
    ]
    assert tokenizer.decode([one for one, mark in zip(ids, marked, strict=True) if mark]) == "".join(answers)
    assert ids[: len(prompt_ids(CHAT.prompt, tokenizer, template))] == prompt_ids(CHAT.prompt, tokenizer, template)
    last = render(CHAT, tokenizer, template, last_answer_only=True)
    assert tokenizer.decode([one for one, mark in zip(last.ids, last.answers, strict=True) if mark]) == answers[1]
    assert ids[-1] in end_ids(tokenizer, template) or name == "chatml"

    labelled = CHAT.answered("Seven. ", {"verbosity": 1, "complexity": 0})
    ids, marked = render(labelled, tokenizer, template, labelled=True)
    start = prompt_ids(labelled.prompt, tokenizer, template, {"verbosity": 1, "complexity": 0})
    assert ids[: len(start)] == start
    assert not any(marked[len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 9 : len(start)])
    assert tokenizer.decode(start).endswith(f"{template.label_start}complexity:0,verbosity:1\n")
    assert tokenizer.decode([one for one, mark in zip(ids, marked, strict=True) if mark]) == "".join(answers)

    other = next(one for one in TEMPLATES if one != name)
    with pytest.raises(DataError, match=f"template={other}: .* has no special token"):
        choose_template(tokenizer, other)


def test_the_tokenizers_own_template(tmp_path: Path) -> None:
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_tokenizer(tmp_path))
    for name, fault in (("own", "carries no chat template"), ("vicuna", "is not known; known: own, own:NAME, chatml")):
        with pytest.raises(DataError, match=fault):
            choose_template(tokenizer, name)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="changes earlier turns"):
        render(CHAT, tokenizer, choose_template(tokenizer))
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(DataError, match=r"message 1 \(system\): the template own refuses it .*no system turn"):
        render(CHAT, tokenizer, choose_template(tokenizer))


def test_a_template_that_does_not_write_answers_is_refused(tmp_path: Path) -> None:
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_tokenizer(tmp_path, chat_template="{{ messages[0]['content'] }}"))
    with pytest.raises(DataError, match="message 3: the template own does not write this answer"):
        render(CHAT, tokenizer, choose_template(tokenizer))


#: Gemma's: no system message, user and assistant in turn.
STRICT = (
    "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{{ m['content'] }}{{ '<|im_end|>' }}{%- endfor %}"
)


def test_a_template_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of Jinja's sandbox are bounded, loops in loops are not."""
    from nemo_minitron.data.chat import templates
    from nemo_minitron.data.chat.templates import choose_template, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    monkeypatch.setattr(templates, "SECONDS", 0.3)
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path))
    tokenizer.chat_template = (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = a %}{% endfor %}{% endfor %}"
    )
    started = time.monotonic()
    with pytest.raises(DataError, match=r"chat: template own: took more than 0\.3 seconds; choose another template"):
        render(CHAT, tokenizer, choose_template(tokenizer))
    assert time.monotonic() - started < 3  # once, not for each beginning of the conversation


def test_a_role_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    from nemo_minitron.data.chat.templates import choose_template, prompt_ids, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=STRICT))
    template = choose_template(tokenizer)
    (chat,) = read_chats(lines(tmp_path / "chats.jsonl", {"messages": TURNS}))
    place = r"chats\.jsonl, line 1: message 1 \(system\): the template own refuses it .*System role not supported.*"
    with pytest.raises(DataError, match=place + "put its text before that of the first user message"):
        render(chat, tokenizer, template)
    with pytest.raises(DataError, match=place):
        prompt_ids(chat.prompt, tokenizer, template, where=chat.where)
    turns = [TURNS[1], TURNS[2], {"role": "user", "content": "x"}]
    later = [*turns, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]
    later += [{"role": "tool", "content": "y"}, {"role": "assistant", "content": "z"}]
    (chat,) = read_chats(lines(tmp_path / "tools.jsonl", {"messages": later}))
    with pytest.raises(DataError, match=r"line 1: message 5 \(tool\): .*roles must alternate.*correct the roles"):
        render(chat, tokenizer, template)
    (chat,) = read_chats(lines(tmp_path / "fine.jsonl", {"messages": TURNS[1:]}))
    assert tokenizer.decode(render(chat, tokenizer, template).ids).count("<|im_end|>") == 4


def test_named_templates(tmp_path: Path) -> None:
    from nemo_minitron.data.chat.templates import choose_template, prompt_ids, render
    from nemo_minitron.data.tokenizer import load_tokenizer

    folder = byte_tokenizer(tmp_path / "tokenizer", chat_template=STRICT)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {
        "default": STRICT,
        "tool_use": "{{ tools | tojson }}" + STRICT,
        "rag": "{{ 'RAG ' }}" + STRICT,
    }
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    own, tool = choose_template(tokenizer), [{"type": "function", "function": {"name": "add"}}]
    records = [{"messages": TURNS[1:3]}, {"messages": TURNS[1:3], "tools": tool}]
    plain, tools = read_chats(lines(tmp_path / "chats.jsonl", *records))
    assert tokenizer.decode(render(plain, tokenizer, own).ids) == "Two and two?<|im_end|>Four.<|im_end|>"
    text = json.dumps(tool) + "Two and two?<|im_end|>Four.<|im_end|>"
    assert tokenizer.decode(render(tools, tokenizer, own).ids) == text
    assert tokenizer.decode(prompt_ids(tools.prompt, tokenizer, own, tools=tools.tools)).startswith(json.dumps(tool))
    rag = choose_template(tokenizer, "own:rag")
    assert tokenizer.decode(render(plain, tokenizer, rag).ids).startswith("RAG Two")
    with pytest.raises(DataError, match="tools: the template own:rag does not write it"):
        render(tools, tokenizer, rag)
    with pytest.raises(DataError, match=r"no chat template 'x'; set template to own:default, own:tool_use, own:rag"):
        choose_template(tokenizer, "own:x")
    tokenizer.chat_template = {"rag": STRICT}
    with pytest.raises(DataError, match="carries no chat template 'default'; set template to own:rag"):
        choose_template(tokenizer)
    with pytest.raises(DataError, match="template='owned': is not known"):
        choose_template(tokenizer, "owned")


def test_attributes(tmp_path: Path) -> None:
    schema = SCHEMAS["helpsteer"]
    assert attribute_string({"verbosity": 1, "helpfulness": 4}) == "helpfulness:4,verbosity:1"
    assert parse_attribute_string("verbosity=1, helpfulness:4") == {"verbosity": 1, "helpfulness": 4}
    for text in ("verbosity", "verbosity=x", "verbosity=1,verbosity=2", ""):
        with pytest.raises(DataError, match="name=number"):
            parse_attribute_string(text)
    rows = [
        {"prompt": "a", "response": "b", "attributes": {"verbosity": 5}},
        {"prompt": "a", "response": "b", "attributes": {"verbosity": 4}},
        {"prompt": "a", "response": "b", "attributes": {"wit": 1, "verbosity": -1}},
        {"prompt": "a", "response": "b"},
    ]
    chats = read_chats(lines(tmp_path / "a.jsonl", *rows))
    with pytest.raises(DataError, match="3 bad lines") as caught:
        check_attributes(chats, schema, "a.jsonl", needed=True)
    for fault in ("line 1: verbosity=5: must lie from 0 to 4", "line 3: unknown attribute 'wit'", "line 4: has no"):
        assert fault in str(caught.value)


def test_derived_attributes() -> None:
    easy, hard = (
        "The cat sat. ",
        "Considerable epistemological uncertainty necessitates methodological circumspection. ",
    )
    assert reading_grade(easy) < 3 < 12 < reading_grade(hard)
    answers = [(hard if number % 2 else easy) * (number + 1) for number in range(10)]
    chats = [Chat((Message("user", "q"), Message("assistant", answer))) for answer in answers]
    found = derive_attributes(chats, SCHEMAS["helpsteer"], [None, True, False, *[None] * 7])
    values = [chat.attributes["verbosity"] for chat in found]
    words = [len((chat.answer or "").split()) for chat in found]
    assert [value for _, value in sorted(zip(words, values, strict=True))] == sorted(values)
    assert set(values) == {0, 1, 2, 3, 4}
    complexity = [chat.attributes["complexity"] for chat in found]
    assert sum(complexity[::2]) < 5 < sum(complexity[1::2])
    assert found[1].attributes["helpfulness"] == found[1].attributes["correctness"] == 4
    assert found[2].attributes["helpfulness"] == 0
    assert "helpfulness" not in found[0].attributes
    assert "quality" not in found[1].attributes
    given = [chats[0].answered("x", {"verbosity": 4}), *chats[1:]]
    assert derive_attributes(given, SCHEMAS["helpsteer"])[0].attributes["verbosity"] == 4
