"""Trimming vocabularies of every supported kind of tokenizer, and the model with its tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.tokenizer.trimming import (
    TokenFrequencies,
    choose_vocabulary,
    read_frequencies,
    renumber,
    tokenizer_fingerprint,
    trim_tokenizer,
    write_frequencies,
)
from nemo_minitron.errors import CheckpointError, DataError, ShapeError

TEXT = [
    "the lord said unto moses, speak unto the children of israel, saying, when any man hath a running issue",
    "return the number of items in the container; raises an exception where the container is empty",
    "o that this too too solid flesh would melt, thaw and resolve itself into a dew, naïve café über 1984",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))


def byte_fallback() -> Tokenizer:
    """As Llama 2's: characters, and bytes for those that are not there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trained(tokenizer, trainers.BpeTrainer(vocab_size=140))
    content = json.loads(tokenizer.to_str())["model"]
    vocabulary = {token: place for place, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    vocabulary |= {token: len(vocabulary) + index for token, index in content["vocab"].items()}
    model = models.BPE(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in content["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def marked() -> Tokenizer:
    """With marks inside and at the end of words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="@", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", *SPECIAL],
            continuing_subword_prefix="@",
            end_of_word_suffix="</w>",
        ),
    )


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(
        tokenizer, trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    )


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL]))


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL]))


def trained(tokenizer: Tokenizer, trainer) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = tokenizer.token_to_id("<s>")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


KINDS = {one.__name__: one for one in (byte_level, byte_fallback, marked, unigram, word_piece, word_level)}
WRITES_ANYTHING = ("byte_level", "byte_fallback")


@cache
def full(kind: str) -> tuple[Tokenizer, str]:
    """One of the tokenizers, and its file's content."""
    tokenizer = KINDS[kind]()
    return tokenizer, tokenizer.to_str()


def directory(path: Path, content: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(content, encoding="utf-8")
    return path


def trim(kind: str, counts, room: float):
    """The full tokenizer, the trimmed one and the ids that stay; ``room`` of what lies between least and most."""
    tokenizer, content = full(kind)
    most = tokenizer.get_vocab_size()
    with TemporaryDirectory() as scratch:
        source = directory(Path(scratch) / "full", content)
        frequencies = TokenFrequencies(counts or {0: 1})
        with pytest.raises(ShapeError, match="must lie between") as caught:
            choose_vocabulary(source, frequencies, 1, vocab_size=most)
        least = int(str(caught.value).split("between ")[1].split()[0])
        size = least + round(room * (most - least))
        kept = choose_vocabulary(source, frequencies, size, vocab_size=most)
        assert len(kept) == size == len(set(kept))
        assert list(kept) == sorted(kept)
        trim_tokenizer(source, kept, Path(scratch) / "trimmed")
        trimmed = Tokenizer.from_file(str(Path(scratch) / "trimmed" / "tokenizer.json"))
    new = {old: index for index, old in enumerate(kept)}
    assert trimmed.get_vocab() == {token: new[old] for token, old in tokenizer.get_vocab().items() if old in new}
    return tokenizer, trimmed, new


texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*" ".join(TEXT[:3]).split(), "Zürich", "山", "🙂", "<|im_start|>"]), max_size=8).map(
        " ".join
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(counted=texts, text=texts, room=st.floats(0, 1))
def test_any_text_is_still_written_and_kept_tokens_stay_what_they_were(kind, counted, text, room):
    tokenizer, trimmed, new = trim(kind, Counter(full(kind)[0].encode(counted).ids), room)
    for one in (counted, text):
        before, after = tokenizer.encode(one), trimmed.encode(one)
        if all(index in new for index in before.ids):
            assert after.ids == [new[index] for index in before.ids]
        if kind in WRITES_ANYTHING:
            assert trimmed.decode(after.ids) == tokenizer.decode(before.ids) == one.replace("<|im_start|>", "")


@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_a_texts_tokens_the_text_stays_as_it_was(kind):
    """What the property above says of kept tokens is no empty word."""
    text = "when any man hath a running number of items"
    counts = Counter(full(kind)[0].encode(text).ids)
    tokenizer, trimmed, new = trim(kind, counts, 0.6)
    assert all(index in new for index in counts)
    assert len(new) < tokenizer.get_vocab_size()
    assert trimmed.encode(text).tokens == tokenizer.encode(text).tokens
    assert max(new.values()) < max(new)


def test_a_token_stays_with_all_it_is_merged_from():
    tokenizer, _, _ = trim("byte_level", {}, 0)
    word = tokenizer.token_to_id("Ġcontainer")
    assert word is not None
    _, trimmed, new = trim("byte_level", {word: 5}, 0.15)
    assert word in new
    assert trimmed.encode(" container").tokens[1:] == ["Ġcontainer"]


def test_padding_and_bert_templates_are_renumbered(tmp_path):
    content = json.loads(full("word_piece")[1])
    ids = content["model"]["vocab"]
    last = max(ids, key=ids.get)
    content["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
                          "pad_id": ids[last], "pad_type_id": 0, "pad_token": last}  # fmt: skip
    content["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", ids["</s>"]], "cls": ["<s>", ids["<s>"]]}
    source = directory(tmp_path / "full", json.dumps(content))
    kept = choose_vocabulary(source, TokenFrequencies({0: 1}), 120, vocab_size=len(ids))
    trim_tokenizer(source, kept, tmp_path / "trimmed")
    trimmed = Tokenizer.from_file(str(tmp_path / "trimmed" / "tokenizer.json"))
    assert trimmed.padding["pad_id"] == trimmed.token_to_id(last) == kept.index(ids[last])
    assert trimmed.encode("the").tokens[0] == "<s>"
    assert trimmed.encode("the").ids[-1] == trimmed.token_to_id("</s>")


def test_special_tokens_of_the_model():
    architecture = Architecture(bos_token_id=3, eos_token_id=[5, 9], pad_token_id=None)
    left = renumber(architecture, (1, 3, 5, 9))
    assert (left.bos_token_id, left.eos_token_id, left.pad_token_id) == (1, [2, 3], None)
    with pytest.raises(ShapeError, match="eos_token_id"):
        renumber(architecture, (1, 3, 5))


def test_the_list_of_frequencies(tmp_path):
    source = directory(tmp_path / "full", full("byte_level")[1])
    file = tmp_path / "frequencies.tsv"
    write_frequencies([0, 7, 3, 7], file, tokenizer=source, comment="17 tokens")
    found = read_frequencies(file)
    assert (found.counts, found.tokenizer) == ({1: 7, 3: 7, 2: 3}, tokenizer_fingerprint(source))
    assert choose_vocabulary(source, found, 300, vocab_size=400)
    other = directory(tmp_path / "other", full("unigram")[1])
    with pytest.raises(DataError, match=r"frequencies.tsv: was counted with another tokenizer"):
        choose_vocabulary(other, found, 120, vocab_size=400)
    with pytest.raises(DataError, match="names token 999, the model has 400"):
        choose_vocabulary(source, TokenFrequencies({999: 1}), 300, vocab_size=400)
    with pytest.raises(ShapeError, match="vocabulary.size=401: must lie between 259 .* and 400"):
        choose_vocabulary(source, found, 401, vocab_size=400)
    for text, message in (
        ("1\t2\n1\t3\n", "line 2: token 1 is counted twice"),
        ("a b\n", "line 1: 'a b' is not a token id and a count"),
        ("1\t-2\n", "is not a token id"),
        ("# nothing\n", "counts no tokens"),
        (None, "cannot be read"),
    ):
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_frequencies(file)
        file.write_text("")


def test_tokenizers_that_cannot_be_trimmed(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no tokenizer.json; convert the tokenizer once with transformers"):
        choose_vocabulary(tmp_path, TokenFrequencies({0: 1}), 3, vocab_size=9)
    for content, message in (
        ({"model": {"type": "Other", "vocab": {}}}, "type Other cannot be trimmed; supported: BPE"),
        ({"model": {"type": "BPE"}}, "cannot be read as a tokenizer"),
        ([], "cannot be read as a tokenizer"),
    ):
        directory(tmp_path, json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            choose_vocabulary(tmp_path, TokenFrequencies({0: 1}), 3, vocab_size=9)
