"""A file of the results of a long job, one line each, from which a later process can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_minitron.errors import ConfigError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["PLAIN", "Codec", "Journal"]

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Codec(Generic[Entry]):
    """How entries of a journal are written.

    Attributes:
        to_json: the JSON object of an entry.
        from_json: the entry of a JSON object; raises ValueError, KeyError, TypeError or AttributeError for any other
            content.
    """

    to_json: Callable[[Entry], dict[str, Any]]
    from_json: Callable[[Any], Entry]


#: Entries that are JSON objects themselves.
PLAIN: Codec[dict[str, Any]] = Codec(dict, dict)


class Journal(Generic[Entry]):
    """A file with a JSON object a line. The first states what all results depend on; every other line is an entry.

    A line that a killed process left incomplete is dropped. So is everything after a line that is no entry.

    Args:
        path: of the file; only one process may write it at a time.
        subject: JSON values that every result depends on.
        codec: of the entries.
        refuse_other: refuse a file with another subject, instead of beginning it anew.

    Attributes:
        resumed: number of entries that the last :meth:`read` returned.
    """

    def __init__(
        self, path: str | Path, subject: dict[str, Any], codec: Codec[Entry], *, refuse_other: bool = False
    ) -> None:
        self.path = Path(path)
        self.resumed = 0
        self._head = json.dumps(subject, sort_keys=True, default=str).encode()
        self._codec = codec
        self._refuse_other = refuse_other

    @staticmethod
    def beside(output: str | Path) -> Path:
        """The journal beside an output."""
        output = Path(output)
        return output.with_name(f".{output.name}.journal.jsonl")

    @staticmethod
    def entries(path: Path) -> int:
        """How many entries a journal holds, whatever its subject; 0 where there is none."""
        return max(0, len(_lines(path)) - 1)

    def read(self) -> list[Entry]:
        """The entries in the file, which is then ready for :meth:`append`.

        Raises:
            ConfigError: if the file has another subject and ``refuse_other`` is set.
        """
        lines = _lines(self.path)
        entries, whole = [], [self._head]
        if lines and lines[0] == self._head:
            entries = self.peek()
            whole = lines[: len(entries) + 1]
        elif lines and self._refuse_other:
            raise ConfigError(
                f"output: {self.path} holds results made with other settings ({_differences(lines[0], self._head)}); "
                "pass --overwrite to begin anew, or choose another output"
            )
        if whole != lines or self.path.stat().st_size != sum(len(line) + 1 for line in whole):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, b"\n".join(whole) + b"\n")
        self.resumed = len(entries)
        return entries

    def peek(self) -> list[Entry]:
        """The entries in the file, which stays as it is; none where it has another subject."""
        lines = _lines(self.path)
        entries: list[Entry] = []
        if not lines or lines[0] != self._head:
            return entries
        for line in lines[1:]:
            try:
                entries.append(self._codec.from_json(parse_json(line)))
            except (ValueError, KeyError, TypeError, AttributeError):
                break
        return entries

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries, and wait until they are on the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(self._codec.to_json(entry)) + "\n" for entry in entries)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Remove the file, once the results are saved elsewhere."""
        self.path.unlink(missing_ok=True)


def _lines(path: Path) -> list[bytes]:
    """Lines that were written to their end."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _differences(before: bytes, now: bytes) -> str:
    """Names of the values in which two first lines differ."""
    try:
        old = dict(parse_json(before))
    except (ValueError, TypeError):
        return "not a journal"
    new = parse_json(now)
    return ", ".join(sorted(key for key in {*old, *new} if old.get(key) != new.get(key)))
