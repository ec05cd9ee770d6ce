"""``DepthPrune`` and ``WidthPrune``: NeMo model transforms that prune a live Megatron model in place.

A transform is a callable ``Module -> Module``, as NeMo 2 takes for ``model_transform``. It finds the ``GPTModel``
chunks in what it is given (NeMo's ``MegatronParallel``, ``Float16Module``, ``ModuleList``) and prunes this rank's part.
The kept units are those that drive :func:`~nemo_minitron.pruning.prune_weights` too, with bit-equal weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints.live import canonical_parameters
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning.kept import load_kept
from nemo_minitron.pruning.live import apply_sizes, current_groups, gpt_chunks, live_shape
from nemo_minitron.runtime.groups import Groups, ParallelLayout
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["DepthPrune", "WidthPrune"]


class DepthPrune:
    """Remove the layers that are not kept, and number the others anew.

    Every pipeline stage must be left with equally many layers, as Megatron lays them out.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them; only ``kept.layers`` is used.
        groups: of this process; None takes Megatron's current ones when the transform is called.

    Raises:
        ShapeError: when called, if the layers are not there, or the stages would become uneven.
        CheckpointError: if the file cannot be read.
    """

    def __init__(self, kept: KeptUnits | str | Path, *, groups: Groups | None = None) -> None:
        self.kept, self.shape = _read(kept)
        self.groups = groups

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prune ``module`` in place, and return it."""
        groups = self.groups or current_groups()
        chunks = gpt_chunks(module)
        shape, layers = live_shape(chunks[0]), self.kept.layers
        if self.shape is not None and self.shape.num_layers != shape.num_layers:
            raise ShapeError(
                f"the kept layers are of a model of {self.shape.num_layers} layers, this one has {shape.num_layers}; "
                "prune the model that they were chosen for"
            )
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= shape.num_layers:
            raise ShapeError(
                f"kept layers {list(layers)}: must be ascending numbers within 0..{shape.num_layers - 1} of the model"
            )
        if faults := _stage_faults(chunks[0], layers, groups.layout):
            raise ShapeError(faults)
        number = {layer + 1: position + 1 for position, layer in enumerate(layers)}
        for chunk in chunks:
            stay = [layer for layer in chunk.decoder.layers if layer.layer_number in number]
            for layer in stay:
                new = number[layer.layer_number]
                for part in layer.modules():
                    if hasattr(part, "layer_number"):
                        part.layer_number = new
            chunk.decoder.layers = nn.ModuleList(stay)
        apply_sizes(module, chunks, shape.replace(num_layers=len(layers)), tensor=groups.layout.tensor)
        return module


class WidthPrune:
    """Remove the neurons, heads, query groups and hidden channels that are not kept.

    Each rank keeps an equal share of what stays. Where that takes rows from other tensor-parallel ranks, one parameter
    at a time is gathered over the group: memory beyond the model is the largest parameter, whole, and its pruned copy.

    The model's layers must be the kept layers: with ``kept.layers`` a part of them, apply :class:`DepthPrune` first.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them.
        groups: of this process; None takes Megatron's current ones when the transform is called.
        family: key of the model's axes table.

    Raises:
        ShapeError: when called, if the units do not fit the model, or the target does not fit the layout.
        CheckpointError: if the file cannot be read.
    """

    def __init__(self, kept: KeptUnits | str | Path, *, groups: Groups | None = None, family: str = "llama") -> None:
        self.kept, self.shape = _read(kept)
        self.groups = groups
        self.family = axes.family(family)

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prune ``module`` in place, and return it."""
        groups = self.groups or current_groups()
        chunks = gpt_chunks(module)
        shape = live_shape(chunks[0])
        target = self._target(shape, groups.layout)
        rows = {name: (row, layer) for name, row, layer in axes.parameters(self.family, shape)}
        for chunk in chunks:
            for name, parameter, owners in _owned_parameters(chunk):
                # The last stage's copy of a tied embedding comes under the output layer's name.
                tied = shape.tied_embeddings and name == self.family.output
                key = next(iter(self.family.first)) if tied else name
                if key not in rows:
                    raise ShapeError(f"{name}: is not in the axes table of the family {self.family.name}; add it there")
                pruned = _like(parameter, self._slice(parameter.detach(), *rows[key], shape, groups))
                for owner, leaf in owners:
                    setattr(owner, leaf, pruned)
        apply_sizes(module, chunks, target, tensor=groups.layout.tensor)
        return module

    def _target(self, shape: ModelShape, layout: ParallelLayout) -> ModelShape:
        """What ``shape`` becomes.

        Raises:
            ShapeError: with every fault.
        """
        if self.shape is not None:
            made_for, here = self.shape.to_dict(), shape.to_dict()
            sizes = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
            if faults := [
                f"{name}: the units are of a model of {made_for[name]}, this one has {here[name]}; prune the model "
                "that they were chosen for"
                for name in sizes
                if made_for[name] != here[name]
            ]:
                raise ShapeError(faults)
        if len(self.kept.layers) != shape.num_layers:
            raise ShapeError(
                f"the units are of {len(self.kept.layers)} kept layers, the model has {shape.num_layers}; "
                "apply DepthPrune with the same units first"
            )
        unpruned = shape.replace(num_layers=max(shape.num_layers, self.kept.layers[-1] + 1))
        if faults := self.kept.faults(unpruned):
            raise ShapeError(faults)
        target = self.kept.target(unpruned)
        if faults := target.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline):
            raise ShapeError(faults)
        return target

    def _slice(
        self, local: torch.Tensor, row: axes.Parameter, layer: int | None, shape: ModelShape, groups: Groups
    ) -> torch.Tensor:
        """This rank's shard of a parameter -> its shard of the pruned parameter."""
        # The dimension that is cut comes last, so that less is sent.
        for dim in sorted(range(len(row.axes)), key=lambda dim: dim == row.tensor_parallel_dim):
            axis = row.axes[dim]
            keep = axes.axis_rows(axis, shape, self.kept, layer)
            if keep is None:
                continue
            keep = keep.to(local.device)
            if dim == row.tensor_parallel_dim and groups.layout.tensor > 1:
                local = _share_out(local, axis, dim, keep, axes.axis_size(axis, shape), groups.tp)
            else:
                local = local.index_select(dim, keep)
        return local


def _share_out(
    local: torch.Tensor, axis: axes.Axis, dim: int, keep: torch.Tensor, size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Equal shares of the kept rows of a dimension that tensor parallelism cuts.

    Args:
        local: this rank's shard of the unpruned parameter.
        axis, dim: what is cut, and where.
        keep: ``[n]`` global rows that stay, in their new order.
        size: global length of the unpruned dimension.
        group: tensor-parallel.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)

    def held(length: int, of: int) -> torch.Tensor:
        return axes.shard_rows(axis, length, rank=of, world=world).to(keep.device)

    wanted = [keep[held(len(keep), other)] for other in range(world)]
    # Every rank works this out for all ranks, so that all take the same way.
    if all(bool(torch.isin(wanted[other], held(size, other)).all()) for other in range(world)):
        source, order = local, held(size, rank)
    else:
        parts = [torch.empty_like(local) for _ in range(world)]
        dist.all_gather(parts, local.contiguous(), group=group)
        source, order = torch.cat(parts, dim), torch.cat([held(size, other) for other in range(world)])
    place = torch.empty(size, dtype=torch.int64, device=keep.device)
    place[order] = torch.arange(len(order), device=keep.device)
    return source.index_select(dim, place[wanted[rank]])


def _like(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """A parameter with new content and the attributes that Megatron put on the old one."""
    new = nn.Parameter(data.contiguous(), requires_grad=parameter.requires_grad)
    # tensor_model_parallel, partition_dim, partition_stride, allreduce, shared, shared_embedding, ...
    vars(new).update(vars(parameter))
    return new


def _owned_parameters(chunk: GPTModel) -> Iterator[tuple[str, nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter of a chunk: canonical name, the parameter, and all modules that hold it with the name there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in chunk.modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((part, leaf))
    for name, parameter in list(canonical_parameters(chunk)):
        yield name, parameter, owners[id(parameter)]


def _stage_faults(chunk: GPTModel, layers: tuple[int, ...], layout: ParallelLayout) -> list[str]:
    """Why Megatron could not lay the kept layers over the pipeline stages that hold them."""
    config = chunk.config
    stages = layout.pipeline * (layout.virtual_pipeline or 1)
    if stages == 1 or len(layers) == config.num_layers:
        return []
    uneven = [
        name
        for name in (
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
        )
        if getattr(config, name, None)
    ]
    if uneven or config.num_layers % stages:
        what = uneven[0] if uneven else f"{config.num_layers} layers over {stages} stages"
        return [f"depth pruning under uneven pipeline stages ({what}) is not supported; use equal ones"]
    run = config.num_layers // stages
    left = [sum(layer // run == stage for layer in layers) for stage in range(stages)]
    if len(set(left)) == 1:
        return []
    return [
        f"the kept layers {list(layers)} leave the {stages} pipeline stages with {left} layers each, Megatron needs "
        "equally many; keep equally many layers of every stage, or prune the checkpoint (`minitron prune`) and load "
        "the result"
    ]


def _read(kept: KeptUnits | str | Path) -> tuple[KeptUnits, ModelShape | None]:
    """The units, and the shape they are units of where a file says it."""
    return load_kept(kept) if isinstance(kept, (str, os.PathLike)) else (kept, None)
