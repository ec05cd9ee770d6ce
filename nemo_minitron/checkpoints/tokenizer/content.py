"""The content of a tokenizer's files, as data: what decides which ids a text becomes, and what each id means."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError

__all__ = ["TokenizerContent", "named_specials", "read_content", "same_files"]


@dataclass(frozen=True)
class TokenizerContent:
    """A tokenizer as its files describe it.

    Attributes:
        directory: where it is.
        ids: id -> text.
        added: ids that ordinary text does not become: added and control tokens.
        merges: in order; None where the files do not say.
        scores: of the pieces of a unigram model, in order; None of other models.
        way: whatever else decides how a text becomes ids, as it is written; None of sentencepiece models.
        around: tokens that the tokenizer puts around a text, with "..." for the text.
        special: ``{"eos_token_id": 2, ...}``.
    """

    directory: Path
    ids: Mapping[int, str]
    added: frozenset[int]
    merges: tuple[str, ...] | None
    scores: tuple[float, ...] | None
    way: Any
    around: tuple[str, ...]
    special: Mapping[str, int]

    def text(self, number: int) -> str | None:
        """Of an id; None if it has none."""
        return self.ids.get(number)

    def shown(self, number: int) -> str:
        """The text of an id, for messages."""
        return repr(self.ids[number]) if number in self.ids else "unknown"


def same_files(first: Path, second: Path) -> bool:
    """Whether the files of which a tokenizer is read are equal byte for byte."""
    for name in ("tokenizer.json", "tokenizer.model", "added_tokens.json"):
        pair = [path for path in (first / name, second / name) if path.is_file()]
        if len(pair) == 1 or (pair and not filecmp.cmp(pair[0], pair[1], shallow=False)):
            return False
        if pair and name == "tokenizer.json":
            return True  # nothing else is looked at
    return True


def named_specials(directory: Path, ids: Mapping[int, str]) -> dict[str, int]:
    """The ids of the tokens that begin, end and fill a text, as far as the tokenizer's configuration names them.

    Raises:
        CheckpointError: if the configuration cannot be read.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = {f"{kind}_token_id": config.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error
    texts = {name: text for name, text in texts.items() if isinstance(text, str)}
    numbers = {text: number for number, text in ids.items() if text in texts.values()}
    return {name: numbers[text] for name, text in texts.items() if text in numbers}


def read_content(directory: Path, probes: Iterable[str] = ()) -> TokenizerContent:
    """Read the files of a tokenizer.

    Args:
        directory: of the tokenizer.
        probes: ordinary texts; added tokens that occur in them are a part of :attr:`TokenizerContent.way`.

    Raises:
        CheckpointError: if they cannot be read as a tokenizer.
    """
    path = directory / "tokenizer.json"
    try:
        if not path.is_file():
            path = directory / "tokenizer.model"
            return _read_sentencepiece(directory, path)
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens") or []
        vocabulary, scores = model["vocab"], None
        if isinstance(vocabulary, dict):
            ids = {number: token for token, number in vocabulary.items()}
        else:
            ids = {number: piece for number, (piece, _) in enumerate(vocabulary)}
            scores = tuple(score for _, score in vocabulary)
        # "a b" in older files, ["a", "b"] in newer ones
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        way = {name: content.get(name) for name in ("normalizer", "pre_tokenizer")}
        way["model"] = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
        # Some tokenizers have added tokens for ordinary text, such as runs of spaces.
        way["added"] = [
            {name: value for name, value in token.items() if name != "id"}
            for token in added
            if any(token["content"] in text for text in probes)
        ]
        ids |= {token["id"]: token["content"] for token in added}
        return TokenizerContent(
            directory,
            ids,
            frozenset(token["id"] for token in added),
            tuple(merges),
            scores,
            way,
            tuple(_around(content.get("post_processor"))),
            named_specials(directory, ids),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error


def _read_sentencepiece(directory: Path, path: Path) -> TokenizerContent:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    numbers = range(pieces.vocab_size())
    ids = {number: pieces.id_to_piece(number) for number in numbers}
    control = {n for n in numbers if pieces.is_control(n) or pieces.is_unknown(n) or pieces.is_unused(n)}
    added_path = directory / "added_tokens.json"
    added = json.loads(added_path.read_text(encoding="utf-8")) if added_path.is_file() else {}
    ids |= {number: token for token, number in added.items()}
    return TokenizerContent(
        directory,
        ids,
        frozenset(control | set(added.values())),
        None,
        None,
        None,
        ("...",),
        named_specials(directory, ids),
    )


def _around(processor: Any) -> list[str]:
    """What a post-processor puts around a text."""
    around = ["..."]
    for part in (processor or {}).get("processors") or [processor]:
        kind = (part or {}).get("type")
        if kind == "TemplateProcessing":
            pieces = [next(iter(piece.items())) for piece in part["single"]]
            template = [value["id"] if name == "SpecialToken" else "..." for name, value in pieces]
            at = template.index("...")
            around = [*template[:at], *around, *template[at + 1 :]]
        elif kind in ("BertProcessing", "RobertaProcessing"):
            around = [part["cls"][0], *around, part["sep"][0]]
    return around
