"""The checksums in a distributed checkpoint: each chunk is a zip archive with a CRC-32 of every member.

``torch.load`` does not look at them (its reader is built without the check), nor does anything in Megatron or NeMo. So
a flipped bit of a weight would be read as another weight.
"""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING, BinaryIO

from nemo_minitron.checkpoints.formats.nemo1.window import Window

if TYPE_CHECKING:
    import torch

__all__ = ["damage"]

_BLOCK = 1 << 20  # bytes that are read at once: they stay in the processor's cache until they are summed
_HEADER = 30  # bytes of a member's own header, before its name


def damage(file: BinaryIO | Window, loaded: torch.Tensor | None = None) -> str | None:
    """What is wrong with a stored chunk; None if each of its members has the checksum that was written with it.

    A chunk that was written without checksums (``torch.serialization.set_crc32_options(False)``) has zeros there, and
    is taken as it is.

    Args:
        file: of exactly the chunk.
        loaded: what ``torch.load`` made of it: its bytes are then summed in memory, and not read again.
    """
    try:
        members = zipfile.ZipFile(file).infolist()
        if not any(member.CRC for member in members):
            return None
        buffer = memoryview(bytearray(_BLOCK))
        held = None if loaded is None else _bytes_of(loaded)
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                return f"{member.filename} is compressed, which torch.save does not do"
            in_memory = held is not None and member.filename.endswith("/data/0") and member.file_size == len(held)
            total = zlib.crc32(held) if held is not None and in_memory else _sum(file, member, buffer)
            if total != member.CRC:
                return f"the checksum of {member.filename} differs"
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's storage, without a copy."""
    import torch

    return memoryview(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())


def _sum(file: BinaryIO | Window, member: zipfile.ZipInfo, buffer: memoryview) -> int:
    """CRC-32 of a member's bytes; ``zipfile`` would copy them several times."""
    file.seek(member.header_offset)
    header = file.read(_HEADER)
    if len(header) < _HEADER or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"the header of {member.filename} is damaged")
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    file.seek(member.header_offset + _HEADER + sum(lengths))
    left, total = member.file_size, 0
    while left:
        count = file.readinto(buffer[: min(left, _BLOCK)])  # type: ignore[union-attr]
        if not count:
            raise EOFError(f"{member.filename} ends early")
        total = zlib.crc32(buffer[:count], total)
        left -= count
    return total
