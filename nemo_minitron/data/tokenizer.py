"""The tokenizer that a checkpoint carries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode", "load_tokenizer", "tokenizer_fingerprint"]

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_BATCH = 64  # texts tokenised at once


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


def tokenizer_fingerprint(directory: str | Path) -> str:
    """sha256 over the tokenizer's files."""
    digest = hashlib.sha256()
    for name in _FILES:
        path = Path(directory, name)
        if path.is_file():
            digest.update(f"{name}:{path.stat().st_size}:".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def encode(tokenizer: Any, texts: Sequence[str], *, vocab_size: int | None) -> Iterator[list[int]]:
    """Token ids of each text: the tokenizer's own special tokens (a BOS, if it adds one), the text, one EOS.

    Args:
        tokenizer: as :func:`load_tokenizer` gives it.
        texts: documents.
        vocab_size: rows of the model's embedding (without padding); None leaves ids unchecked.

    Raises:
        DataError: where the tokenizer has no EOS, or gives an id that the model has no embedding for.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer names no end-of-text token, which separates documents; "
            "set eos_token in its tokenizer_config.json"
        )
    for start in range(0, len(texts), _BATCH):
        encoded = tokenizer(
            list(texts[start : start + _BATCH]),
            verbose=False,
            return_attention_mask=False,
        )["input_ids"]
        for ids in encoded:
            if not ids or ids[-1] != end:
                ids = [*ids, end]
            if vocab_size is not None and (highest := max(ids)) >= vocab_size:
                raise DataError(
                    f"{tokenizer.name_or_path}: {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, "
                    f"the model's vocabulary only {vocab_size} entries; use the tokenizer that belongs to the model"
                )
            yield ids
