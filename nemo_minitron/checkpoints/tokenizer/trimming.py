"""Trim a vocabulary: choose the tokens that stay, and write the tokenizer with only those.

Token ids are renumbered in their old order, so the new id of a kept token is its position among the kept ids. A text
whose tokens are all kept is tokenised as before, renumbered; any other text falls back on shorter tokens, down to the
bytes. Tokenizers are read and written as the JSON of the ``tokenizers`` library; no code of a checkpoint runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.tokenizer.content import read_object
from nemo_minitron.checkpoints.tokenizer.files import copy_tokenizer
from nemo_minitron.checkpoints.tokenizer.names import CONFIG, CONTENT, TEMPLATE, TEMPLATES, named_files, tokenizer_files
from nemo_minitron.checkpoints.tokenizer.spelling import PLAIN_CLASS
from nemo_minitron.errors import CheckpointError, DataError, ShapeError
from nemo_minitron.parsing import parse_json

__all__ = [
    "FREQUENCIES",
    "TokenFrequencies",
    "choose_vocabulary",
    "frequencies_path",
    "read_frequencies",
    "renumber",
    "tokenizer_fingerprint",
    "trim_tokenizer",
    "write_frequencies",
]

FREQUENCIES = "frequencies.tsv"
"""The file that ``minitron tokens`` writes into its output."""
KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TEXT_PARTS = ("normalizer", "pre_tokenizer", "decoder")
#: What stays of a tokenizer's files: the others describe the full vocabulary, and would contradict the trimmed one.
_KEPT = (CONTENT, CONFIG, "special_tokens_map.json", TEMPLATE, "chat_template.json")

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_TOKENIZER = "# tokenizer: "


@dataclass(frozen=True)
class TokenFrequencies:
    """How often each token occurs in a text.

    Attributes:
        counts: by token id; a token that is not listed has 0.
        tokenizer: :func:`tokenizer_fingerprint` of the tokenizer that counted; None if the list does not state it.
        source: path of the list, for messages.
    """

    counts: Mapping[int, int]
    tokenizer: str | None = None
    source: str = "the token frequencies"


def tokenizer_fingerprint(tokenizer: Path) -> str:
    """A hash of 16 hexadecimal digits, equal for tokenizers that give the same ids to the same tokens.

    Raises:
        CheckpointError: for a tokenizer that is not supported.
    """
    ids = sorted(_ids(_read(tokenizer)).items())
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def frequencies_path(given: str | Path) -> Path:
    """The path of the list, given itself or as the output directory of ``minitron tokens``."""
    given = Path(given)
    return given / FREQUENCIES if given.is_dir() else given


def read_frequencies(path: Path) -> TokenFrequencies:
    """A text file with one ``id<TAB>count`` a line; lines that begin with ``#`` are remarks.

    Raises:
        DataError: naming the file and the line.
    """
    counts: dict[int, int] = {}
    tokenizer = None
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith(_TOKENIZER):
                tokenizer = line.removeprefix(_TOKENIZER).strip()
            if not line.strip() or line.startswith("#"):
                continue
            parts = line.split()
            if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
                raise DataError(f"{path}, line {number}: {line[:80]!r} is not a token id and a count")
            if int(parts[0]) in counts:
                raise DataError(f"{path}, line {number}: token {parts[0]} is counted twice")
            counts[int(parts[0])] = int(parts[1])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `minitron tokens`") from None
    if not counts:
        raise DataError(f"{path}: counts no tokens; run `minitron tokens`")
    return TokenFrequencies(counts, tokenizer, str(path))


def write_frequencies(counts: Sequence[int], path: Path, *, tokenizer: Path, comment: str) -> None:
    """Write the counts of all tokens that occur, the most frequent first. ``counts[i]`` is that of token ``i``.

    Raises:
        CheckpointError: for a tokenizer that cannot be trimmed.
    """
    order = sorted((token for token, count in enumerate(counts) if count), key=lambda token: (-counts[token], token))
    lines = [f"# {comment}", _TOKENIZER + tokenizer_fingerprint(tokenizer)]
    lines += [f"{token}\t{counts[token]}" for token in order]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def choose_vocabulary(
    tokenizer: Path, frequencies: TokenFrequencies, size: int, *, vocab_size: int, special: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ``size`` token ids that stay, ascending.

    Always kept: added tokens (special ones, chat markers), the unknown token, and the alphabet that every text can be
    written with: of bytes, or of the single characters where the tokenizer knows no bytes. Then the most frequent
    tokens, each with the shorter tokens that it is merged from, which it could not be reached without; equal counts:
    the lower id first.

    Args:
        tokenizer: directory with ``tokenizer.json``.
        frequencies: of the tokens of a text.
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
    remedy = "count the tokens with the model's own tokenizer (`minitron tokens`)"
    strangers = [index for index in frequencies.counts if index >= vocab_size]
    if frequencies.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
        raise DataError(f"{frequencies.source}: was counted with another tokenizer than that of the model; {remedy}")
    if strangers:
        raise DataError(f"{frequencies.source}: names token {strangers[0]}, the model has {vocab_size}; {remedy}")
    kept = _required(content, ids) | set(special)
    tokens = kept | set(ids.values())
    if not len(kept) <= size <= len(tokens):
        raise ShapeError(
            f"vocabulary.size={size}: must lie between {len(kept)} (special tokens and the alphabet that every text "
            f"can be written with) and {len(tokens)} (the tokenizer's tokens)"
        )
    parents = _parents(content, ids)
    order = sorted(tokens, key=lambda token: (-frequencies.counts.get(token, 0), token))
    # A token whose parts do not fit any more is passed over. The shortest of those left has all its parts among the
    # kept ones, so every pass adds something.
    while len(kept) < size:
        for token in order:
            wanted = {token, *parents.get(token, ())} - kept
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
    if content.get("padding"):
        content["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    copy_tokenizer(source, target)
    for name in tokenizer_files(target, named_files(_config(source))):
        if name not in _KEPT and not name.startswith(f"{TEMPLATES}/"):
            (target / name).unlink()
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if config := _config(source):
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(new[int(old)]): token for old, token in config["added_tokens_decoder"].items() if int(old) in new
            }
        # What reads tokenizer.json whatever class the full tokenizer came with.
        config["tokenizer_class"] = PLAIN_CLASS
        for name in ("vocab_file", "merges_file", "auto_map"):
            config.pop(name, None)
        (target / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def renumber(architecture: Architecture, kept: Sequence[int]) -> Architecture:
    """The constants of the trimmed model, with the new ids of its special tokens.

    Raises:
        ShapeError: if a special token is not kept.
    """
    new = {old: index for index, old in enumerate(kept)}

    def renumbered(name: str, value: Any) -> Any:
        try:
            return [new[token] for token in value] if isinstance(value, list) else None if value is None else new[value]
        except KeyError as error:
            raise ShapeError(f"{name}={value}: token {error} is not among the kept tokens; keep it") from None

    generation: dict[str, Any] = {}
    for key, value in architecture.generation.items():
        if key.endswith("_token_id"):
            generation[key] = renumbered(key, value)
        elif key in ("suppress_tokens", "begin_suppress_tokens") and value:
            generation[key] = [new[token] for token in value if token in new]
        elif key == "bad_words_ids" and value:
            generation[key] = [[new[token] for token in word] for word in value if new.keys() >= set(word)]
        elif key in ("forced_decoder_ids", "sequence_bias") and value:
            raise ShapeError(f"{key} of generation_config.json names tokens by their ids in another form; remove it")
        else:
            generation[key] = value
    ids = {name: renumbered(name, getattr(architecture, name)) for name in _IDS}
    return dataclasses.replace(architecture, generation=generation, **ids)


def _config(directory: Path) -> dict[str, Any]:
    return read_object(directory / CONFIG) if (directory / CONFIG).is_file() else {}


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no tokenizer.json; "
            "convert the tokenizer once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
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
    ids = (
        dict(vocabulary)
        if isinstance(vocabulary, dict)
        else {piece: index for index, (piece, _) in enumerate(vocabulary)}
    )
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _required(content: dict[str, Any], ids: Mapping[str, int]) -> set[int]:
    model = content["model"]
    required = {token["id"] for token in content.get("added_tokens") or []} | _mentioned(content.get("post_processor"))
    required |= {ids[token] for token in (model.get("unk_token"),) if token in ids}
    required |= {index for index in (model.get("unk_id"),) if index is not None}
    if content.get("padding"):
        required.add(content["padding"]["pad_id"])
    if model["type"] == "Unigram":
        # An unknown character costs ten more than the least likely piece: that stays, or segmentations would change.
        required.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
    alphabet = _byte_alphabet() if _uses_bytes(content) else set()
    spelled = not alphabet and not model.get("byte_fallback") and model["type"] != "WordLevel"
    # Spelled in bytes, the mark of a space would come back as the mark: text is restored before bytes are.
    spaces = json.dumps([content.get(name) for name in _TEXT_PARTS], ensure_ascii=False)
    marks = [model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""]
    for token, index in ids.items():
        single = len(token.removeprefix(marks[0]).removesuffix(marks[1])) == 1
        stands_for_space = single and not token.isascii() and token in spaces
        if token in alphabet or _BYTE.fullmatch(token) or (spelled and single) or stands_for_space:
            required.add(index)
    return required


def _uses_bytes(content: dict[str, Any]) -> bool:
    """Whether text is turned into characters that stand for bytes before it is looked up."""
    return '"ByteLevel"' in json.dumps([content.get(name) for name in _TEXT_PARTS[:2]])


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


def _symbols(token: str, model: dict[str, Any]) -> list[str]:
    """The symbols that byte-pair encoding starts from: single characters, marked inside and at the end of words if the
    tokenizer does that.
    """
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    parts = list(token.removeprefix(prefix).removesuffix(suffix))
    parts = [prefix + part if inside or place else part for place, part in enumerate(parts)]
    return [*parts[:-1], parts[-1] + suffix] if ends and parts else parts


def _parents(content: dict[str, Any], ids: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Token -> every token that byte-pair encoding passes through when it builds it from single characters.

    The merges inside a token happen in the same order in any text. So with these kept, a text whose tokens are all kept
    is encoded as before.
    """
    model = content["model"]
    if model["type"] != "BPE":
        return {}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    parents = {}
    for token, index in model["vocab"].items():
        parts = _symbols(token, model)
        passed = list(parts)
        while len(parts) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break  # not built by merges: a whole word that is looked up, or an added token
            parts[place : place + 2] = [_joined(parts[place : place + 2], model)]
            passed.append(parts[place])
        parents[index] = tuple({ids[part] for part in passed if part in ids} - {index})
    return parents


def _mentioned(part: Any) -> set[int]:
    """Ids inside a post-processor."""
    ids: set[int] = set()
    _renumbered(part, _Seen(ids))
    return ids


class _Seen(dict[int, int]):
    """A mapping that returns each id unchanged and records it."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__()
        self._found = ids

    def __missing__(self, index: int) -> int:
        self._found.add(index)
        return index


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """Ids inside a post-processor: ``ids`` of templates, ``[token, id]`` of BERT's ``sep`` and ``cls``."""
    if isinstance(part, list):
        return [_renumbered(item, new) for item in part]
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
