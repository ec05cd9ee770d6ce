"""A tiny random mixture of experts in Mixtral's form, in memory and live under any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.pruning import ARCHITECTURE, SHAPE, DictWeights, live

from nemo_minitron import axes
from nemo_minitron.checkpoints.base import Checkpoint

MIXTURE = SHAPE.replace(num_layers=2, ffn_hidden_size=20, num_moe_experts=4)
TOPK = 2


def random_mixture(*, seed: int = 0, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Checkpoint:
    """Two of four experts a token; ``change`` may edit the tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in axes.parameters(axes.FAMILIES["mixtral"], MIXTURE):
        tensor = torch.randn(entry.shape, generator=generator)
        tensors[entry.name] = 1 + 0.2 * tensor if tensor.ndim == 1 else 0.3 * tensor
    if change is not None:
        change(tensors)
    architecture = dataclasses.replace(ARCHITECTURE, family="mixtral", moe_router_topk=TOPK)
    return Checkpoint(MIXTURE, architecture, DictWeights(tensors), None, Path("random"), "memory")


def live_mixture(groups: Any, *, dtype: torch.dtype = torch.float64) -> list[Any]:
    """This rank's chunks of it, filled."""
    return live(random_mixture(), groups, dtype=dtype)
