"""Functions that several formats share: the table check, casting, stored dtypes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Weights
from nemo_minitron.errors import CheckpointError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "CastWeights", "names_and_shapes", "torch_dtype", "writing_order"]

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Dtypes a checkpoint may have, with the bytes of one element."""


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        CheckpointError: for a dtype that is not supported in checkpoints.
    """
    import torch

    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one that checkpoints are written in; use {', '.join(DTYPES)}")
    return getattr(torch, name)


def dtype_name(dtypes: Sequence[torch.dtype], where: str) -> str:
    """The dtype that holds all of ``dtypes`` without loss, by name.

    Raises:
        CheckpointError: for quantized or integer weights, or no weights at all.
    """
    import torch

    if not dtypes:
        raise CheckpointError(f"{where} holds no weights")
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    name = str(widest).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"{where} stores weights as {name}, which is not supported; convert them to one of {', '.join(DTYPES)}"
        )
    return name


def names_and_shapes(architecture: Architecture, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model with its global shape, in the order of the forward pass."""
    table = axes.family(architecture.family)
    return {entry.name: entry.shape for entry in axes.parameters(table, shape)}


def writing_order(architecture: Architecture, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """:func:`names_and_shapes` with the tensors outside the layers first.

    The allocator keeps the memory of the layers' small tensors. An output layer after them would come on top of that.
    """
    shapes = names_and_shapes(architecture, shape)
    return dict(sorted(shapes.items(), key=lambda item: item[0].startswith("decoder.layers.")))


@dataclasses.dataclass(frozen=True)
class CastWeights:
    """``inner`` with every tensor cast on reading. Implements :class:`Weights`; adds the cast copy of one tensor.

    Attributes:
        sums: CRC-32 of each tensor that was read, after the cast.
    """

    inner: Weights
    dtype: str
    sums: dict[str, int] = dataclasses.field(default_factory=dict)

    def names(self) -> Sequence[str]:
        """The names of ``inner``."""
        return self.inner.names()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in ``dtype``."""
        import torch

        from nemo_minitron.checkpoints.formats.torch_dist.checksums import crc32

        tensor = self.inner.tensor(name).to(torch_dtype(self.dtype)).contiguous()
        self.sums[name] = crc32(tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor

    def content(self) -> str:
        """A hash of all tensors, for the model record of what was written: ``<dtype>-<16 hexadecimal digits>``."""
        lines = "".join(f"{name} {self.sums[name]:08x}\n" for name in sorted(self.sums))
        return f"{self.dtype}-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
