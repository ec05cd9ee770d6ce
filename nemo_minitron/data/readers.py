"""Files of text, tables and datasets as documents, streamed.

Plain text is a file that is named so; everything else goes through the reader of records
(:mod:`nemo_minitron.data.records`). Memory: a line of a text file, and what that reader takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.data.bad_records import shown
from nemo_minitron.data.containers import JSON_KINDS, KNOWN, TEXT_NAMES, look, opened, says_json, says_text
from nemo_minitron.data.json_records import text_lines
from nemo_minitron.data.records import Records, parse_all, records_of
from nemo_minitron.errors import DataError

__all__ = ["SECTION_CHARACTERS", "Document", "documents_of", "lines_of", "read_documents", "sections"]

SECTION_CHARACTERS = 8192


class Document(NamedTuple):
    """One text.

    Attributes:
        title: its origin, for messages.
        text: the text, stripped, not empty.
    """

    title: str
    text: str


def read_documents(path: Path, key: str, *, skip: bool = False) -> Iterator[Document]:
    """The documents of a file or of a directory with a dataset.

    Args:
        path: of plain text, or of records.
        key: the field or column of a record that holds the text.
        skip: leave bad records out.

    Raises:
        DataError: for content that is no text and holds no records, a damaged file, a table without the column, and
            the first bad record, or a file of bad records alone.
    """
    container = look(path, plain=True)
    if container.kind == "empty":
        return
    if says_text(path) and container.kind in (*JSON_KINDS, "text"):
        yield from sections(str(path), (line for _, line in lines_of(path, container.compression)))
    elif container.kind == "text" and not says_json(path):
        raise DataError(
            f"{path}: begins with neither {{ nor [, is no known table, and is not named as plain text "
            f"({', '.join(TEXT_NAMES)}); rename it, or give {KNOWN}"
        )
    else:
        yield from documents_of(records_of(container), key, skip=skip)


def documents_of(records: Records, key: str, *, skip: bool = False) -> Iterator[Document]:
    """The texts of records.

    Raises:
        DataError: as :func:`read_documents`.
    """
    if records.columns is not None and key not in records.columns:
        whose = "it" if records.title.startswith("dataset ") else "the file"
        raise DataError(f"{records.title}: no column {key!r}; {whose} has {', '.join(records.columns)}; set text_key")
    parsed = parse_all(
        records.read([key]),
        records.title,
        lambda record: _text_of(record, key, table=records.columns is not None),
        skip=skip,
        at_once=True,
        may_be_empty=True,
    )
    for where, text in parsed:
        yield Document(where, text)


def _text_of(record: Any, key: str, *, table: bool) -> str:
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    value = record.get(key)
    if isinstance(value, str):
        return value
    if table:
        raise DataError(f"column {key!r} holds {shown(value)}, not text; set text_key")
    state = f"text_key={key!r} is no string" if key in record else f"no key {key!r}"
    raise DataError(f"{state}; it has {', '.join(sorted(record)) or 'no keys'}; set text_key")


def lines_of(path: Path, compression: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, without the line end.

    Raises:
        DataError: for a line that is not UTF-8, or a compressed file that is damaged.
    """
    with opened(path, compression) as stream:
        for number, line, fault in text_lines(stream):
            if fault:
                raise DataError(f"{path}, line {number}: {fault}; convert the file")
            yield number, line


def sections(title: str, lines: Iterable[str]) -> Iterator[Document]:
    """Cut plain text at the first blank line past :data:`SECTION_CHARACTERS`."""
    kept: list[str] = []
    characters = number = 0
    for line in lines:
        if not line.strip() and characters >= SECTION_CHARACTERS:
            number += 1
            yield Document(f"{title}, section {number}", "\n".join(kept))
            kept, characters = [], 0
        kept.append(line)
        characters += len(line) + 1
    yield Document(f"{title}, section {number + 1}", "\n".join(kept))
