"""An open checkpoint, the same class for every format: sizes, constants, lazily read tensors and the tokenizer.

Each format's reader and writer (``formats/*/checkpoint.py``) open a path as a :class:`Checkpoint` and write one. All
that happens between reading and writing (offline pruning, casting, loading into a live model) is a function of
:class:`Weights`, which reads one tensor at a time, so a conversion needs the memory of one tensor, not of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import Family, family
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Weights"]


class Weights(Protocol):
    """Global tensors under canonical names (see :mod:`nemo_minitron.axes`), read on demand.

    The vocabulary has its true number of rows; the formats' readers and writers remove and add padding.
    """

    def names(self) -> Sequence[str]:
        """Canonical names in the order of the forward pass."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on CPU, in the stored dtype.

        Raises:
            CheckpointError: if it is missing, truncated or of the wrong shape.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: metadata read, tensors not.

    Attributes:
        shape: its sizes.
        architecture: its constants.
        weights: its tensors.
        tokenizer: directory with HF tokenizer files (chat template included), or None where it carries none.
        path: where it was opened.
        format: its name in :data:`nemo_minitron.checkpoints.formats.FORMATS`.
        lineage: what it was made from; written beside the weights as ``minitron.json``.
    """

    shape: ModelShape
    architecture: Architecture
    weights: Weights
    tokenizer: Path | None
    path: Path
    format: str
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The axes table of this model."""
        return family(self.architecture.family)
