"""Move layers between pipeline ranks, so that each rank holds those that Megatron would give it in the pruned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron.errors import ShapeError
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["LayerMoves", "Move", "keep_layers", "order_moves", "plan_layer_moves"]


@dataclass(frozen=True)
class TensorOfLayer:
    """Description of a tensor for the rank that receives it. ``marks``: attributes that Megatron's layers set on it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    marks: dict[str, Any]


_Content = list[TensorOfLayer]


@dataclass(frozen=True)
class Move:
    """A layer (its number in the pruned model, from 0) goes from one pipeline rank to another."""

    layer: int
    source: int
    target: int


@dataclass(frozen=True)
class LayerMoves:
    """Where the kept layers are and where they go, the same on every pipeline rank.

    Attributes:
        layers: kept layers, by their numbers in the unpruned model.
        chunks: per kept layer, the (virtual) stage that will hold it.
        moves: layers that change their pipeline rank, in the order of the moves.
        contents: per kept layer, its tensors on this rank's tensor-parallel shard.
    """

    layers: tuple[int, ...]
    chunks: tuple[int, ...]
    moves: list[Move]
    contents: list[_Content]


def order_moves(holders: Sequence[int], owners: Sequence[int], before: Sequence[int]) -> list[Move]:
    """Order the moves so that no rank ever holds more than one layer above its limit.

    A rank's limit is the larger of its numbers of layers before and after. A layer moves to a rank that is below its
    limit. If all are at their limits, in a ring, one rank takes a layer too many and gives one away in the next move.

    Args:
        holders, owners: per kept layer, the pipeline rank that has it now and the rank that will have it.
        before: per rank, the layers it held before the pruning.
    """
    held = [list(holders).count(rank) for rank in range(len(before))]
    room = [max(count, list(owners).count(rank)) for rank, count in enumerate(before)]
    pending = [Move(layer, *pair) for layer, pair in enumerate(zip(holders, owners, strict=True)) if pair[0] != pair[1]]
    ordered = []
    while pending:
        move = min(
            pending, key=lambda move: (held[move.source] <= room[move.source], held[move.target] >= room[move.target])
        )
        pending.remove(move)
        ordered.append(move)
        held[move.source] -= 1
        held[move.target] += 1
    return ordered


def plan_layer_moves(
    chunks: Sequence[GPTModel], layers: tuple[int, ...], shape: ModelShape, target: ModelShape, groups: Groups
) -> LayerMoves:
    """Find the layers that must change their rank. Collective over the pipeline group; changes nothing.

    Args:
        chunks: of this rank.
        layers: kept layers, by their numbers in the unpruned model.
        shape, target: of the unpruned and of the pruned model.
        groups: of this process.

    Raises:
        ShapeError: on every rank, if chunks of the model are missing, or layers must move and their parameters differ.
    """
    layout = groups.layout
    mine = {
        layer.layer_number - 1: (number, _content(layer))
        for number, chunk in enumerate(chunks)
        for layer in chunk.decoder.layers
    }
    everyone: list[dict[int, tuple[int, _Content]]] = [{} for _ in range(layout.pipeline)]
    dist.all_gather_object(everyone, mine, group=groups.pp)
    holders = {layer: rank for rank, held in enumerate(everyone) for layer in held}
    if sorted(holders) != list(range(shape.num_layers)) or len(chunks) != (layout.virtual_pipeline or 1):
        raise ShapeError(
            f"the pipeline ranks hold the layers {sorted(holders)} of a model of {shape.num_layers}, in {len(chunks)} "
            "model chunks on this rank; give the transform all chunks of the model, on every rank"
        )
    sizes = target.pipeline_stage_sizes(layout.pipeline_stages)
    pipeline_stages = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    moves = order_moves(
        [holders[layer] for layer in layers],
        [stage % layout.pipeline for stage in pipeline_stages],
        [len(held) for held in everyone],
    )
    contents = [everyone[holders[layer]][layer][1] for layer in layers]
    if moves and any(content != contents[0] for content in contents):
        raise ShapeError(
            "layers must move to other pipeline stages, but the model's layers differ in their parameters; prune the "
            "checkpoint (`minitron prune`) and load the result"
        )
    return LayerMoves(layers, tuple(stage // layout.pipeline for stage in pipeline_stages), moves, contents)


def keep_layers(chunks: Sequence[GPTModel], plan: LayerMoves, groups: Groups) -> None:
    """Remove the other layers, move layers between ranks, and number all anew. Collective over the pipeline group.

    The configuration of the chunks must be that of the pruned model already: new layers are built from it.

    Layers go point to point, one at a time, tensor by tensor, straight into the parameters of the receiver. A rank
    holds at most one layer above the larger of what it held before and what it ends with.

    Args:
        chunks: of this rank; their layers change.
        plan: from :func:`plan_layer_moves`.
        groups: of this process.
    """
    rank = groups.pp_rank
    new = {layer: position for position, layer in enumerate(plan.layers)}
    held = {
        new[number]: layer
        for chunk in chunks
        for layer in chunk.decoder.layers
        if (number := layer.layer_number - 1) in new
    }
    device = next(chunks[0].parameters()).device
    specs = [chunk.decoder.submodules.layer_specs[0] for chunk in chunks]
    for chunk in chunks:
        chunk.decoder.layers = nn.ModuleList()
    with torch.no_grad():
        for move in plan.moves:
            if move.source == rank:
                _send(held.pop(move.layer), dist.get_global_rank(groups.pp, move.target), groups.pp)
            elif move.target == rank:
                number = plan.chunks[move.layer]
                layer = _empty_layer(chunks[number], specs[number], plan.contents[move.layer], device)
                _receive(layer, dist.get_global_rank(groups.pp, move.source), groups.pp)
                held[move.layer] = layer
    for number, chunk in enumerate(chunks):
        stay = [position for position in sorted(held) if plan.chunks[position] == number]
        for position in stay:
            for part in held[position].modules():
                if hasattr(part, "layer_number"):
                    part.layer_number = position + 1
        chunk.decoder.layers = nn.ModuleList(held[position] for position in stay)
        chunk.decoder.submodules.layer_specs = [specs[number]] * len(stay)


def _tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _content(layer: nn.Module) -> _Content:
    # tensor_model_parallel, partition_dim, allreduce, sequence_parallel, ...: layers that are not initialised lack some
    return [
        TensorOfLayer(
            name,
            tuple(tensor.shape),
            tensor.dtype,
            tensor.requires_grad,
            {mark: value for mark, value in vars(tensor).items() if isinstance(value, bool | int | float | str)},
        )
        for name, tensor in _tensors(layer)
    ]


def _send(layer: nn.Module, to: int, group: dist.ProcessGroup) -> None:
    for _, tensor in _tensors(layer):
        dist.send(tensor.detach().contiguous(), dst=to, group=group)


def _receive(layer: nn.Module, source: int, group: dist.ProcessGroup) -> None:
    for _, tensor in _tensors(layer):
        dist.recv(tensor.detach(), src=source, group=group)


def _empty_layer(chunk: GPTModel, spec: Any, content: _Content, device: torch.device) -> nn.Module:
    """A layer of the chunk's configuration, for the tensors in ``content``; as ``TransformerBlock`` builds its own."""
    from megatron.core.transformer.spec_utils import build_module

    decoder, config = chunk.decoder, chunk.decoder.config
    drawn, config.perform_initialization = config.perform_initialization, False
    try:
        layer: nn.Module = build_module(spec, config=config, layer_number=1, **versions.block_arguments(decoder))
    finally:
        config.perform_initialization = drawn
    for (_, tensor), sent in zip(_tensors(layer), content, strict=True):
        if tuple(tensor.shape) != sent.shape:
            raise ShapeError(f"{sent.name} is {list(sent.shape)}, in a layer of this model {list(tensor.shape)}")
        tensor.data = tensor.data.to(device, sent.dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(sent.trained)
        vars(tensor).update(sent.marks)
    return layer.train(decoder.training)
