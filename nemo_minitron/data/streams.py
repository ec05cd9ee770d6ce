"""The tokens of each source, made once and cached: ``cache_dir/tokens/<hash>``, memory-mapped.

They do not depend on sequence length, weight, splits or the other sources, so a change of these does not tokenise a
source again. A directory holds ``tokens.bin`` (int32, document after document in the source's order),
``answers.bin`` (of conversations, a byte a token), ``documents.safetensors`` (lengths, sizes, order) and, where bad
records are left out, ``skipped.jsonl``. It is written
aside and renamed; one that is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data import packages, prose
from nemo_minitron.data.bad_records import BadRecord, BadRecords
from nemo_minitron.data.digests import file_digest
from nemo_minitron.data.encoding import Encoder, Refused, encode_all
from nemo_minitron.data.indexed import IndexedStream, pair
from nemo_minitron.data.sources import PACKAGE_TEXTS, dataset_files, iter_documents, source_files
from nemo_minitron.data.splits import DocumentTable, order_key
from nemo_minitron.data.tables import open_dataset
from nemo_minitron.data.tokenizer import tokenizer_files_digest
from nemo_minitron.errors import DataError
from nemo_minitron.jobs import skipped
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.files import read_json_lines
from nemo_minitron.runtime.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.data.chat.conversations import Chat

__all__ = ["TokenStream", "source_state", "titles_of", "token_stream"]

logger = logging.getLogger(__name__)

_FORMAT = 1  # of a kept directory; raise it when the same source would give other tokens
_CHAT_FORMAT = 2  # the same of conversations
_CHECKED_BYTES = 1 << 30
"""Checksums are of files up to this size; larger ones are held to their size alone."""


class TokenStream(Protocol):
    """The documents of one source as tokens.

    Attributes:
        table: lengths, sizes and order of the documents.
        answers: bool, of the length of ``tokens``: the tokens that are learned; None if all are.
    """

    table: DocumentTable
    answers: Any

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """``[stop - start]`` ids of a document."""
        ...


def token_stream(source: SourceConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """The tokens of a source: from the cache, or made now, by one process at a time.

    Args:
        source: of ``config``.
        config: its seed, cache and workers.
        tokenizer: as :func:`~nemo_minitron.data.tokenizer.load_tokenizer` gives it.

    Raises:
        DataError: for a source that cannot be read, or a tokenizer that cannot close documents.
    """
    encoder = Encoder.of(tokenizer, template=source.template if source.chat is not None else None)
    if source.megatron is not None:
        return IndexedStream(source.megatron, end=encoder.end, seed=config.seed)
    key = json.dumps(
        [
            _FORMAT if encoder.template is None else _CHAT_FORMAT,
            source_state(source, config.cache_dir),
            source.text_key,
            source.max_characters,
            encoder.template,
            config.seed,
            tokenizer_files_digest(tokenizer.name_or_path),
            *(["skip"] if config.skip else []),
        ]
    )
    folder = Path(config.cache_dir) / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        kept = _Kept.open(folder)
        if kept is None:
            _make(source, config, encoder, folder)
            kept = _Kept.open(folder)
    if kept is None:
        raise DataError(f"{folder}: what was just written cannot be read back; look at the disk")
    if config.skip:
        skipped.restore(read_json_lines(folder / skipped.FILE_NAME))
    return kept


class _Kept:
    """A directory of the cache."""

    def __init__(self, table: DocumentTable, tokens: np.ndarray, answers: np.ndarray | None) -> None:
        self.table = table
        self._tokens, self._answers = tokens, answers
        self._begins = np.concatenate([[0], np.cumsum(table.lengths)])
        self.answers = None if answers is None else self._learned

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """``[stop - start]`` int32."""
        begin = self._begins[document]
        return self._tokens[begin + start : begin + stop]

    def _learned(self, document: int, start: int, stop: int) -> np.ndarray:
        assert self._answers is not None
        begin = self._begins[document]
        return self._answers[begin + start : begin + stop].astype(bool)

    @classmethod
    def open(cls, folder: Path) -> _Kept | None:
        """Open a directory; None if it does not exist or is damaged. A damaged directory is removed."""
        if not folder.is_dir():
            return None
        try:
            return cls._open(folder)
        except Exception as error:  # safetensors has errors of its own, which are no OSError
            logger.warning("%s: is damaged (%s); its source is tokenised again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    @classmethod
    def _open(cls, folder: Path) -> _Kept:
        from safetensors import safe_open

        with safe_open(folder / "documents.safetensors", framework="np") as file:
            sums = parse_json(file.metadata()["checksums"])
            table = DocumentTable(*(file.get_tensor(name) for name in DocumentTable._fields))
        arrays = {}
        for name, dtype in (("tokens.bin", np.int32), ("answers.bin", np.uint8)):
            if name in sums:
                arrays[name] = np.memmap(folder / name, dtype, "r")
                if len(arrays[name]) != int(table.lengths.sum()):
                    raise ValueError(f"{name} holds {len(arrays[name])} tokens of {int(table.lengths.sum())}")
                if arrays[name].nbytes <= _CHECKED_BYTES and zlib.crc32(arrays[name]) != sums[name]:  # type: ignore[arg-type]
                    raise ValueError(f"{name} has another checksum")
        return cls(table, arrays["tokens.bin"], arrays.get("answers.bin"))


class _Writer:
    """A file of numbers and its running checksum."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self.checksum = 0

    def add(self, numbers: np.ndarray) -> None:
        content = np.ascontiguousarray(numbers).tobytes()
        self.checksum = zlib.crc32(content, self.checksum)
        self._file.write(content)

    def close(self) -> None:
        self._file.close()


def _make(source: SourceConfig, config: DataConfig, encoder: Encoder, folder: Path) -> None:
    """Tokenise a source. The caller holds the lock, so unfinished directories of other processes can be removed."""
    from safetensors.numpy import save_file

    lengths: list[int] = []
    sizes: list[int] = []
    keys: list[bytes] = []
    with write_aside(folder, overwrite=True, error=DataError, alone=True) as aside:
        aside.mkdir()
        with (
            closing(_Writer(aside / "tokens.bin")) as tokens,
            closing(_Writer(aside / "answers.bin")) as answers,
        ):
            documents = _documents(source, config)
            bad = BadRecords(source.name, skip=config.skip)
            with progress_bar(f"tokenising {source.name}", None) as advance:
                count = 0
                for (key, size), encoded in encode_all(encoder, documents, config.workers):
                    if isinstance(encoded, Refused):
                        if not config.skip:
                            raise BadRecord(encoded.where, encoded.reason)
                        file, _, place = encoded.where.rpartition(", ")
                        bad.add(place, DataError(encoded.reason), encoded.record, file=file)
                        continue
                    lengths.append(len(encoded.ids))
                    sizes.append(size)
                    keys.append(key)
                    tokens.add(encoded.ids)
                    if encoded.answers is not None:
                        answers.add(encoded.answers)
                    count += len(encoded.ids)
                    advance(1, f"{count:,} tokens")
            if bad:
                bad.close(len(lengths))
        checksums = {"tokens.bin": tokens.checksum}
        if encoder.template is not None:
            checksums["answers.bin"] = answers.checksum
        else:
            (aside / "answers.bin").unlink()
        table = DocumentTable(
            np.array(lengths, dtype=np.int64),
            np.array(sizes, dtype=np.int64),
            np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), 32),
        )
        if config.skip:
            (aside / skipped.FILE_NAME).write_text(skipped.as_text(skipped.entries(titles_of(source))))
        save_file(table._asdict(), aside / "documents.safetensors", metadata={"checksums": json.dumps(checksums)})
    logger.info("source %r: %d documents, %s tokens", source.name, len(lengths), f"{sum(lengths):,}")


def _documents(source: SourceConfig, config: DataConfig) -> Iterator[tuple[tuple[bytes, int], Any, int]]:
    """``((order key, size), document, characters)``."""
    if source.chat is None:
        for document in iter_documents(source, config.cache_dir, skip=config.skip):
            size = len(document.text)
            yield (order_key(config.seed, document.text), size), document.text, size
        return
    seen: set[bytes] = set()
    characters = 0
    for chat in _chats(source, skip=config.skip):
        text = json.dumps(chat.record())
        size = sum(len(message.content) for message in chat.messages)
        if (key := order_key(config.seed, text)) in seen:
            continue
        seen.add(key)
        yield (key, size), chat, size
        characters += size
        if source.max_characters is not None and characters >= source.max_characters:
            break


def _chats(source: SourceConfig, *, skip: bool) -> Iterator[Chat]:
    from nemo_minitron.data.chat.conversations import iter_chats

    for path in source_files(source):
        yield from iter_chats(path, skip=skip)


def titles_of(source: SourceConfig) -> list[str]:
    """The titles of the containers of a source, by which records that were left out are known."""
    if source.dataset is not None:
        return [f"dataset {source.dataset!r}", *map(str, dataset_files(source))]
    return [str(path) for path in source_files(source)] if source.path or source.chat else []


# ---------------------------------------------------------------------------------------------------------------- state


def source_state(source: SourceConfig, cache_dir: str | Path) -> object:
    """The values on which a source's documents depend, as JSON.

    Raises:
        DataError: for missing files.
    """
    if source.package in packages.PACKAGES:
        return packages.PACKAGES[source.package].sha256
    if source.package is not None:
        if source.package not in PACKAGE_TEXTS:
            return source.package  # An unknown one: reading it says so.
        return [prose.RULES, prose.versions(source.package)]
    if source.megatron is not None:
        files = list(pair(source.megatron))
    elif source.dataset is not None:
        named = dataset_files(source)
        files = [file for entry in named for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
        if not named:  # on the hub: its fingerprint follows the revision
            dataset = open_dataset(source.dataset, source.dataset_split, [])
            return [source.dataset, source.dataset_split, dataset._fingerprint]
    else:
        named = source_files(source)
        files = [file for entry in named for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
    return [
        source.dataset_split,
        [[path.suffix, file_digest(path, cache_dir)] for path in files if path.is_file()],
    ]
