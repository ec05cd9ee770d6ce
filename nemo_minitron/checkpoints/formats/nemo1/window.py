"""A part of a file, to be read like a whole file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Window"]


class Window(io.RawIOBase):
    """``length`` bytes of a file from ``start`` on, seekable, so that readers of whole files can read a part in place.

    Args:
        source: an open file, which stays open, or a path, which is opened and closed with this object.
        start, length: the part, in bytes.
    """

    def __init__(self, source: BinaryIO | Path, start: int, length: int) -> None:
        self._own = isinstance(source, Path)
        self._file: Any = open(source, "rb") if isinstance(source, Path) else source  # noqa: SIM115 (see close)
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position within the part."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the part; returns the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the part goes; returns the bytes read, 0 at its end."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._start + self._position)
        read: int = self._file.readinto(view[:count])
        self._position += read
        return read

    def close(self) -> None:
        """Close the file if this object opened it."""
        if self._own and not self.closed:
            self._file.close()
        super().close()
