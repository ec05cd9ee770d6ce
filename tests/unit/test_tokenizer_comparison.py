"""Tokenizers of two models: what is one tokenizer, what differs and is named, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.checkpoints.peek import peek_vocabulary
from nemo_minitron.checkpoints.tokenizer.comparison import PROBES, CommonVocabulary, Vocabulary, compare, warnings_of
from nemo_minitron.checkpoints.tokenizer.opening import find_tokenizer
from nemo_minitron.errors import CheckpointError

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The JSON of a byte-level BPE tokenizer of 300 tokens and three added ones, as ``tokenizers`` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PROBES, trainer)
    tokenizer.add_special_tokens(["<|end|>", "<|turn|>", "<|reserved_0|>"])
    return json.loads(tokenizer.to_str())


@pytest.fixture
def written(trained: dict[str, Any], tmp_path: Path) -> Callable[..., Vocabulary]:
    def write(name: str, change: Change | None = None, *, rows: int = 303, **config: Any) -> Vocabulary:
        content = copy.deepcopy(trained)
        if change is not None:
            change(content)
        directory = tmp_path / name
        directory.mkdir()
        (directory / "tokenizer.json").write_text(json.dumps(content))
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<|end|>", "pad_token": "<|end|>"} | config)
        )
        return Vocabulary(name, directory, rows, directory)

    return write


def added(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}


def test_equal_tokenizers_share_everything(written: Callable[..., Vocabulary]) -> None:
    older = written("older", lambda x: x["model"].update(merges=[" ".join(pair) for pair in x["model"]["merges"]]))
    common = compare(written("newer"), older)
    assert common.whole and common.cuts_alike and common.warning is None
    assert (common.size, common.left_out, common.unlike) == (303, (), {})


def test_rows_ends_and_padding_are_named_in_one_warning(written: Callable[..., Vocabulary]) -> None:
    student = written("student", rows=304)
    common = compare(student, written("teacher", rows=384, eos_token="<|turn|>", pad_token="<|reserved_0|>"))
    assert (common.size, common.left_out) == (304, ())
    assert not common.whole and not common.cuts_alike and common.ends_differ
    assert common.warning == (
        "student and teacher have one tokenizer but for 304 and 384 rows; eos_token_id is 300 '<|end|>' and "
        "301 '<|turn|>'; pad_token_id is 300 '<|end|>' and 302 '<|reserved_0|>'"
    )
    padded = compare(written("s"), written("t", pad_token="<|turn|>"))
    assert padded.whole and padded.cuts_alike and "pad_token_id" in str(padded.warning)
    silent = compare(written("unnamed", eos_token=None, pad_token=None), student)
    assert silent.cuts_alike and silent.remarks == ("303 and 304 rows",)


def test_a_chat_template_is_named_and_changes_nothing(written: Callable[..., Vocabulary]) -> None:
    base, chat = written("base"), written("chat", chat_template="{{ messages }}")
    other = written("other", lambda x: x.update(truncation=None), chat_template="{{ messages[0] }}")
    for pair, remark in (
        ((base, chat), "chat templates (none of base)"),
        ((chat, base), "chat templates (none of base)"),
        ((chat, other), "chat templates (of other texts)"),
    ):
        common = compare(*pair)
        assert common.whole and common.cuts_alike and common.remarks == (remark,)
    assert compare(chat, written("same", chat_template="{{ messages }}")).warning is None


def test_models_that_differ_alike_are_named_in_one_line(written: Callable[..., Vocabulary]) -> None:
    teacher = written("teacher")
    chat = {"eos_token": "<|turn|>", "chat_template": "{{ messages }}"}
    others = [written("pruned"), written("sft", **chat), written("dpo", **chat), written("wide", rows=304, **chat)]
    end = "eos_token_id is 300 '<|end|>' and 301 '<|turn|>'"
    assert warnings_of(compare(teacher, other) for other in others) == [
        f"teacher and each of sft, dpo have one tokenizer but for chat templates (none of teacher); {end}",
        f"teacher and wide have one tokenizer but for 303 and 304 rows; chat templates (none of teacher); {end}",
    ]


def test_added_tokens_of_one_model_are_left_out(written: Callable[..., Vocabulary]) -> None:
    """One lies among the other's padding rows, one above them; a reserved token has another text."""

    def more(content: dict[str, Any]) -> None:
        content["added_tokens"] += [added(303, "<|tool|>"), added(310, "<|far|>")]
        content["added_tokens"][2]["content"] = "<|call|>"

    common = compare(written("student", rows=308), written("teacher", more, rows=320))
    assert common.left_out == (302, 303)
    assert set(common.unlike) == {302, 303, 310}
    assert common.unlike[303] == "unknown to student, '<|tool|>' to teacher"
    assert "308 and 320 rows; 2 added tokens known to teacher alone (303 is unknown to student" in str(common.warning)
    assert "1 added token of another text (302 is '<|reserved_0|>' to student, '<|call|>' to teacher)" in str(
        common.warning
    )
    assert not common.whole and not common.cuts_alike and not common.ends_differ
    swapped = compare(written("s", more, rows=320), written("t", rows=308))
    assert swapped.left_out == common.left_out and "known to s alone" in str(swapped.warning)


def test_tokens_around_a_text_are_compared(written: Callable[..., Vocabulary]) -> None:
    def begins(content: dict[str, Any]) -> None:
        token, text = {"SpecialToken": {"id": "<|turn|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        template = {
            "type": "TemplateProcessing", "single": [token, text], "pair": [token, text],
            "special_tokens": {"<|turn|>": {"id": "<|turn|>", "ids": [301], "tokens": ["<|turn|>"]}},
        }  # fmt: skip
        trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        content["post_processor"] = {"type": "Sequence", "processors": [trim, template]}

    student, teacher = written("student"), written("teacher", begins)
    common = compare(student, teacher)
    assert common.whole and not common.cuts_alike
    assert common.remarks == ("a text becomes '...' and '<|turn|> ...'",)
    assert compare(teacher, written("same", begins)).cuts_alike

    def roberta(content: dict[str, Any]) -> None:
        content["post_processor"] = {"type": "RobertaProcessing", "cls": ["<|turn|>", 301], "sep": ["<|end|>", 300]}

    assert compare(written("r", roberta), student).remarks == ("a text becomes '<|turn|> ... <|end|>' and '...'",)


def isolated_digits(content: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}


def same_in_other_words(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    content["normalizer"] = {"type": "Sequence", "normalizers": []}


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"2 tokens differ \('a' has id \d+ and id \d+\)"),
        (lambda x: x["model"]["merges"].reverse(), r"\d+ merges differ \('.*' has order 0 and order \d+\)"),
        (lambda x: x["model"]["vocab"].update(zzz=303), r"1 tokens differ \('zzz' has none and id 303\)"),
        (lambda x: x["added_tokens"].append(added(x["model"]["vocab"]["a"], "<a>")), r"tokens differ \('a' has id"),
        (isolated_digits, r"\d+ of \d+ texts become other ids \('0 1 12 123 .*: \d+ ids \(\d+, .*\) and \d+ ids"),
        (lambda x: x.update(normalizer={"type": "NFC"}), r"texts become other ids \('naïve.*decomposed"),
        (lambda x: x.update(normalizer={"type": "Lowercase"}), "texts become other ids"),
        (lambda x: x["added_tokens"].append(added(303, "    ")), r"2 of 18 texts become other ids \(' {8}eight"),
    ],
)
def test_what_ordinary_text_becomes_must_be_the_same(
    change: Change, message: str, written: Callable[..., Vocabulary]
) -> None:
    with pytest.raises(CheckpointError, match=rf"ours \(.*\) and theirs \(.*\) have different tokenizers: .*{message}"):
        compare(written("ours"), written("theirs", change))


def test_a_way_that_is_written_otherwise_is_tried_out(written: Callable[..., Vocabulary]) -> None:
    assert compare(written("ours"), written("theirs", same_in_other_words)).whole
    truncated = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    short = written("short", lambda x: (same_in_other_words(x), x.update(truncation=truncated)))
    assert compare(written("whole"), short).whole
    bad = written("bad", lambda x: x.update(pre_tokenizer={"type": "Unheard"}))
    with pytest.raises(CheckpointError, match=r"bad/tokenizer.json cannot be read as a tokenizer"):
        compare(short, bad)


def test_scores_of_a_unigram_model_must_agree(tmp_path: Path) -> None:
    def write(name: str, score: float) -> Vocabulary:
        pieces = [["<unk>", 0.0], ["a", -1.0], ["b", score], ["ab", -3.0]]
        content = {"model": {"type": "Unigram", "vocab": pieces, "unk_id": 0}, "added_tokens": []}
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        return Vocabulary(name, tmp_path / name, 4, tmp_path / name)

    first = write("first", -2.0)
    assert compare(first, write("rounded", -2.0000001)).whole
    with pytest.raises(CheckpointError, match=r"1 scores of tokens differ \('b' has -2.0 and -2.5\)"):
        compare(first, write("other", -2.5))


def test_sentencepiece_models_are_compared_by_their_pieces(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join([PROBES[0], "a few lines more of ordinary text, of which pieces are made"] * 5))

    def write(name: str, added_tokens: dict[str, int] | None = None, size: int = 60) -> Vocabulary:
        (tmp_path / name).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / name / "tokenizer"), vocab_size=size, model_type="bpe",
            character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
        if added_tokens:
            (tmp_path / name / "added_tokens.json").write_text(json.dumps(added_tokens))
        return Vocabulary(name, tmp_path / name, size + 4, find_tokenizer(tmp_path / name))

    first = write("first")
    assert compare(first, write("same")).whole
    assert compare(first, write("more", {"<tool>": 60})).left_out == (60,)
    with pytest.raises(CheckpointError, match="tokens differ"):
        compare(first, write("larger", size=70))


def test_without_a_tokenizer_the_rows_must_agree(written: Callable[..., Vocabulary], tmp_path: Path) -> None:
    student = written("student")
    assert compare(student, Vocabulary("teacher", tmp_path, 303, None)).whole
    with pytest.raises(
        CheckpointError,
        match=r"student .* has a vocabulary of 303 and teacher .* of 304, and the teacher carries no tokenizer",
    ):
        compare(student, Vocabulary("teacher", tmp_path, 304, None))
    assert compare(Vocabulary("a", tmp_path, 5, None), Vocabulary("b", tmp_path, 5, None)) == CommonVocabulary(
        ("a", "b"), (5, 5)
    )


@settings(max_examples=60, deadline=None)
@given(
    ours=st.dictionaries(st.integers(8, 20), st.sampled_from("xyz"), max_size=8),
    theirs=st.dictionaries(st.integers(8, 20), st.sampled_from("xyz"), max_size=8),
    rows=st.tuples(st.integers(9, 24), st.integers(9, 24)),
)
def test_ids_are_left_out_exactly_where_their_meaning_differs(
    tmp_path_factory: pytest.TempPathFactory, ours: dict[int, str], theirs: dict[int, str], rows: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    pair = []
    for name, tokens, count in zip("ab", (ours, theirs), rows, strict=True):
        vocabulary = {f"t{number}": number for number in range(8)}
        content = {
            "model": {"type": "WordLevel", "vocab": vocabulary},
            "added_tokens": [{"id": number, "content": f"<{text}>"} for number, text in tokens.items()],
        }
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps(content))
        pair.append(Vocabulary(name, folder / name, count, folder / name))
    common = compare(*pair)
    expected = {n for n in range(8, 21) if ours.get(n) != theirs.get(n)}
    assert set(common.unlike) == expected
    assert common.left_out == tuple(sorted(n for n in expected if n < min(rows)))
    assert common.cuts_alike == (not expected)
    assert (common.warning is None) == (not expected and rows[0] == rows[1])


def test_plans_peek_without_opening(tmp_path: Path) -> None:
    """Both formats that are directories; nothing of what only opening tells."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 11, "hidden_size": 8,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    bare = peek_vocabulary("bare", tmp_path / "hf")
    assert bare == Vocabulary("bare", tmp_path / "hf", 11, None)
    tokens = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    seen = peek_vocabulary("full", str(tmp_path / "hf"))
    assert seen is not None and seen.tokenizer == tmp_path / "hf"
    (tmp_path / "nemo" / "context" / "nemo_tokenizer").mkdir(parents=True)
    assert peek_vocabulary("foreign", tmp_path / "nemo") is None
    assert peek_vocabulary("missing", tmp_path / "nowhere") is None
    assert peek_vocabulary("a name", "org/name") is None
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        peek_vocabulary("damaged", tmp_path / "hf")
