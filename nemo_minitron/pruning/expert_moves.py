"""Remove experts from a live mixture, and move others between expert-parallel ranks: each then holds equally many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron.errors import ShapeError

__all__ = ["keep_experts"]


def keep_experts(layer: Any, experts: Sequence[int], group: dist.ProcessGroup) -> None:
    """Remove all but these experts from a layer's mixture, and number them anew.

    The router's rows and the sizes are not touched.

    Collective over ``group``. Rank r of n ends with the r-th n-th of the kept experts. An expert whose rank changes is
    sent there, tensor by tensor; memory beyond the model: the experts that a rank receives.

    Args:
        layer: a transformer layer whose MLP is Megatron's ``MoELayer``.
        experts: global numbers of the experts that stay, in their new order.
        group: expert-parallel.

    Raises:
        ShapeError: for experts that are not modules of their own, or cannot be shared out over the group.
    """
    held = getattr(layer.mlp.experts, "local_experts", None)
    if held is None:
        raise ShapeError(
            f"the experts are a {type(layer.mlp.experts).__name__}; live pruning needs moe_grouped_gemm=False, or "
            "prune the checkpoint (`minitron prune`)"
        )
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(experts) % world:
        raise ShapeError(
            f"{len(experts)} experts cannot be shared out over {world} expert-parallel ranks; keep a multiple of them"
        )
    each, share = len(held), len(experts) // world
    layer.mlp.local_expert_indices = list(range(rank * share, (rank + 1) * share))
    if world == 1:
        layer.mlp.experts.local_experts = nn.ModuleList([held[expert] for expert in experts])
        return
    stored = [[parameter.detach() for parameter in expert.parameters()] for expert in held]
    mine: list[list[torch.Tensor]] = []
    # All ranks go through the experts in one order, so each message meets its receiver.
    for position, expert in enumerate(experts):
        (source, place), target = divmod(expert, each), position // share
        if target == rank:
            mine.append(stored[place] if source == rank else _receive(stored[0], source, group))
        elif source == rank:
            for tensor in stored[place]:
                dist.send(tensor.contiguous(), dst=dist.get_global_rank(group, target), group=group)
    kept = nn.ModuleList(list(held)[:share])
    for module, tensors in zip(kept, mine, strict=True):
        for parameter, tensor in zip(module.parameters(), tensors, strict=True):
            parameter.data = tensor
    layer.mlp.experts.local_experts = kept


def _receive(like: list[torch.Tensor], source: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of an expert, all experts being of one size."""
    tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
    for tensor in tensors:
        dist.recv(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensors
