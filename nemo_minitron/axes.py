"""THE table: for every parameter, which axis each of its dimensions lies on and how tensor parallelism cuts it.

Counting, slicing, sharding, checking and conversion all read this table. A new model family is a new entry in
:data:`FAMILIES`, and one in the table of each checkpoint format that can hold it. What else depends on the inner order
of a QKV matrix or of a gated MLP (:attr:`Axis.QKV`, :attr:`Axis.GATED_FFN`): the parts in
``checkpoints/formats/huggingface/names.py``, the heads' blocks in ``pruning/merging.py``, the sums in
``importance/magnitude.py``, the states in ``distillation/losses/state_hooks.py``.

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from nemo_minitron.errors import ShapeError
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
    "Parameter",
    "axis_rows",
    "axis_size",
    "entry",
    "family",
    "layer_count",
    "layer_parameters",
    "parameter",
    "parameter_count",
    "parameters",
    "shard_rows",
    "tensor_shape",
]


EXPERTS = "mlp.experts.local_experts."
"""Before an expert's number in the names of its parameters: Megatron's module of experts computed one by one."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?(.+)")


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
        expert: which expert of its layer the parameter belongs to; set by :func:`parameters`, None outside experts.
        part: what of its layer it belongs to, the norm before it included; a layer without that part does not have it.
            None outside the layers.
    """

    axes: tuple[Axis, ...]
    tensor_parallel_dim: int | None = None
    expert: int | None = None
    part: Literal["attention", "mlp"] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of a model.

    Attributes:
        name: canonical.
        row: of the family's table.
        layer: that it lies in, or None.
        sizes: of that layer; outside the layers, of the model.
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
        """Its numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Family:
    """A model family as data: all that the algorithms need to know. None of them asks for a family's name.

    Attributes:
        name: key in :data:`FAMILIES`.
        layer: parameters of one decoder layer, by name below ``decoder.layers.N.``.
        first: parameters before the layers (first pipeline stage).
        last: parameters after the layers (last pipeline stage).
        expert: of a mixture of experts, parameters of one expert, by name below
            ``decoder.layers.N.mlp.experts.local_experts.E.``; empty where the MLP is dense.
        output: name of the output layer, absent where embeddings are tied.
        activation: of the MLP: "silu" or "squared_relu".
        normalization: Megatron's name: "RMSNorm" or "LayerNorm".
        zero_centered_norm: norm weights are stored minus one (``layernorm_zero_centered_gamma``, NeMo's "layernorm1p").
    """

    name: str
    layer: dict[str, Parameter]
    first: dict[str, Parameter]
    last: dict[str, Parameter]
    expert: dict[str, Parameter] = field(default_factory=dict)
    output: str = "output_layer.weight"
    activation: str = "silu"
    normalization: str = "RMSNorm"
    zero_centered_norm: bool = False

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up-projection."""
        return any(Axis.GATED_FFN in row.axes for row in (*self.layer.values(), *self.expert.values()))

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return "self_attention.linear_qkv.bias" in self.layer

    @property
    def qk_layernorm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return "self_attention.q_layernorm.weight" in self.layer


_NORM = Parameter((Axis.HIDDEN,))
_HEAD_NORM = Parameter((Axis.HEAD_DIM,))
_EMBEDDING = Parameter((Axis.VOCAB, Axis.HIDDEN), tensor_parallel_dim=0)
_FIRST = {"embedding.word_embeddings.weight": _EMBEDDING}
_LAST = {"decoder.final_layernorm.weight": _NORM, "output_layer.weight": _EMBEDDING}


def _part(part: Literal["attention", "mlp"], rows: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: dataclasses.replace(row, part=part) for name, row in rows.items()}


_ATTENTION = _part(
    "attention",
    {
        "self_attention.linear_qkv.layer_norm_weight": _NORM,
        "self_attention.linear_qkv.weight": Parameter((Axis.QKV, Axis.HIDDEN), tensor_parallel_dim=0),
        "self_attention.linear_proj.weight": Parameter((Axis.HIDDEN, Axis.HEADS), tensor_parallel_dim=1),
    },
)
_QKV_BIAS = _part("attention", {"self_attention.linear_qkv.bias": Parameter((Axis.QKV,), tensor_parallel_dim=0)})
_QK_NORM = _part(
    "attention",
    {"self_attention.q_layernorm.weight": _HEAD_NORM, "self_attention.k_layernorm.weight": _HEAD_NORM},
)
_GATED = Parameter((Axis.GATED_FFN, Axis.HIDDEN), tensor_parallel_dim=0)
_UP = Parameter((Axis.FFN, Axis.HIDDEN), tensor_parallel_dim=0)
_DOWN = Parameter((Axis.HIDDEN, Axis.FFN), tensor_parallel_dim=1)
_GATED_MLP = _part(
    "mlp",
    {
        "mlp.linear_fc1.layer_norm_weight": _NORM,
        "mlp.linear_fc1.weight": _GATED,
        "mlp.linear_fc2.weight": _DOWN,
    },
)

LLAMA = Family("llama", layer=_ATTENTION | _GATED_MLP, first=_FIRST, last=_LAST)
"""Llama, and Mistral without sliding windows."""

QWEN2 = Family(
    "qwen2",
    layer=_ATTENTION | _QKV_BIAS | _GATED_MLP,
    first=_FIRST,
    last=_LAST,
)
QWEN3 = Family(
    "qwen3",
    layer=_ATTENTION | _QK_NORM | _GATED_MLP,
    first=_FIRST,
    last=_LAST,
)
NEMOTRON = Family(
    "nemotron",
    layer=_ATTENTION
    | _part("attention", {"self_attention.linear_qkv.layer_norm_bias": _NORM})
    | _part(
        "mlp",
        {
            "mlp.linear_fc1.layer_norm_weight": _NORM,
            "mlp.linear_fc1.layer_norm_bias": _NORM,
            "mlp.linear_fc1.weight": _UP,
            "mlp.linear_fc2.weight": _DOWN,
        },
    ),
    first=_FIRST,
    last=_LAST | {"decoder.final_layernorm.bias": _NORM},
    activation="squared_relu",
    normalization="LayerNorm",
    zero_centered_norm=True,
)
MIXTRAL = Family(
    "mixtral",
    # the router reads the norm's output too, so Megatron does not fuse it into the experts' first linear
    layer=_ATTENTION
    | _part(
        "mlp",
        {"pre_mlp_layernorm.weight": _NORM, "mlp.router.weight": Parameter((Axis.EXPERTS, Axis.HIDDEN))},
    ),
    first=_FIRST,
    last=_LAST,
    expert=_part("mlp", {"linear_fc1.weight": _GATED, "linear_fc2.weight": _DOWN}),
)

FAMILIES: dict[str, Family] = {one.name: one for one in (LLAMA, QWEN2, QWEN3, NEMOTRON, MIXTRAL)}


def family(name: str) -> Family:
    """The table of a family.

    Raises:
        ShapeError: for a family that is not in :data:`FAMILIES`.
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
        sizes: of the layer (:meth:`~nemo_minitron.shape.ModelShape.at`). What it lacks, of size 0, has none, not even
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
    match = _LAYER.fullmatch(name)
    if match is None:
        return table.first[name] if name in table.first else table.last[name]
    if match[2] is None:
        return table.layer[match[3]]
    return dataclasses.replace(table.expert[match[3]], expert=int(match[2]))


def entry(table: Family, shape: ModelShape, name: str) -> Entry:
    """One parameter of a model, by its canonical name.

    Raises:
        KeyError: for a name that the family does not have.
    """
    match = _LAYER.fullmatch(name)
    layer = None if match is None else int(match[1])
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
    return sum(one.count for one in parameters(table, shape))


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
