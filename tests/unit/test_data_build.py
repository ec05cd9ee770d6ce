"""Blocks of masked documents, of conversations and of Megatron's tokenised corpora; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.text import WORDS, sentences, write_jsonl, write_tokenizer

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data import Blocks, build, build_blocks
from nemo_minitron.data.inputs import data_inputs
from nemo_minitron.errors import DataError

END = 0  # EOS of the tokenizer; word "w5" is 3 + 5


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


def config(tmp_path: Path, *sources: SourceConfig, **settings: Any) -> DataConfig:
    fractions = {"calibration_fraction": 0.2, "held_out_fraction": 0.2}
    return DataConfig(
        sources=list(sources), **{"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **fractions, **settings}
    )


def lengths_of_documents(tmp_path: Path) -> SourceConfig:
    """Documents of 3 to 40 words."""
    texts = [text for n in range(3, 41) for text in sentences(3, n, seed=n)]
    return SourceConfig(name="mixed", path=str(write_jsonl(tmp_path / "mixed.jsonl", texts)))


def test_best_fit_keeps_documents_whole(tmp_path: Path, tokenizer: Path) -> None:
    source = lengths_of_documents(tmp_path)
    found = build_blocks(config(tmp_path, source, documents="mask", packing="best_fit"), tokenizer, "train")
    assert found.segments is not None
    assert found.loss_mask is None
    whole = 0
    for tokens, segments in zip(found.tokens, found.segments, strict=True):
        filling = segments == -1
        assert (tokens[filling] == END).all()
        assert not filling[: int((~filling).sum())].any()  # at the end alone
        numbers = segments[~filling].unique_consecutive()
        assert numbers.tolist() == list(range(len(numbers)))
        for number in numbers:
            document = tokens[segments == number]
            assert (document[:-1] != END).all()
            whole += int(document[-1] == END)
        assert int(found.counted()[0].sum()) == int((found.segments[0] >= 0).sum()) - len(
            found.segments[0].unique()
        ) + (1 if (found.segments[0] < 0).any() else 0)
    masked = build_blocks(config(tmp_path, source, documents="mask"), tokenizer, "train")
    cut = sum(int((row == END).sum()) for row in masked.tokens)
    assert whole >= cut  # the same documents, and the tail of the stream
    joined = build_blocks(config(tmp_path, source), tokenizer, "train")
    assert joined.segments is None
    assert torch.equal(joined.tokens, masked.tokens)
    ends = masked.tokens[:, :-1] == END
    assert torch.equal(masked.counted(), ~ends)  # no label begins another document
    # Scores count every position, so their blocks have no filling.
    scored = build_blocks(config(tmp_path, source, documents="mask", packing="best_fit"), tokenizer, "calibration")
    assert (scored.segments >= 0).all()
    assert config(tmp_path, source, packing="best_fit").faults()


@pytest.mark.parametrize("settings", [{}, {"documents": "mask"}, {"documents": "mask", "packing": "best_fit"}])
def test_pieces_begin_with_the_first_token(settings: dict[str, str], tmp_path: Path, tokenizer: Path) -> None:
    """Every block begins with it, and every part of a document that is cut; the text is the same."""
    path = tokenizer / "tokenizer_config.json"
    content = json.loads(path.read_text())
    source = lengths_of_documents(tmp_path)
    with pytest.raises(DataError, match="begin_pieces=true: the tokenizer .* names no first token"):
        build_blocks(config(tmp_path, source, begin_pieces=True, **settings), tokenizer, "train")
    path.write_text(
        json.dumps({**content, "bos_token": "w9"})
    )  # its documents do not begin so: it shows where it comes
    begin = 3 + 9
    for split in ("train", "calibration"):
        begun = build_blocks(config(tmp_path, source, begin_pieces=True, **settings), tokenizer, split)
        plain = build_blocks(config(tmp_path, source, **settings), tokenizer, split)
        assert begun.tokens.shape[1] == plain.tokens.shape[1] == 17
        if begun.segments is None:
            starts = torch.zeros_like(begun.tokens, dtype=torch.bool)
            starts[:, 0] = True
        else:
            starts = torch.cat([torch.ones_like(begun.segments[:, :1]), begun.segments.diff(dim=1)], dim=1) != 0
            starts &= begun.segments >= 0
            assert ((begun.segments >= 0).sum(dim=1) > 1).all()
        inserted = starts & (begun.tokens == begin)
        assert inserted.any() and (starts & ~inserted).any()
        # without it, the same documents, in pieces
        words = [int(token) for token in begun.tokens[~inserted] if token != END]
        assert len(words) <= int((plain.tokens != END).sum()) + 16
        assert set(words) <= {int(token) for token in plain.tokens.unique()}


# ---------------------------------------------------------------------------------------------------------------- chats


TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} w3 {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


def chats(tmp_path: Path, tokenizer: Path, answers: int = 4) -> SourceConfig:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer)
    own.chat_template = TEMPLATE
    own.save_pretrained(tokenizer)
    questions, replies = sentences(40, 5, seed=1), sentences(40, answers, seed=2)
    path = tmp_path / "chats.jsonl"
    lines = [{"prompt": q.replace("w1 ", "w9 "), "response": a} for q, a in zip(questions, replies, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig(name="chats", chat=str(path))


def test_only_answers_of_conversations_are_learned(tmp_path: Path, tokenizer: Path) -> None:
    source = chats(tmp_path, tokenizer)
    text = lengths_of_documents(tmp_path)
    found = build_blocks(
        config(tmp_path, source, text, documents="mask", packing="best_fit"), tokenizer, "train", blocks=12
    )
    chat, plain = found.by_domain()["chats"], found.by_domain()["mixed"]
    # A conversation is w1, 5 words, w3, w2, 4 words, w3, EOS: 14 tokens, one a block of 17.
    assert (chat.segments >= 0).sum(dim=1).tolist() == [14] * len(chat)
    expected = torch.tensor([[False] * 7 + [True] * 5 + [False] * 4] * len(chat))
    assert torch.equal(chat.loss_mask, expected)
    assert torch.equal(chat.counted(), expected)
    assert (chat.tokens[:, 12] == 3 + 3).all()  # the end of the answer is learned
    assert torch.equal(plain.loss_mask, plain.segments[:, 1:] >= 0)
    # The same conversations one after the other, without masks: what is learned is the same.
    stream = build_blocks(config(tmp_path, source), tokenizer, "train")
    assert stream.segments is None
    labels = stream.tokens[:, 1:][stream.counted()]
    assert set(labels.tolist()) >= {3 + 3}
    assert (stream.counted().sum(dim=1) > 0).all()


def test_blocks_without_an_answer_are_left_out_or_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = chats(tmp_path, tokenizer, answers=1)
    said: list[str] = []
    # Not through handlers: libraries that other tests start in this process rearrange them.
    monkeypatch.setattr(build.logger, "warning", lambda text, *values: said.append(text % values))
    found = build_blocks(config(tmp_path, source, sequence_length=3), tokenizer, "train")
    assert (found.counted().sum(dim=1) > 0).all()
    assert "hold no label that counts, and are left out" in "".join(said)
    # Answers so short that one token blocks never see question and answer together.
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": " ".join(WORDS[4:]), "response": "w1"}) + "\n")
    lone = config(tmp_path, source, sequence_length=100)
    with pytest.raises(DataError, match=r"'chats': none of the 1 blocks of its train split holds a label that counts"):
        build_blocks(lone, tokenizer, "train")


# ------------------------------------------------------------------------------------------------------------- megatron


def write_indexed(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16) -> Path:
    """By Megatron's own builder: a document is a list of sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def corpus(seed: int, count: int = 40) -> list[list[list[int]]]:
    """Documents of one to three sequences; every other one is closed by EOS; one is empty."""
    random = np.random.default_rng(seed)
    found = [
        [random.integers(3, 123, random.integers(1, 9)).tolist() for _ in range(random.integers(1, 4))]
        for _ in range(count)
    ]
    for document in found[::2]:
        document[-1].append(END)
    found[5] = []
    return found


@pytest.mark.slow
def test_megatron_corpora_are_read_and_blended(tmp_path: Path, tokenizer: Path) -> None:
    first, second = corpus(1), corpus(2)
    write_indexed(tmp_path / "first", first)
    write_indexed(tmp_path / "second", second, np.int32)
    one = config(tmp_path, SourceConfig(name="first", megatron=str(tmp_path / "first")), documents="mask")
    seen: list[tuple[int, ...]] = []
    for split in ("train", "calibration", "held_out"):
        found = build_blocks(one, tokenizer, split)
        for row, segments in zip(found.tokens, found.segments, strict=True):
            seen += [tuple(row[segments == number].tolist()) for number in segments.unique()]
    every = [[*(token for part in document for token in part)] for document in first if document]
    every = [document if document[-1] == END else [*document, END] for document in every]
    texts = [",".join(map(str, document)) for document in every]
    assert all(any(",".join(map(str, piece)) in text for text in texts) for piece in seen)
    whole = sum(piece in {tuple(document) for document in every} for piece in seen)
    assert whole > 10
    again = config(tmp_path, SourceConfig(name="f", megatron=str(tmp_path / "first")), cache_dir=str(tmp_path / "x"))
    assert torch.equal(build_blocks(again, tokenizer, "train").tokens, build_blocks(one, tokenizer, "train").tokens)
    blend = config(tmp_path, blend=["3", str(tmp_path / "first"), "1.0", str(tmp_path / "second")])
    assert not blend.faults()
    found = build_blocks(blend, tokenizer, "train", blocks=8)
    assert {name: len(part) for name, part in found.by_domain().items()} == {"first": 6, "second": 2}
    assert [Path(path).name for path, _ in data_inputs(blend).files] == [
        "first.bin", "first.idx", "second.bin", "second.idx",
    ]  # fmt: skip
    assert [source.weight for source in config(tmp_path, blend=["a/b"]).all_sources()] == [1.0]
    assert len(config(tmp_path, blend=["x", "a", "0", "b"]).faults()) == 2
    assert config(tmp_path, blend=["1", "a", "2"]).faults()
    with pytest.raises(
        DataError, match=r"'first' with the tokenizer .*: gives the id \d+, the model's vocabulary only"
    ):
        build_blocks(one, tokenizer, "train", vocab_size=60)


@pytest.mark.slow
def test_damaged_megatron_corpora_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    prefix = write_indexed(tmp_path / "corpus", corpus(3))
    one = config(tmp_path, SourceConfig(name="c", megatron=str(prefix)))
    binary, index = (prefix.with_suffix(end) for end in (".bin", ".idx"))
    contents = binary.read_bytes(), index.read_bytes()
    head = struct.Struct("<9sQBQQ")
    magic, version, code, sequences, documents = head.unpack(contents[1][: head.size])
    rest = contents[1][head.size :]

    def header(**changes: Any) -> bytes:
        return (
            head.pack(*({"m": magic, "v": version, "c": code, "s": sequences, "d": documents} | changes).values())
            + rest
        )

    for changed, message in (
        ((contents[0][:-2], contents[1]), r"corpus.bin: holds \d+ bytes, its index tells of \d+"),
        ((contents[0] + b"\0\0", contents[1]), r"corpus.bin: holds \d+ bytes"),
        ((contents[0], contents[1][:-8]), r"corpus.idx: holds \d+ bytes, \d+ are due for \d+ sequences"),
        ((contents[0], contents[1][:20]), r"corpus.idx: is cut off"),
        ((contents[0], b"PK\3\4" + contents[1]), r"corpus.idx: is no Megatron index"),
        ((contents[0], header(v=2)), r"has version 2, only 1 is known"),
        ((contents[0], header(c=6)), r"its tokens are of type 6, not whole numbers"),
        ((contents[0], header(s=sequences + 1)), r"bytes, \d+ are due for"),
        ((contents[0], contents[1][:-8] + b"\7" + b"\0" * 7), r"its documents do not cover its \d+ sequences"),
        ((contents[0], contents[1][: head.size] + b"\xff" * 4 + contents[1][head.size + 4 :]), "negative length"),
    ):
        binary.write_bytes(changed[0])
        index.write_bytes(changed[1])
        with pytest.raises(DataError, match=message):
            build_blocks(one, tokenizer, "train")
    index.unlink()
    with pytest.raises(DataError, match=r"corpus.idx does not exist; give the prefix of a .bin and .idx pair"):
        build_blocks(one, tokenizer, "train")
    write_indexed(tmp_path / "empty", [])
    with pytest.raises(DataError, match="holds no tokens"):
        build_blocks(config(tmp_path, SourceConfig(name="e", megatron=str(tmp_path / "empty"))), tokenizer, "train")


def test_sequences_longer_than_the_model(tmp_path: Path, tokenizer: Path) -> None:
    one = config(tmp_path, lengths_of_documents(tmp_path))
    assert isinstance(build_blocks(one, tokenizer, "train", max_length=16), Blocks)
    with pytest.raises(DataError, match="sequence_length=16: the model reads 15 tokens at most"):
        build_blocks(one, tokenizer, "train", max_length=15)
    assert dataclasses.replace(one, workers=0).faults()
