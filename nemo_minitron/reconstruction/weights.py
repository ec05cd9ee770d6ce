"""Checkpoints in which some tensors are replaced, and the check that a model was cut from a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint, Weights
from nemo_minitron.errors import CheckpointError
from nemo_minitron.pruning import prune_weights

__all__ = ["ReplacedWeights", "TensorsReplaced", "check_cut"]


@dataclass(frozen=True)
class ReplacedWeights:
    """``inner`` with some tensors from safetensors files. Implements :class:`~nemo_minitron.checkpoints.base.Weights`.

    Attributes:
        inner: all tensors.
        files: file of each tensor that is replaced, by its name.
    """

    inner: Weights
    files: Mapping[str, Path]

    def names(self) -> Sequence[str]:
        """The names of ``inner``."""
        return self.inner.names()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in the stored dtype."""
        from safetensors import safe_open

        if name not in self.files:
            return self.inner.tensor(name)
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class TensorsReplaced:
    """``inner`` with some tensors from memory. Implements :class:`~nemo_minitron.checkpoints.base.Weights`.

    Attributes:
        inner: all tensors.
        tensors: those that are replaced, by their names.
    """

    inner: Weights
    tensors: Mapping[str, torch.Tensor]

    def names(self) -> Sequence[str]:
        """The names of ``inner``."""
        return self.inner.names()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor."""
        return self.tensors[name] if name in self.tensors else self.inner.tensor(name)


def check_cut(student: Checkpoint, teacher: Checkpoint, kept: KeptUnits, *, merged_heads: bool = False) -> None:
    """Make sure that a model is what pruning left of a teacher, and has not been trained since.

    Sizes are compared, and the tensors of the first and the last kept layer and outside the layers.

    Args:
        student: pruned.
        teacher: that it was cut from.
        kept: the units that stayed.
        merged_heads: pruned heads were merged into kept ones, so that attention's weights are others.

    Raises:
        CheckpointError: if it is another model.
    """
    if (faults := kept.faults(teacher.shape)) or kept.target(teacher.shape) != student.shape:
        reason = faults[0] if faults else "sizes differ"
        raise CheckpointError(
            f"{student.path}: was not cut from {teacher.path} by its kept units ({reason}); give the teacher that "
            "`minitron prune` read"
        )
    cut = prune_weights(teacher, kept)
    last = student.shape.num_layers - 1
    for entry in axes.parameters(student.family, student.shape):
        if entry.layer not in (None, 0, last) or (merged_heads and ".linear_qkv." in entry.name):
            continue
        own, expected = student.weights.tensor(entry.name), cut.weights.tensor(entry.name)
        if not torch.equal(own, expected.to(own.dtype)):
            raise CheckpointError(
                f"{student.path}: {entry.name} is not what pruning leaves of {teacher.path}; reconstruct the pruned "
                "model before it is trained, and give the teacher that `minitron prune` read"
            )
