"""Prune a checkpoint into a checkpoint, one tensor at a time, without a process group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint, Weights
from nemo_minitron.checkpoints.tokenizer.trimming import renumber
from nemo_minitron.errors import ShapeError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["PrunedWeights", "prune_weights"]


@dataclass(frozen=True)
class PrunedWeights:
    """``inner`` with only the kept rows and columns of every tensor. Implements ``Weights``; holds one source tensor.

    Attributes:
        inner: tensors of the unpruned model.
        table: its family.
        shape: its sizes.
        kept: its units that stay.
    """

    inner: Weights
    table: axes.Family
    shape: ModelShape
    kept: KeptUnits

    def names(self) -> Sequence[str]:
        """Canonical names of the pruned model, whose layers are numbered anew."""
        return list(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """The pruned tensor, in the stored dtype.

        Raises:
            KeyError: for a name that the pruned model does not have.
        """
        entry = self._entries[name]
        tensor = self.inner.tensor(self.kept.source(name))
        for dim, axis in enumerate(entry.row.axes):
            rows = axes.axis_rows(axis, self.shape, self.kept, entry.layer, entry.row.expert)
            if rows is not None:
                tensor = tensor.index_select(dim, rows)
        return tensor.contiguous()

    @cached_property
    def _entries(self) -> dict[str, axes.Entry]:
        return {entry.name: entry for entry in axes.parameters(self.table, self.kept.target(self.shape))}


def prune_weights(checkpoint: Checkpoint, kept: KeptUnits, *, lineage: dict[str, Any] | None = None) -> Checkpoint:
    """The pruned checkpoint. No tensor is read before it is asked for.

    Where the vocabulary is trimmed, the result has no tokenizer (the full one does not fit it): the caller gives it the
    trimmed one (:func:`nemo_minitron.checkpoints.tokenizer.trimming.trim_tokenizer`).

    Args:
        checkpoint: unpruned.
        kept: units that stay, by their indices in ``checkpoint``.
        lineage: what to record about the pruning (method, scores), beside the parent's path, shape and own lineage.

    Raises:
        ShapeError: if the units do not fit the checkpoint, with every fault.
    """
    if faults := kept.faults(checkpoint.shape):
        raise ShapeError(faults)
    architecture, tokenizer = checkpoint.architecture.of_layers(kept.layers), checkpoint.tokenizer
    if faults := architecture.faults(kept.target(checkpoint.shape)):
        raise ShapeError(faults)
    if kept.vocab is not None:
        architecture, tokenizer = renumber(architecture, kept.vocab), None
    parent = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "shape": checkpoint.shape.to_dict(),
        "lineage": checkpoint.lineage,
    }
    return dataclasses.replace(
        checkpoint,
        shape=kept.target(checkpoint.shape),
        architecture=architecture,
        tokenizer=tokenizer,
        weights=PrunedWeights(checkpoint.weights, checkpoint.family, checkpoint.shape, kept),
        lineage={"made_by": "prune", **(lineage or {}), "parents": {"model": parent}},
    )
