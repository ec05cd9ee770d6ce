"""The checksums in a distributed checkpoint: each chunk is a zip archive with a CRC-32 of every member.

``torch.load`` does not look at them (its reader is built without the check), nor does anything in Megatron or NeMo. So
a flipped bit of a weight would be read as another weight.
"""

from __future__ import annotations

import zipfile
from typing import Any, BinaryIO

from nemo_minitron.checkpoints.formats.nemo1.window import Window

try:  # four times as fast as zlib, of the same values
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["SummedWindow", "crc32", "damage"]

_BLOCK = 1 << 19  # bytes that are read at once: they stay in the processor's cache until they are summed
_HEADER = 30  # bytes of a member's own header, before its name


class SummedWindow(Window):
    """A :class:`Window` that sums what is read of it in large pieces, block by block, while it is in the cache.

    Attributes:
        sums: CRC-32 of each such piece: ``{(start, length): sum}``.
    """

    def __init__(self, source: BinaryIO, start: int, length: int) -> None:
        super().__init__(source, start, length)
        self.sums: dict[tuple[int, int], int] = {}

    def readinto(self, buffer: Any) -> int:
        """As :meth:`Window.readinto`."""
        view = memoryview(buffer).cast("B")
        if len(view) < _BLOCK:
            return super().readinto(view)
        start, done, total = self.tell(), 0, 0
        while done < len(view) and (count := super().readinto(view[done : done + _BLOCK])):
            total = crc32(view[done : done + count], total)
            done += count
        self.sums[start, done] = total
        return done


def damage(file: BinaryIO | Window) -> str | None:
    """What is wrong with a stored chunk; None if each of its members has the checksum that was written with it.

    A chunk that was written without checksums (``torch.serialization.set_crc32_options(False)``) has zeros there, and
    is taken as it is.

    Args:
        file: of exactly the chunk. What a :class:`SummedWindow` has read as a whole member is not read again.
    """
    try:
        members = zipfile.ZipFile(file).infolist()
        if not any(member.CRC for member in members):
            return None
        buffer = memoryview(bytearray(_BLOCK))
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                return f"{member.filename} is compressed, which torch.save does not do"
            if _sum(file, member, buffer) != member.CRC:
                return f"the checksum of {member.filename} differs"
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None


def _sum(file: BinaryIO | Window, member: zipfile.ZipInfo, buffer: memoryview) -> int:
    """CRC-32 of a member's bytes; ``zipfile`` would copy them several times."""
    file.seek(member.header_offset)
    header = file.read(_HEADER)
    if len(header) < _HEADER or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"the header of {member.filename} is damaged")
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = member.header_offset + _HEADER + sum(lengths)
    if isinstance(file, SummedWindow) and (known := file.sums.get((start, member.file_size))) is not None:
        return known
    file.seek(start)
    left, total = member.file_size, 0
    while left:
        count = file.readinto(buffer[: min(left, _BLOCK)])  # type: ignore[union-attr]
        if not count:
            raise EOFError(f"{member.filename} ends early")
        total = crc32(buffer[:count], total)
        left -= count
    return total
