"""Canonical names <-> Hugging Face names, one tensor at a time.

A canonical tensor is made of one or several HF tensors. :mod:`nemo_minitron.families` names them; how they are joined
follows from the axis of the tensor's rows (:mod:`nemo_minitron.axes`): QKV rows are three tensors, gated MLP rows two,
every other tensor is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.axes import (
    Axis,
    Entry,
    axis_parts,
    axis_size,
    join_gate,
    join_qkv,
    name_parts,
    split_gate,
    split_qkv,
)
from nemo_minitron.checkpoints.formats.huggingface.families import hf_family
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["fused_parts", "hf_names", "hf_parts", "hf_shapes", "merge", "split"]


def hf_names(family: str, name: str) -> tuple[str, ...]:
    """The HF tensors that a canonical tensor is made of, in the order in which :func:`merge` takes them."""
    known, (layer, expert, below) = hf_family(family), name_parts(name)
    if layer is None:
        return (known.outer[name],)
    parts = known.layer[below] if expert is None else [part.format(expert) for part in known.expert[below]]
    return tuple(f"model.layers.{layer}.{part}" for part in parts)


def hf_shapes(axes: Sequence[Axis], shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the HF tensors behind a canonical tensor with these axes, in the order of :func:`hf_names`.

    Here and below ``shape`` has the sizes of the tensor's layer (:meth:`~nemo_minitron.shape.ModelShape.at`).
    """
    rest = tuple(axis_size(axis, shape) for axis in axes[1:])
    return [(rows, *rest) for rows in axis_parts(axes[0], shape)]


def hf_parts(family: str, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the HF tensors that a canonical tensor is made of, in the order of :func:`hf_names`."""
    return dict(zip(hf_names(family, entry.name), hf_shapes(entry.row.axes, entry.sizes), strict=True))


def fused_parts(family: str, entry: Entry) -> dict[str, tuple[int, ...]]:
    """:func:`hf_parts` in files where all experts of a layer are one tensor, whose first dimension is the expert."""
    known, (layer, expert, below) = hf_family(family), name_parts(entry.name)
    if layer is None or below not in known.fused:
        return hf_parts(family, entry)
    count = () if expert is None else (entry.sizes.num_moe_experts or 0,)
    return {f"model.layers.{layer}.{known.fused[below]}": (*count, *entry.shape)}


def merge(axes: Sequence[Axis], parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """HF tensors -> the canonical tensor.

    For QKV: query ``[heads * head_dim, h]``, key and value ``[groups * head_dim, h]`` ->
    ``[groups * (heads_per_group + 2) * head_dim, h]``, each group being its query heads, its key, its value
    (the row order of ``megatron.core.transformer.attention.SelfAttention.linear_qkv``).
    Holds the parts and the result at once; a tensor of one part is returned as it is.
    """
    if axes[0] is Axis.QKV:
        queries, keys, values = parts
        return join_qkv(queries, keys, values, shape)
    if axes[0] is Axis.GATED_FFN:
        gate, up = parts
        return join_gate(gate, up)
    return parts[0]


def split(axes: Sequence[Axis], tensor: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    """The canonical tensor -> HF tensors, contiguous: the inverse of :func:`merge`."""
    if axes[0] is Axis.QKV:
        parts = split_qkv(tensor, shape)
    else:
        parts = split_gate(tensor) if axes[0] is Axis.GATED_FFN else (tensor,)
    return [part.contiguous() for part in parts]
