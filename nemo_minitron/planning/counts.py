"""Numbers of parameters as functions of the sizes that a search varies, read off the axes of a family's parameters."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar, cast

from nemo_minitron import axes
from nemo_minitron.axes import Axis
from nemo_minitron.shape import ModelShape, share_layers

__all__ = ["LayerCost", "SizesLike", "layer_cost", "layers_of_ranks", "outer_counts"]


class SizesLike(Protocol):
    """The sizes of a shape that its cost depends on: a :class:`~nemo_minitron.shape.ModelShape`, or a candidate."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def num_query_groups(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def num_moe_experts(self) -> int | None: ...  # noqa: D102
    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def ffn_hidden_size(self) -> int: ...  # noqa: D102


Sizes = TypeVar("Sizes", bound=SizesLike)


class LayerCost(NamedTuple):
    """Parameters of a layer: affine in these sizes, for a width of the residual stream and a number of experts.

    Attributes:
        attention, mlp: of that part, whatever its sizes: its norms, a router.
        per_group, per_head: for each query group, and for each query head.
        per_neuron: for each neuron of the MLP's width, in all experts together.
    """

    attention: float
    per_group: float
    per_head: float
    mlp: float
    per_neuron: float

    def parameters(self, sizes: SizesLike) -> float:
        """Of a layer of these sizes; a part of size 0 has none."""
        attention, _, _, mlp, _ = self
        groups, neurons = sizes.num_query_groups, sizes.ffn_hidden_size
        attention += self.per_group * groups + self.per_head * sizes.num_attention_heads
        mlp += self.per_neuron * neurons
        return (attention if groups else 0) + (mlp if neurons else 0)


def layer_cost(
    table: axes.Family,
    *,
    hidden_size: int,
    head_dim: int,
    experts: int | None = None,
    active: int | None = None,
    tensor: int = 1,
    expert: int = 1,
) -> LayerCost:
    """The cost of a layer on each of ``tensor * expert`` ranks; whole numbers on one.

    Args:
        table: of the family.
        hidden_size: width of the residual stream.
        head_dim: channels of a head.
        experts: of a mixture.
        active: experts whose parameters count, such as those that a token is sent to; None counts all. The router
            counts whole.
        tensor: tensor-parallel ranks.
        expert: expert-parallel ranks.
    """
    lengths = {Axis.HIDDEN: hidden_size, Axis.HEAD_DIM: head_dim, Axis.EXPERTS: experts or 0}
    varying = {
        Axis.FFN: {"per_neuron": 1},
        Axis.GATED_FFN: {"per_neuron": 2},
        Axis.HEADS: {"per_head": head_dim},
        Axis.QKV: {"per_head": head_dim, "per_group": 2 * head_dim},
    }
    cost: dict[str, float] = dict.fromkeys(LayerCost._fields, 0)
    counted = (experts or 0) if active is None else active
    own = counted if expert == 1 else counted / expert
    rows: list[tuple[axes.Parameter, float]] = [
        *((row, 1) for row in table.layer.values()),
        *((row, own) for row in table.expert.values()),
    ]
    for row, copies in rows:
        terms: dict[str, int] = {row.part or "mlp": 1}
        for axis in row.axes:
            if axis in varying:
                terms = varying[axis]  # once a row
        count = copies * math.prod(lengths[axis] for axis in row.axes if axis not in varying)
        share = _share(count, row, tensor)
        for name, times in terms.items():
            cost[name] += times * share
    return LayerCost(**cost)


def layers_of_ranks(sizes: Sizes, *, pipeline: int, virtual_pipeline: int | None = None) -> list[Counter[Sizes]]:
    """Layers of each pipeline rank, its chunks together: how many of which sizes.

    Args:
        sizes: of the model; a layout that it cannot be shared out over leaves ranks without layers.
        pipeline: pipeline stages.
        virtual_pipeline: model chunks of each, or None for one.
    """
    own = None if not isinstance(sizes, ModelShape) or sizes.uniform else iter(cast(list[Sizes], sizes.each()))
    ranks: list[Counter[Sizes]] = [Counter() for _ in range(pipeline)]
    for run, count in enumerate(share_layers(sizes.num_layers, pipeline * (virtual_pipeline or 1))):
        if own is None:
            ranks[run % pipeline][sizes] += count
        else:
            ranks[run % pipeline].update(itertools.islice(own, count))
    return ranks


def outer_counts(table: axes.Family, shape: ModelShape, *, hidden_size: int, tensor: int = 1) -> tuple[float, float]:
    """Parameters before and after the layers on each of ``tensor`` ranks; tied embeddings lie before.

    Args:
        table: of the family.
        shape: for the vocabulary, and whether embeddings are tied.
        hidden_size: width of the residual stream.
        tensor: tensor-parallel ranks.
    """
    lengths = {Axis.HIDDEN: hidden_size, Axis.VOCAB: shape.vocab_size}
    tied = {table.output} if shape.tied_embeddings else set()

    def count(rows: Mapping[str, axes.Parameter]) -> float:
        return sum(
            _share(math.prod(lengths[axis] for axis in row.axes), row, tensor)
            for name, row in rows.items()
            if name not in tied
        )

    return count(table.first), count(table.last)


def _share(count: float, row: axes.Parameter, tensor: int) -> float:
    """What one rank holds of so many numbers of a parameter."""
    return count if tensor == 1 or row.tensor_parallel_dim is None else count / tensor
