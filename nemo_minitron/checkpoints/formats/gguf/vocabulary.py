"""A tokenizer as keys of a GGUF header: from its ``tokenizer.json`` and what transformers makes of it.

Tokens, kinds and special tokens are those that llama.cpp's ``convert_hf_to_gguf.py`` writes. What a header cannot say
is refused; the converter writes another tokenizer in such a case, or knows the vocabulary by a hash of a text's tokens,
which a vocabulary that was cut does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.accounting import warn_once
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.gguf.splits import SPLITS, name_of
from nemo_minitron.checkpoints.tokenizer.content import read_object, token_ids
from nemo_minitron.checkpoints.tokenizer.files import check_tokenizer
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["GGUFVocabulary", "vocabulary_of"]

#: llama.cpp's kinds of tokens (``llama_token_type``).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
#: Scores in the converter: of rows without a token, and of added tokens.
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
#: Tokens that the converter takes for control tokens, whatever the tokenizer says of them.
_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
#: Tokens that llama.cpp takes for the end of an answer wherever they are (``llama-vocab.cpp``).
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>",
         "<|end_of_text|>", "<eos>")  # fmt: skip
_SPACE = "▁"
_PROBE = "a"
_REMEDY = "export the model as hf"


@dataclass(frozen=True)
class GGUFVocabulary:
    """The keys of a header that describe a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for sentencepiece's.
        pre: how text is divided.
        tokens, kinds: for each row of the embeddings.
        scores: for each row; of sentencepiece alone.
        merges: of byte-level BPE alone.
        special: kind of a special token ("bos", "eos", "eot" ...) -> its number.
        adds: what is put before and after each text: "bos" and "eos" -> whether it is.
        space: whether a space is put before each text; None where no text gets one.
        templates: chat templates by name.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    space: bool | None = None
    templates: dict[str, str] = field(default_factory=dict)

    def add(self, writer: GGUFWriter) -> None:
        """Add the keys to a header."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        for kind, value in self.adds.items():
            getattr(writer, f"add_add_{kind}_token")(value)
        if self.space is not None:
            writer.add_add_space_prefix(self.space)
        if list(self.templates) == ["default"]:
            writer.add_chat_template(self.templates["default"])
        elif self.templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.templates.items()])


def vocabulary_of(directory: Path, rows: int, architecture: Architecture) -> GGUFVocabulary:
    """The keys for a tokenizer.

    Args:
        directory: with a ``tokenizer.json``.
        rows: of the model's embeddings; those without a token get a name and are never produced by a text.
        architecture: the model's, whose end tokens are written.

    Raises:
        CheckpointError: for a tokenizer that a header cannot express, saying what of it.
    """
    from transformers import AutoTokenizer

    check_tokenizer(directory, rows)
    path = directory / "tokenizer.json"
    content = read_object(path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens, kinds = _tokens(path, content, rows)
    model = content["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _refusal(path, f"its model is {model.get('type')!r}, where llama.cpp's formats are byte-pair encodings")
    special, adds = _ends(path, tokenizer, architecture)
    shared: dict[str, Any] = {"special": special, "adds": adds, "templates": _templates(tokenizer)}
    if model.get("byte_fallback"):
        _check_sentencepiece(path, content)
        unknown = model.get("unk_token")
        for number, token in enumerate(tokens):
            if token == unknown and token in model["vocab"]:
                kinds[number] = _UNKNOWN
                special["unk"] = number
            elif kinds[number] == _NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = _BYTE
        scores = _scores(path, content, tokens, kinds)
        return GGUFVocabulary("llama", "default", tokens, kinds, scores, space=_prefixed(content), **shared)
    pre = name_of(content)
    if pre is None or any(step.get("type") != "NFC" for step in _flat(content.get("normalizer"))):
        what = "normalizer" if pre is not None else "pre_tokenizer"
        raise _refusal(
            path,
            f"its {what} is {str(content.get(what))[:200]}, which is none of llama.cpp's ways of dividing text ("
            f"{', '.join(SPLITS)})",
        )
    merges = [_merge(path, merge) for merge in model.get("merges") or []]
    return GGUFVocabulary("gpt2", pre, tokens, kinds, merges=merges, **shared)


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: GGUF cannot express this tokenizer: {why}; {_REMEDY}")


def _tokens(path: Path, content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token and kind of each row."""
    words = {number: token for token, number in token_ids(path, dict(content)).items()}
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    taken, tokens, kinds = set(words.values()), [], []
    for row in range(rows):
        word = words.get(row)
        if word is None:
            word = f"[PAD{row}]"
            while word in taken:
                word += "_"
            kinds.append(_UNUSED)
        elif row not in added:
            kinds.append(_NORMAL)
        elif added[row].get("special") or _seems_special(word):
            kinds.append(_CONTROL)
        else:
            word = word.replace(_SPACE, " ")
            kinds.append(_USER_DEFINED)
        tokens.append(word)
    loose = [token["content"] for token in added.values() if any(token.get(key) for key in ("lstrip", "single_word"))]
    if loose:
        warn_once(
            path,
            f"{len(loose)} added tokens, such as {loose[0]!r}, take the spaces before them or are words of their own; "
            "llama.cpp finds them as they stand",
        )
    return tokens, kinds


def _seems_special(token: str) -> bool:
    return token in _SPECIAL or any(token.startswith(first) and token.endswith(last) for first, last in _BRACKETS)


def _ends(path: Path, tokenizer: Any, architecture: Architecture) -> tuple[dict[str, int], dict[str, bool]]:
    """Special tokens, and which of them are put before and after each text."""
    special = {
        kind: number
        for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        if isinstance(number := getattr(tokenizer, f"{kind}_token_id", None), int)
    }
    special.pop("cls", None)  # of models that are no generators
    bare = tokenizer(_PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(_PROBE).input_ids
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    before, after = whole[:start], whole[start + len(bare) :]
    for what, extra in (("before", before), ("after", after)):
        if len(extra) > 1:
            raise _refusal(path, f"it puts {len(extra)} tokens {what} each text, {extra}, and llama.cpp one at most")
    if before:
        special["bos"] = before[0]
    given = architecture.end_tokens
    ends = list(dict.fromkeys([*after, *([special["eos"]] if special.get("eos") in given else []), *given]))
    if not ends and "eos" in special:
        ends = [special["eos"]]
    special |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    by_itself = [number for number in ends[3:] if tokenizer.convert_ids_to_tokens(number) not in _ENDS]
    if by_itself:
        warn_once(path, f"a GGUF header names three end tokens; {by_itself} will not end an answer in llama.cpp")
    if not ends:
        warn_once(path, "neither the model nor the tokenizer has an end token; llama.cpp takes one by its number")
    if "bos" not in special and architecture.bos_token_id is not None:
        special["bos"] = architecture.bos_token_id
    if "pad" not in special and architecture.pad_token_id is not None:
        special["pad"] = architecture.pad_token_id
    return special, {"bos": bool(before), "eos": bool(after)}


def _templates(tokenizer: Any) -> dict[str, str]:
    given = tokenizer.chat_template
    return {} if given is None else {"default": given} if isinstance(given, str) else dict(given)


def _merge(path: Path, merge: Any) -> str:
    """One merge as the file has it: its two tokens with a space between."""
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    if len(parts) != 2 or any(" " in part for part in parts):
        raise _refusal(path, f"its merge {merge!r} has a space in a token")
    return " ".join(parts)


# -------------------------------------------------------------------------------------------------------- sentencepiece


def _check_sentencepiece(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse what sentencepiece's BPE of llama.cpp does not do before it merges."""
    for what in ("normalizer", "pre_tokenizer"):
        for step in _flat(content.get(what)):
            kind, pattern = step.get("type"), step.get("pattern") or {}
            spaces = pattern.get("String") in (" ", _SPACE)
            known = (
                (kind == "Prepend" and step.get("prepend") == _SPACE)
                or (kind == "Replace" and pattern.get("String") == " " and step.get("content") == _SPACE)
                or (kind == "Metaspace" and not step.get("split", True))
                # after spaces were replaced there is nothing to split at
                or (kind == "Split" and spaces and what == "pre_tokenizer" and pattern.get("String") == " ")
            )
            if not known:
                raise _refusal(path, f"its {what} has a step {kind!r} ({str(dict(step))[:120]}) beside sentencepiece's")


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [part for one in inner for part in _flat(one)]


def _prefixed(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before each text."""
    return any(step.get("type") == "Prepend" for step in _flat(content.get("normalizer"))) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _flat(content.get("pre_tokenizer"))
    )


def _scores(path: Path, content: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> list[float]:
    """The score of each token, by which llama.cpp orders merges: the lower the later the merges that make it.

    llama.cpp merges whatever makes a token, and so does sentencepiece: a tokenizer with other merges is refused. Tokens
    whose merges stand between each other's had the same score in sentencepiece, and get it here.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    model = content["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges") or []]
    spans: dict[str, list[int]] = {}
    for rank, pair in enumerate(pairs):
        spans.setdefault("".join(pair), [rank, rank])[1] = rank
    given: dict[str, float] = {}
    score, end = 0.0, -1
    for token, (first, last) in spans.items():  # in the order of their first merges
        score, end = (-float(first), last) if first > end else (score, max(end, last))
        given[token] = score
    never = -float(len(pairs)) - 1
    made = {token: given.get(token, never) for token in model["vocab"]}
    added = {token["content"] for token in content.get("added_tokens") or []}
    other = {pair for pair in set(generate_merges(model["vocab"], made)) ^ set(pairs) if "".join(pair) not in added}
    if other:
        raise _refusal(
            path,
            f"sentencepiece merges whatever makes a token, and {len(other)} merges of this one differ, such as "
            f"{min(other)}",
        )
    rest = {_UNUSED: _UNUSED_SCORE, _CONTROL: _ADDED_SCORE, _USER_DEFINED: _ADDED_SCORE, _UNKNOWN: 0.0, _BYTE: 0.0}
    return [rest.get(kind, given.get(token, never)) for token, kind in zip(tokens, kinds, strict=True)]
