"""Records that cannot be used: refused all at once, or left out and kept (``on_bad_record``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from nemo_minitron.errors import DataError
from nemo_minitron.jobs import skipped

__all__ = ["BadRecord", "BadRecords", "UnknownKinds", "bad_lines", "each", "shown"]

logger = logging.getLogger(__name__)

_REPORTED = 20  # bad records named in one error
_SHOWN = 40  # characters of a value in a message
_REMEDY = "correct or remove {}, or set on_bad_record=skip to leave {} out"

S = TypeVar("S")
T = TypeVar("T")


class UnknownKinds(DataError):
    """A record is of a form that is not known, or holds unknown fields.

    Attributes:
        kinds: what is unknown -> the fault. A file with many records of one kind reports it once.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = dict(kinds)
        super().__init__("; ".join(self.kinds.values()))


class BadRecord(DataError):
    """What is wrong with one record that was read before: a template refuses it, for example.

    Attributes:
        where: its file and place; empty if not known.
        reason: what is wrong.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}" if where else reason)


class BadRecords:
    """The bad records of one file; true if there are any.

    Args:
        title: of the file.
        skip: they are left out.
    """

    def __init__(self, title: str, *, skip: bool) -> None:
        self._title, self._skip = title, skip
        self._count = self._more = 0
        self._faults: list[str] = []
        self._kinds: dict[str, int] = {}
        self._again: Counter[int] = Counter()  # further records of the fault with this number
        if skip:
            skipped.watch()

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, place: str, error: DataError, record: Any = None, *, file: str = "") -> None:
        """One bad record.

        Args:
            place: in the file.
            error: what is wrong with it.
            record: itself; what is left out is kept.
            file: that it stands in, if not the title.
        """
        self._count += 1
        kinds = error.kinds if isinstance(error, UnknownKinds) else {"": str(error)}
        if self._skip:
            skipped.add(file or self._title, place, "; ".join(kinds.values()), record)
        for kind, fault in kinds.items():
            if kind and kind in self._kinds:
                self._again[self._kinds[kind]] += 1
                continue
            if kind:
                self._kinds[kind] = len(self._faults) + self._more
            if len(self._faults) < _REPORTED:
                self._faults.append(f"{place}: {fault}")
            else:  # not shown, so not kept: there may be millions
                self._more += 1

    def close(self, good: int) -> None:
        """After the last record.

        Raises:
            DataError: with all bad records, unless they are left out; in any case if no record is good, or there is
                none.
        """
        if self._count and (not self._skip or not good):
            for number, count in self._again.items():
                if number < len(self._faults):
                    self._faults[number] += f" (and {count} more like it)"
            raise bad_lines(
                self._title, self._faults, lines=self._count, more=self._more, all_of_them=not good and self._skip
            )
        if not good:
            raise DataError(f"{self._title}: is empty; give a file with at least one record")
        self.tell(good)

    def tell(self, good: int) -> None:
        """Log what was left out."""
        if self._count and self._skip:
            logger.warning(
                "%s: left out %d of %d records (on_bad_record=skip); the first is %s",
                self._title, self._count, self._count + good, self._faults[0],
            )  # fmt: skip


def bad_lines(title: str, faults: Sequence[str], *, lines: int, more: int = 0, all_of_them: bool = False) -> DataError:
    """One error for all bad records of a file.

    Args:
        title: the file.
        faults: what is wrong, each with its place, whose first word says what the records are ("line 7: ...").
        lines: how many records are bad.
        more: how many faults there are besides.
        all_of_them: no record is good, so that none can be left out.
    """
    rest = f"\n  and {more} more" if more else ""
    told = "".join(f"\n  {fault}" for fault in faults)
    noun = next((word for word in ("row", "item") if faults[0].startswith(f"{word} ")), "line")
    plural = f"1 bad {noun}" if lines == 1 else f"{lines} bad {noun}s"
    pronoun = "it" if lines == 1 else "them"
    remedy = "no record is left; correct the file" if all_of_them else _REMEDY.format(pronoun, pronoun)
    return DataError(f"{title}: {plural}; {remedy}:{told}{rest}")


def each(
    rows: Iterable[S],
    convert: Callable[[S], T],
    *,
    where: Callable[[S], str],
    record: Callable[[S], Any],
    title: str,
    skip: bool,
) -> list[tuple[S, T]]:
    """``(row, converted)`` of each row that ``convert`` takes: a second step over records that were read.

    Args:
        rows: of one file, or of several.
        convert: raises a DataError for a row that it cannot take.
        where: file and place of a row.
        record: what is kept of a row that is left out.
        title: of the file.
        skip: leave bad rows out.

    Raises:
        DataError: with all bad rows, unless they are left out; in any case if no row is good.
    """
    bad = BadRecords(title, skip=skip)
    done: list[tuple[S, T]] = []
    for row in rows:
        try:
            done.append((row, convert(row)))
        except DataError as error:
            if isinstance(error, BadRecord):
                error = DataError(error.reason)
            file, _, place = where(row).rpartition(", ")
            bad.add(place or "record", error, record(row), file=file)
    if bad:
        bad.close(len(done))
    return done


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
