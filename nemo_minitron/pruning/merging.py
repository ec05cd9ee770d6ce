"""Merge pruned heads into kept heads: the difference of a kept and a pruned head is added to the kept head.

Minitron (arXiv 2407.14679, section 2.3): of ``L`` heads in order of importance, ``K`` of which stay, head ``i`` becomes
``head_i + (head_i - head_(2K - i + 1))``, so that the least important kept head is paired with the most important
pruned head, and so on outwards. With ``L < 2K`` the first heads have no partner and stay as they are; with
``L > 2K`` the last pruned heads have no partner. With grouped query attention only query heads are merged.

A head means the weights of its queries, keys and values; the output projection, which mixes the heads, is left alone.
Heads of a group share key and value, so only their queries are merged, within each kept group; heads of a pruned group
are not merged, since their queries belong to other keys. In multi-head attention, where a group is one
head, the heads of a layer are merged with their keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron import axes
from nemo_minitron.axes import Axis, KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint, Weights
from nemo_minitron.errors import NonFiniteError, ShapeError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["MergedHeads", "head_pairs", "merge_pruned_heads"]

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MergedHeads:
    """``inner`` with the pruned heads merged into the kept ones, in the unpruned shape. Holds two copies of a tensor.

    Attributes:
        inner: tensors of the unpruned model.
        table: its family.
        shape: its sizes.
        pairs: layer -> ``(kept head, pruned head)``, global head numbers.
    """

    inner: Weights
    table: axes.Family
    shape: ModelShape
    pairs: Mapping[int, Pairs]

    def names(self) -> Sequence[str]:
        """Those of the unpruned model."""
        return self.inner.names()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the stored dtype; merged ones are computed in fp32 at least.

        Raises:
            KeyError: for a name that the model does not have.
        """
        import torch

        tensor = self.inner.tensor(name)
        entry = axes.entry(self.table, self.shape, name)
        pairs = self.pairs.get(entry.layer, ()) if entry.layer is not None else ()
        if Axis.QKV not in entry.row.axes or not pairs:
            return tensor
        dim = entry.row.axes.index(Axis.QKV)
        kept, gone = (_blocks([pair[side] for pair in pairs], entry.sizes.heads_per_group) for side in (0, 1))
        heads = tensor.unflatten(dim, (-1, self.shape.head_dim)).to(torch.promote_types(tensor.dtype, torch.float32))
        merged = heads.index_select(dim, kept).mul_(2).sub_(heads.index_select(dim, gone))
        return heads.index_copy(dim, kept, merged).flatten(dim, dim + 1).to(tensor.dtype)


def _blocks(heads: Sequence[int], q: int) -> torch.Tensor:
    """Where the heads lie on the QKV axis of a layer with ``q`` heads a group, in blocks of ``head_dim`` rows.

    A head that has keys and values of its own takes them along.
    """
    import torch

    return torch.tensor(axes.head_blocks(heads, q, keys_values=q == 1))


def merge_pruned_heads(checkpoint: Checkpoint, kept: KeptUnits, importance: torch.Tensor) -> Checkpoint:
    """The unpruned checkpoint with the heads that ``kept`` will prune merged into those that it keeps.

    It is pruned as any other checkpoint, by :func:`~nemo_minitron.pruning.prune_weights` or, loaded into a live model,
    by :class:`~nemo_minitron.pruning.WidthPrune`, with the same ``kept``.

    Args:
        checkpoint: unpruned.
        kept: units that will stay.
        importance: ``[L, A]`` scores of the query heads, by which heads are paired.

    Raises:
        ShapeError: if the units or the scores do not fit the checkpoint.
        NonFiniteError: if a score is NaN or infinite.
    """
    return dataclasses.replace(
        checkpoint,
        weights=MergedHeads(
            checkpoint.weights, checkpoint.family, checkpoint.shape, head_pairs(checkpoint.shape, kept, importance)
        ),
    )


def head_pairs(shape: ModelShape, kept: KeptUnits, importance: torch.Tensor) -> dict[int, Pairs]:
    """Layer -> ``(kept head, pruned head)``; equal scores: the head of the lower number counts as the more important.

    Raises:
        ShapeError, NonFiniteError: as :func:`merge_pruned_heads`.
    """
    if faults := kept.faults(shape):
        raise ShapeError(faults)
    if tuple(importance.shape) != (shape.num_layers, shape.num_attention_heads):
        raise ShapeError(
            f"the scores of heads are {list(importance.shape)}, the model has {shape.num_layers} layers of "
            f"{shape.num_attention_heads} heads; score this model first"
        )
    if not bool(importance.isfinite().all()):
        layer = int((~importance.isfinite()).any(dim=1).nonzero()[0])
        raise NonFiniteError(f"layer {layer} heads: a score is not finite; score the model again")
    by_layer: dict[int, Pairs] = {}
    for position, layer in enumerate(kept.layers):
        q = shape.at(layer).heads_per_group
        scores = importance[layer].tolist()
        if q == 1:
            families = [([head for group in kept.heads[position] for head in group], range(shape.num_attention_heads))]
        else:
            families = [
                (list(heads), range(group * q, (group + 1) * q))
                for group, heads in zip(kept.groups[position], kept.heads[position], strict=True)
            ]
        pairs: list[tuple[int, int]] = []
        for stay, all_heads in families:
            ranked = sorted(all_heads, key=lambda head: (-scores[head], head))
            staying = [head for head in ranked if head in stay]
            going = [head for head in ranked if head not in stay]
            # head K with head K + 1, head K - 1 with head K + 2, ...
            pairs += zip(reversed(staying), going, strict=False)
        by_layer[layer] = tuple(sorted(pairs))
    return by_layer
