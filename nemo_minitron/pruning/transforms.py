"""``DepthPrune`` and ``WidthPrune``: NeMo model transforms that prune a live Megatron model in place.

A transform is a callable ``Module -> Module``, as NeMo 2 takes for ``model_transform``. It finds the ``GPTModel``
chunks in what it is given (NeMo's ``MegatronParallel``, ``Float16Module``, ``ModuleList``) and prunes this rank's part.
The kept units are those that drive :func:`~nemo_minitron.pruning.prune_weights` too, with bit-equal weights.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning.expert_moves import keep_experts
from nemo_minitron.pruning.kept import LIVE_PRUNING, read_live_kept
from nemo_minitron.pruning.layer_moves import keep_layers, plan_layer_moves
from nemo_minitron.pruning.live import (
    apply_config,
    apply_layer_types,
    apply_pipeline_stages,
    apply_sizes,
    gpt_chunks,
    kept_types,
    like_parameter,
    live_family,
    live_shape,
    owned_parameters,
)
from nemo_minitron.pruning.row_moves import take_rows
from nemo_minitron.pruning.wrapping import without_ddp
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import Groups, ParallelLayout, current_groups
from nemo_minitron.shape import SIZES, ModelShape, padded_vocab, require_uniform

__all__ = ["DepthPrune", "WidthPrune"]


class DepthPrune:
    """Remove the layers that are not kept, and number the others anew.

    Any layers may be removed. The kept ones are distributed over the pipeline stages as by
    ``runtime.model.build_model``; a layer whose pipeline rank changes is sent there, one layer at a time. A rank never
    holds more than one layer above the larger of what it held before and what it ends with.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them; only ``kept.layers`` is used.
        groups: of this process; None takes Megatron's current ones when the transform is called.

    Raises:
        ShapeError: if the units leave layers of different sizes; when called, if the layers are not there, or are fewer
            than the pipeline stages.
        CheckpointError: if the file cannot be read.
    """

    def __init__(self, kept: KeptUnits | str | Path, *, groups: Groups | None = None) -> None:
        cpu.ensure()
        self.kept, self.shape = read_live_kept(kept)
        self.groups = groups

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prune ``module`` in place, and return it."""
        with without_ddp(module):
            self._prune(module, self.groups or current_groups())
        return module

    def _prune(self, module: nn.Module, groups: Groups) -> None:
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
        target = shape.replace(num_layers=len(layers))
        if faults := target.layout_faults(tensor=1, pipeline=groups.layout.pipeline_stages):
            raise ShapeError(faults)
        _check_agreement(self.kept, groups.pp)
        plan = plan_layer_moves(chunks, layers, shape, target, groups)
        types = kept_types(chunks[0].config, layers)
        apply_config(module, target)
        apply_layer_types(module, types)
        apply_pipeline_stages(module, target, groups.layout)
        keep_layers(chunks, plan, groups)
        apply_sizes(chunks, target, tensor=groups.layout.tensor)


class WidthPrune:
    """Remove the neurons, heads, query groups, hidden channels and vocabulary rows that are not kept.

    Each rank keeps an equal share of the kept units. Only rows that change their tensor-parallel rank are sent.
    Parameters go one by one: memory beyond the model is two copies of one parameter's shard (one cut in its first
    dimension, one in both) and two messages of :data:`~nemo_minitron.pruning.row_moves.MESSAGE_BYTES`.

    The model's layers must be the kept layers: if ``kept.layers`` are only some of them, apply :class:`DepthPrune`
    first.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them.
        groups: of this process; None takes Megatron's current ones when the transform is called.
        family: key of the model's axes table; None takes the one that has the model's parameters.

    Raises:
        ShapeError: if the units leave layers of different sizes; when called, if they do not fit the model, or the
            target does not fit the layout.
        CheckpointError: if the file cannot be read.
    """

    def __init__(
        self, kept: KeptUnits | str | Path, *, groups: Groups | None = None, family: str | None = None
    ) -> None:
        cpu.ensure()
        self.kept, self.shape = read_live_kept(kept)
        self.groups = groups
        self.family = None if family is None else axes.family(family)

    def __call__(self, module: nn.Module) -> nn.Module:
        """Prune ``module`` in place, and return it."""
        with without_ddp(module):
            self._prune(module, self.groups or current_groups())
        return module

    def _prune(self, module: nn.Module, groups: Groups) -> None:
        chunks = gpt_chunks(module)
        shape = live_shape(chunks[0])
        target = self._target(shape, groups.layout)
        for group in (groups.tp, groups.ep):
            _check_agreement(self.kept, group)
        table = self.family or live_family(chunks[0])
        rows = {entry.name: (entry.row, entry.layer) for entry in axes.parameters(table, shape)}
        for chunk in chunks:
            if self.kept.experts is not None:
                for part in chunk.decoder.layers:
                    keep_experts(part, self.kept.experts[part.layer_number - 1], groups.ep)
            for name, parameter, owners in owned_parameters(chunk):
                # The last stage's copy of a tied embedding comes under the output layer's name.
                tied = shape.tied_embeddings and name == table.output
                key = next(iter(table.first)) if tied else name
                if key not in rows:
                    raise ShapeError(f"{name}: is not in the axes table of the family {table.name}; add it there")
                pruned = like_parameter(parameter, self._slice(parameter.detach(), *rows[key], shape, target, groups))
                for owner, leaf in owners:
                    setattr(owner, leaf, pruned)
        apply_config(module, target)
        apply_sizes(chunks, target, tensor=groups.layout.tensor)

    def _target(self, shape: ModelShape, layout: ParallelLayout) -> ModelShape:
        """The pruned ``shape``; both have the padded vocabulary size.

        Raises:
            ShapeError: with every fault.
        """
        if self.shape is not None:
            here = shape.to_dict()
            if faults := [
                f"{name}: the units are of a model of {size}, this one has {here[name]}; prune the model "
                "that they were chosen for"
                for name, size in self.shape.to_dict().items()
                if name in (*SIZES, "head_dim") and name != "num_layers" and size != here[name]
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
        require_uniform(target, LIVE_PRUNING)
        if faults := target.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages, expert=layout.expert):
            raise ShapeError(faults)
        if self.kept.vocab is not None:
            return target.replace(vocab_size=padded_vocab(target.vocab_size, tensor=layout.tensor))
        return target

    def _slice(
        self,
        local: torch.Tensor,
        row: axes.Parameter,
        layer: int | None,
        shape: ModelShape,
        target: ModelShape,
        groups: Groups,
    ) -> torch.Tensor:
        """This rank's shard of a parameter -> its shard of the pruned parameter."""
        # The dimension that is cut comes last, so that less is sent.
        for dim in sorted(range(len(row.axes)), key=lambda dim: dim == row.tensor_parallel_dim):
            axis = row.axes[dim]
            keep = axes.axis_rows(axis, shape, self.kept, layer, row.expert)
            if keep is None:
                continue
            if axis is axes.Axis.VOCAB:  # rows of padding
                keep = nn.functional.pad(keep, (0, target.vocab_size - len(keep)), value=-1)
            keep = keep.to(local.device)
            if dim == row.tensor_parallel_dim:
                local = take_rows(local, axis, dim, keep, axes.axis_size(axis, shape), groups.tp)
            else:
                local = local.index_select(dim, keep)
        return local


def _check_agreement(kept: KeptUnits, group: dist.ProcessGroup) -> None:
    """Raises ShapeError on all ranks of the group if they were given different units: messages would not match."""
    mine = zlib.crc32(repr(dataclasses.astuple(kept)).encode())
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if len(set(everyone)) > 1:
        raise ShapeError("the ranks were given different kept units; give every rank the same kept.json")
