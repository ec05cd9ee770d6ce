"""The tokenizer that a checkpoint carries."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "tokenizer_files_digest"]

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def load_tokenizer(directory: str | Path | None) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in a directory. Nothing is downloaded and no code of the directory runs.

    Raises:
        DataError: where there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if directory is None:
        raise DataError("the checkpoint carries no tokenizer; import the model from a source that has one")
    path = Path(directory)
    if not any((path / name).is_file() for name in _FILES[:3]):
        raise DataError(f"{path}: no tokenizer there ({', '.join(_FILES[:3])}); name a directory that holds one")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they please on damaged files.
        raise DataError(f"{path}: the tokenizer cannot be read ({type(error).__name__}: {error})") from None


def tokenizer_files_digest(directory: str | Path) -> str:
    """sha256 over the tokenizer's files, as a cache key. Equal tokenizers may have different digests."""
    digest = hashlib.sha256()
    for name in _FILES:
        path = Path(directory, name)
        if path.is_file():
            digest.update(f"{name}:{path.stat().st_size}:".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
