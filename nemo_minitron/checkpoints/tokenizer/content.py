"""What the JSON files of a tokenizer say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.parsing import parse_json

__all__ = [
    "known_class",
    "model_config",
    "read_object",
    "special_by_id",
    "special_tokens",
    "token_ids",
    "write_object",
]

#: Classes that transformers 4 has, so that it need not be asked.
_USUAL = {
    f"{name}Tokenizer{fast}"
    for name in ("CodeLlama", "GPT2", "Gemma", "Llama", "PreTrained", "Qwen2")
    for fast in ("", "Fast")
}
_SPECIAL = ("bos", "eos", "pad")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} cannot be read (it holds no object but {type(content).__name__}); restore the file"
        )
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` beside a tokenizer; empty where there is none."""
    return read_object(directory / "config.json") if (directory / "config.json").is_file() else {}


def special_tokens(directory: Path, config: Mapping[str, Any], files: list[str]) -> dict[str, Any]:
    """``bos_token`` and the others, from where transformers takes them.

    That is ``special_tokens_map.json`` where the configuration lists no added tokens, else the configuration.
    """
    given = {key: value for key, value in config.items() if key.endswith(("_tokens", "_token"))}
    if "special_tokens_map.json" in files and "added_tokens_decoder" not in config:
        given |= read_object(directory / "special_tokens_map.json")
    return {key: value for key, value in given.items() if not key.startswith("add_")}


def special_by_id(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    """Special tokens by the ids that a ``config.json`` gives them."""
    tokens = {number: token for token, number in ids.items()}
    out = {}
    for kind in _SPECIAL:
        number = model.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number in tokens:
            out[f"{kind}_token"] = tokens[number]
    return out


def known_class(name: Any) -> bool:
    """Whether transformers 4 has this class of tokenizers."""
    if not isinstance(name, str) or name in _USUAL:
        return isinstance(name, str)
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    known = {kind for pair in TOKENIZER_MAPPING_NAMES.values() for kind in pair if kind}
    return bool({name, f"{name}Fast"} & known)


def token_ids(path: Path, content: dict[str, Any]) -> dict[str, int]:
    """Token -> id, added tokens among them.

    Args:
        path: of the ``tokenizer.json``, for messages.
        content: of the file.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        vocabulary = content["model"]["vocab"]
        # unigram models list [piece, score] by id; the others map piece -> id
        if not isinstance(vocabulary, dict):
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        if not all(isinstance(number, int) for number in ids.values()):
            raise ValueError("an id is no number")
        return ids
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error
