"""Files of text and tables as documents, streamed: text, JSONL and Parquet files, and Hugging Face datasets.

Memory: one line of a text or JSONL file, :data:`ROWS` rows of a Parquet file or dataset.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["SECTION_CHARACTERS", "Document", "dataset_rows", "lines_of", "open_dataset", "reader_of", "sections"]

SECTION_CHARACTERS = 8192
ROWS = 1024  # of a table that are read at once

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Document(NamedTuple):
    """One text.

    Attributes:
        title: its origin, for messages.
        text: the text, stripped, not empty.
    """

    title: str
    text: str


def reader_of(path: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    """The reader of a file of this name, ``reader(path, text_key)``; None for an unknown type of file."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    if name is not path and name.suffix.lower() == ".parquet":
        return None  # compressed within, and read by random access
    return READERS.get(name.suffix.lower())


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as stream:
            yield stream
        return
    import pyarrow

    with pyarrow.input_stream(str(path), compression=compression) as packed:
        try:
            yield io.BufferedReader(packed, 1 << 20)
        except OSError as error:
            raise DataError(f"{path}: is damaged or cut off ({error}); write it anew") from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number from 1, without the line end.

    Raises:
        DataError: for a line that is not UTF-8, or a compressed file that is damaged.
    """
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield (
                    number,
                    line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"),
                )
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from None


def _plain(path: Path, _: str) -> Iterator[Document]:
    yield from sections(str(path), (line for _, line in lines_of(path)))


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
    for number, line in lines_of(path):
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
            check_column(str(path), file.schema_arrow.names, key, what="the file")
            batches = (batch.column(0).to_pylist() for batch in file.iter_batches(ROWS, columns=[key]))
            yield from _rows(str(path), batches, key)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it anew") from None
    except OSError as error:
        # what is wrong with a page that is cut off comes as an error without a number
        if error.errno is not None:
            raise
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it anew") from None


def check_column(title: str, names: Iterable[str], key: str, *, what: str) -> None:
    """Raise a DataError unless there is a column ``key``."""
    names = list(names)
    if key not in names:
        raise DataError(f"{title}: no column {key!r}; {what} has {', '.join(names)}; set text_key")


def _rows(title: str, batches: Iterable[list[Any]], key: str) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for value in batch:
            row += 1
            if not isinstance(value, str):
                raise DataError(f"{title}, row {row}: column {key!r} holds {value!r}, not text; set text_key")
            yield Document(f"{title}, row {row}", value)


#: By the end of a file's name.
READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _plain,
    ".text": _plain,
    ".md": _plain,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


# ------------------------------------------------------------------------------------------------------------- datasets


def open_dataset(name: str, split: str | None, files: list[Path]) -> datasets.Dataset:
    """A Hugging Face dataset, memory-mapped. None of its code is run.

    Args:
        name: a directory that ``Dataset.save_to_disk`` (or ``DatasetDict``'s) wrote; ``.arrow`` files; or a name on the
            hub, which is downloaded on first use.
        split: name of the split, for a dataset with several.
        files: files that ``name`` matches as a path or pattern; empty for a name on the hub.

    Raises:
        DataError: for a directory without a dataset, damaged files, an unknown split, or a hub that does not answer.
    """
    import datasets

    try:
        if not files:
            if split is None:
                raise DataError(
                    f"dataset {name!r}: there is no such directory or file; correct the path, or set dataset_split to "
                    "load it from the hub"
                )
            return datasets.load_dataset(name, split=split, trust_remote_code=False)
        if all(path.suffix == ".arrow" for path in files):
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])
        if len(files) > 1 or not files[0].is_dir():
            raise DataError(
                f"dataset {name!r}: {files[0]} is neither a directory that save_to_disk wrote nor an .arrow file"
            )
        dataset = datasets.load_from_disk(str(files[0]))
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of its own, pyarrow's, OSError and ValueError
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise DataError(
            f"dataset {name!r}: cannot be opened ({reason}); give a directory that save_to_disk wrote, .arrow files, "
            "or a name on the hub and dataset_split"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            given = "it has several splits" if split is None else f"it has no split {split!r}"
            raise DataError(f"dataset {name!r}: {given}; set dataset_split to one of {', '.join(dataset)}")
        return dataset[split]
    return dataset


def dataset_rows(name: str, dataset: datasets.Dataset, key: str) -> Iterator[Document]:
    """The rows of a dataset as documents.

    Raises:
        DataError: if there is no such column, or its values are not text.
    """
    check_column(f"dataset {name!r}", dataset.column_names, key, what="it")
    dataset = dataset.select_columns([key])
    yield from _rows(f"dataset {name!r}", (batch[key] for batch in dataset.iter(ROWS)), key)
