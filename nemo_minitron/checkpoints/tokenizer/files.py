"""The tokenizer of a checkpoint: its files, its number of tokens, and whether it fits the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError

__all__ = [
    "FILES",
    "check_same_tokenizer",
    "check_tokenizer",
    "copy_tokenizer",
    "find_tokenizer",
    "special_ids",
    "token_count",
]

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a HF tokenizer directory. Code files are left behind: nothing carried along may run."""


def find_tokenizer(directory: Path) -> Path | None:
    """``directory`` if it holds the files of a HF tokenizer, else None."""
    return directory if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, chat template included, into ``target`` (created if missing)."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def token_count(directory: Path) -> int:
    """Embedding rows that the tokenizer needs: its highest token id plus one.

    ``tokenizer.json`` is read as data; a sentencepiece ``tokenizer.model`` through sentencepiece.

    Raises:
        CheckpointError: if the files cannot be read as a tokenizer.
    """
    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            # unigram models list [piece, score] by id; the others map piece -> id
            ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            added = [token["id"] for token in content.get("added_tokens") or []]
            return max([*ids, *added], default=-1) + 1
        from sentencepiece import SentencePieceProcessor

        path = directory / "tokenizer.model"
        count = SentencePieceProcessor(model_file=str(path)).vocab_size()
        added_path = directory / "added_tokens.json"
        if added_path.is_file():
            path = added_path
            count = max([count - 1, *json.loads(path.read_text(encoding="utf-8")).values()]) + 1
        return int(count)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce a token for which there is no embedding row.

    Fewer tokens than rows are fine (many published models pad their vocabulary).

    Raises:
        CheckpointError: naming both sizes.
    """
    count = token_count(directory)
    if count > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has {count} tokens but the embedding has only {vocab_size} rows; "
            f"use the tokenizer that the model was trained with, or extend the embedding first"
        )


def special_ids(directory: Path) -> dict[str, int]:
    """``{"bos_token_id": 1, ...}`` for the special tokens that the tokenizer's configuration names.

    Empty where the files do not say (sentencepiece without a configuration).
    """
    config_path, path = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not (config_path.is_file() and path.is_file()):
        return {}
    try:
        config, content = (json.loads(file.read_text(encoding="utf-8")) for file in (config_path, path))
        numbers = dict(content["model"]["vocab"]) if isinstance(content["model"]["vocab"], dict) else {}
        numbers |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        out = {}
        for kind in ("bos", "eos", "pad"):
            token = config.get(f"{kind}_token")
            token = token["content"] if isinstance(token, dict) else token
            if token in numbers:
                out[f"{kind}_token_id"] = numbers[token]
        return out
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error


def check_same_tokenizer(models: Mapping[str, Path | None]) -> None:
    """Refuse models whose tokenizers differ in the meaning of ids or in special tokens.

    Vocabulary, merges and special tokens are compared, not the files, which differ between releases of ``tokenizers``.
    A model without a tokenizer is skipped.

    Args:
        models: directory of each model's tokenizer, by the name of the model.

    Raises:
        CheckpointError: naming what differs, with examples; or for files that cannot be read as a tokenizer.
    """
    given = {name: directory for name, directory in models.items() if directory is not None}
    if len(given) < 2:
        return
    (first, reference), *others = given.items()
    expected = _meaning(reference)
    for name, directory in others:
        meaning = _meaning(directory)
        if faults := [fault for part in expected if (fault := _difference(part, expected[part], meaning.get(part)))]:
            raise CheckpointError(
                f"{first} ({reference}) and {name} ({directory}) have different tokenizers: {'; '.join(faults)}. Their "
                "token ids do not mean the same, so neither their logits nor their losses can be compared; use models "
                "with one tokenizer"
            )


def _meaning(directory: Path) -> dict[str, dict[Any, Any] | None]:
    """``tokens`` (token -> id), ``merges`` (pair -> rank; None where the files do not say), ``special tokens``."""
    path = directory / "tokenizer.json"
    try:
        if not path.is_file():
            from sentencepiece import SentencePieceProcessor

            path = directory / "tokenizer.model"
            pieces = SentencePieceProcessor(model_file=str(path))
            ids = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
            return {"tokens": ids, "merges": None, "special tokens": _ends(directory)}
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = content.get("added_tokens") or []
        # "a b" in older files, ["a", "b"] in newer ones
        merges = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges") or []
        ]
        return {
            "tokens": vocabulary | {token["content"]: token["id"] for token in added},
            "merges": {merge: rank for rank, merge in enumerate(merges)},
            "special tokens": _ends(directory),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error


def _ends(directory: Path) -> dict[str, int]:
    """The ids that begin and end a text. The padding token is ignored: exporters choose it freely."""
    return {name: number for name, number in special_ids(directory).items() if name != "pad_token_id"}


def _difference(part: str, expected: dict[Any, Any] | None, other: dict[Any, Any] | None) -> str | None:
    """What differs between two tables, with an example."""
    if expected is None or other is None or expected == other:
        return None
    if part == "special tokens":  # a file that does not name one contradicts nothing
        expected, other = ({key: table[key] for key in expected.keys() & other.keys()} for table in (expected, other))
    different = [key for key in {**expected, **other} if expected.get(key) != other.get(key)]
    if not different:
        return None
    example = different[0]
    what = "order" if part == "merges" else "id"
    values = [f"{what} {table[example]}" if example in table else "none" for table in (expected, other)]
    return f"{len(different)} {part} differ ({example!r} has {values[0]} and {values[1]})"
