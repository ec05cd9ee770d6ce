"""Results of a long job, a line each, in a file that outlives the process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.runtime.files import replace_file

__all__ = ["Journal"]


class Journal:
    """Lines of JSON objects, of which the first says what all the others depend on.

    A journal of something else is begun anew; the half line of a process that was killed is dropped.

    Args:
        path: of the file; only one process may write it at a time.
        subject: JSON values that every result depends on.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path = path
        self._head = json.dumps(subject, sort_keys=True).encode()

    @staticmethod
    def beside(output: str | Path) -> Path:
        """Where the journal of an output lies."""
        output = Path(output)
        return output.with_name(f".{output.name}.journal.jsonl")

    @staticmethod
    def entries(path: Path) -> int:
        """Results that a journal holds, whatever it is of."""
        return max(0, len(_lines(path)) - 1)

    def read(self) -> list[dict[str, Any]]:
        """What is there already; the file is left ready for :meth:`append`."""
        lines = _lines(self.path)
        found, whole = [], [self._head]
        if lines and lines[0] == self._head:
            for line in lines[1:]:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    break
                whole.append(line)
        if whole != lines or self.path.stat().st_size != sum(len(line) + 1 for line in whole):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, b"\n".join(whole) + b"\n")
        return found

    def append(self, results: Iterable[dict[str, Any]]) -> None:
        """Add results, and see them onto the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(result) + "\n" for result in results)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Remove the file: the results stand elsewhere."""
        self.path.unlink(missing_ok=True)


def _lines(path: Path) -> list[bytes]:
    """Lines that were written to their end."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
