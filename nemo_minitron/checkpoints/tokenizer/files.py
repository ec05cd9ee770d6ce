"""The tokenizer of a checkpoint: its files, its number of tokens, and whether it fits the model.

Every directory here is one that :func:`~nemo_minitron.checkpoints.tokenizer.opening.find_tokenizer` gave: it holds a
``tokenizer.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer import names
from nemo_minitron.checkpoints.tokenizer.content import read_object, special_tokens, token_ids
from nemo_minitron.checkpoints.tokenizer.opening import find_tokenizer, origin
from nemo_minitron.errors import CheckpointError

__all__ = [
    "check_same_tokenizer",
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
                f"{first} ({origin(reference)}) and {name} ({origin(directory)}) have different tokenizers: "
                f"{'; '.join(faults)}. Their token ids do not mean the same, so neither their logits nor their losses "
                "can be compared; use models with one tokenizer"
            )


def _meaning(directory: Path) -> dict[str, dict[Any, Any] | None]:
    """``tokens`` (token -> id), ``merges`` (pair -> rank; None where the files do not say), ``special tokens``."""
    ids, content = _read(directory)
    if any((origin(directory) / name).is_file() for name in names.SENTENCEPIECE) and origin(directory) != directory:
        return {"tokens": ids, "merges": None, "special tokens": _ends(directory)}
    # "a b" in older files, ["a", "b"] in newer ones
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges") or []]
    return {
        "tokens": ids,
        "merges": {merge: rank for rank, merge in enumerate(merges)},
        "special tokens": _ends(directory),
    }


def _read(directory: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Token -> id, added tokens among them, and the content of ``tokenizer.json``."""
    content = read_object(directory / names.CONTENT)
    return token_ids(directory / names.CONTENT, content), content


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
