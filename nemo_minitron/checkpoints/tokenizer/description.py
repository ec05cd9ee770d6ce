"""The content of a tokenizer's files, as data: what decides which ids a text becomes, and what each id means."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer import names
from nemo_minitron.checkpoints.tokenizer.content import read_object, special_tokens
from nemo_minitron.checkpoints.tokenizer.opening import origin
from nemo_minitron.checkpoints.tokenizer.spelling import chat_templates
from nemo_minitron.errors import CheckpointError

__all__ = ["TokenizerContent", "carried_templates", "named_specials", "read_content", "same_files"]


@dataclass(frozen=True)
class TokenizerContent:
    """A tokenizer as its files describe it.

    Attributes:
        directory: where it is.
        ids: id -> text.
        added: ids that ordinary text does not become: added and control tokens.
        merges: in order; None of a converted sentencepiece model, whose order is the converter's.
        scores: of the pieces of a unigram model, in order; None of other models.
        way: whatever else decides how a text becomes ids, as it is written.
        around: tokens that the tokenizer puts around a text, with "..." for the text.
        special: ``{"eos_token_id": 2, ...}``.
        templates: chat templates by name.
    """

    directory: Path
    ids: Mapping[int, str]
    added: frozenset[int]
    merges: tuple[str, ...] | None
    scores: tuple[float, ...] | None
    way: Any
    around: tuple[str, ...]
    special: Mapping[str, int]
    templates: Mapping[str, str] = field(default_factory=dict)

    def text(self, number: int) -> str | None:
        """Of an id; None if it has none."""
        return self.ids.get(number)

    def shown(self, number: int) -> str:
        """The text of an id, for messages."""
        return repr(self.ids[number]) if number in self.ids else "unknown"


def same_files(first: Path, second: Path) -> bool:
    """Whether the ``tokenizer.json`` of both is equal byte for byte."""
    return filecmp.cmp(first / names.CONTENT, second / names.CONTENT, shallow=False)


def named_specials(directory: Path, ids: Mapping[int, str]) -> dict[str, int]:
    """The ids of the tokens that begin, end and fill a text, as far as the tokenizer's configuration names them.

    Raises:
        CheckpointError: if the configuration cannot be read.
    """
    path = directory / names.CONFIG
    if not path.is_file():
        return {}
    given = special_tokens(directory, read_object(path), names.tokenizer_files(directory))
    named = {f"{kind}_token_id": given.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    texts = {name: text for name, text in texts.items() if isinstance(text, str)}
    numbers = {text: number for number, text in ids.items() if text in texts.values()}
    return {name: numbers[text] for name, text in texts.items() if text in numbers}


def carried_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a tokenizer by name.

    Raises:
        CheckpointError: if the configuration cannot be read.
    """
    path = directory / names.CONFIG
    config = read_object(path) if path.is_file() else {}
    return chat_templates(directory, config, names.tokenizer_files(directory))


def read_content(directory: Path, probes: Iterable[str] = ()) -> TokenizerContent:
    """Read the files of a tokenizer.

    Args:
        directory: of the tokenizer, as :func:`~nemo_minitron.checkpoints.tokenizer.opening.find_tokenizer` gives it.
        probes: ordinary texts; added tokens that occur in them are a part of :attr:`TokenizerContent.way`.

    Raises:
        CheckpointError: if they cannot be read as a tokenizer.
    """
    path = directory / names.CONTENT
    content = read_object(path)
    try:
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
            None if _is_converted(directory) else tuple(merges),
            scores,
            way,
            tuple(_around(content.get("post_processor"))),
            named_specials(directory, ids),
            carried_templates(directory),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error


def _is_converted(directory: Path) -> bool:
    """Whether a tokenizer was converted from a sentencepiece model."""
    source = origin(directory)
    return source != directory and any((source / name).is_file() for name in names.SENTENCEPIECE)


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
