"""Files of a GGUF model: one, or several parts; the keys of their header, and where their tensors lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.accounting import Noted
from nemo_minitron.errors import CheckpointError
from nemo_minitron.runtime.requirements import require

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

__all__ = ["GGUFContent", "read_gguf"]

MAGIC = b"GGUF"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFContent:
    """What a model's GGUF files hold.

    Attributes:
        path: the file, of several parts the first.
        fields: keys of the header; it notes which are read.
        tensors: by name; their data stay on the disk.
    """

    path: Path
    fields: Noted
    tensors: dict[str, ReaderTensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first, as torch has it; the file has it the other way round."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def tensor(self, name: str, part: int | None = None) -> torch.Tensor:
        """A tensor's numbers in float32, on CPU: those that llama.cpp's own ``gguf`` package dequantizes.

        Args:
            name: of the tensor.
            part: of its first dimension; None for all of it.

        Raises:
            CheckpointError: for a quantization that the package cannot undo.
        """
        import numpy as np
        import torch
        from gguf.quants import dequantize

        stored, shape = self.tensors[name], self.shape(name)
        data, shape = (stored.data, shape) if part is None else (stored.data[part], shape[1:])
        try:
            numbers = dequantize(data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {stored.tensor_type.name}, which cannot be read ({error}); use a "
                "file of another quantization"
            ) from error
        return torch.from_numpy(np.array(numbers, dtype=np.float32).reshape(shape))


def read_gguf(source: Path) -> GGUFContent:
    """Open a GGUF file, and all parts of the model that it is a part of. Tensors are read later, one at a time.

    Raises:
        CheckpointError: for a file that is missing, damaged or big-endian; for parts that are missing or of another
            model.
        MissingDependency: without the ``gguf`` package.
    """
    require("gguf", for_="reading GGUF")
    paths = _parts(source)
    readers = [_open(path) for path in paths]
    fields = _fields(paths[0], readers[0])
    tensors: dict[str, ReaderTensor] = {}
    for path, reader in zip(paths, readers, strict=True):
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{path}: {tensor.name} is in another part too; the parts are of several models")
            tensors[tensor.name] = tensor
    _check_parts(paths, readers, fields, len(tensors))
    return GGUFContent(paths[0], Noted(fields), tensors)


def _parts(source: Path) -> list[Path]:
    """All parts of a model, in their order."""
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist; check the path")
    match = _PART.fullmatch(source.name)
    if match is None:
        return [source]
    count = int(match[3])
    parts = [source.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{source} is one of {count} parts, and {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} "
            "missing; put all parts into one directory"
        )
    return parts or [source]


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFEndian, GGUFReader

    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
    try:
        reader = GGUFReader(path, "r")
    except Exception as error:  # on damaged bytes the package fails in any way
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError(f"{path} is big-endian, which is not supported; use a little-endian file")
    return reader


def _fields(path: Path, reader: GGUFReader) -> dict[str, Any]:
    try:
        # those that begin with GGUF. are made up by the package
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from error


def _check_parts(paths: list[Path], readers: list[GGUFReader], fields: dict[str, Any], tensors: int) -> None:
    """Hold the parts against what each header says of them."""
    for number, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        own = fields if number == 0 else _fields(path, reader)
        count, place = own.get("split.count"), own.get("split.no")
        if len(paths) == 1 and count in (None, 0, 1):
            continue
        if count != len(paths):
            raise CheckpointError(
                f"{path}: its header says split.count={count}, its name makes it one of {len(paths)} parts; give all "
                "parts the names that llama.cpp gave them (model-00001-of-00003.gguf)"
            )
        if place != number:
            raise CheckpointError(
                f"{path}: its header says split.no={place}, its name {number}; the parts are mixed up"
            )
        if own.get("split.tensors.count") not in (None, tensors):
            raise CheckpointError(
                f"{path}: its header says split.tensors.count={own['split.tensors.count']}, the parts hold {tensors}; "
                "the parts are of several models"
            )
