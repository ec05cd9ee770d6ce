"""Tokenizers in every form in which models come: read, carried whole, trimmed; and files that are damaged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tokenizers as made
from support.checkpoints import TINY, tiny_hf_model
from support.text import write_tokenizer

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.tokenizer import opening
from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary, compare
from nemo_minitron.checkpoints.tokenizer.files import special_ids, token_count
from nemo_minitron.checkpoints.tokenizer.opening import find_tokenizer, origin
from nemo_minitron.checkpoints.tokenizer.trimming import TokenFrequencies, choose_vocabulary, trim_tokenizer
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import CheckpointError


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "nemo_minitron")
    return caplog


def encode(directory: Path, text: str) -> list[int]:
    return load_tokenizer(find_tokenizer(directory))(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_alone(kind, tmp_path, warnings):
    from sentencepiece import SentencePieceProcessor

    size = 400 if kind == "bpe" else 330
    path = made.sentencepiece_model(tmp_path / "sp" / "tokenizer.model", kind=kind, size=size)
    directory = find_tokenizer(tmp_path / "sp")
    assert directory != tmp_path / "sp"
    assert origin(directory) == tmp_path / "sp"
    assert sorted(file.name for file in (tmp_path / "sp").iterdir()) == ["tokenizer.model"]
    assert (directory / "tokenizer.model").read_bytes() == path.read_bytes()
    pieces, tokenizer = SentencePieceProcessor(model_file=str(path)), load_tokenizer(directory)
    for text in made.PROBES[:-1]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text
        assert tokenizer.decode(pieces.encode(text)) == text
    assert tokenizer("the").input_ids[0] == pieces.bos_id() == 1
    assert token_count(directory) == size
    assert special_ids(directory) == {"bos_token_id": 1, "eos_token_id": 2}
    assert not warnings.records


def test_sentencepiece_with_added_tokens_and_other_special_pieces(tmp_path):
    path = made.sentencepiece_model(
        tmp_path / "sp" / "tokenizer.model", bos_piece="<begin>", eos_piece="<end>", pad_id=3
    )
    (tmp_path / "sp" / "added_tokens.json").write_text(json.dumps({"<extra>": 400, "<more>": 401}))
    directory = find_tokenizer(tmp_path / "sp")
    assert token_count(directory) == 402
    assert special_ids(directory) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    tokenizer = load_tokenizer(directory)
    assert tokenizer.convert_tokens_to_ids(["<extra>", "<more>", "<begin>"]) == [400, 401, 1]
    assert 400 in tokenizer("a <extra> b").input_ids
    shutil.copytree(tmp_path / "sp", tmp_path / "other")
    made.sentencepiece_model(tmp_path / "other" / "tokenizer.model", size=390)
    (tmp_path / "other" / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"teacher \(.*sp\) and student .* have different tokenizers"):
        compare(
            Vocabulary("teacher", tmp_path, 400, directory),
            Vocabulary("student", tmp_path, 400, find_tokenizer(tmp_path / "other")),
        )
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read as a tokenizer"):
        find_tokenizer(tmp_path / "sp")


def test_a_sentencepiece_model_that_transformers_converts_otherwise(tmp_path, warnings):
    made.sentencepiece_model(tmp_path / "tokenizer.model", remove_extra_whitespaces=True)
    find_tokenizer(tmp_path)
    assert "otherwise than sentencepiece" in warnings.text


def test_a_sentencepiece_model_with_another_order_of_special_pieces(tmp_path, warnings):
    made.sentencepiece_model(tmp_path / "tokenizer.model", unk_id=2, bos_id=0, eos_id=1)
    assert special_ids(find_tokenizer(tmp_path)) == {"bos_token_id": 0, "eos_token_id": 1}
    assert not warnings.records  # it encodes all texts as sentencepiece does


def test_vocab_json_and_merges_alone(tmp_path, warnings):
    expected = made.byte_level(special=("<|endoftext|>",))
    source = made.bpe_files(tmp_path / "bpe")
    directory = find_tokenizer(source)
    for text in made.PROBES:
        assert encode(source, text) == expected.encode(text, add_special_tokens=False).ids
    assert load_tokenizer(directory).decode(encode(source, made.PROBES[3])) == made.PROBES[3]
    assert token_count(directory) == expected.get_vocab_size()
    assert special_ids(directory) == {"bos_token_id": 0, "eos_token_id": 0}
    assert {file.name for file in directory.iterdir()} == {
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert not warnings.records


def test_special_tokens_are_those_of_the_models_configuration(tmp_path):
    source = made.bpe_files(tmp_path / "bpe", special=("<a>", "<b>"))
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 0, "eos_token_id": [1]}))
    directory = find_tokenizer(source)
    assert special_ids(directory) == {"bos_token_id": 0, "eos_token_id": 1}
    assert token_count(directory) == 380
    # nothing is made up
    (source / "config.json").unlink()
    assert special_ids(find_tokenizer(source)) == {}
    assert token_count(find_tokenizer(source)) == 380


def test_the_class_that_the_files_name(tmp_path):
    """Qwen 2 splits digits, GPT-2 does not."""
    source = made.bpe_files(tmp_path / "bpe")
    plain = encode(source, "1984")
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert encode(source, "1984") != plain
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert encode(source, "1984") == plain


def test_word_pieces_need_a_class(tmp_path):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "lord", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt do not say what kind of tokenizer .* tokenizer_class"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert encode(tmp_path, "the lords") == [5, 6, 7]
    assert token_count(find_tokenizer(tmp_path)) == 8


def test_a_makers_own_form_alone_is_refused(tmp_path, warnings):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tekken\.json is a tokenizer in its maker's own form"):
        find_tokenizer(tmp_path)
    (tmp_path / "tekken.json").unlink()
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    assert "has no vocabulary beside tokenizer_config.json" in warnings.text


def test_vocab_json_without_merges(tmp_path):
    source = made.bpe_files(tmp_path / "bpe")
    (source / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="do not say what kind"):
        find_tokenizer(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(CheckpointError, match="transformers cannot read the tokenizer as GPT2Tokenizer"):
        find_tokenizer(source)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json"]
)
@pytest.mark.parametrize("content", ["{", "[]", "\udce4"])
def test_damaged_json_is_named(name, content, tmp_path):
    source = made.bpe_files(tmp_path / "bpe")
    if name == "tokenizer.json":
        write_tokenizer(source)
    (source / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=name):
        token_count(find_tokenizer(source))


def test_added_tokens_of_another_tokenizer(tmp_path):
    source = write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "added_tokens.json").write_text(json.dumps({"<eos>": 0}))
    assert encode(source, "w1 <eos>") == [4, 0]  # transformers 4 itself fails on these files
    (source / "added_tokens.json").write_text(json.dumps({"<new>": 123}))
    with pytest.raises(CheckpointError, match=r"'<new>' the id 123, tokenizer\.json none; .* two tokenizers"):
        find_tokenizer(source)


def test_code_and_places_are_left_behind(tmp_path, warnings):
    source = write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "HomeMadeTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_home.HomeMadeTokenizer", None]},
        "tokenizer_file": str(tmp_path / "elsewhere.json"),
        "phrases_file": "phrases.dat",
        "code_file": "tokenization_home.py",
        "up_file": "../secret",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenization_home.py").write_text("raise SystemExit('ran')")
    (source / "phrases.dat").write_text("phrases")
    (tmp_path / "secret").write_text("secret")
    directory = find_tokenizer(source)
    assert encode(source, "w1 w2") == [4, 5]
    assert {file.name for file in directory.iterdir()} == {
        "phrases.dat",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = json.loads((directory / "tokenizer_config.json").read_text())
    assert not {"auto_map", "tokenizer_file"} & written.keys()
    assert "tokenizer_class HomeMadeTokenizer is not known" in warnings.text


KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(invented=st.dictionaries(KEYS.map(lambda key: f"x_{key}"), VALUES, min_size=1, max_size=3), newer=st.booleans())
def test_invented_settings_are_carried_and_change_nothing(invented, newer, tmp_path):
    source = tmp_path / "tokenizer"
    if not source.exists():
        write_tokenizer(source)
        (tmp_path / "config.json").write_text((source / "tokenizer_config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"} if newer else {}
    (source / "tokenizer_config.json").write_text(json.dumps(config | more | invented))
    opening._copies.clear()
    directory = find_tokenizer(source)
    assert encode(directory, "w1 <eos> w2") == [4, 0, 5]
    written = json.loads((directory / "tokenizer_config.json").read_text())
    assert {key: written.get(key) for key in invented} == invented


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model") / "hf", vocab_size=450)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_trimming_and_exports(kind, model, tmp_path):
    """From a vocabulary alone through trimming and an export: the same text, in fewer tokens."""
    source = tmp_path / "source"
    shutil.copytree(model, source)
    if kind == "bpe":
        made.bpe_files(source)
    else:
        made.sentencepiece_model(source / "tokenizer.model")
    checkpoint = open_checkpoint(source)
    write_checkpoint(checkpoint, tmp_path / "out", "hf")
    carried = {file.name for file in checkpoint.tokenizer.iterdir()}
    assert carried <= {file.name for file in (tmp_path / "out").iterdir()}
    assert open_checkpoint(tmp_path / "out").tokenizer == tmp_path / "out"
    text = made.TEXTS[0]
    ids = encode(source, text)
    assert encode(tmp_path / "out", text) == ids
    counts = TokenFrequencies({token: ids.count(token) for token in ids})
    kept = choose_vocabulary(
        checkpoint.tokenizer, counts, 390 if kind == "sentencepiece" else 330, vocab_size=TINY["vocab_size"] + 1000
    )
    trim_tokenizer(checkpoint.tokenizer, kept, tmp_path / "trimmed")
    assert find_tokenizer(tmp_path / "trimmed") == tmp_path / "trimmed"
    assert set(ids) <= set(kept)
    again = encode(tmp_path / "trimmed", text)
    assert [kept[token] for token in again] == ids
    assert load_tokenizer(tmp_path / "trimmed").decode(again) == text
    assert not {"tokenizer.model", "vocab.json", "merges.txt"} & {
        file.name for file in (tmp_path / "trimmed").iterdir()
    }


def test_files_beside_a_model_are_accounted_for(model, tmp_path, warnings):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    made.bpe_files(source)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "phrases_file": "phrases.dat"})
    )
    (source / "phrases.dat").write_text("phrases")
    (source / "strange.dat").write_text("strange")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    write_checkpoint(open_checkpoint(source), tmp_path / "out", "hf")
    assert (tmp_path / "out" / "phrases.dat").is_file()
    (record,) = [record for record in warnings.records if "left behind" in record.message]
    assert record.message.endswith("files that are not known are left behind: strange.dat")
