"""Multiple-choice tasks: files with good and bad lines, questions from a package's text, their tokens and accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint
from support.text import WORDS, write_tokenizer

from nemo_minitron.config import TaskConfig
from nemo_minitron.data import tasks
from nemo_minitron.data.sources import Document
from nemo_minitron.data.tasks import Question, encode_task, read_task
from nemo_minitron.errors import DataError


def read(path: Path, **settings):
    return read_task(TaskConfig(path=str(path), **settings), cache_dir=path.parent, seed=1)


def line(**changes):
    return json.dumps({"prompt": "a b", "choices": ["c", "d e"], "answer": 1, **changes})


def test_a_file(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("\ufeff" + line() + "\n\n" + line(prompt="x:\n") + "\n" + line(prompt=""), encoding="utf-8")
    assert read(path) == [
        Question("a b ", ("c", "d e"), 1),
        Question("x:\n", ("c", "d e"), 1),
        Question("", ("c", "d e"), 1),
    ]
    assert len(read(path, questions=2)) == 2


def test_every_bad_line_is_named(tmp_path):
    bad = [
        "{",
        "[]",
        line(answer=2),
        line(answer=True),
        line(choices=["one"]),
        line(choices=["c", "c"]),
        line(choices=["c", " "]),
        line(prompt=3),
        json.dumps({"prompt": "a"}),
    ]
    path = tmp_path / "task.jsonl"
    path.write_bytes("\n".join([line(), *bad]).encode() + b"\n\xff\n")
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 10 bad lines")
    for number, words in enumerate(
        ["not JSON", "not list", "answer=2", "answer=True", "two or more", "all different", "none of them empty",
         "prompt is 3", "has no choices and no answer", "not UTF-8"], 2,
    ):  # fmt: skip
        assert any(f"line {number}: " in one and words in one for one in message.splitlines()), (number, words)
    path.write_text("{\n" * 30)
    with pytest.raises(DataError, match="and 10 more"):
        read(path)


def test_no_questions(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not known; known: next_verse"):
        read_task(TaskConfig(builtin="chess"), cache_dir=tmp_path, seed=1)
    assert TaskConfig().given is None
    assert TaskConfig(path="a", builtin="b").faults()


def test_next_verse_is_the_same_for_a_seed_and_true_to_its_text(monkeypatch, tmp_path):
    chapters = [
        Document(f"Book {c}", "\n".join(f"chapter {c} verse {v}" for v in range(12 if c else 5))) for c in range(9)
    ]
    monkeypatch.setattr(tasks, "read_source", lambda source, cache_dir: chapters)

    def build(seed, **settings):
        return read_task(TaskConfig(builtin="next_verse", **settings), cache_dir=tmp_path, seed=seed)

    questions = build(1)
    assert build(1) == questions != build(2)
    assert build(1, questions=3) == questions[:3]
    assert len(questions) == 8  # one chapter is too short
    assert len({question.answer for question in questions}) > 1
    for question in questions:
        said = question.prompt.splitlines()
        first = int(said[0].split()[-1])
        assert [int(one.split()[-1]) for one in said] == [first, first + 1, first + 2]
        assert question.choices[question.answer] == said[0].replace(f"verse {first}", f"verse {first + 3}")
        assert len({*question.choices, *said}) == 7


QUESTIONS = [
    Question("w1 w2 ", ("w3 w4", "w5", "w6 w7 w8"), 0),
    Question("w9 " * 40, ("w10", "w11"), 1),
    Question("w9 ", ("w12 w13", "w14 w15"), 0),
    Question("w20\n", ("w21", "w22", "w23"), 2),
]


def test_tokens_of_the_choices_alone_count(tmp_path):
    write_tokenizer(tmp_path)
    task = encode_task(QUESTIONS, tmp_path, vocab_size=123, max_length=64, multiple=3)
    assert [tuple(part.shape) for part in task.tokens] == [(10, 97)]  # lcm(32, 3) tokens and their labels
    rows = [row for part in zip(task.tokens, task.counted, strict=True) for row in zip(*part, strict=True)]
    for (ids, counted), question, choice in zip(rows, task.question.tolist(), task.choice.tolist(), strict=True):
        assert [WORDS[i - 3] for i in ids[1:][counted].tolist()] == QUESTIONS[question].choices[choice].split()
    assert task.characters.tolist()[:3] == [5, 2, 8]
    assert task.answers.tolist() == [0, 1, 0, 2]
    assert task.total == 960

    cut = encode_task(QUESTIONS[1:2], tmp_path, vocab_size=123, max_length=8)
    assert cut.counted[0].nonzero()[:, 1].tolist() == [7, 7]  # nine tokens: eight that predict, one choice
    with pytest.raises(DataError, match="between 1 and 2 are needed"):
        encode_task(QUESTIONS[:1], tmp_path, vocab_size=123, max_length=3)
    with pytest.raises(DataError, match="only has 20 entries"):
        encode_task(QUESTIONS, tmp_path, vocab_size=20, max_length=64)


def test_accuracy_is_that_of_plain_log_likelihoods(tmp_path):
    """Question by question, without filling, from the logits of one row at a time."""
    from nemo_minitron.importance import task_accuracy

    write_tokenizer(tmp_path)
    shape = SHAPE.replace(vocab_size=123)
    draw = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(WORDS[i] for i in torch.randint(0, 120, (count,), generator=draw).tolist())

    questions = [
        Question(words(3 + n % 40) + " ", tuple(words(1 + (n + c) % 5) for c in range(2 + n % 3)), n % 2)
        for n in range(24)
    ]
    with one_process() as groups:
        chunks = live(random_checkpoint(shape), groups)
        right = []
        for question in questions:
            values = []
            for choice in question.choices:
                texts = (question.prompt, question.prompt + choice)
                prompt, whole = ([3 + WORDS.index(word) for word in text.split()] for text in texts)
                table = logits(chunks, torch.tensor([whole[:-1]]))[0, :, :123].double().log_softmax(-1)
                values.append(sum(float(table[i - 1, whole[i]]) for i in range(len(prompt), len(whole))) / len(choice))
            right.append(max(range(len(values)), key=values.__getitem__) == question.answer)
        task = encode_task(questions, tmp_path, vocab_size=123, max_length=64)
        found = task_accuracy(chunks, groups, task, 3, 123)
    assert 0 < found < 1
    assert found == pytest.approx(sum(right) / len(right))
