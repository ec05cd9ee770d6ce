"""What every checkpoint is to the rest of the suite, whatever its format: sizes, constants, lazy tensors, tokenizer.

A door (``formats/*/door.py``) opens a path as a :class:`Checkpoint` and writes one.
Everything between two doors (pruning offline, casting, loading into a live model) is a function of :class:`Weights`,
which reads one tensor at a time, so the memory of a conversion is one tensor and not one model.
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

    Vocabulary rows are the true vocabulary's: padding is a matter of the doors.
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
