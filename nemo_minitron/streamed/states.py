"""Hidden states of many samples between two layers, in memory or in a file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.errors import CheckpointError

__all__ = ["States", "save_tensors"]

_TOGETHER = 1 << 23  # bytes that are written at once
#: Dtypes as the header of a safetensors file spells them.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class States:
    """``[n, s, H]`` hidden states of this rank's samples, on the CPU.

    Args:
        samples, length, width: ``n``, ``s`` and ``H``.
        dtype: of the states.
        file: where they are kept; None keeps them in memory. The pages of a file are the operating system's to write
            and to drop, so that they take no memory that is needed otherwise.
        existing: the file holds states already.

    Raises:
        CheckpointError: for a file of another size.
    """

    def __init__(
        self,
        samples: int,
        length: int,
        width: int,
        *,
        dtype: torch.dtype,
        file: Path | None = None,
        existing: bool = False,
    ) -> None:
        self.file = file
        count = samples * length * width
        if file is None or not count:
            self.tensor = torch.empty(samples, length, width, dtype=dtype)
            return
        size = count * dtype.itemsize
        if existing and (held := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: holds {held} bytes of hidden states where {size} are needed")
        if not existing:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                _reserve(stream.fileno(), size, file)
        flat = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
        self.tensor = flat.view(samples, length, width)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """``[s, b, H]`` states of the samples ``start`` to ``stop``, as Megatron's layers take them."""
        return self.tensor[start:stop].transpose(0, 1).contiguous()

    def write(self, start: int, hidden: torch.Tensor) -> None:
        """Put ``[s, b, H]`` states in the place of the samples from ``start`` on."""
        self.tensor[start : start + hidden.shape[1]].copy_(hidden.transpose(0, 1))


def _reserve(descriptor: int, size: int, file: Path) -> None:
    """Reserve a file's space: of a full disk it is said now. A write through a map would end the process.

    Raises:
        OSError: if there is no space, with the file's name.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from error


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, a few megabytes at a time; those in mapped files stay there.

    The file appears whole or not at all. One that stood there is let go and not written over: tensors that were read
    from it may be maps of it.

    Raises:
        OSError: if the disk is full.
    """
    begin = 0
    entries: dict[str, Any] = {}
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # readers map the data, which has to begin at a multiple
    aside = file.with_name(f"{file.name}.part")
    with aside.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            if tensor.nbytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                for first in range(0, len(flat), _TOGETHER):
                    stream.write(flat[first : first + _TOGETHER].data)
    aside.replace(file)
