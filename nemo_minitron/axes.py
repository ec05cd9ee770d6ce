"""THE table: for every parameter, which axis each of its dimensions lies on and how tensor parallelism cuts it.

Counting, slicing, sharding, checking and conversion all read this table; no other file knows the inner order of a
QKV matrix or of a gated MLP. A new model family is a new entry in :data:`FAMILIES`.

Canonical names are those that Megatron-core writes into a distributed checkpoint (the Transformer Engine spelling,
with ``layer_norm_weight`` inside the linear that follows it), one name a layer:
``decoder.layers.3.mlp.linear_fc2.weight``. Tensors under canonical names are global: TP 1, PP 1, vocabulary without
padding.

Torch is imported only inside the functions that build index tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from nemo_minitron.errors import ShapeError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = [
    "FAMILIES",
    "Axis",
    "Family",
    "KeptUnits",
    "Parameter",
    "axis_rows",
    "axis_size",
    "family",
    "parameter_count",
    "parameters",
    "shard_rows",
]


class Axis(Enum):
    """What one dimension of a parameter ranges over."""

    HIDDEN = "hidden"  # channels of the residual stream
    FFN = "ffn"  # MLP neurons
    GATED_FFN = "gated_ffn"  # all gates, then all up-projections: 2 x neurons
    HEADS = "heads"  # query heads x head_dim, heads in group order
    QKV = "qkv"  # per group: its query heads, its key head, its value head, each x head_dim
    VOCAB = "vocab"
    HEAD_DIM = "head_dim"  # channels within a head (QK norm)
    EXPERTS = "experts"  # experts of a mixture (rows of its router)


@dataclass(frozen=True)
class Parameter:
    """One row of a family's table.

    Attributes:
        axes: the axis of each dimension, outermost first.
        tensor_parallel_dim: the dimension that TP cuts, or None where every TP rank holds all of it.
    """

    axes: tuple[Axis, ...]
    tensor_parallel_dim: int | None = None


@dataclass(frozen=True)
class Family:
    """A model family as data.

    Attributes:
        name: key in :data:`FAMILIES`.
        layer: parameters of one decoder layer, by name below ``decoder.layers.N.``.
        first: parameters before the layers (first pipeline stage).
        last: parameters after the layers (last pipeline stage).
        output: name of the output layer, absent where embeddings are tied.
    """

    name: str
    layer: dict[str, Parameter]
    first: dict[str, Parameter]
    last: dict[str, Parameter]
    output: str = "output_layer.weight"


_NORM = Parameter((Axis.HIDDEN,))
_EMBEDDING = Parameter((Axis.VOCAB, Axis.HIDDEN), tensor_parallel_dim=0)

LLAMA = Family(
    name="llama",
    layer={
        "self_attention.linear_qkv.layer_norm_weight": _NORM,
        "self_attention.linear_qkv.weight": Parameter((Axis.QKV, Axis.HIDDEN), tensor_parallel_dim=0),
        "self_attention.linear_proj.weight": Parameter((Axis.HIDDEN, Axis.HEADS), tensor_parallel_dim=1),
        "mlp.linear_fc1.layer_norm_weight": _NORM,
        "mlp.linear_fc1.weight": Parameter((Axis.GATED_FFN, Axis.HIDDEN), tensor_parallel_dim=0),
        "mlp.linear_fc2.weight": Parameter((Axis.HIDDEN, Axis.FFN), tensor_parallel_dim=1),
    },
    first={"embedding.word_embeddings.weight": _EMBEDDING},
    last={"decoder.final_layernorm.weight": _NORM, "output_layer.weight": _EMBEDDING},
)

FAMILIES: dict[str, Family] = {LLAMA.name: LLAMA}


def family(name: str) -> Family:
    """The table of a family.

    Raises:
        ShapeError: for a family that is not in :data:`FAMILIES`.
    """
    if name not in FAMILIES:
        raise ShapeError(f"model family {name!r} is not known; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def parameters(table: Family, shape: ModelShape) -> Iterator[tuple[str, Parameter, int | None]]:
    """Every parameter of a model as ``(canonical name, row of the table, layer or None)``, in forward order."""
    for name, row in table.first.items():
        yield name, row, None
    for layer in range(shape.num_layers):
        for name, row in table.layer.items():
            yield f"decoder.layers.{layer}.{name}", row, layer
    for name, row in table.last.items():
        if not (shape.tied_embeddings and name == table.output):
            yield name, row, None


def axis_size(axis: Axis, shape: ModelShape) -> int:
    """Global length of a dimension that lies on ``axis``."""
    s = shape
    return {
        Axis.HIDDEN: s.hidden_size,
        Axis.FFN: s.ffn_hidden_size,
        Axis.GATED_FFN: 2 * s.ffn_hidden_size,
        Axis.HEADS: s.num_attention_heads * s.head_dim,
        Axis.QKV: (s.num_attention_heads + 2 * s.num_query_groups) * s.head_dim,
        Axis.VOCAB: s.vocab_size,
        Axis.HEAD_DIM: s.head_dim,
        Axis.EXPERTS: s.num_moe_experts or 0,
    }[axis]


def tensor_shape(row: Parameter, shape: ModelShape) -> tuple[int, ...]:
    """Global shape of a parameter."""
    return tuple(axis_size(axis, shape) for axis in row.axes)


def parameter_count(table: Family, shape: ModelShape) -> int:
    """Exact number of parameters, tied embeddings counted once and vocabulary padding not at all."""
    return sum(math.prod(tensor_shape(row, shape)) for _, row, _ in parameters(table, shape))


@dataclass(frozen=True)
class KeptUnits:
    """The units that survive pruning, by global index in the unpruned model. The order given is the order kept.

    ``ffn``, ``groups`` and ``heads`` have one entry for each *kept* layer.

    Attributes:
        layers: kept layers, ascending.
        hidden: kept channels of the residual stream, the same in every layer.
        ffn: per kept layer, the kept neurons.
        groups: per kept layer, the kept query groups.
        heads: per kept layer and kept group, the kept query heads (global head index), equally many in each group.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)

    @classmethod
    def everything(cls, shape: ModelShape) -> KeptUnits:
        """Keep every unit: pruning with this is the identity."""
        q, g, n = shape.heads_per_group, shape.num_query_groups, shape.num_layers
        heads = tuple(tuple(range(group * q, (group + 1) * q)) for group in range(g))
        return cls(
            layers=tuple(range(n)),
            hidden=tuple(range(shape.hidden_size)),
            ffn=(tuple(range(shape.ffn_hidden_size)),) * n,
            groups=(tuple(range(g)),) * n,
            heads=(heads,) * n,
        )

    def target(self, shape: ModelShape) -> ModelShape:
        """The shape that remains of ``shape``."""
        return shape.replace(
            num_layers=len(self.layers),
            hidden_size=len(self.hidden),
            ffn_hidden_size=len(self.ffn[0]),
            num_query_groups=len(self.groups[0]),
            num_attention_heads=sum(len(group) for group in self.heads[0]),
        )

    def faults(self, shape: ModelShape) -> list[str]:
        """Everything that makes these units impossible for a model of ``shape``; empty if they are fine."""

        def bad(name: str, indices: tuple[int, ...], size: int) -> list[str]:
            out = []
            if not indices:
                out.append(f"{name}: nothing is kept")
            if len(set(indices)) != len(indices):
                out.append(f"{name}: an index is repeated")
            if any(not 0 <= index < size for index in indices):
                out.append(f"{name}: an index lies outside 0..{size - 1}")
            return out

        found = bad("layers", self.layers, shape.num_layers) + bad("hidden", self.hidden, shape.hidden_size)
        if list(self.layers) != sorted(self.layers):
            found.append("layers: must ascend")
        for name in ("ffn", "groups", "heads"):
            if len(getattr(self, name)) != len(self.layers):
                found.append(f"{name}: {len(getattr(self, name))} layers of indices for {len(self.layers)} kept layers")
        if found:
            return found
        q = shape.heads_per_group
        for index, layer in enumerate(self.layers):
            found += bad(f"layer {layer} ffn", self.ffn[index], shape.ffn_hidden_size)
            found += bad(f"layer {layer} groups", self.groups[index], shape.num_query_groups)
            if len(self.heads[index]) != len(self.groups[index]):
                found.append(f"layer {layer} heads: one row of heads is needed for each kept group")
                continue
            for group, heads in zip(self.groups[index], self.heads[index], strict=True):
                found += bad(f"layer {layer} group {group} heads", heads, shape.num_attention_heads)
                if any(head // q != group for head in heads):
                    found.append(f"layer {layer} group {group}: a kept head belongs to another group")
            if len({len(heads) for heads in self.heads[index]}) > 1:
                found.append(f"layer {layer}: groups keep different numbers of heads")
        for name, counts in (
            ("ffn", {len(x) for x in self.ffn}),
            ("groups", {len(x) for x in self.groups}),
            ("heads", {sum(map(len, x)) for x in self.heads}),
        ):
            if len(counts) > 1:
                found.append(f"{name}: layers keep different numbers ({sorted(counts)}); a uniform model needs one")
        return found


def _blocks(starts: torch.Tensor, length: int) -> torch.Tensor:
    """``[n]`` block numbers -> ``[n * length]`` row numbers, block by block."""
    import torch

    return (starts[:, None] * length + torch.arange(length)).flatten()


def axis_rows(axis: Axis, shape: ModelShape, kept: KeptUnits, layer: int | None) -> torch.Tensor | None:
    """Rows of a global dimension that survive pruning, in their new order.

    Args:
        axis: what the dimension ranges over.
        shape: the unpruned model's.
        kept: the surviving units.
        layer: the layer's position among the *kept* layers; None for parameters outside the layers.

    Returns:
        ``[rows kept]`` int64 indices, or None where pruning does not touch the axis.
    """
    import torch

    if axis in (Axis.VOCAB, Axis.HEAD_DIM):
        return None
    if axis is Axis.HIDDEN:
        return torch.tensor(kept.hidden)
    assert layer is not None, f"{axis} exists only inside a layer"
    if axis is Axis.FFN:
        return torch.tensor(kept.ffn[layer])
    if axis is Axis.GATED_FFN:
        neurons = torch.tensor(kept.ffn[layer])
        return torch.cat([neurons, neurons + shape.ffn_hidden_size])
    if axis is Axis.HEADS:
        return _blocks(torch.tensor(kept.heads[layer]).flatten(), shape.head_dim)
    q = shape.heads_per_group
    blocks = []
    for group, heads in zip(kept.groups[layer], kept.heads[layer], strict=True):
        first = group * (q + 2)
        blocks += [first + head % q for head in heads] + [first + q, first + q + 1]
    return _blocks(torch.tensor(blocks), shape.head_dim)


def shard_rows(axis: Axis, size: int, *, rank: int, world: int) -> torch.Tensor:
    """Rows of a global dimension that tensor-parallel rank ``rank`` of ``world`` holds, in its local order.

    Megatron cuts every axis into equal runs, except that a gated MLP's rank holds its run of gates and its run of
    up-projections (``megatron.core.transformer.mlp.apply_swiglu_sharded_factory``).

    Args:
        axis: what the dimension ranges over.
        size: global length of the dimension (of VOCAB: with padding).
        rank, world: position in, and size of, the tensor-parallel group.

    Raises:
        ShapeError: if the axis does not divide.
    """
    import torch

    parts = 2 if axis is Axis.GATED_FFN else 1
    if size % (parts * world):
        raise ShapeError(f"axis {axis.value} of {size // parts} cannot be split over tensor parallel {world}")
    run = size // (parts * world)
    return torch.cat([torch.arange(run) + part * (size // parts) + rank * run for part in range(parts)])
