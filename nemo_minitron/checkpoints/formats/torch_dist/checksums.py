"""The checksums in a distributed checkpoint: each chunk is a zip archive with a CRC-32 of every member.

``torch.load`` does not look at them (its reader is built without the check), nor does anything in Megatron or NeMo. So
a flipped bit of a weight would be read as another weight.
"""

from __future__ import annotations

import zipfile
from typing import BinaryIO

__all__ = ["damage"]

_BLOCK = 1 << 22  # bytes that are read at once


def damage(file: BinaryIO) -> str | None:
    """What is wrong with a stored chunk; None if each of its members has the checksum that was written with it.

    A chunk that was written without checksums (``torch.serialization.set_crc32_options(False)``) has zeros there, and
    is taken as it is.

    Args:
        file: of exactly the chunk.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if not any(member.CRC for member in members):
                return None
            for member in members:
                with archive.open(member) as stream:  # raises at the end of a member whose checksum differs
                    while stream.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None
