"""The tokenizer of a checkpoint: its files, its number of tokens, and whether it fits the model.

Every directory here is one that :func:`~nemo_minitron.checkpoints.tokenizer.opening.find_tokenizer` gave: it holds a
``tokenizer.json``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer import names
from nemo_minitron.checkpoints.tokenizer.content import read_object, special_tokens, token_ids
from nemo_minitron.checkpoints.tokenizer.opening import find_tokenizer, origin
from nemo_minitron.errors import CheckpointError

__all__ = [
    "check_tokenizer",
    "copy_tokenizer",
    "find_tokenizer",
    "special_ids",
    "token_count",
]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, chat templates included, into ``target`` (created if missing)."""
    target.mkdir(parents=True, exist_ok=True)
    config = read_object(source / names.CONFIG) if (source / names.CONFIG).is_file() else {}
    for name in names.tokenizer_files(source, names.named_files(config)):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def token_count(directory: Path) -> int:
    """Embedding rows that the tokenizer needs: its highest token id plus one.

    Raises:
        CheckpointError: if the files cannot be read as a tokenizer.
    """
    ids, _ = _read(directory)
    return max(ids.values(), default=-1) + 1


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce a token for which there is no embedding row.

    Fewer tokens than rows are fine (many published models pad their vocabulary).

    Raises:
        CheckpointError: naming both sizes.
    """
    count = token_count(directory)
    if count > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {origin(directory)} has {count} tokens but the embedding has only {vocab_size} rows; "
            f"use the tokenizer that the model was trained with, or extend the embedding first"
        )


def special_ids(directory: Path) -> dict[str, int]:
    """``{"bos_token_id": 1, ...}`` for the special tokens that the tokenizer's configuration names."""
    config_path = directory / names.CONFIG
    if not config_path.is_file():
        return {}
    ids, _ = _read(directory)
    given, out = special_tokens(directory, read_object(config_path), names.tokenizer_files(directory)), {}
    for kind in ("bos", "eos", "pad"):
        token = given.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            out[f"{kind}_token_id"] = ids[token]
    return out


def _read(directory: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Token -> id, added tokens among them, and the content of ``tokenizer.json``."""
    content = read_object(directory / names.CONTENT)
    return token_ids(directory / names.CONTENT, content), content
