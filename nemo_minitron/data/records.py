"""The one reader of records: every container as a stream of :class:`Record`, and records through a parser.

Texts, conversations, preference pairs, prompts, labelled answers and tasks all come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_minitron.data import json_records, tables
from nemo_minitron.data.bad_records import BadRecords
from nemo_minitron.data.containers import KNOWN, Container, look, opened, says_json
from nemo_minitron.data.json_records import Record
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["Record", "Records", "open_records", "parse_all", "records_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """The records of one file, directory or dataset, which can be read again and again.

    Attributes:
        title: for messages.
        columns: of a table; None for JSON, where each record has its own.
    """

    title: str
    columns: tuple[str, ...] | None
    _read: Callable[[Sequence[str] | None], Iterator[Record]]

    def read(self, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """The records in their order; of a table, with these columns only.

        Raises:
            DataError: for a container that is damaged. What is wrong with one record is its ``fault``.
        """
        return self._read(None if self.columns is None else columns)

    @classmethod
    def of_dataset(cls, name: str, dataset: datasets.Dataset) -> Records:
        """The rows of an open dataset."""
        return cls(
            f"dataset {name!r}",
            tuple(dataset.column_names),
            lambda columns: tables.dataset_rows(name, dataset, columns),
        )


def open_records(path: str | Path) -> Records:
    """The records of a file, or of a directory that ``save_to_disk`` of Hugging Face ``datasets`` wrote.

    Raises:
        DataError: for a path that cannot be read, or holds no records.
    """
    return records_of(look(path))


def records_of(container: Container) -> Records:
    """The records of what :func:`~nemo_minitron.data.containers.look` found.

    Raises:
        DataError: as :func:`open_records`.
    """
    path, kind, compression = container
    title = str(path)
    if kind == "dataset":
        dataset = tables.open_folder(path)
        return replace(Records.of_dataset(title, dataset), title=title)
    if kind == "parquet":
        return Records(title, tuple(tables.parquet_columns(path)), lambda names: tables.parquet_rows(path, names))
    if kind in ("arrow file", "arrow stream"):
        stream = kind == "arrow stream"
        names = tuple(tables.arrow_columns(path, stream=stream))
        return Records(title, names, lambda names: tables.arrow_rows(path, names, stream=stream))
    if kind == "text" and not says_json(path):
        raise DataError(f"{path}: begins with neither {{ nor [, and is no known table. What is read: {KNOWN}")

    def read(_: Sequence[str] | None) -> Iterator[Record]:
        with opened(path, compression) as stream:
            if kind in ("array", "objects"):
                yield from json_records.items(stream, title, array=kind == "array")
            else:
                yield from json_records.lines(stream)

    return Records(title, None, read)


def parse_all(
    records: Iterable[Record],
    title: str,
    parse: Callable[[Any], T],
    *,
    skip: bool = False,
    at_once: bool = False,
    may_be_empty: bool = False,
) -> Iterator[tuple[str, T]]:
    """``(file and place, parsed)`` of each record, streamed.

    Args:
        records: of one container.
        title: of the container, for messages.
        parse: raises a DataError with what is wrong with one record.
        skip: leave bad records out (``on_bad_record: skip``); they are logged and kept for ``skipped.jsonl``.
        at_once: refuse the first bad record when it is met, instead of all of them at the end.
        may_be_empty: a container without any record is no fault.

    Raises:
        DataError: with all bad records, unless they are left out; in any case if no record is good, or there is none.
            After the first bad record nothing is given out.
    """
    bad = BadRecords(title, skip=skip)
    good = 0
    try:
        for place, value, fault in records:
            try:
                if fault:
                    raise DataError(fault)
                item = parse(value)
            except DataError as error:
                if at_once and not skip:
                    raise DataError(f"{title}, {place}: {error}; on_bad_record=skip leaves such records out") from None
                bad.add(place, error, value)
                continue
            good += 1
            if skip or not bad:
                yield f"{title}, {place}", item
    except GeneratorExit:  # no more is wanted
        bad.tell(good)
        raise
    if good or bad or not may_be_empty:
        bad.close(good)
