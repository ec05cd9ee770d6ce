"""Safetensors files written tensor by tensor, so that a file of any size costs the memory of one tensor.

A file is eight bytes with the length of its header, the header (JSON: names, dtypes, shapes, places), and the data
without gaps. All of the header follows from names and shapes, so it is written before any tensor is read. The form:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from nemo_minitron.checkpoints.weights import DTYPES
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["ShardWriter", "plan_shards"]

#: Our dtypes as the header spells them.
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}

#: The part of the limit below which a shard is too small to stand alone.
_SMALL = 1 / 8


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Share tensors out over files, in their order, each file filled up to the limit.

    A tensor above the limit gets a file of its own; a small file before such a tensor joins it, and a small last file
    takes its part of the one before, so that none of a few kilobytes is left.

    Args:
        sizes: bytes of each tensor.
        limit: bytes that a file may hold.

    Returns:
        The names in each file.
    """
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        joins = size > limit and held < _SMALL * limit
        if not shards or (held + size > limit and not joins):
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) > 1 and held < _SMALL * limit:
        last = shards[-2] + shards[-1]
        first = list(itertools.accumulate(sizes[name] for name in last))
        evenness = [min(size, first[-1] - size) if first[-1] - size <= limit else -1 for size in first[:-1]]
        index = evenness.index(max(evenness)) + 1
        shards[-2:] = [last[:index], last[index:]]
    return shards


class ShardWriter:
    """Writes ``model.safetensors``, or shards and their index, one tensor after the other.

    A context manager; the directory is complete when it ends without an error. Files get the mode that the umask says.

    Args:
        directory: an existing directory.
        shapes: every tensor that will come, in that order.
        dtype: of all tensors, a key of :data:`~nemo_minitron.checkpoints.weights.DTYPES`.
        limit: bytes of tensors that a file may hold.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int) -> None:
        self._directory, self._shapes, self._dtype = directory, shapes, dtype
        self._sizes = {name: math.prod(shape) * DTYPES[dtype] for name, shape in shapes.items()}
        shards = plan_shards(self._sizes, limit)
        count = len(shards)
        self._files = {
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors": names
            for number, names in enumerate(shards, start=1)
        }
        self._steps = self._places()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor.

        Raises:
            CheckpointError: if it is not the tensor whose turn it is, or has another shape or dtype than announced.
            OSError: if it cannot be written.
        """
        import torch

        expected, file, opens = next(self._steps, ("no tensor", "", False))
        if (name, tuple(tensor.shape), tensor.dtype) != (
            expected,
            self._shapes.get(name),
            getattr(torch, self._dtype),
        ):
            raise CheckpointError(
                f"{self._directory / file}: {name}, {list(tensor.shape)} in {tensor.dtype}, came where the header says "
                f"{expected}, {list(self._shapes.get(expected, ()))} in {self._dtype}; write the tensors as announced"
            )
        if opens:
            self._close()
            self._file = open(self._directory / file, "wb")  # noqa: SIM115 (closed when the next begins)
            self._file.write(self._header(self._files[file]))
        assert self._file is not None
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            return
        if (left := next(self._steps, None)) is not None:
            raise CheckpointError(f"{self._directory / left[1]} is not complete: {left[0]} was not written; write it")
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": {name: file for file, names in self._files.items() for name in names},
            }
            path = self._directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _places(self) -> Iterator[tuple[str, str, bool]]:
        """Each tensor, its file, and whether it is the first there."""
        for file, names in self._files.items():
            for index, name in enumerate(names):
                yield name, file, index == 0

    def _header(self, names: list[str]) -> bytes:
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + self._sizes[name]
            content[name] = {
                "dtype": _CODES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [start, end],
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
        return struct.pack("<Q", len(text)) + text

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
