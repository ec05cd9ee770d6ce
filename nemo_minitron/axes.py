"""The axes table: for every parameter, the axis of each dimension and how tensor parallelism cuts it.

Counting, slicing, sharding, checking and conversion all read this table. A model family is a file in
:mod:`nemo_minitron.families`. No other file than this one knows the inner order of a QKV matrix or of a gated MLP
(:attr:`Axis.QKV`, :attr:`Axis.GATED_FFN`): :func:`split_qkv`, :func:`split_gate`, :func:`head_blocks` and their like
take them apart.

Canonical names are those that Megatron-core writes into a distributed checkpoint (the Transformer Engine spelling,
with ``layer_norm_weight`` inside the linear that follows it), one name a layer and one an expert:
``decoder.layers.3.mlp.linear_fc2.weight``, ``decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight``. Tensors
under canonical names are global: TP 1, PP 1, vocabulary without padding.

Torch is imported only inside the functions that build index tensors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.errors import ShapeError
from nemo_minitron.families import FAMILIES
from nemo_minitron.families.entry import Axis, Family, Parameter
from nemo_minitron.shape import ModelShape
from nemo_minitron.units import KeptUnits

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXPERTS",
    "FAMILIES",
    "Axis",
    "Entry",
    "Family",
    "KeptUnits",
    "NameParts",
    "Parameter",
    "axis_parts",
    "axis_rows",
    "axis_size",
    "entry",
    "family",
    "head_blocks",
    "join_gate",
    "join_qkv",
    "layer_count",
    "layer_parameters",
    "name_parts",
    "parameter",
    "parameter_count",
    "parameters",
    "shard_rows",
    "split_gate",
    "split_qkv",
    "tensor_shape",
]


EXPERTS = "mlp.experts.local_experts."
"""Before an expert's number in the names of its parameters: Megatron's module of experts computed one by one."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?(.+)")


class NameParts(NamedTuple):
    """The parts of a canonical name; see :func:`name_parts`.

    Attributes:
        layer: number of the layer; None outside the layers.
        expert: number of the expert; None outside experts.
        below: name below ``decoder.layers.N.`` or below the expert's module; outside the layers the whole name.
    """

    layer: int | None
    expert: int | None
    below: str


def name_parts(name: str) -> NameParts:
    """Take a canonical name apart."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return NameParts(None, None, name)
    return NameParts(int(match[1]), None if match[2] is None else int(match[2]), match[3])


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of a model.

    Attributes:
        name: canonical name.
        row: its row of the family's table.
        layer: number of its layer; None outside the layers.
        sizes: sizes of that layer; outside the layers, those of the model.
    """

    name: str
    row: Parameter
    layer: int | None
    sizes: ModelShape

    @property
    def shape(self) -> tuple[int, ...]:
        """Its global shape."""
        return tensor_shape(self.row, self.sizes)

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def family(name: str) -> Family:
    """The table of a family.

    Raises:
        ShapeError: for a family that is not in :data:`~nemo_minitron.families.FAMILIES`.
    """
    if name not in FAMILIES:
        raise ShapeError(f"model family {name!r} is not known; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def parameters(table: Family, shape: ModelShape) -> Iterator[Entry]:
    """Every parameter of a model, in forward order.

    Each expert's parameters come under names of their own, with :attr:`Parameter.expert` set in their rows.
    """
    for name, row in table.first.items():
        yield Entry(name, row, None, shape)
    for layer, sizes in enumerate(shape.each()):
        for name, row in layer_parameters(table, sizes).items():
            yield Entry(f"decoder.layers.{layer}.{name}", row, layer, sizes)
    for name, row in table.last.items():
        if not (shape.tied_embeddings and name == table.output):
            yield Entry(name, row, None, shape)


def layer_parameters(table: Family, sizes: ModelShape) -> dict[str, Parameter]:
    """The parameters of one layer with all its experts, by name below ``decoder.layers.N.``.

    Args:
        table: of the family.
        sizes: of the layer (:meth:`~nemo_minitron.shape.ModelShape.at`). A part of size 0 has no parameters, nor has
            the norm before it.
    """
    experts = range((sizes.num_moe_experts or 0) if table.expert else 0)
    rows = table.layer | {
        f"{EXPERTS}{expert}.{name}": dataclasses.replace(row, expert=expert)
        for expert in experts
        for name, row in table.expert.items()
    }
    there = {"attention": sizes.num_query_groups > 0, "mlp": sizes.ffn_hidden_size > 0}
    return rows if all(there.values()) else {name: row for name, row in rows.items() if there[row.part or "mlp"]}


def parameter(table: Family, name: str) -> Parameter:
    """The table's row of a canonical name.

    Raises:
        KeyError: for a name that the family does not have.
    """
    layer, expert, below = name_parts(name)
    if layer is None:
        return table.first[name] if name in table.first else table.last[name]
    if expert is None:
        return table.layer[below]
    return dataclasses.replace(table.expert[below], expert=expert)


def entry(table: Family, shape: ModelShape, name: str) -> Entry:
    """One parameter of a model, by its canonical name.

    Raises:
        KeyError: for a name that the family does not have.
    """
    layer = name_parts(name).layer
    return Entry(name, parameter(table, name), layer, shape.at(layer))


def axis_size(axis: Axis, sizes: ModelShape) -> int:
    """Global length of a dimension that lies on ``axis``, by the sizes of its layer."""
    match axis:
        case Axis.HIDDEN:
            return sizes.hidden_size
        case Axis.FFN:
            return sizes.ffn_hidden_size
        case Axis.GATED_FFN:
            return 2 * sizes.ffn_hidden_size
        case Axis.HEADS:
            return sizes.num_attention_heads * sizes.head_dim
        case Axis.QKV:
            return (sizes.num_attention_heads + 2 * sizes.num_query_groups) * sizes.head_dim
        case Axis.VOCAB:
            return sizes.vocab_size
        case Axis.HEAD_DIM:
            return sizes.head_dim
        case Axis.EXPERTS:
            return sizes.num_moe_experts or 0


def tensor_shape(row: Parameter, sizes: ModelShape) -> tuple[int, ...]:
    """Global shape of a parameter, by the sizes of its layer."""
    return tuple(axis_size(axis, sizes) for axis in row.axes)


def layer_count(table: Family, sizes: ModelShape) -> int:
    """Exact number of parameters of one layer, by its sizes."""
    return sum(math.prod(tensor_shape(row, sizes)) for row in layer_parameters(table, sizes).values())


def parameter_count(table: Family, shape: ModelShape) -> int:
    """Exact number of parameters, tied embeddings counted once and vocabulary padding not at all."""
    return sum(item.count for item in parameters(table, shape))


def _blocks(starts: torch.Tensor, length: int) -> torch.Tensor:
    """``[n]`` block numbers -> ``[n * length]`` row numbers, block by block."""
    import torch

    return (starts[:, None] * length + torch.arange(length)).flatten()


def axis_rows(
    axis: Axis, shape: ModelShape, kept: KeptUnits, layer: int | None, expert: int | None = None
) -> torch.Tensor | None:
    """Rows of a global dimension that survive pruning, in their new order.

    Args:
        axis: what the dimension ranges over.
        shape: the unpruned model's.
        kept: the surviving units.
        layer: the layer's position among the *kept* layers; None for parameters outside the layers.
        expert: the expert's position among the *kept* experts of the layer; None for parameters outside experts.

    Returns:
        ``[rows kept]`` int64 indices, or None where pruning does not touch the axis.
    """
    import torch

    shape = shape.at(None if layer is None else kept.layers[layer])
    if axis is Axis.HEAD_DIM:
        return None
    if axis is Axis.VOCAB:
        return None if kept.vocab is None else torch.tensor(kept.vocab)
    if axis is Axis.HIDDEN:
        return torch.tensor(kept.hidden)
    assert layer is not None, f"{axis} exists only inside a layer"
    if axis is Axis.EXPERTS:
        assert kept.experts is not None, "the family has experts, the kept units have none"
        return torch.tensor(kept.experts[layer])
    if axis in (Axis.FFN, Axis.GATED_FFN):
        if expert is None:
            neurons = torch.tensor(kept.ffn[layer])
        else:
            assert kept.expert_ffn is not None, "the family has experts, the kept units have none"
            neurons = torch.tensor(kept.expert_ffn[layer][expert])
        return neurons if axis is Axis.FFN else torch.cat([neurons, neurons + shape.ffn_hidden_size])
    if axis is Axis.HEADS:
        return _blocks(torch.tensor(kept.heads[layer]).flatten(), shape.head_dim)
    q = shape.heads_per_group
    blocks = []
    for group, heads in zip(kept.groups[layer], kept.heads[layer], strict=True):
        keys = group * (q + 2) + q
        blocks += [*head_blocks(heads, q), keys, keys + 1]
    return _blocks(torch.tensor(blocks), shape.head_dim)


def shard_rows(axis: Axis, size: int, *, rank: int, world: int) -> torch.Tensor:
    """Rows of a global dimension that tensor-parallel rank ``rank`` of ``world`` holds, in its local order.

    Megatron cuts every axis into equal runs. Of a gated MLP a rank holds its run of gates and its run of up-projections
    (``megatron.core.transformer.mlp.apply_swiglu_sharded_factory``).

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


def axis_parts(axis: Axis, shape: ModelShape) -> tuple[int, ...]:
    """Global lengths of the parts of a dimension that other libraries store as separate tensors.

    Queries, keys and values; gates and up-projections; elsewhere the whole dimension.
    """
    if axis is Axis.QKV:
        groups = shape.num_query_groups * shape.head_dim
        return shape.num_attention_heads * shape.head_dim, groups, groups
    if axis is Axis.GATED_FFN:
        return shape.ffn_hidden_size, shape.ffn_hidden_size
    return (axis_size(axis, shape),)


def split_qkv(tensor: torch.Tensor, shape: ModelShape, *, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values out of a tensor whose dimension ``dim`` lies on :attr:`Axis.QKV`.

    Args:
        tensor: ``[..., (heads + 2 groups) * head_dim, ...]``, global or one tensor-parallel rank's.
        shape: of the model.
        dim: the dimension.

    Returns:
        ``[..., heads * head_dim, ...]``, and ``[..., groups * head_dim, ...]`` twice; views if there is one group, else
        copies.
    """
    dim, width = dim % tensor.ndim, shape.head_dim
    rows = [shape.heads_per_group * width, width, width]
    parts = tensor.unflatten(dim, (-1, sum(rows))).split(rows, dim=dim + 1)
    return tuple(part.flatten(dim, dim + 1) for part in parts)


def join_qkv(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """The inverse of :func:`split_qkv` for the first dimension of global tensors; a copy."""
    import torch

    grouped = [part.unflatten(0, (shape.num_query_groups, -1)) for part in (queries, keys, values)]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def split_gate(tensor: torch.Tensor, *, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Gates and up-projections, as views, of a global tensor whose dimension ``dim`` lies on :attr:`Axis.GATED_FFN`."""
    return tensor.chunk(2, dim)


def join_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`split_gate` for the first dimension; a copy."""
    import torch

    return torch.cat([gate, up])


def head_blocks(heads: Sequence[int], heads_per_group: int, *, keys_values: bool = False) -> list[int]:
    """Positions of query heads on :attr:`Axis.QKV`, in blocks of ``head_dim`` rows.

    Args:
        heads: global numbers.
        heads_per_group: query heads of a group.
        keys_values: add after each head the blocks of its group's key and value.
    """
    blocks = []
    for head in heads:
        group, within = divmod(head, heads_per_group)
        first = group * (heads_per_group + 2)
        blocks.append(first + within)
        if keys_values:
            blocks += [first + heads_per_group, first + heads_per_group + 1]
    return blocks
