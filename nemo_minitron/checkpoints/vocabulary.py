"""Trimming a vocabulary: which tokens stay, and the tokenizer that knows only those.

Token ids are renumbered in their old order, so a kept token's new id is its place among the kept ids. A text whose
tokens are all kept is tokenised as before, renumbered; any other text falls back on shorter tokens, down to the bytes.
Tokenizers are read and written as the JSON of the ``tokenizers`` library; no code of a checkpoint runs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer import copy_tokenizer
from nemo_minitron.errors import CheckpointError, DataError, ShapeError
from nemo_minitron.shape import Architecture

__all__ = [
    "choose_vocabulary",
    "read_frequencies",
    "renumber",
    "trim_tokenizer",
    "vocabulary_faults",
    "write_frequencies",
]

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: What else describes the full vocabulary, and would contradict the trimmed one.
_STALE = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def read_frequencies(path: Path) -> dict[int, int]:
    """``token id -> count`` out of a text file with one ``id<TAB>count`` a line.

    Raises:
        DataError: naming the file and the line.
    """
    found: dict[int, int] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            parts = line.split()
            if len(parts) != 2 or not all(part.isdigit() for part in parts):
                raise DataError(f"{path}, line {number}: {line!r} is not a token id and a count")
            if int(parts[0]) in found:
                raise DataError(f"{path}, line {number}: token {parts[0]} is counted twice")
            found[int(parts[0])] = int(parts[1])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `minitron tokens`") from None
    if not found:
        raise DataError(f"{path}: counts no tokens; run `minitron tokens`")
    return found


def write_frequencies(counts: Sequence[int], path: Path, *, comment: str) -> None:
    """Write the counts of all tokens that occur, the most frequent first. ``counts[i]`` is that of token ``i``."""
    order = sorted((token for token, count in enumerate(counts) if count), key=lambda token: (-counts[token], token))
    lines = [f"# {comment}", *(f"{token}\t{counts[token]}" for token in order)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def choose_vocabulary(
    tokenizer: Path, frequencies: Mapping[int, int], size: int, *, vocab_size: int, special: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ``size`` token ids that stay, ascending.

    Always kept: added tokens (special ones, chat markers), the unknown token, and the alphabet of bytes, so that every
    text can still be written. Then the most frequent tokens, each with the shorter tokens that it is merged from, which
    it could not be reached without; equal counts: the lower id first.

    Args:
        tokenizer: directory with ``tokenizer.json``.
        frequencies: counts by token id; what is not in it counts as 0.
        size: tokens to keep.
        vocab_size: rows of the model's embedding.
        special: further ids to keep (the model's bos, eos, pad).

    Raises:
        CheckpointError: for a tokenizer that is not supported.
        DataError: for frequencies of another tokenizer.
        ShapeError: if ``size`` is below what must be kept, or above the tokens that there are.
    """
    content = _read(tokenizer)
    ids = _ids(content)
    tokens = {index: token for token, index in ids.items()}
    if strangers := [index for index in frequencies if index >= vocab_size]:
        raise DataError(
            f"the token frequencies name token {strangers[0]}, the model has {vocab_size}; count the tokens with the "
            "model's own tokenizer (`minitron tokens`)"
        )
    kept = _required(content, ids) | set(special)
    if not len(kept) <= size <= len(tokens):
        raise ShapeError(
            f"vocab_size={size}: must lie between {len(kept)} (special tokens and the alphabet of bytes) and "
            f"{len(tokens)} (the tokenizer's)"
        )
    parents = _parents(content, ids)
    for token in sorted(tokens, key=lambda token: (-frequencies.get(token, 0), token)):
        if len(kept) == size:
            break
        wanted = _closure(token, parents) - kept
        if len(kept) + len(wanted) <= size:
            kept |= wanted
    return tuple(sorted(kept))


def trim_tokenizer(source: Path, kept: Sequence[int], target: Path) -> None:
    """Write the tokenizer in ``source`` with the kept tokens alone, renumbered, into the directory ``target``.

    Raises:
        CheckpointError: for a tokenizer that is not supported.
    """
    content = _read(source)
    new = {old: index for index, old in enumerate(kept)}
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    if model["type"] == "BPE":
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in model["vocab"] for part in (*_pair(merge), _joined(merge, model)))
        ]
    content["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in content.get("added_tokens") or [] if token["id"] in new
    ]
    content["post_processor"] = _renumbered(content.get("post_processor"), new)
    copy_tokenizer(source, target)
    for name in _STALE:
        (target / name).unlink(missing_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config_path = target / "tokenizer_config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(new[int(old)]): token for old, token in config["added_tokens_decoder"].items() if int(old) in new
            }
        # What reads tokenizer.json whatever class the full tokenizer came with.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in ("vocab_file", "merges_file", "auto_map"):
            config.pop(name, None)
        config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def vocabulary_faults(tokenizer: Path) -> list[str]:
    """Why the tokenizer cannot be trimmed; empty if it can."""
    try:
        _read(tokenizer)
    except CheckpointError as error:
        return [str(error)]
    return []


def renumber(architecture: Architecture, kept: Sequence[int]) -> Architecture:
    """The constants of the model that is left: the ids of its special tokens.

    Raises:
        ShapeError: if one of them is not kept.
    """
    new = {old: index for index, old in enumerate(kept)}

    def renumbered(name: str) -> Any:
        value = getattr(architecture, name)
        try:
            return [new[one] for one in value] if isinstance(value, list) else None if value is None else new[value]
        except KeyError as error:
            raise ShapeError(f"{name}={value}: token {error} is not among the kept tokens; keep it") from None

    return dataclasses.replace(
        architecture, **{name: renumbered(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no tokenizer.json; "
            "convert the tokenizer once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = content["model"]["type"]
        content["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); restore the file") from error
    if kind not in KINDS:
        raise CheckpointError(f"{path}: a tokenizer of type {kind} cannot be trimmed; supported: {', '.join(KINDS)}")
    return content


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id, of the model and of the added tokens."""
    vocabulary = content["model"]["vocab"]
    found = (
        dict(vocabulary)
        if isinstance(vocabulary, dict)
        else {piece: index for index, (piece, _) in enumerate(vocabulary)}
    )
    return found | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _required(content: dict[str, Any], ids: Mapping[str, int]) -> set[int]:
    model = content["model"]
    found = {token["id"] for token in content.get("added_tokens") or []}
    if model.get("unk_token") in ids:
        found.add(ids[model["unk_token"]])
    if model.get("unk_id") is not None:
        found.add(model["unk_id"])
    alphabet = _byte_alphabet() if _uses_bytes(content) else set()
    for token, index in ids.items():
        if token in alphabet or _BYTE.fullmatch(token):
            found.add(index)
        elif not alphabet and model["type"] in ("BPE", "WordPiece") and len(token.removeprefix("##")) == 1:
            # Without bytes to fall back on, the single characters are the alphabet.
            found.add(index)
    return found


def _uses_bytes(content: dict[str, Any]) -> bool:
    """Whether text is turned into characters that stand for bytes before it is looked up."""
    return '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))


def _byte_alphabet() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _pair(merge: Any) -> tuple[str, str]:
    """A merge is ``"a b"`` in older files, ``["a", "b"]`` in newer ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _joined(merge: Any, model: dict[str, Any]) -> str:
    left, right = _pair(merge)
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _parents(content: dict[str, Any], ids: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Token -> every token that byte-pair encoding passes through when it builds it from single characters.

    Merges inside of a token happen in their order whatever stands around it, so with these kept, a text whose tokens
    are all kept is built as before.
    """
    model = content["model"]
    if model["type"] != "BPE":
        return {}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    found = {}
    for token, index in model["vocab"].items():
        parts, passed = list(token), []
        while len(parts) > 1:
            pairs = [(ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts))]
            rank, place = min(pairs)
            if rank == len(ranks):
                break  # not built by merges: a whole word that is looked up, or an added token
            joined = parts[place] + parts[place + 1]
            passed += [parts[place], parts[place + 1], joined]
            parts[place : place + 2] = [joined]
        found[index] = tuple({ids[part] for part in passed if part in ids} - {index})
    return found


def _closure(token: int, parents: Mapping[int, tuple[int, ...]]) -> set[int]:
    return {token, *parents.get(token, ())}


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """Ids inside a post-processor: ``ids`` of templates, ``[token, id]`` of BERT's ``sep`` and ``cls``."""
    if isinstance(part, list):
        return [_renumbered(one, new) for one in part]
    if not isinstance(part, dict):
        return part
    out = {}
    for key, value in part.items():
        if key == "ids" and isinstance(value, list):
            out[key] = [new[old] for old in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            out[key] = [value[0], new[value[1]]]
        else:
            out[key] = _renumbered(value, new)
    return out
