"""What a file or directory of data holds, told by its content: lines, JSON, Parquet, Arrow, a ``datasets`` folder.

Names are believed only where content cannot tell: plain text is a file that is called so. A name that says something
else than the content is warned of, once, and the content is read.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from nemo_minitron.accounting import warn_once
from nemo_minitron.errors import DataError

__all__ = [
    "JSON_KINDS", "KNOWN", "TEXT_NAMES", "Container", "is_dataset_folder", "look", "opened", "says_json", "says_text",
]  # fmt: skip

#: What every reader of records takes, for messages.
KNOWN = (
    "JSONL, a JSON array or JSON objects one after the other (each also as .gz or .zst), Parquet, an Arrow file or "
    "stream, or a directory that save_to_disk of Hugging Face datasets wrote"
)
#: Kinds of containers whose text is JSON.
JSON_KINDS = ("lines", "array", "objects")
#: Names of plain text.
TEXT_NAMES = (".txt", ".text", ".md")

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
#: What the end of a name says of the content.
_SAID: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jl"), ("lines",)),
    ".json": JSON_KINDS,
    **dict.fromkeys((".parquet", ".pq"), ("parquet",)),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), ("arrow file", "arrow stream")),
    **dict.fromkeys(TEXT_NAMES, ("text",)),
}
_WORDS = {
    "lines": "JSON lines", "array": "a JSON array", "objects": "JSON objects over several lines", "parquet": "Parquet",
    "arrow file": "an Arrow file", "arrow stream": "an Arrow stream", "text": "plain text", "empty": "nothing",
    "gzip": "gzip", "zstd": "zstd",
}  # fmt: skip
#: First bytes of files that hold no records -> what they are.
_FOREIGN: dict[bytes, str] = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive (or a file of torch.save); unpack it",
    b"PK\x05\x06": "an empty zip archive",
    b"BZh": "compressed by bzip2; decompress it, or compress with gzip or zstd",
    b"\xfd7zXZ\x00": "compressed by xz; decompress it, or compress with gzip or zstd",
    b"\x04\x22\x4d\x18": "compressed by lz4; decompress it, or compress with gzip or zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"FEA1": "a Feather file of version 1; write version 2",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3": "an SQLite database",
    b"GGUF": "a model (GGUF)",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a pointer of Git LFS in the file's place; fetch the file (git lfs pull)",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
    **{bytes([0x80, version]): "a pickle, which nothing here opens" for version in range(2, 6)},
}
#: The same of text, without regard to case.
_FOREIGN_TEXT = {b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<?xml": "XML"}

_HEAD = 1 << 12
_FIRST_LINE = 1 << 18  # bytes of the first line that are read to tell lines from an array
_BUFFER = 1 << 18  # bytes that are decompressed at once
_MARK = "\ufeff".encode()


class Container(NamedTuple):
    """What holds the records.

    Attributes:
        path: of the file or directory.
        kind: "lines" (JSONL), "array", "objects", "parquet", "arrow file", "arrow stream", "dataset", "text" or
            "empty".
        compression: "gzip" or "zstd" around it.
    """

    path: Path
    kind: str
    compression: str | None = None


def is_dataset_folder(path: Path) -> bool:
    """Whether a directory is one that ``save_to_disk`` of Hugging Face ``datasets`` wrote."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def look(path: str | Path, *, plain: bool = False) -> Container:
    """Find out what a path holds. Reads its first bytes.

    Args:
        path: of a file or directory.
        plain: plain text is wanted too: what is named as text is text, if it looks like JSON.

    Raises:
        DataError: for a path that cannot be read, a directory that is no dataset, and content that holds no records.
    """
    path = Path(path)
    if path.is_dir():
        if not is_dataset_folder(path):
            raise DataError(f"{path}: is a directory without a dataset; give {KNOWN}")
        return Container(path, "dataset")
    try:
        with path.open("rb") as stream:
            first = stream.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from None
    compression = "gzip" if first.startswith(_GZIP) else "zstd" if first == _ZSTD else None
    with opened(path, compression) as stream:
        kind = _kind(path, stream, compression, plain=plain)
    container = Container(path, kind, compression)
    _compare(container, plain=plain)
    return container


def _kind(path: Path, stream: IO[bytes], compression: str | None, *, plain: bool) -> str:
    """What (decompressed) content is."""
    head = stream.read(_HEAD)
    inside = f"{compression} around " if compression else ""
    for magic, kind in _TABLES.items():
        if head.startswith(magic):
            if compression:
                raise DataError(f"{path}: is {inside}{_WORDS[kind]}, which is read in any order; decompress it")
            return kind
    if head.startswith((_GZIP, _ZSTD)):
        raise DataError(f"{path}: is compressed twice; decompress it once")
    text = head.removeprefix(_MARK).lstrip()
    foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None) or next(
        (what for magic, what in _FOREIGN_TEXT.items() if text.lower().startswith(magic) and not says_text(path)), None
    )
    if foreign is not None:
        raise DataError(f"{path}: is {inside}{foreign}. What is read: {KNOWN}")
    if b"\0" in head:
        raise DataError(f"{path}: is {inside}no text and no known table. What is read: {KNOWN}")
    while head and not text:  # a beginning of blank lines
        head = stream.read(_HEAD)
        text = head.lstrip()
    if not text:
        return "empty"
    if text[:1] not in (b"[", b"{"):
        return "text"
    if b"\n" not in text:
        text += stream.readline(_FIRST_LINE)
    if b"\n" not in text[:_FIRST_LINE] and len(text) < _FIRST_LINE:  # a single line
        kind = "array" if text[:1] == b"[" else "lines"
    else:
        text += stream.read(max(0, _FIRST_LINE - len(text)))
        kind = _json_kind(text.decode("utf-8", errors="replace"))
    return "text" if plain and says_text(path) and not _begins_with_object(text) else kind


def _begins_with_object(text: bytes) -> bool:
    """Text may begin with a bracket, too."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.decode("utf-8", errors="replace").lstrip("[ \t\r\n"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _json_kind(text: str) -> str:
    """Lines, an array or objects, by a beginning of several lines, or of a very long one."""
    first, end, rest = text.partition("\n")
    decode = json.JSONDecoder().raw_decode
    try:
        _, stop = decode(first)
        whole = not first[stop:].strip()
    except (ValueError, RecursionError):
        whole = False
    if text[0] == "[":
        # An array that ends in its line, and more behind it: a line that is no object, among others.
        return "lines" if whole and rest.strip() else "array"
    if whole or not end:
        return "lines"
    try:
        decode(text)
    except json.JSONDecodeError as error:
        # A line that is cut off is wrong where the next one begins; an object that goes on is wrong at the end alone.
        cut = error.pos >= len(text) - 1 or error.msg.startswith("Unterminated string")
        return "objects" if cut and len(text) >= _FIRST_LINE // 2 else "lines"
    except (ValueError, RecursionError):
        return "lines"
    return "objects"


def says_text(path: Path) -> bool:
    """Whether a file is named as plain text."""
    return _inner(path).suffix.lower() in TEXT_NAMES


def says_json(path: Path) -> bool:
    """Whether a file is named as JSON."""
    said = _SAID.get(_inner(path).suffix.lower())
    return said is not None and set(said) <= set(JSON_KINDS)


def _inner(path: Path) -> Path:
    """The name without the end that says how it is compressed."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path


def _compare(container: Container, *, plain: bool) -> None:
    """Warn of a name that says something else than the content."""
    path, kind, compression = container
    named, end = _COMPRESSIONS.get(path.suffix.lower()), _inner(path).suffix.lower()
    said = _SAID.get(end)
    if kind == "empty":
        if named or (said and "lines" not in said and "text" not in said):
            raise DataError(f"{path}: holds nothing, not even the beginning of such a file; write it anew")
        return
    if named is not None and named != compression:
        warn_once(path, f"is named {path.suffix}, and is {compression or 'not compressed'}; it is read as that")
    if said is None or kind in said or kind == "text":
        return
    what = _WORDS[kind]
    if plain and said == ("text",) and kind in JSON_KINDS:
        warn_once(path, f"is named {end}, and looks like {what}; it is read as plain text: name it .jsonl for records")
    else:
        warn_once(path, f"is named {end}, and holds {what}; it is read as that")


# -------------------------------------------------------------------------------------------------------------- streams


@contextmanager
def opened(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file.

    Raises:
        DataError: while they are read, where the file is damaged or cut off.
    """
    try:
        with path.open("rb") as raw, _decompressed(raw, path, compression) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: is damaged or cut off ({error}); write it anew") from None
    except OSError as error:
        if compression is None or error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        raise DataError(f"{path}: is damaged or cut off ({error}); write it anew") from None


@contextmanager
def _decompressed(raw: IO[bytes], path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    if compression is None:
        yield raw
    elif compression == "gzip":
        with gzip.GzipFile(fileobj=raw) as packed:
            yield io.BufferedReader(packed, _BUFFER)  # type: ignore[arg-type]  # it reads as a raw stream does
    else:
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as packed:
            yield io.BufferedReader(packed, _BUFFER)
