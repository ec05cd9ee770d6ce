"""The door for tokenizers: a directory's files as files that every stage and transformers 4 and 5 read alike.

Most directories are that already. Where one is not (saved by transformers 5; a vocabulary without ``tokenizer.json``),
a translated copy is made in a temporary directory that lives as long as the process; the files themselves stay as they
are.
"""

from __future__ import annotations

import atexit
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.tokenizer import names
from nemo_minitron.checkpoints.tokenizer.content import (
    known_class,
    model_config,
    read_object,
    special_by_id,
    special_tokens,
    token_ids,
    write_object,
)
from nemo_minitron.checkpoints.tokenizer.conversion import convert_tokenizer
from nemo_minitron.checkpoints.tokenizer.spelling import chat_templates, is_newer, needs_translation, plain_spelling
from nemo_minitron.errors import CheckpointError

__all__ = ["find_tokenizer", "origin"]

#: Translated copies of this process, by what they were made from; and what each was made from.
_copies: dict[tuple[Any, ...], Path] = {}
_origins: dict[Path, Path] = {}


def find_tokenizer(directory: Path) -> Path | None:
    """A directory with the tokenizer of ``directory`` as ``tokenizer.json`` and what goes with it; None without one.

    Args:
        directory: of a checkpoint or of the tokenizer alone.

    Returns:
        ``directory`` itself, if its files are read alike by every reader; else a translated copy.

    Raises:
        CheckpointError: for files that cannot be read, or of a form that no reader here knows, naming them.
    """
    config = read_object(directory / names.CONFIG) if (directory / names.CONFIG).is_file() else {}
    files = names.tokenizer_files(directory, names.named_files(config))
    if not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in names.VOCABULARIES):
        _refuse_foreign(directory, files, config)
        return None
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if name in files:
            read_object(directory / name)
    whole = names.CONTENT in files and names.CONFIG in files
    if whole and not needs_translation(config, files) and known_class(config.get("tokenizer_class")):
        return directory
    key = _key(directory, [*files, "config.json"])
    if key not in _copies:
        copy = Path(tempfile.mkdtemp(prefix="nemo_minitron_tokenizer_"))
        atexit.register(_remove, copy, os.getpid())
        if names.CONTENT in files:
            _translate(directory, copy, config, files)
        else:
            convert_tokenizer(directory, copy, config, files)
        _copies[key], _origins[copy] = copy, directory
    return _copies[key]


def origin(directory: Path) -> Path:
    """The directory that a translated copy was made from, for messages; any other directory itself."""
    return _origins.get(directory, directory)


def _translate(directory: Path, copy: Path, config: dict[str, Any], files: list[str]) -> None:
    content = read_object(directory / names.CONTENT)
    templates = chat_templates(directory, config, files)
    ids = token_ids(directory / names.CONTENT, content)
    if "added_tokens.json" in files:
        for token, number in read_object(directory / "added_tokens.json").items():
            if ids.get(token) != number:
                raise CheckpointError(
                    f"{directory / 'added_tokens.json'} gives {token!r} the id {number}, {names.CONTENT} "
                    f"{ids.get(token, 'none')}; the files are of two tokenizers, remove the wrong one"
                )
    kind = config.get("tokenizer_class")
    if kind is not None and not is_newer(config) and not known_class(kind):
        warn_once(directory, f"tokenizer_class {kind} is not known; {names.CONTENT} is read as it stands")
    special = special_tokens(directory, config, files)
    if names.CONFIG not in files and not special:
        special = special_by_id(model_config(directory), ids)
    for name in files:
        if name not in (names.CONFIG, names.TEMPLATE) and not name.startswith(f"{names.TEMPLATES}/"):
            shutil.copyfile(directory / name, copy / name)
    write_object(copy / names.CONFIG, plain_spelling({**config, **special}, content, templates))


def _refuse_foreign(directory: Path, files: list[str], config: Mapping[str, Any]) -> None:
    entries = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in entries if any(fnmatch.fnmatchcase(name, pattern) for pattern in names.FOREIGN)]
    if foreign:
        raise CheckpointError(
            f"{directory / foreign[0]} is a tokenizer in its maker's own form, and there is no other; save it with a "
            "current transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)), or move the file away to "
            "go on without a tokenizer"
        )
    if files:
        warn_once(directory, f"has no vocabulary beside {', '.join(files)}, so the model is read without a tokenizer")


def _key(directory: Path, files: list[str]) -> tuple[Any, ...]:
    stats = [(name, (directory / name).stat()) for name in files if (directory / name).is_file()]
    return (directory.resolve(), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _remove(copy: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(copy, ignore_errors=True)
