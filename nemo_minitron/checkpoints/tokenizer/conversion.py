"""A vocabulary without ``tokenizer.json`` (sentencepiece, ``vocab.json`` with ``merges.txt``, ...) as one with it.

transformers converts, with the class that the files name; the result is held against the vocabulary that it was made
from.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.tokenizer import names
from nemo_minitron.checkpoints.tokenizer.content import (
    known_class,
    model_config,
    read_object,
    special_by_id,
    special_tokens,
    write_object,
)
from nemo_minitron.checkpoints.tokenizer.spelling import chat_templates, plain_spelling
from nemo_minitron.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["convert_tokenizer"]

#: Texts that a sentencepiece model and what was made of it must encode alike.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "a  b   c",
    " leading and trailing ",
    "tabs\tand\nlines\n\nof text",
    "1234567890, 3.14 and -2",
    "naïve café Œuvre ﬁne №5",
    "Привет, мир! 你好，世界。 こんにちは",
    "\U0001f600 \U0001f469‍\U0001f52c é",
    "def f(x):\n    return x ** 2  # squared",
)
_REMEDY = "save it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) and use what that wrote"


def convert_tokenizer(directory: Path, target: Path, config: Mapping[str, Any], files: list[str]) -> None:
    """Write the tokenizer's files into ``target``, with the ``tokenizer.json`` that transformers makes of them.

    The class is that of ``tokenizer_config.json``, else of ``config.json``, else, by the model's type, one that reads
    these files. Where nothing says it, a sentencepiece model is read as Llama's, and ``vocab.json`` with ``merges.txt``
    as GPT-2's.

    Args:
        directory: of the files.
        target: an empty directory.
        config: of ``tokenizer_config.json``.
        files: names of the tokenizer's files.

    Raises:
        CheckpointError: for files that transformers cannot convert, or converts to another tokenizer.
    """
    model = model_config(directory)
    name, said = _class_name(directory, config, model, files)
    vocabulary, path = _vocabulary(directory, files)
    added = read_object(directory / "added_tokens.json") if "added_tokens.json" in files else {}
    ids = vocabulary | added
    with tempfile.TemporaryDirectory() as scratch:
        for file in files:
            if not file.startswith(names.TEMPLATES):
                shutil.copyfile(directory / file, Path(scratch) / file)
        given = {**config, **special_tokens(directory, config, files)}
        if isinstance(extra := given.get("extra_special_tokens"), list):
            del given["extra_special_tokens"]
            given["additional_special_tokens"] = [*(given.get("additional_special_tokens") or []), *extra]
        if not said:
            # the class's own defaults are tokens of another vocabulary
            given = {**_nothing_special(directory, files), **special_by_id(model, ids), **given}
        if added and "added_tokens_decoder" not in given:
            given["added_tokens_decoder"] = _added(added, given)
        given.pop("auto_map", None)
        write_object(Path(scratch) / names.CONFIG, {**given, "tokenizer_class": name})
        tokenizer = _load(directory, Path(scratch), name)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    _check(directory, path, tokenizer, ids)
    if path is not None and path.name in names.SENTENCEPIECE:
        _check_pieces(path, tokenizer, added)
    for file in files:
        if file not in (names.CONFIG, names.TEMPLATE) and not file.startswith(f"{names.TEMPLATES}/"):
            shutil.copyfile(directory / file, target / file)
    (target / names.CONTENT).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if value}
    templates = chat_templates(directory, config, files)
    write_object(target / names.CONFIG, plain_spelling({**given, **settings, **special}, content, templates))


def _class_name(
    directory: Path, config: Mapping[str, Any], model: Mapping[str, Any], files: list[str]
) -> tuple[str, bool]:
    """The class of the tokenizer, and whether the files say it."""
    for key, content in ((names.CONFIG, config), ("config.json", model)):
        named = content.get("tokenizer_class")
        if isinstance(named, str) and known_class(named) and not named.startswith("PreTrained"):
            return named, True
        if named is not None:
            warn_once(directory, f"{key}: tokenizer_class {named} cannot read {', '.join(files)}")
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    for name in TOKENIZER_MAPPING_NAMES.get(str(model.get("model_type")), ()):
        needed = _needed(tokenizer_class_from_name(name)) if name else ()
        if needed and set(needed) <= set(files):
            assert name is not None
            return name, True
    if any(name in files for name in names.SENTENCEPIECE):
        return "LlamaTokenizer", False
    if {"vocab.json", "merges.txt"} <= set(files):
        return "GPT2Tokenizer", False
    raise CheckpointError(
        f"{directory}: {', '.join(files)} do not say what kind of tokenizer they are; name its tokenizer_class in "
        f"{names.CONFIG}, or {_REMEDY}"
    )


def _needed(kind: Any) -> list[str]:
    """The vocabulary files that a class of transformers reads."""
    return [name for key, name in getattr(kind, "vocab_files_names", {}).items() if key != "tokenizer_file"]


def _nothing_special(directory: Path, files: list[str]) -> dict[str, Any]:
    """The special tokens of a vocabulary that no configuration names: a sentencepiece model's own, GPT-2's, or none."""
    sentencepiece = next((name for name in names.SENTENCEPIECE if name in files), None)
    if sentencepiece is None:
        known = read_object(directory / "vocab.json") if "vocab.json" in files else {}
        end = "<|endoftext|>" if "<|endoftext|>" in known else None
        return {"bos_token": end, "eos_token": end, "unk_token": end}
    pieces = _sentencepiece(directory / sentencepiece)
    numbers = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id(), "pad": pieces.pad_id()}
    special = {f"{kind}_token": pieces.id_to_piece(number) for kind, number in numbers.items() if number >= 0}
    if "bos_token" not in special:
        special |= {"bos_token": None, "add_bos_token": False}
    return {"eos_token": None, **special}


def _added(added: Mapping[str, int], given: Mapping[str, Any]) -> dict[str, Any]:
    """``added_tokens.json`` as ``added_tokens_decoder``, as transformers reads it."""
    special = {str(token["content"] if isinstance(token, dict) else token) for token in _flat(given)}
    return {
        str(number): {
            "content": token,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": token not in special,
            "special": token in special,
        }
        for token, number in added.items()
    }


def _flat(given: Mapping[str, Any]) -> list[Any]:
    values = [value for key, value in given.items() if key.endswith("_token") and isinstance(value, str | dict)]
    return [*values, *(given.get("additional_special_tokens") or [])]


def _load(directory: Path, scratch: Path, name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    # It warns of its older behaviour, which is what is wanted, and of slow conversions.
    loggers = [logging.getLogger("transformers"), logging.getLogger("transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        tokenizer = AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, sentencepiece and tokenizers raise what they please on damaged files
        raise CheckpointError(
            f"{directory}: transformers cannot read the tokenizer as {name} ({type(error).__name__}: "
            f"{first_line(error)}); restore the files, or {_REMEDY}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{directory}: {name} has no form as tokenizer.json; {_REMEDY}")
    return tokenizer  # type: ignore[no-any-return]


def _vocabulary(directory: Path, files: list[str]) -> tuple[dict[str, int], Path | None]:
    """Token -> id as the files have it, and the file; empty for a form that is not read here."""
    for name in names.SENTENCEPIECE:
        if name in files:
            pieces = _sentencepiece(directory / name)
            return {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}, directory / name
    if "vocab.json" in files:
        path = directory / "vocab.json"
        ids = read_object(path)
        if not all(isinstance(number, int) for number in ids.values()):
            raise CheckpointError(f"{path} is no table of tokens and their ids; restore the file")
        return ids, path
    if "vocab.txt" in files:
        path = directory / "vocab.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); restore the file") from error
        return {token: number for number, token in enumerate(lines)}, path
    return {}, None


def _sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer ({error}); restore the file, or {_REMEDY}"
        ) from error


def _check(directory: Path, path: Path | None, tokenizer: PreTrainedTokenizerFast, ids: Mapping[str, int]) -> None:
    """Refuse a conversion that gives a token of the files another id, or makes up tokens."""
    made = tokenizer.get_vocab()
    moved = [token for token, number in ids.items() if made.get(token) != number]
    if path is not None and moved:
        raise CheckpointError(
            f"{path}: transformers gives {len(moved)} tokens other ids than the file, such as {moved[0]!r} "
            f"({ids[moved[0]]}, converted {made.get(moved[0], 'none')}); {_REMEDY}"
        )
    more = [token for token in made if token not in ids]
    if path is not None and more:
        warn_once(directory, f"the tokenizer's class adds {', '.join(map(repr, more[:5]))} to the files' vocabulary")


def _check_pieces(path: Path, tokenizer: PreTrainedTokenizerFast, added: Mapping[str, int]) -> None:
    """Warn where sentencepiece itself encodes a text otherwise."""
    encode: Callable[[str], list[int]] = _sentencepiece(path).encode
    probes = [text for text in PROBES if not any(token in text for token in added)]
    other = [text for text in probes if tokenizer(text, add_special_tokens=False)["input_ids"] != encode(text)]
    if other:
        warn_once(
            path, f"transformers encodes {len(other)} of {len(probes)} texts otherwise than sentencepiece, {other[0]!r}"
        )
