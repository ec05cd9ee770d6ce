"""The tokenizer of a checkpoint: its files, its number of tokens, and whether it fits the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nemo_minitron.errors import CheckpointError

__all__ = [
    "FILES",
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
