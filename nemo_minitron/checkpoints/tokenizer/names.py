"""The names of a tokenizer's files: what is carried along, and what a tokenizer can be read from."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = [
    "CONFIG",
    "CONTENT",
    "FOREIGN",
    "PATTERNS",
    "SENTENCEPIECE",
    "TEMPLATE",
    "TEMPLATES",
    "is_tokenizer_file",
    "named_files",
    "tokenizer_files",
]

CONTENT = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
#: Files that a tokenizer can be read from, as shell patterns.
VOCABULARIES = (CONTENT, *SENTENCEPIECE, "vocab.json", "vocab.txt", "*.tiktoken", "tiktoken.model")
#: Files of a tokenizer, as shell patterns. Code is left behind: nothing that is carried along may run.
PATTERNS = (
    *VOCABULARIES,
    CONFIG,
    "tokenizer.*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
)
#: Forms of a tokenizer that its maker's own library reads, as shell patterns.
FOREIGN = ("tekken.json", "tekken_*.json", "tokenizer.model.v*", "tokenizer.mm.model*")
_CODE = (".py", ".pyc", ".so", ".sh", ".pkl", ".pickle")


def is_tokenizer_file(name: str) -> bool:
    """Whether a path inside a directory is that of a tokenizer's file."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def named_files(config: Mapping[str, Any]) -> list[str]:
    """Files that a ``tokenizer_config.json`` names (``vocab_file`` and the like): plain names, no code."""
    values = [value for key, value in config.items() if key.endswith("_file") and isinstance(value, str)]
    return [
        value
        for value in values
        if value and PurePosixPath(value).name == value and not value.startswith(".") and not value.endswith(_CODE)
    ]


def tokenizer_files(directory: Path, named: Iterable[str] = ()) -> list[str]:
    """The tokenizer's files in a directory, by their paths inside.

    Args:
        directory: which need not exist.
        named: names of files beyond :data:`PATTERNS`.
    """
    folder = directory / TEMPLATES
    inside = [*_names(directory), *(f"{TEMPLATES}/{name}" for name in (_names(folder) if folder.is_dir() else ()))]
    named = set(named)
    return [name for name in inside if (is_tokenizer_file(name) or name in named) and (directory / name).is_file()]


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
