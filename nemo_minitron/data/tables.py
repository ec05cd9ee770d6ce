"""Records of tables: Parquet files, Arrow files and streams, datasets of Hugging Face. All are streamed.

Memory: :data:`ROWS` rows of the columns that are read.

A table has a place for each field of each row, so a field that a row has not is null there, also within a list of
objects. So nulls of fields are left out: they say the same as a field that is missing. Nulls within a list stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.data.json_records import Record
from nemo_minitron.errors import DataError, first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = [
    "ROWS",
    "arrow_columns",
    "arrow_rows",
    "dataset_rows",
    "open_dataset",
    "open_folder",
    "parquet_columns",
    "parquet_rows",
]

ROWS = 1024  # of a table that are read at once
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


def parquet_columns(path: Path) -> list[str]:
    """The columns of a Parquet file."""
    import pyarrow.parquet

    with _readable(path, "Parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of a Parquet file, of these columns or of all.

    Raises:
        DataError: for a damaged file.
    """
    import pyarrow.parquet

    with _readable(path, "Parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        yield from _records(file.iter_batches(ROWS, columns=None if columns is None else list(columns)))


def arrow_columns(path: Path, *, stream: bool) -> list[str]:
    """The columns of an Arrow file or stream."""
    with _arrow(path, stream=stream) as reader:
        return list(reader.schema.names)


def arrow_rows(path: Path, columns: Sequence[str] | None = None, *, stream: bool) -> Iterator[Record]:
    """The rows of an Arrow file or stream, of these columns or of all.

    Raises:
        DataError: for a damaged file.
    """
    with _arrow(path, stream=stream) as reader:
        batches = reader if stream else (reader.get_batch(number) for number in range(reader.num_record_batches))
        chosen = (batch if columns is None else batch.select(list(columns)) for batch in batches)
        yield from _records(
            batch.slice(start, ROWS) for batch in map(_whole, chosen) for start in range(0, batch.num_rows, ROWS)
        )


def _whole(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """A batch whose offsets lie within it: pyarrow believes those of a file, and ends the process at wrong ones."""
    batch.validate(full=True)
    return batch


@contextmanager
def _arrow(path: Path, *, stream: bool) -> Iterator[Any]:
    import pyarrow

    with _readable(path, "Arrow stream" if stream else "Arrow file"), pyarrow.memory_map(str(path)) as file:
        if stream:
            file.seek(max(0, file.size() - len(_END)))
            if file.read() != _END:  # at the border of two batches nothing else shows it
                raise DataError(f"{path}: is cut off, an Arrow stream without its end; write it anew")
            file.seek(0)
        with (pyarrow.ipc.open_stream if stream else pyarrow.ipc.open_file)(file) as reader:
            yield reader


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        # a damaged name of a column is a ValueError; a page that is cut off gives an error without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        raise DataError(f"{path}: not a readable {what} ({first_line(error)}); write it anew") from None


def _records(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for value, fault in _values(batch):
            row += 1
            yield Record(f"row {row}", value, fault)


def _values(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[tuple[Any, str]]:
    try:
        rows = batch.to_pylist()
    except (ValueError, KeyError) as error:  # text that is not UTF-8, a number or date that Python has not
        if batch.num_rows == 1:
            reason = f"not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else str(error)
            yield None, reason
            return
        for number in range(batch.num_rows):
            yield from _values(batch.slice(number, 1))
        return
    for row in rows:
        yield _without_nulls(row), ""


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        if value and all(isinstance(entry, tuple) for entry in value):  # a map's
            return {key: _without_nulls(entry) for key, entry in value}
        return [_without_nulls(entry) for entry in value]
    return value


# ------------------------------------------------------------------------------------------------------------- datasets


def open_dataset(name: str, split: str | None, files: list[Path]) -> datasets.Dataset:
    """A Hugging Face dataset, memory-mapped. None of its code is run.

    Args:
        name: a directory that ``Dataset.save_to_disk`` (or ``DatasetDict``'s) wrote; or a name on the hub, which is
            downloaded on first use.
        split: name of the split, for a dataset with several.
        files: what ``name`` matches as a path or pattern; empty for a name on the hub.

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
        if len(files) > 1:
            raise DataError(f"dataset {name!r}: matches several, directories among them; name one directory, or files")
        dataset = datasets.load_from_disk(str(files[0]))
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of its own, pyarrow's, OSError and ValueError
        reason = f"{type(error).__name__}: {first_line(error)}"
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


def open_folder(path: Path) -> datasets.Dataset:
    """The dataset of a directory that ``save_to_disk`` wrote; of several splits, each is a directory in it.

    Raises:
        DataError: as :func:`open_dataset`, and for a directory of several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        if len(splits) != 1:
            raise DataError(
                f"{path}: holds the splits {', '.join(splits) or '(none)'}; name the directory of one"
                + (f", {path / splits[0]}" if splits else "")
            )
        path = path / splits[0]
    return open_dataset(str(path), None, [path])


def dataset_rows(name: str, dataset: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of a dataset, of these columns or of all.

    Raises:
        DataError: for damaged files.
    """
    import pyarrow

    if columns is not None:
        dataset = dataset.select_columns(list(columns))
    try:
        # As Arrow: features that decode images and sound would open them.
        yield from _records(dataset.with_format("arrow").iter(ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"dataset {name!r}: cannot be read ({first_line(error)}); write it anew") from None
