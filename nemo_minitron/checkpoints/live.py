"""Fill a live Megatron model from a checkpoint: each rank reads its own shard from ``Weights``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from nemo_minitron import axes
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.runtime.groups import Groups

__all__ = ["canonical_parameters", "load_into", "output_weight"]

_LOCAL_SPELLING = {
    # Megatron's local layer spec keeps the norms outside the linears that follow them
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
#: As every layer spec keeps it before a router, which no linear can be fused with.
_BEFORE_EXPERTS = ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias")


def canonical_parameters(chunk: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a chunk under canonical names: global numbers (of layers, of experts), Transformer Engine
    spelling.

    Works for any pipeline or virtual pipeline stage (``layer_number`` is global in Megatron) and for both layer specs.
    A parameter is named after the module that holds it. If embeddings are tied and the last stage is not the first, its
    copy of the embedding is named ``output_layer.weight``.
    """
    layers = {index: layer.layer_number - 1 for index, layer in enumerate(chunk.decoder.layers)}
    experts = {
        index: getattr(layer.mlp, "local_expert_indices", ()) for index, layer in enumerate(chunk.decoder.layers)
    }
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if chunk.config.num_moe_experts is None or rest not in _BEFORE_EXPERTS:
                rest = _LOCAL_SPELLING.get(rest, rest)
            if rest.startswith(axes.EXPERTS):
                local, below = rest.removeprefix(axes.EXPERTS).split(".", 1)
                rest = f"{axes.EXPERTS}{experts[int(index)][int(local)]}.{below}"
            yield f"decoder.layers.{layers[int(index)]}.{rest}", parameter
        else:
            yield name, parameter


def load_into(chunks: Sequence[GPTModel], checkpoint: Checkpoint, groups: Groups, *, skip: Sequence[str] = ()) -> None:
    """Fill this rank's chunks with its shard of ``checkpoint``, in the chunks' own dtype.

    Each tensor is read whole and cut by :func:`nemo_minitron.axes.shard_rows`, so a rank holds one global tensor beside
    its model. Padding rows of the vocabulary become zero. There is no communication: every rank reads by itself.

    Args:
        chunks: plain Megatron ``GPTModel``s of this rank (one, or one for each virtual pipeline stage).
        checkpoint: the checkpoint to load; its shape must be the model's.
        groups: of this process; the tensor-parallel group is used.
        skip: parameters whose names begin with one of these are left as they are (a head that the checkpoint lacks).

    Raises:
        CheckpointError: if the checkpoint lacks a parameter of the model, or has it in another shape.
    """
    table, shape = checkpoint.family, checkpoint.shape
    rows = {entry.name: entry.row for entry in axes.parameters(table, shape)}
    embedding = next(iter(table.first))
    rank, world = torch.distributed.get_rank(groups.tp), torch.distributed.get_world_size(groups.tp)
    for chunk in chunks:
        for name, parameter in canonical_parameters(chunk):
            if name.startswith(tuple(skip)):
                continue
            source = embedding if shape.tied_embeddings and name == table.output else name
            if source not in rows:
                raise CheckpointError(
                    f"the model has a parameter {name} that {checkpoint.path} ({shape.num_layers} layers, "
                    f"tied_embeddings={shape.tied_embeddings}) does not; build the model from the checkpoint's shape"
                )
            row = rows[source]
            tensor = checkpoint.weights.tensor(source)
            if (dim := row.tensor_parallel_dim) is not None:
                tensor = _shard(tensor, row.axes[dim], dim, rank=rank, world=world, local=parameter.shape[dim])
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: the shard of {source} has shape {list(tensor.shape)} where the model on this "
                    f"rank has {list(parameter.shape)}; build the model from the checkpoint's shape"
                )
            with torch.no_grad():
                parameter.copy_(tensor)


def output_weight(checkpoint: Checkpoint, groups: Groups, *, vocab_size: int | None = None) -> torch.Tensor:
    """This tensor-parallel rank's rows of the output layer (of tied embeddings, of the embedding), with padding rows.

    Args:
        checkpoint: of the model.
        groups: of this process; the tensor-parallel group is used.
        vocab_size: rows of a model by whose partition the layer is cut; None for its own. Rows that the layer lacks
            are zero, rows above are dropped.

    Returns:
        ``[V/tp, H]`` in the stored dtype, the vocabulary padded as in
        :func:`nemo_minitron.runtime.model.build_model`.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    from nemo_minitron.shape import padded_vocab

    table, shape = checkpoint.family, checkpoint.shape
    rank, world = torch.distributed.get_rank(groups.tp), torch.distributed.get_world_size(groups.tp)
    name = next(iter(table.first)) if shape.tied_embeddings else table.output
    rows = shape.vocab_size if vocab_size is None else vocab_size
    local = padded_vocab(rows, tensor=world) // world
    return _shard(checkpoint.weights.tensor(name)[:rows], axes.Axis.VOCAB, 0, rank=rank, world=world, local=local)


def _shard(tensor: torch.Tensor, axis: axes.Axis, dim: int, *, rank: int, world: int, local: int) -> torch.Tensor:
    """This rank's part of ``tensor`` along ``dim``; a vocabulary is cut as if it were padded to ``local * world``."""
    size = tensor.shape[dim]
    if axis is not axes.Axis.VOCAB:
        return tensor if world == 1 else tensor.index_select(dim, axes.shard_rows(axis, size, rank=rank, world=world))
    if local * world < size:
        raise CheckpointError(
            f"the model has {local * world} vocabulary rows where the checkpoint has {size}; "
            f"build the model from the checkpoint's shape"
        )
    first = min(rank * local, size)
    part = tensor[first : min(first + local, size)]
    padding = part.new_zeros((local - part.shape[0], *part.shape[1:]))
    return torch.cat([part, padding]) if padding.shape[0] else part
